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
from ..routing import Trace, on_device
from .adapter import Adapter, cache_of
from .calls import CallReader, Prefill, by_name
from .devices import loaded, to_layer
from .layers import RoutedLayers
from .parallel import check_heads, head_group
from .vision import ReducedVision

# The routing of each routed decoder: what is routed is the decoder, which `copy.copy` of a model shares with it.
_routings: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Routing]] = weakref.WeakKeyDictionary()


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
        self._check_model()
        self._layers = RoutedLayers(adapter, policy)
        self._head_group = head_group(adapter.model)
        self._vision = None if policy.reducer is None else self._reduced_vision()
        self._ranks_ahead = {stage.layer - 1 for stage in policy.schedule if policy.ranks_by_previous_layer}
        self._calls = CallReader(adapter, policy, self._layers, self._head_group, self._vision)
        self._local = threading.local()  # one forward per thread; `call` is what it is
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._remove_present(replace)
        self._install()

    # Set-up and removal

    def _check_model(self) -> None:
        model, text_model_type = self._adapter.model, self._adapter.decoder.config.model_type
        if text_model_type not in self._adapter.text_model_types:
            raise NotImplementedError(
                f"model must have a text model of type {', '.join(self._adapter.text_model_types)}, "
                f"got {text_model_type!r}"
            )
        dtype = getattr(model, "dtype", None)
        if dtype not in FLOATING:
            raise NotImplementedError(f"model must be of dtype {', '.join(map(str, FLOATING))}, got {dtype}")

    def _reduced_vision(self) -> ReducedVision:
        adapter = self._adapter
        if adapter.vision is None:
            raise NotImplementedError(
                f"reducer must be None on a model of type {adapter.model.config.model_type!r}, got "
                f"{self.policy.reducer!r}; reducers work on llava, llava_next and qwen2_5_vl"
            )
        if self._head_group is not None:
            raise NotImplementedError(
                f"reducer must be None on a model whose heads are split over processes, got {self.policy.reducer!r}"
            )
        vision = adapter.vision(adapter, self.policy.reducer)
        present = _routing_on(adapter)
        vision.check_tower(None if present is None else present._vision)
        return vision

    def _remove_present(self, replace: bool) -> None:
        """Remove the routing that is on the model, or refuse to."""
        present = _routing_on(self._adapter)
        if present is None:
            return
        if not replace:
            raise ValueError(
                f"model must not be routed already, got a {type(self._adapter.model).__name__} that is: remove() that "
                "routing first, or apply with replace=True"
            )
        present.remove()

    def _install(self) -> None:
        adapter, add = self._adapter, self._handles.append
        self._decoder_signature = inspect.signature(adapter.decoder.forward)
        add(adapter.core.register_forward_pre_hook(self._begin, with_kwargs=True))
        add(adapter.core.register_forward_hook(self._end, always_call=True))
        add(adapter.decoder.register_forward_pre_hook(self._enter_decoder, with_kwargs=True))
        first = self._layers.stages[0].start
        if first - 1 in self._ranks_ahead:
            add(adapter.layers[first - 1].register_forward_pre_hook(self._enter_last_unrouted_layer, with_kwargs=True))
        for stage, numbers in enumerate(self._layers.stages):
            for number in numbers:
                hook = partial(self._enter_layer, stage, number)
                add(adapter.layers[number].register_forward_pre_hook(hook, with_kwargs=True))
        if self._vision is not None:
            self._vision.install(add)
        # What the model adds before the first decision, it adds itself.
        self._routes_features = adapter.feature_layers > first
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
            if self._vision is not None:
                self._vision.remove()
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
        self._local.call = self._local.unread = None
        self._local.awaits_decoder = False
        if self._vision is None:
            self._local.call = self._calls.read(args, kwargs)
        else:
            self._local.unread = args, kwargs  # what was dropped shows in what the decoder is handed
        self._local.awaits_decoder = True

    def _end(self, core: nn.Module, args: tuple, output) -> None:
        call, self._local.call = getattr(self._local, "call", None), None
        self._local.awaits_decoder = False
        if output is not None and isinstance(call, Prefill) and not call.finished:
            raise RuntimeError(
                f"a routed prompt must run through all {len(self._adapter.layers)} decoder layers, and it did not: "
                "does the configuration name fewer (num_hidden_layers)?"
            )

    # Inside the language model

    def _enter_decoder(self, decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if not getattr(self._local, "awaits_decoder", False):
            raise RuntimeError(
                f"{type(decoder).__name__} was called on its own: call the whole model, which knows where the visual "
                "tokens are, or remove() the routing first"
            )
        self._local.awaits_decoder = False
        if self._vision is None and self._local.call is None:
            return None
        arguments = by_name(self._decoder_signature, args, kwargs)
        if self._vision is not None:
            unread, self._local.unread = self._local.unread, None
            self._read_reduced(*unread, arguments)
        call = self._local.call
        if call is None:
            return (), arguments
        given = arguments.get("position_ids")
        if isinstance(call, Prefill):
            call.note_positions(given)
            if self._routes_features:
                call.layer_features = self._adapter.take_layer_features(arguments)
            return ((), arguments) if call.layer_features or self._vision is not None else None
        positions = call.position_ids(given)
        return None if positions is None else ((), {**arguments, "position_ids": positions})

    def _read_reduced(self, args: tuple, kwargs: dict, arguments: dict) -> None:
        """Read a call of the model; the marks of what was dropped are taken out of what its decoder is handed."""
        vision, embeds = self._vision, arguments["inputs_embeds"]
        found: list[Tensor] = []

        def marks() -> tuple[Tensor, Tensor]:
            found.extend(vision.marks(embeds))
            return tuple(found)

        call = self._calls.read(args, kwargs, marks)
        if isinstance(call, Prefill):
            answers, visual = call.forward.prompt.answers, sum(call.forward.prompt.visual_counts)
            if answers["foreign"] or not (answers["dropped"] or vision.kept_all):
                raise ValueError(
                    "image features must be computed by this model under this routing, where there is a reducer, got a "
                    f"prompt of {visual} visual tokens of which {answers['dropped']} were dropped by it and "
                    f"{answers['foreign']} by another"
                )
        if found:
            arguments["inputs_embeds"] = embeds.masked_fill(found[1][:, :, None], 0)
        self._local.call = call

    def _enter_layer(self, stage: int, number: int, layer: nn.Module, args: tuple, kwargs: dict):
        call = getattr(self._local, "call", None)
        if call is None:
            return None
        hidden, *others = args
        if isinstance(call, Prefill):
            given = kwargs["position_embeddings"]  # of the full sequence
            if call.stage == stage:
                hidden = self._decide(call, number, layer, hidden, kwargs)
            if number in self._ranks_ahead:
                self._rank_ahead(call, number, layer, hidden, given)
            kwargs["position_embeddings"] = call.position_embeddings
            kwargs["position_ids"] = None  # of the full sequence; layers rotate by the embeddings
        elif self.policy.positions == "contiguous":
            kwargs["position_embeddings"] = call.position_embeddings(stage, partial(self._embeddings_at, hidden))
        kwargs["attention_mask"] = call.mask(stage, number, hidden, kwargs)
        return (hidden, *others), kwargs

    def _enter_last_unrouted_layer(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        call = getattr(self._local, "call", None)
        if isinstance(call, Prefill):
            number = self._layers.stages[0].start - 1
            self._rank_ahead(call, number, layer, args[0], kwargs["position_embeddings"])

    def _decide(self, call: Prefill, number: int, layer: nn.Module, hidden: Tensor, kwargs: dict) -> Tensor:
        call.fill(cache_of(kwargs))
        hidden = to_layer(layer, hidden)
        tables = self._tables(layer, hidden, kwargs["position_embeddings"])
        hidden = call.forward.decide(hidden, tables, partial(self._project, call, number, layer))
        if self.policy.positions == "contiguous":
            call.position_embeddings = self._embeddings_at(hidden, call.forward.numbers(hidden.device))
            call.forward.tables = self._tables(layer, hidden, call.position_embeddings)
        else:
            call.position_embeddings = self._adapter.position_embeddings(*call.forward.tables)
        return hidden

    def _rank_ahead(
        self, call: Prefill, number: int, layer: nn.Module, hidden: Tensor, position_embeddings: object
    ) -> None:
        """Rank for the decision in the next layer; position_embeddings are those of the full sequence."""
        hidden = to_layer(layer, hidden)
        tables = self._tables(layer, hidden, position_embeddings)
        call.forward.score(hidden, tables, partial(self._project, call, number, layer))

    def _tables(self, layer: nn.Module, hidden: Tensor, position_embeddings: object) -> tuple[Tensor, ...]:
        """cos and sin, (B, L, R), of what layers are handed."""
        tables = self._adapter.rotary(layer, position_embeddings)
        return tuple(table.expand(hidden.shape[0], *table.shape[1:]) for table in tables)

    def _embeddings_at(self, hidden: Tensor, positions: Tensor) -> object:
        """What layers are handed at positions (B, M) that count tokens."""
        axes = self._adapter.position_axes
        positions = positions if axes == 1 else positions.expand(axes, -1, -1)
        return self._adapter.decoder.rotary_emb(hidden, positions)

    @torch.no_grad()
    def _project(
        self,
        call: Prefill,
        number: int,
        layer: nn.Module,
        hidden: Tensor,
        tables: tuple,
        valid: Tensor | None,
        places: Tensor | None = None,
        keys_alone: bool = False,
    ) -> dict[str, object]:
        with loaded(layer, layer.self_attn):
            if keys_alone:
                arguments = {"key": self._adapter.keys(layer.self_attn, layer.input_layernorm(hidden))}
            else:
                arguments = self._adapter.ranking(layer, hidden, *tables, valid, places)
        check_heads(arguments, self._adapter.decoder.config, self._head_group)
        if call.past is not None and not keys_alone:
            keys = self._adapter.cached_keys(call.cache, number)[:, :, : call.past.lengths[call.stage]]
            valid = call.past.valid[call.stage]
            arguments |= {
                "past_key": on_device(hidden.device, keys).transpose(1, 2),
                "past_mask": None if valid is None else on_device(hidden.device, valid).expand(hidden.shape[0], -1),
            }
        return arguments

    def _add_layer_features(self, number: int, layer: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        call = getattr(self._local, "call", None)
        if not isinstance(call, Prefill) or number >= len(call.layer_features):
            return None
        return call.forward.add(output, call.layer_features[number])

    def _leave_last_layer(self, layer: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        call = getattr(self._local, "call", None)
        if not isinstance(call, Prefill):
            return None
        full = call.forward.finish(output)
        call.record()
        self.trace = Trace.of(call.forward, call.past)
        return full


def _routing_on(adapter: Adapter) -> Routing | None:
    """The routing that is on a model."""
    return _routings.get(adapter.decoder, lambda: None)()


def _forget_compiled_code() -> None:
    """Code that `torch.compile` made before hooks came or went does not look for them again."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
