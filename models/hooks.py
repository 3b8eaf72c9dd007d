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
from .adapter import Adapter
from .calls import CallReader, Prefill, by_name
from .devices import loaded, to_layer
from .layers import RoutedLayers
from .parallel import check_heads, head_group

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
        self._calls = CallReader(adapter, policy, self._layers, self._head_group)
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
        if self.policy.positions != "original":
            raise NotImplementedError(
                f"positions must be 'original' on transformers models, got {self.policy.positions!r}"
            )
        dtype = getattr(model, "dtype", None)
        if dtype not in FLOATING:
            raise NotImplementedError(f"model must be of dtype {', '.join(map(str, FLOATING))}, got {dtype}")

    def _remove_present(self, replace: bool) -> None:
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
        adapter, add = self._adapter, self._handles.append
        self._decoder_signature = inspect.signature(adapter.decoder.forward)
        add(adapter.core.register_forward_pre_hook(self._begin, with_kwargs=True))
        add(adapter.core.register_forward_hook(self._end, always_call=True))
        add(adapter.decoder.register_forward_pre_hook(self._enter_decoder, with_kwargs=True))
        for stage, numbers in enumerate(self._layers.stages):
            for number in numbers:
                hook = partial(self._enter_layer, stage, number)
                add(adapter.layers[number].register_forward_pre_hook(hook, with_kwargs=True))
        # What the model adds before the first decision, it adds itself.
        self._routes_features = adapter.feature_layers > self.policy.schedule[0].layer
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
        self._local.call = None
        self._local.awaits_decoder = False
        self._local.call = self._calls.read(args, kwargs)
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
        call = self._local.call
        if call is None:
            return None
        arguments = by_name(self._decoder_signature, args, kwargs)
        given = arguments.get("position_ids")
        if isinstance(call, Prefill):
            call.note_positions(given)
            if self._routes_features:
                call.layer_features = self._adapter.take_layer_features(arguments)
            return ((), arguments) if call.layer_features else None
        positions = call.position_ids(given)
        return None if positions is None else ((), {**arguments, "position_ids": positions})

    def _enter_layer(self, stage: int, number: int, layer: nn.Module, args: tuple, kwargs: dict):
        call = getattr(self._local, "call", None)
        if call is None:
            return None
        hidden, *others = args
        if isinstance(call, Prefill):
            if call.stage == stage:
                hidden = self._decide(call, number, layer, hidden, kwargs)
            kwargs["position_embeddings"] = call.position_embeddings
            kwargs["position_ids"] = None  # of the full sequence; layers rotate by the embeddings
        kwargs["attention_mask"] = call.mask(stage, number, hidden, kwargs)
        return (hidden, *others), kwargs

    def _decide(self, call: Prefill, number: int, layer: nn.Module, hidden: Tensor, kwargs: dict) -> Tensor:
        call.cache = kwargs.get("past_key_values")
        hidden = to_layer(layer, hidden)
        tables = self._adapter.rotary(layer, kwargs["position_embeddings"])
        tables = tuple(table.expand(hidden.shape[0], *table.shape[1:]) for table in tables)
        hidden = call.forward.decide(hidden, tables, partial(self._ranking, call, number, layer))
        call.position_embeddings = self._adapter.position_embeddings(*call.forward.tables)
        return hidden

    @torch.no_grad()
    def _ranking(
        self,
        call: Prefill,
        number: int,
        layer: nn.Module,
        hidden: Tensor,
        tables: tuple,
        ranked: Tensor | None,
        last: Tensor | None,
    ) -> dict[str, object]:
        with loaded(layer):
            arguments = self._adapter.ranking(layer, hidden, *tables, ranked, last)
        check_heads(arguments, self._adapter.decoder.config, self._head_group)
        if call.past is not None:
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


def _forget_compiled_code() -> None:
    """Code that `torch.compile` made before hooks came or went does not look for them again."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
