"""Routing installed on one model instance, through PyTorch's forward hooks."""

from __future__ import annotations

import inspect
import sys
import threading
import weakref
from collections.abc import Callable
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from ..ops import FLOATING
from ..policy import Policy
from ..routing import CachedPrompt, Past, Prompt, RoutedForward, Trace
from .adapter import Adapter
from .devices import loaded, to_layer
from .generation import prompt_call
from .masks import IMPLEMENTATIONS, attention_mask
from .parallel import check_heads, head_group, over_all_heads

# The attribute of a cache object that holds its CachedPrompt: it lives, is copied and dies with the cache.
_CACHE_ATTRIBUTE = "_reroute_kernels_prompt"

_LAYER_TYPES = ("full_attention", "sliding_attention", "linear_attention")

# The routing of each routed decoder: what is routed is the decoder, which `copy.copy` of a model shares with it.
_routings: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Routing]] = weakref.WeakKeyDictionary()


class _Prefill:
    """A routed prompt on its way through the layers."""

    def __init__(self, forward: RoutedForward, past: Past | None):
        self.forward = forward
        self.past = past  # what the cache held before, if anything
        self.last_position: Tensor | None = None
        self.cache = None
        self.finished = False
        self.layer_features: list[Tensor] = []  # (B, L, d), added after the first layers
        # What every layer of the stage is handed:
        self.position_embeddings: object = None
        self.masks: dict[str, object] = {}  # by kind of layer


class _Continuation:
    """New tokens on top of a cache that a routed prompt filled."""

    def __init__(
        self,
        prompt: CachedPrompt,
        batch: int,
        queries: int,
        new_tokens: int,
        mask: Tensor | None,
        has_positions: bool,
    ):
        self.prompt = prompt
        self.batch = batch
        self.queries = queries
        self.new_tokens = new_tokens  # after the prompt, those of this call included
        self.mask = mask  # (B, all tokens), False at padding; None where there is none
        self.has_positions = has_positions  # given by the caller
        self.masks: dict[tuple[int, str], object] = {}  # by stage and kind of layer

    @cached_property
    def added(self) -> Tensor | None:
        """(B, new tokens), False at padding; None where there is none. Most calls do not need it."""
        return None if self.mask is None else self.mask[:, self.prompt.past.length :].bool()


class Routing:
    """A policy at work on one model; made by `apply`, and usable as a context manager.

    Args:
        adapter: of the model.
        policy: the policy.
        replace: whether to remove a routing that is on the model, once this one is found valid.

    Attributes:
        policy: the policy.
        trace: what the latest routed prefill did, or None before the first one.
    """

    def __init__(self, adapter: Adapter, policy: Policy, replace: bool = False):
        self.policy = policy
        self.trace: Trace | None = None
        self._adapter = adapter
        self._config = adapter.decoder.config
        self._window = getattr(self._config, "sliding_window", None)
        self._head_group = head_group(adapter.model)
        self._local = threading.local()  # one forward per thread; `call` is what it is
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._check_model()
        self._displace(replace)
        self._install()

    # Set-up and removal

    def _check_model(self) -> None:
        adapter, policy = self._adapter, self.policy
        model, config = adapter.model, self._config
        if config.model_type not in adapter.text_model_types:
            raise NotImplementedError(
                f"model must have a text model of type {', '.join(adapter.text_model_types)}, got {config.model_type!r}"
            )
        layers = len(adapter.layers)
        if policy.schedule[-1].layer >= layers:
            raise ValueError(
                f"schedule must stay below layer {layers} of this {type(model).__name__}, "
                f"got layer {policy.schedule[-1].layer}"
            )
        if policy.positions != "original":
            raise NotImplementedError(f"positions must be 'original' on transformers models, got {policy.positions!r}")
        kinds = self._adapter.layer_types
        allowed = [number for number, kind in enumerate(kinds) if kind == "full_attention"]
        for stage in policy.schedule:
            if kinds[stage.layer] != "full_attention":
                raise NotImplementedError(
                    f"schedule must decide at layers with full attention, of this {type(model).__name__} "
                    f"{', '.join(map(str, allowed)) or 'none'}; got layer {stage.layer} of {kinds[stage.layer]!r}"
                )
        for number in range(policy.schedule[0].layer, layers):
            if kinds[number] not in _LAYER_TYPES:
                raise NotImplementedError(
                    f"layers from the first decision on must be of type {', '.join(_LAYER_TYPES)}, got "
                    f"{kinds[number]!r} at layer {number} of this {type(model).__name__}"
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

    def _displace(self, replace: bool) -> None:
        """Remove the routing that is on the model, or refuse to."""
        present = _routings.get(self._adapter.decoder, lambda: None)()
        if present is None:
            return
        if not replace:
            raise ValueError(
                f"model must not be routed already, got a {type(self._adapter.model).__name__} that is: remove() that "
                "routing first, or apply with replace=True"
            )
        present.remove()

    def _install(self) -> None:
        adapter, schedule = self._adapter, self.policy.schedule
        # The frames that it reads are no matter of torch.compile, which would warn.
        self._prompt_call = torch.compiler.disable(prompt_call)
        ends = [*(stage.layer for stage in schedule[1:]), len(adapter.layers)]
        self._stages = [range(stage.layer, end) for stage, end in zip(schedule, ends, strict=True)]
        kinds = adapter.layer_types
        self._attention_layers = [number for number, kind in enumerate(kinds) if kind != "linear_attention"]
        # Layers in which what stands last in a row counts.
        self._fill_front = any(kind != "full_attention" for kind in kinds[schedule[0].layer :])
        # transformers reads the length of a cache off its first attention layer.
        self._length_is_routed = schedule[0].layer <= self._attention_layers[0]
        self._core_signature = inspect.signature(adapter.core.forward)
        self._decoder_signature = inspect.signature(adapter.decoder.forward)
        add = self._handles.append
        add(adapter.core.register_forward_pre_hook(self._begin, with_kwargs=True))
        add(adapter.core.register_forward_hook(self._end, always_call=True))
        add(adapter.decoder.register_forward_pre_hook(self._enter_decoder, with_kwargs=True))
        for stage, layers in enumerate(self._stages):
            for number in layers:
                hook = partial(self._enter_layer, stage, number)
                add(adapter.layers[number].register_forward_pre_hook(hook, with_kwargs=True))
        # What the model adds before the first decision, it adds itself.
        self._routes_features = adapter.feature_layers > schedule[0].layer
        for number in range(adapter.feature_layers if self._routes_features else 0):
            add(adapter.layers[number].register_forward_hook(partial(self._add_layer_features, number)))
        add(adapter.layers[-1].register_forward_hook(self._leave_last_layer))
        _routings[adapter.decoder] = weakref.ref(self)
        _forget_compiled_code()

    def remove(self) -> None:
        """Take every hook off the model, which then is what it was. Calling it again does nothing."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            _routings.pop(self._adapter.decoder, None)
            _forget_compiled_code()
        self._handles.clear()
        self._local = threading.local()  # an interrupted call may have left its state

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
        filled = cache is not None and _cached_tokens(cache) > 0
        generation = self._prompt_call() if not filled or tokens.shape[1] > 1 else None
        if (
            generation is not None
            and generation.chunked_ids is not None
            and self._has_visual_ids(generation.chunked_ids)
        ):
            raise NotImplementedError(
                "prefill_chunk_size must be None for a routed prompt, or not below its length: a chunk without the "
                "prompt's last token cannot rank by it"
            )
        if filled:
            self._local.call = self._continue(cache, tokens, arguments)
        else:
            if cache is not None and hasattr(cache, _CACHE_ATTRIBUTE):
                delattr(cache, _CACHE_ATTRIBUTE)  # the cache was reset since
                lengths = {_cached_tokens(cache, layer) for layer in self._attention_layers}
                if lengths != {0}:
                    raise ValueError(
                        "past_key_values must hold the whole routed prompt or nothing, got layers of "
                        f"{sorted(lengths)} cached tokens"
                    )
            self._local.call = self._start(cache, arguments, guessed=generation.guessed)
        self._local.awaits_decoder = True

    def _end(self, core: nn.Module, args: tuple, output) -> None:
        call, self._local.call = getattr(self._local, "call", None), None
        self._local.awaits_decoder = False
        if output is not None and isinstance(call, _Prefill) and not call.finished:
            raise RuntimeError(
                f"a routed prompt must run through all {len(self._adapter.layers)} decoder layers, and it did not: "
                "does the configuration name fewer (num_hidden_layers)?"
            )

    def _start(self, cache, arguments: dict, past: Past | None = None, guessed: int = 0) -> _Prefill | None:
        visual = self._visual_tokens(arguments)
        queries = visual.shape[1]
        expected = (visual.shape[0], queries + (past.length if past else 0))
        mask, unlike_causal = _padding_mask(arguments.get("attention_mask"), queries, expected[1])
        is_padding_mask = isinstance(mask, Tensor) and tuple(mask.shape) == expected
        valid = mask[:, -queries:].to(visual.device, torch.bool) if is_padding_mask else None
        gaps = self._gaps(cache, arguments)
        prompt = Prompt(visual, valid, guessed, [number for number in (gaps, unlike_causal) if number is not None])
        if not prompt.has_visual_tokens:
            return None
        self._check_attention()
        self._check_cache(cache)
        if past is not None:
            self._check_past(cache)
        if mask is not None and not is_padding_mask:
            got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise NotImplementedError(
                f"attention_mask must be None or of shape {expected} for a routed prompt, got {got}"
            )
        if unlike_causal is not None and prompt.answers[-1]:
            raise NotImplementedError(
                "attention_mask of four dimensions must be causal with padding for a routed prompt, got another one"
            )
        if gaps is not None and prompt.answers[0]:
            raise NotImplementedError(
                "position_ids of a routed prompt without cache and mask must count by one: transformers takes others "
                "for several packed sequences"
            )
        if prompt.right_padded and self._fill_front:
            raise NotImplementedError(
                "attention_mask must put padding on the left for a text model with layers of "
                f"{', '.join(sorted(set(self._adapter.layer_types)))}, got padding on the right"
            )
        for name in ("output_hidden_states", "output_attentions"):
            if arguments.get(name, getattr(self._config, name, False)):
                raise NotImplementedError(f"{name} must be off for a routed prompt, got {arguments.get(name, True)}")
        layer = self._adapter.layers[self.policy.schedule[0].layer]
        if layer.training and getattr(layer, "gradient_checkpointing", False):
            raise NotImplementedError("gradient checkpointing must be off for a routed prompt, got it on")
        combine = None if self._head_group is None else partial(over_all_heads, self._head_group)
        return _Prefill(RoutedForward(self.policy, prompt, self._fill_front, combine), past)

    def _check_past(self, cache) -> None:
        """Whether a routed prompt can follow on what the cache holds."""
        before: CachedPrompt | None = getattr(cache, _CACHE_ATTRIBUTE, None)
        if self._length_is_routed:
            raise NotImplementedError(
                "past_key_values must be empty where a prompt brings images and the first decision is at layer "
                f"{self.policy.schedule[0].layer}, by whose cache transformers counts tokens; got one with tokens"
            )
        if getattr(cache, "offloading", False):
            raise NotImplementedError(
                "past_key_values must not be offloaded where a prompt brings images to a filled cache, got offloading"
            )
        if before is not None and before.right_padded:
            raise NotImplementedError(
                "past_key_values must hold prompts padded on the left where a prompt brings images to a filled cache, "
                "got one padded on the right"
            )

    def _gaps(self, cache, arguments: dict) -> Tensor | None:
        """How often positions do not count by one, in a call in which transformers takes that for packed sequences."""
        positions = arguments.get("position_ids")
        uses_cache = cache is not None or arguments.get("use_cache", getattr(self._config, "use_cache", False))
        if positions is None or uses_cache or arguments.get("attention_mask") is not None:
            return None
        if positions.ndim == 3:
            positions = positions[0] if positions.shape[0] == 4 else None
        return None if positions is None else (positions.diff(dim=1) != 1).sum()

    def _check_cache(self, cache) -> None:
        if cache is None:
            return
        from transformers import DynamicCache, StaticCache

        accepted = [DynamicCache] if self._fill_front else [DynamicCache, StaticCache]
        if type(cache) not in accepted and type(cache).__name__ not in self._adapter.cache_types:
            names = " or ".join([kind.__name__ for kind in accepted] + list(self._adapter.cache_types))
            raise NotImplementedError(f"past_key_values must be a {names}, got {type(cache).__name__}")

    def _has_visual_ids(self, input_ids: Tensor) -> bool:
        return bool(self._visual_tokens({"input_ids": input_ids}).any())

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

    def _continue(self, cache, tokens: Tensor, arguments: dict) -> _Prefill | _Continuation | None:
        prompt: CachedPrompt | None = getattr(cache, _CACHE_ATTRIBUTE, None)
        brings_images = bool(_image_features(arguments))
        batch, queries = tokens.shape[:2]
        if prompt is None:
            if arguments.get("input_ids") is None and queries > 1 and not brings_images:
                raise ValueError(
                    "input_ids must be given to a routed model, got inputs_embeds of several tokens on a cache: "
                    "visual tokens cannot be told from text in them"
                )
            checked = (self._attention_layers[0], self.policy.schedule[0].layer, self._attention_layers[-1])
            lengths = {_cached_tokens(cache, layer) for layer in checked}
            if len(lengths) > 1:
                raise ValueError(
                    f"past_key_values must come from a finished call, got layers of {sorted(lengths)} cached tokens "
                    "and no record of the routed prompt that filled them"
                )
            if not brings_images:
                return None
            (length,) = lengths
            mask, _ = _padding_mask(arguments.get("attention_mask"), queries, length + queries)
            valid = mask[:, :length].bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
            past = Past.plain(length, valid, len(self.policy.schedule), tokens.device)
            return self._start(cache, arguments, past)
        if prompt.policy != self.policy:
            raise ValueError(
                f"past_key_values must have been filled under this policy, got a cache filled under {prompt.policy}"
            )
        self._check_attention()
        if batch % prompt.batch:
            raise ValueError(
                f"the batch must be {prompt.batch} or a multiple of it, as in the cached prompt, got {batch}"
            )
        length = prompt.past.length
        new_tokens = self._tokens_after(cache, prompt) + queries
        mask, _ = _padding_mask(arguments.get("attention_mask"), queries, length + new_tokens)
        if mask is not None:
            expected = (batch, length + new_tokens)
            if not isinstance(mask, Tensor) or tuple(mask.shape) != expected:
                got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
                raise ValueError(
                    f"attention_mask must be None or of shape {expected}, the {length} tokens of the prompt and "
                    f"{new_tokens} after it, got {got}"
                )
        elif self._length_is_routed and queries > 1:
            # The length of the first attention layer, by which `generate` cuts off what is cached, is not the prompt's.
            raise NotImplementedError(
                "attention_mask must be given with several new tokens on a cache that a decision at layer "
                f"{self.policy.schedule[0].layer} filled"
            )
        if brings_images:
            earlier = mask[:, length:-queries].bool() if mask is not None else None
            past = prompt.with_later(batch, earlier, new_tokens - queries)
            call = self._start(cache, arguments, past)
            if call is not None:
                return call
        has_positions = arguments.get("position_ids") is not None
        return _Continuation(prompt, batch, queries, new_tokens, mask, has_positions)

    def _tokens_after(self, cache, prompt: CachedPrompt) -> int:
        """Tokens that a cache holds after its routed prompt."""
        counted = {layers[0]: length for layers, length in zip(self._stages, prompt.past.lengths, strict=True)}
        counted[self._attention_layers[-1]] = prompt.past.lengths[-1]
        counted.setdefault(self._attention_layers[0], prompt.past.length)
        after = [_cached_tokens(cache, layer) - length for layer, length in sorted(counted.items())]
        if min(after) < 0:
            raise ValueError(
                f"past_key_values must hold the whole routed prompt, got {-min(after)} of its tokens cropped"
            )
        if len(set(after)) == 1:
            return after[0]
        if not self._length_is_routed and after[0] == min(after):
            # Cropped to a length for all layers, as assisted decoding does: those of the stages kept what it cut off.
            for layers, length in zip(self._stages, prompt.past.lengths, strict=True):
                for number in layers:
                    if number in self._attention_layers:
                        cache.layers[number].crop(length + after[0])
            return self._tokens_after(cache, prompt)
        raise ValueError(
            "past_key_values must hold the same tokens in all layers after the routed prompt, got "
            f"{sorted(set(after))} of them: a call on it failed"
        )

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
            call.last_position = self._last_position(call, positions)
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

    def _last_position(self, call: _Prefill, positions: Tensor | None) -> Tensor | None:
        """Where a later call cannot tell its positions from the first layer's cache or from the end of a row."""
        prompt = call.forward.prompt
        if not prompt.right_padded and not self._length_is_routed:
            return None
        batch, device = prompt.visual.shape[0], prompt.visual.device
        if positions is None:
            positions = torch.arange(prompt.length, device=device)[None] + (call.past.length if call.past else 0)
        positions = positions.expand(*positions.shape[:-2], batch, -1)[..., : prompt.length - prompt.guessed]
        if prompt.end is None:
            last = positions[..., -1:]
        else:
            index = prompt.end.clamp(min=0)[:, None].expand(*positions.shape[:-1], 1)
            last = positions.gather(-1, index)
        if positions.ndim == 3 and not prompt.right_padded:
            # Of three axes, what follows stands behind the furthest one; a fourth counts the tokens.
            axes = positions[-3:]
            if prompt.valid is not None:
                axes = axes.masked_fill(~prompt.valid, 0)
            furthest = axes.amax(dim=(0, 2))[None, :, None].expand(3, -1, -1)
            last = torch.cat([last[:-3], furthest])
        return last

    def _enter_layer(self, stage: int, number: int, layer: nn.Module, args: tuple, kwargs: dict):
        call = getattr(self._local, "call", None)
        if call is None:
            return None
        kind = self._adapter.layer_types[number]
        if isinstance(call, _Continuation):
            if kind != "linear_attention":
                if kwargs.get("attention_mask") is None and not self._length_is_routed:
                    call.added = None  # the model looked for padding and found none
                kwargs["attention_mask"] = self._continuation_mask(call, stage, number, args[0], kwargs)
            return args, kwargs

        hidden, *others = args
        if number == self._stages[stage][0]:
            hidden = self._decide(call, number, layer, hidden, kwargs)
        if kind not in call.masks:
            call.masks[kind] = self._prefill_mask(call, stage, number, hidden)
        kwargs["position_embeddings"] = call.position_embeddings
        kwargs["position_ids"] = None  # of the full sequence; layers rotate by the embeddings
        kwargs["attention_mask"] = call.masks[kind]
        return (hidden, *others), kwargs

    def _decide(self, call: _Prefill, number: int, layer: nn.Module, hidden: Tensor, kwargs: dict) -> Tensor:
        call.cache = kwargs.get("past_key_values")
        hidden = to_layer(layer, hidden)
        tables = self._adapter.rotary(layer, kwargs["position_embeddings"])
        tables = tuple(table.expand(hidden.shape[0], *table.shape[1:]) for table in tables)
        hidden = call.forward.decide(hidden, tables, partial(self._ranking, call, number, layer))
        call.position_embeddings = self._adapter.position_embeddings(*call.forward.tables)
        call.masks = {}
        return hidden

    @torch.no_grad()
    def _ranking(
        self,
        call: _Prefill,
        number: int,
        layer: nn.Module,
        hidden: Tensor,
        tables: tuple,
        ranked: Tensor | None,
        last: Tensor | None,
    ) -> dict[str, object]:
        with loaded(layer):
            arguments = self._adapter.ranking(layer, hidden, *tables, ranked, last)
        check_heads(arguments, self._config, self._head_group)
        if call.past is not None:
            stage = len(call.forward.kept)
            keys = self._adapter.cached_keys(call.cache, number)[:, :, : call.past.lengths[stage]]
            valid = call.past.valid[stage]
            arguments |= {
                "past_key": keys.to(hidden.device).transpose(1, 2),
                "past_mask": None if valid is None else valid.to(hidden.device).expand(hidden.shape[0], -1),
            }
        return arguments

    def _prefill_mask(self, call: _Prefill, stage: int, number: int, hidden: Tensor) -> object:
        forward, past, queries = call.forward, call.past, hidden.shape[1]
        # Rows without a token that stand after all others are kept out by causality alone.
        valid = forward.kept[stage] >= 0 if forward.is_ragged(stage) and self._fill_front else None
        if self._adapter.layer_types[number] == "linear_attention":
            return valid
        before, total = 0, forward.prompt.length
        if past is not None:
            before, total = past.lengths[stage], total + past.length
            if valid is not None or past.valid[stage] is not None:
                own = torch.ones_like(forward.kept[stage], dtype=torch.bool) if valid is None else valid
                earlier = past.valid[stage]
                earlier = own.new_ones(own.shape[0], before) if earlier is None else earlier.expand(own.shape[0], -1)
                valid = torch.cat([earlier.to(own.device), own], dim=1)

        def positions() -> Tensor:
            kept = forward.kept[stage]
            if past is None:
                return kept
            earlier = past.positions[stage].to(kept.device).expand(kept.shape[0], -1)
            return torch.cat([earlier, kept + past.length], dim=1)

        return self._mask(call.cache, number, queries, before, total, valid, positions, hidden)

    def _continuation_mask(self, call: _Continuation, stage: int, number: int, hidden: Tensor, kwargs: dict) -> object:
        key = (stage, self._adapter.layer_types[number])
        if key not in call.masks:
            prompt = call.prompt
            call.masks[key] = self._mask(
                kwargs.get("past_key_values"),
                number,
                call.queries,
                prompt.past.lengths[stage] + call.new_tokens - call.queries,
                prompt.past.length + call.new_tokens,
                prompt.valid_keys(stage, call.batch, call.added, call.new_tokens),
                partial(prompt.key_positions, stage, call.batch, call.new_tokens),
                hidden,
            )
        return call.masks[key]

    def _mask(
        self,
        cache,
        number: int,
        queries: int,
        past: int,
        total: int,
        valid: Tensor | None,
        positions: Callable[[], Tensor],
        hidden: Tensor,
    ) -> object:
        """The mask of a layer: `past` keys are cached in it, of `total` tokens of the full sequence."""
        implementation = self._config._attn_implementation
        layers = getattr(cache, "layers", ())
        cached = layers[number] if number < len(layers) else None
        if self._adapter.layer_types[number] == "sliding_attention" and total > self._window:
            # The window is one of positions, not of rows, and the cache of such a layer may hold the last rows only.
            if getattr(cached, "is_sliding", False):
                past = min(past, self._window - 1)
            keys = past + queries
            places = positions()[:, -keys:]
            valid = valid[:, -keys:] if valid is not None else None
            return attention_mask(implementation, queries, past, keys, hidden, valid, places, self._window)
        keys = getattr(cached, "max_cache_len", past + queries)
        return attention_mask(implementation, queries, past, keys, hidden, valid)

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
            setattr(call.cache, _CACHE_ATTRIBUTE, CachedPrompt.of(call.forward, call.past, call.last_position))
        self.trace = Trace.of(call.forward, call.past)
        return full


def _arguments(signature: inspect.Signature, args: tuple, kwargs: dict) -> dict:
    """All arguments of a call by name."""
    return {**dict(zip(signature.parameters, args, strict=False)), **kwargs}


def _forget_compiled_code() -> None:
    """Code that `torch.compile` made before hooks came or went does not look for them again."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def _cached_tokens(cache, layer: int = 0) -> int:
    return int(cache.get_seq_length(layer))


def _image_features(arguments: dict) -> list[str]:
    """Arguments of a call that bring image or video features."""
    names = ("pixel_values", "pixel_values_videos", "mm_encoder_outputs")
    return [name for name in names if arguments.get(name) is not None and len(arguments[name])]


def _padding_mask(mask: object, queries: int, total: int) -> tuple[object, Tensor | None]:
    """The (B, total) mask behind an attention mask.

    For caches of a fixed size `generate` makes masks of four dimensions, one for each kind of layer, of which the last
    query's row is what it made them from.

    Returns:
        The mask, or what it is if there is none behind it; and, of four dimensions, in how many places it differs from
        a causal mask with that padding.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[2] != queries or mask.shape[3] < total:
        return mask, None
    seen = (mask if mask.dtype == torch.bool else mask == 0)[:, 0, :, :total]
    valid = seen[:, -1]
    causal = torch.ones(queries, total, dtype=torch.bool, device=seen.device).tril(total - queries)
    differs = (seen ^ (causal & valid[:, None])) & valid[:, -queries:, None]
    return valid, differs.sum()
