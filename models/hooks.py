"""Routing installed on one model instance, through PyTorch's forward hooks."""

from __future__ import annotations

import inspect
import sys
import threading
import weakref
from functools import partial

import torch
from torch import Tensor, nn

from ..ops import FLOATING
from ..policy import Policy
from ..routing import CachedPrompt, Prompt, RoutedForward, Trace
from .adapter import Adapter
from .devices import loaded, to_layer
from .masks import IMPLEMENTATIONS, causal_mask
from .parallel import check_heads, head_group, over_all_heads

# The attribute of a cache object that holds its CachedPrompt: it lives, is copied and dies with the cache.
_CACHE_ATTRIBUTE = "_reroute_kernels_prompt"

_routed_models: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class _Prefill:
    """A routed prompt on its way through the layers."""

    def __init__(self, forward: RoutedForward):
        self.forward = forward
        self.last_position: Tensor | None = None
        self.cache = None
        self.finished = False
        self.layer_features: list[Tensor] = []  # (B, L, d), added after the first layers
        self.masks: dict[int, Tensor | None] = {}


class _Continuation:
    """New tokens on top of a cache that a routed prompt filled."""

    def __init__(
        self,
        prompt: CachedPrompt,
        batch: int,
        queries: int,
        new_tokens: int,
        added: Tensor | None,
        has_positions: bool,
    ):
        self.prompt = prompt
        self.batch = batch
        self.queries = queries
        self.new_tokens = new_tokens  # after the prompt, those of this call included
        self.added = added  # (B, new tokens), False at padding; None where there is none
        self.has_positions = has_positions  # given by the caller
        self.masks: dict[int, Tensor | None] = {}


class Routing:
    """A policy at work on one model; made by `apply`, and usable as a context manager.

    Attributes:
        policy: the policy.
        trace: what the latest routed prefill did, or None before the first one.
    """

    def __init__(self, adapter: Adapter, policy: Policy):
        self.policy = policy
        self.trace: Trace | None = None
        self._adapter = adapter
        self._config = adapter.decoder.config
        self._head_group = head_group(adapter.model)
        self._local = threading.local()  # one forward per thread; `call` is what it is
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._check_model()
        self._install()

    # Set-up and removal

    def _check_model(self) -> None:
        adapter, policy = self._adapter, self.policy
        model, config = adapter.model, self._config
        if model in _routed_models:
            raise ValueError(
                f"model must not be routed already, got a {type(model).__name__} that is: remove() it first"
            )
        if config.model_type not in adapter.text_model_types:
            raise NotImplementedError(
                f"model must have a text model of type {', '.join(adapter.text_model_types)}, got {config.model_type!r}"
            )
        layers, first = len(adapter.layers), policy.schedule[0].layer
        if policy.schedule[-1].layer >= layers:
            raise ValueError(
                f"schedule must stay below layer {layers} of this {type(model).__name__}, "
                f"got layer {policy.schedule[-1].layer}"
            )
        if policy.positions != "original":
            raise NotImplementedError(f"positions must be 'original' on transformers models, got {policy.positions!r}")
        layer_types = getattr(config, "layer_types", None)
        if layer_types is None:
            sliding = getattr(config, "sliding_window", None) is not None
            layer_types = ["sliding_attention" if sliding else "full_attention"] * layers
        for number in range(first, layers):
            if layer_types[number] != "full_attention":
                raise NotImplementedError(
                    f"layers from the first decision on must have full attention, got {layer_types[number]!r} "
                    f"at layer {number} of this {type(model).__name__}"
                )
        dtype = getattr(model, "dtype", None)
        if dtype not in FLOATING:
            raise NotImplementedError(f"model must be of dtype {', '.join(map(str, FLOATING))}, got {dtype}")
        self._check_attention()

    def _check_attention(self) -> None:
        if self._config._attn_implementation not in IMPLEMENTATIONS:
            raise NotImplementedError(
                f"attn_implementation must be one of {', '.join(map(repr, IMPLEMENTATIONS))}, "
                f"got {self._config._attn_implementation!r}"
            )

    def _install(self) -> None:
        adapter, schedule = self._adapter, self.policy.schedule
        self._core_signature = inspect.signature(adapter.core.forward)
        self._decoder_signature = inspect.signature(adapter.decoder.forward)
        add = self._handles.append
        add(adapter.core.register_forward_pre_hook(self._begin, with_kwargs=True))
        add(adapter.core.register_forward_hook(self._end, always_call=True))
        add(adapter.decoder.register_forward_pre_hook(self._enter_decoder, with_kwargs=True))
        for stage, (here, after) in enumerate(zip(schedule, (*schedule[1:], None), strict=True)):
            for number in range(here.layer, after.layer if after else len(adapter.layers)):
                hook = partial(self._enter_layer, stage, number == here.layer)
                add(adapter.layers[number].register_forward_pre_hook(hook, with_kwargs=True))
        # What the model adds before the first decision, it adds itself.
        self._routes_features = adapter.feature_layers > schedule[0].layer
        for number in range(adapter.feature_layers if self._routes_features else 0):
            add(adapter.layers[number].register_forward_hook(partial(self._add_layer_features, number)))
        add(adapter.layers[-1].register_forward_hook(self._leave_last_layer))
        _routed_models.add(adapter.model)
        _forget_compiled_code()

    def remove(self) -> None:
        """Take every hook off the model, which then is what it was. Calling it again does nothing."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            _routed_models.discard(self._adapter.model)
            _forget_compiled_code()
        self._handles.clear()

    def __enter__(self) -> Routing:
        return self

    def __exit__(self, *exception) -> None:
        self.remove()

    def __deepcopy__(self, memo):
        raise TypeError("a routed model cannot be copied: remove() the routing first")

    def __reduce__(self):
        raise TypeError("a routed model cannot be pickled: remove() the routing first")

    # One call of the model

    def _begin(self, core: nn.Module, args: tuple, kwargs: dict) -> None:
        """Find out what this call is: a routed prompt, new tokens on a routed cache, or nothing to route."""
        self._local.call = None
        self._local.awaits_decoder = False
        arguments = _arguments(self._core_signature, args, kwargs)
        cache = arguments.get("past_key_values")
        tokens = arguments.get("input_ids")
        if tokens is None:
            tokens = arguments.get("inputs_embeds")
        if tokens is None:
            return  # the model says what is missing
        if cache is not None and _cached_tokens(cache) > 0:
            self._local.call = self._continue(cache, tokens, arguments)
        else:
            if cache is not None and hasattr(cache, _CACHE_ATTRIBUTE):
                delattr(cache, _CACHE_ATTRIBUTE)  # the cache was reset since
                lengths = {cache.get_seq_length(layer) for layer in range(len(self._adapter.layers))}
                if lengths != {0}:
                    raise ValueError(
                        "past_key_values must hold the whole routed prompt or nothing, got layers of "
                        f"{sorted(lengths)} cached tokens"
                    )
            self._local.call = self._start(cache, arguments)
        self._local.awaits_decoder = True

    def _end(self, core: nn.Module, args: tuple, output) -> None:
        call, self._local.call = getattr(self._local, "call", None), None
        self._local.awaits_decoder = False
        if output is not None and isinstance(call, _Prefill) and not call.finished:
            raise RuntimeError(
                f"a routed prompt must run through all {len(self._adapter.layers)} decoder layers, and it did not: "
                "does the configuration name fewer (num_hidden_layers)?"
            )

    def _start(self, cache, arguments: dict) -> _Prefill | None:
        visual = self._visual_tokens(arguments)
        mask = arguments.get("attention_mask")
        is_padding_mask = isinstance(mask, Tensor) and mask.shape == visual.shape
        valid = mask.to(visual.device, torch.bool) if is_padding_mask else None
        prompt = Prompt(visual, valid, self._packing_positions(cache, arguments))
        if not prompt.has_visual_tokens:
            return None
        self._check_attention()
        self._check_cache(cache)
        if mask is not None and not is_padding_mask:
            got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise NotImplementedError(
                f"attention_mask must be None or of shape {tuple(visual.shape)} for a routed prompt, got {got}"
            )
        if prompt.has_gaps:
            raise NotImplementedError(
                "position_ids of a routed prompt without cache and mask must count by one: transformers takes others "
                "for several packed sequences"
            )
        for name in ("output_hidden_states", "output_attentions"):
            if arguments.get(name, getattr(self._config, name, False)):
                raise NotImplementedError(f"{name} must be off for a routed prompt, got {arguments.get(name, True)}")
        layer = self._adapter.layers[self.policy.schedule[0].layer]
        if layer.training and getattr(layer, "gradient_checkpointing", False):
            raise NotImplementedError("gradient checkpointing must be off for a routed prompt, got it on")
        combine = None if self._head_group is None else partial(over_all_heads, self._head_group)
        return _Prefill(RoutedForward(self.policy, prompt, combine))

    def _packing_positions(self, cache, arguments: dict) -> Tensor | None:
        """The positions, (B or 1, L), of a call in which transformers would look for packed sequences in them."""
        positions = arguments.get("position_ids")
        uses_cache = cache is not None or arguments.get("use_cache", getattr(self._config, "use_cache", False))
        if positions is None or uses_cache or arguments.get("attention_mask") is not None:
            return None
        if positions.ndim == 3:
            return positions[0] if positions.shape[0] == 4 else None
        return positions

    def _check_cache(self, cache) -> None:
        if cache is None:
            return
        from transformers import DynamicCache

        if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
            kind = type(cache).__name__ + (" with offloading" if getattr(cache, "offloading", False) else "")
            raise NotImplementedError(f"past_key_values must be a DynamicCache without offloading, got {kind}")

    def _visual_tokens(self, arguments: dict) -> Tensor:
        """(B, L) bool, found by placeholder: `generate` may have encoded the images before this call."""
        input_ids = arguments.get("input_ids")
        if input_ids is not None:
            visual = torch.zeros_like(input_ids, dtype=torch.bool)
            for token_id in self._adapter.visual_token_ids:
                visual |= input_ids == token_id
            return visual
        if not _image_features(arguments):
            raise ValueError(
                "input_ids must be given to a routed model, got inputs_embeds without image features: "
                "visual tokens cannot be told from text in them"
            )
        embeds = arguments["inputs_embeds"]
        embed = self._adapter.core.get_input_embeddings()
        ids = torch.tensor(self._adapter.visual_token_ids, device=embeds.device)
        return (embeds[:, :, None] == embed(ids)).all(dim=-1).any(dim=-1)

    def _continue(self, cache, tokens: Tensor, arguments: dict) -> _Continuation | None:
        prompt: CachedPrompt | None = getattr(cache, _CACHE_ATTRIBUTE, None)
        if names := _image_features(arguments):
            raise NotImplementedError(
                f"past_key_values must be empty where a routed prompt brings images, got {_cached_tokens(cache)} "
                f"cached tokens with {', '.join(names)}"
            )
        first = self.policy.schedule[0].layer
        if prompt is None:
            if arguments.get("input_ids") is None and tokens.shape[1] > 1:
                raise ValueError(
                    "input_ids must be given to a routed model, got inputs_embeds of several tokens on a cache: "
                    "visual tokens cannot be told from text in them"
                )
            lengths = {cache.get_seq_length(layer) for layer in (0, first, len(self._adapter.layers) - 1)}
            if len(lengths) > 1:
                raise ValueError(
                    f"past_key_values must come from a finished call, got layers of {sorted(lengths)} cached tokens "
                    "and no record of the routed prompt that filled them"
                )
            return None
        if prompt.policy != self.policy:
            raise ValueError(
                f"past_key_values must have been filled under this policy, got a cache filled under {prompt.policy}"
            )
        self._check_attention()
        batch, queries = tokens.shape[:2]
        if batch % prompt.batch:
            raise ValueError(
                f"the batch must be {prompt.batch} or a multiple of it, as in the cached prompt, got {batch}"
            )
        new_tokens = self._tokens_after(cache, prompt) + queries
        mask = arguments.get("attention_mask")
        if mask is not None:
            expected = (batch, prompt.length + new_tokens)
            if not isinstance(mask, Tensor) or tuple(mask.shape) != expected:
                got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
                raise ValueError(
                    f"attention_mask must be None or of shape {expected}, the {prompt.length} tokens of the prompt and "
                    f"{new_tokens} after it, got {got}"
                )
        elif first == 0 and queries > 1:
            # The length of layer 0, by which `generate` cuts off what is cached, is not that of the prompt.
            raise NotImplementedError(
                "attention_mask must be given with several new tokens on a cache that a decision at layer 0 filled"
            )
        added = mask[:, prompt.length :].bool() if mask is not None else None
        has_positions = arguments.get("position_ids") is not None
        return _Continuation(prompt, batch, queries, new_tokens, added, has_positions)

    def _tokens_after(self, cache, prompt: CachedPrompt) -> int:
        """Tokens that a cache holds after its routed prompt."""
        decision_layers = [stage.layer for stage in self.policy.schedule]
        lengths = dict(zip(decision_layers, prompt.stage_lengths, strict=True))
        lengths[len(self._adapter.layers) - 1] = prompt.stage_lengths[-1]
        lengths.setdefault(0, prompt.length)
        after = {cache.get_seq_length(layer) - length for layer, length in lengths.items()}
        if len(after) > 1:
            raise ValueError(
                "past_key_values must hold the same tokens in all layers after the routed prompt, got "
                f"{sorted(after)} of them: a call on it failed, or it was cropped to one length for all layers"
            )
        if min(after) < 0:
            raise ValueError(
                f"past_key_values must hold the whole routed prompt, got {-min(after)} of its tokens cropped"
            )
        return after.pop()

    # Inside the language model

    def _enter_decoder(self, decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if not getattr(self._local, "awaits_decoder", False):
            raise RuntimeError(
                f"{type(decoder).__name__} was called on its own: call the whole model, which knows where the visual "
                "tokens are, or remove() the routing first"
            )
        self._local.awaits_decoder = False
        call = self._local.call
        if call is None:
            return None
        arguments = _arguments(self._decoder_signature, args, kwargs)
        positions: Tensor | None = arguments.get("position_ids")
        if isinstance(call, _Prefill):
            call.last_position = self._last_position(call.forward.prompt, positions)
            if self._routes_features:
                call.layer_features = self._adapter.take_layer_features(arguments)
            return ((), arguments) if call.layer_features else None
        if call.prompt.last_position is None or (call.has_positions and not call.prompt.right_padded):
            return None
        last = call.prompt.last_position.repeat_interleave(call.batch // call.prompt.batch, dim=-2)
        if positions is not None and positions.ndim == last.ndim:
            last = last[last.shape[0] - positions.shape[0] :] if last.ndim == 3 else last
        if call.added is None:
            offsets = torch.arange(call.new_tokens, device=last.device)
        else:
            offsets = (call.added.cumsum(dim=1) - 1).clamp(min=0)
        offsets = offsets[..., -call.queries :]
        arguments["position_ids"] = last + 1 + offsets
        return (), arguments

    def _last_position(self, prompt: Prompt, positions: Tensor | None) -> Tensor | None:
        """Where a later call cannot tell its positions from the first layer's cache or from the end of a row."""
        if not prompt.right_padded and self.policy.schedule[0].layer > 0:
            return None
        batch, device = prompt.visual.shape[0], prompt.visual.device
        if positions is None:
            positions = torch.arange(prompt.length, device=device)[None]
        positions = positions.expand(*positions.shape[:-2], batch, -1)
        if prompt.last is None:
            last = positions[..., -1:]
        else:
            index = prompt.last.clamp(min=0)[:, None].expand(*positions.shape[:-1], 1)
            last = positions.gather(-1, index)
        if positions.ndim == 3 and not prompt.right_padded:
            # Of three axes, what follows stands behind the furthest one; a fourth counts the tokens.
            axes = positions[-3:]
            if prompt.valid is not None:
                axes = axes.masked_fill(~prompt.valid, 0)
            furthest = axes.amax(dim=(0, 2))[None, :, None].expand(3, -1, -1)
            last = torch.cat([last[:-3], furthest])
        return last

    def _enter_layer(self, stage: int, decides: bool, layer: nn.Module, args: tuple, kwargs: dict):
        call = getattr(self._local, "call", None)
        if call is None:
            return None
        if isinstance(call, _Continuation):
            if kwargs.get("attention_mask") is None and self.policy.schedule[0].layer > 0:
                call.added = None  # the model looked for padding and found none
            kwargs["attention_mask"] = self._continuation_mask(call, stage, args[0])
            return args, kwargs

        forward = call.forward
        hidden, *others = args
        position_ids = kwargs.get("position_ids")
        if decides:
            call.cache = kwargs.get("past_key_values")
            hidden = to_layer(layer, hidden)
            cos, sin = self._adapter.rotary(layer, kwargs["position_embeddings"])
            if position_ids is not None and position_ids.ndim == 3:
                position_ids = position_ids.permute(1, 2, 0)  # [B, L, axes]
            tables = (cos, sin) if position_ids is None else (cos, sin, position_ids)
            tables = tuple(table.expand(hidden.shape[0], *table.shape[1:]) for table in tables)
            hidden = forward.decide(hidden, tables, partial(self._ranking, layer))
        cos, sin, *positions = forward.tables
        kwargs["position_embeddings"] = self._adapter.position_embeddings(cos, sin)
        if positions and positions[0].ndim == 3:
            positions = [positions[0].permute(2, 0, 1)]
        kwargs["position_ids"] = positions[0] if positions else None
        kwargs["attention_mask"] = self._prefill_mask(call, stage, hidden)
        return (hidden, *others), kwargs

    @torch.no_grad()
    def _ranking(self, layer: nn.Module, hidden: Tensor, tables: tuple, valid: Tensor | None, last: Tensor | None):
        with loaded(layer):
            ranking = self._adapter.ranking(layer, hidden, *tables[:2], valid, last)
        check_heads(ranking, self._config, self._head_group)
        return ranking

    def _prefill_mask(self, call: _Prefill, stage: int, hidden: Tensor) -> Tensor | None:
        # Rows without a token stand after all others, so that causality alone keeps them out.
        if stage not in call.masks:
            length = hidden.shape[1]
            call.masks = {stage: causal_mask(self._config._attn_implementation, length, length, None, hidden)}
        return call.masks[stage]

    def _continuation_mask(self, call: _Continuation, stage: int, hidden: Tensor) -> Tensor | None:
        if stage not in call.masks:
            valid = call.prompt.valid_keys(stage, call.batch, call.added, call.new_tokens)
            keys = call.prompt.stage_lengths[stage] + call.new_tokens
            call.masks = {stage: causal_mask(self._config._attn_implementation, call.queries, keys, valid, hidden)}
        return call.masks[stage]

    def _add_layer_features(self, number: int, layer: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        call = getattr(self._local, "call", None)
        if not isinstance(call, _Prefill) or number >= len(call.layer_features):
            return None
        return call.forward.add(output, call.layer_features[number])

    def _leave_last_layer(self, layer: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        call = getattr(self._local, "call", None)
        if not isinstance(call, _Prefill):
            return None
        full = call.forward.finish(output)
        call.finished = True
        if call.cache is not None:
            setattr(call.cache, _CACHE_ATTRIBUTE, CachedPrompt.of(call.forward, call.last_position))
        self.trace = Trace.of(call.forward)
        return full


def _arguments(signature: inspect.Signature, args: tuple, kwargs: dict) -> dict:
    """All arguments of a call by name."""
    return {**dict(zip(signature.parameters, args, strict=False)), **kwargs}


def _forget_compiled_code() -> None:
    """Code that `torch.compile` made before hooks came or went does not look for them again."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def _cached_tokens(cache) -> int:
    return int(cache.get_seq_length())


def _image_features(arguments: dict) -> list[str]:
    """Arguments of a call that bring image or video features."""
    names = ("pixel_values", "pixel_values_videos", "mm_encoder_outputs")
    return [name for name in names if arguments.get(name) is not None and len(arguments[name])]
