"""Routing installed on one model instance, through PyTorch's forward hooks."""

from __future__ import annotations

import inspect
import sys
import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn

from reroute_kernels import ops
from reroute_kernels.checks import FLOATING
from reroute_kernels.policy import Policy
from reroute_kernels.routing import on_device
from reroute_kernels.trace import Trace

from . import refusals
from .adapter import Adapter, cache_of
from .answers import Answers, checked
from .calls import CallReader, by_name
from .checkpointing import checkpointed, runs_first
from .experts import asks_for_router_logits, with_tokens, without_padding
from .frozen import cache_frozen
from .graphs import CudaGraphs, Graphs, RoutedPrefills
from .layers import RoutedLayers
from .modules import Module, uncompiled
from .offload import to_execution_device
from .prefill import Continuation, Prefill
from .projection import LayerProjection
from .prompt_text import PromptText
from .stack import calls_of, forwards_of
from .static import PrefillKey
from .tensor_parallel import check_not_sharded, head_group, plans_part
from .vision import ReducedVision

# Active routing per decoder and per module around it: `copy.copy(model)` shares both, and a user may replace either.
_routings: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Routing]] = weakref.WeakKeyDictionary()


@dataclass(eq=False)
class _Call:
    """State of one call of the model, on the stack of its thread: a hook may call the model anew.

    routed: the routed prompt or continuation, or None; unread: arguments that are read once the decoder is handed the
    embeddings;
    awaits_decoder: whether the decoder is still to be called; mask: the attention mask, if the head is kept from it.
    """

    routed: Prefill | Continuation | None = None
    unread: Any = None
    awaits_decoder: bool = False
    mask: object = None


class _Calls(threading.local):
    """The calls of the model that run in a thread, each inside the one before, and arguments for the next one."""

    def __init__(self):
        self.stack: list[_Call] = []
        # Labels of the call whose head was entered last, and its attention mask if that is kept from the head.
        self.labels: Tensor | None = None
        self.mask: object = None


class Routing:
    """A policy at work on one model; made by `apply`, and usable as a context manager.

    Args:
        adapter: of the model.
        policy: the policy.
        replace: whether to remove a routing that is on the model, once this one is found valid.
        cuda_graphs: how prefills are captured in CUDA graphs; None if they are not.

    Attributes:
        policy: the policy.
        trace: record of the latest routed prefill, or None before the first one.
        graphs: the prefills that are held in CUDA graphs; None if none are to be.
        answers_from: where answers begin in prompts that are scored together with them; None leaves it to `labels`.
    """

    def __init__(self, adapter: Adapter, policy: Policy, replace: bool = False, cuda_graphs: CudaGraphs | None = None):
        self.policy = policy
        self.trace: Trace | None = None
        self._answers_from: int | Tensor | None = None
        self._adapter = adapter
        self._check_model()
        self._layers = RoutedLayers(adapter, policy)
        self._head_group = head_group(adapter.model)
        self._vision: Any = None if policy.reducer is None else self._reduced_vision()  # a ReducedVision
        self._ranks_ahead = set(policy.layers_ranking_ahead)
        self._calls = CallReader(adapter, policy, self._layers, self._head_group, self._vision)
        if self._vision is not None:
            self._vision.prompt_text = torch.compiler.disable(self._text_beside_images)
        self._running = _Calls()
        # torch.compile must not trace these: they read frames.
        self._count_calls = torch.compiler.disable(partial(calls_of, adapter.core))
        self._decoder_runs = torch.compiler.disable(partial(forwards_of, adapter.decoder))
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self.graphs: Graphs | None = None if cuda_graphs is None else Graphs(adapter, policy, cuda_graphs)
        self._graphed: RoutedPrefills | None = None
        self._remove_present(replace)
        self._install()

    def __repr__(self) -> str:
        state = "" if self._handles else ", removed"
        return f"Routing({type(self._adapter.model).__name__}, {self.policy}{state})"

    def summary(self) -> str:
        """Text that tells which tokens run in which layers, by the policy and by the latest prompt."""
        layers, starts = self._layers.num_layers, self.policy.stage_layers
        ends = [*starts[1:], layers]
        lines = [f"{type(self._adapter.model).__name__}: {self.policy}"]
        if starts[0] > 0:
            lines.append(f"layers 0 to {starts[0] - 1}: all tokens")
        keeps = [stage.keep for stage in self.policy.schedule]
        shares = ["what the reducer leaves"] * (len(starts) - len(keeps)) + [
            f"{keep:.1%} of the visual" for keep in keeps
        ]
        for start, end, share in zip(starts, ends, shares, strict=True):
            lines.append(f"layers {start} to {end - 1}: text and {share}")
        lines.append("no prompt yet" if self.trace is None else f"latest prompt: {self.trace.summary()}")
        return "\n".join(lines)

    # Set-up and removal

    def _check_model(self) -> None:
        model, text_model_type = self._adapter.model, self._adapter.decoder.config.model_type
        if text_model_type not in self._adapter.text_model_types:
            accepted = ", ".join(self._adapter.text_model_types)
            raise refusals.TEXT_MODEL.because(accepted=accepted, text_model_type=text_model_type)
        dtype = getattr(model, "dtype", None)
        if dtype not in FLOATING:
            raise refusals.DTYPE.because(accepted=", ".join(map(str, FLOATING)), dtype=dtype)

    def _reduced_vision(self) -> ReducedVision:
        adapter = self._adapter
        model_type = adapter.model.config.model_type
        if adapter.vision is None or (adapter.vision.model_types and model_type not in adapter.vision.model_types):
            raise refusals.REDUCER_FAMILY.because(model_type=model_type, reducer=self.policy.reducer)
        assert self.policy.reducer is not None
        vision = adapter.vision(adapter, self.policy.reducer)
        if self._head_group is not None and plans_part(adapter.model, vision.tower):
            raise refusals.REDUCER_SPLIT_HEADS.because(reducer=self.policy.reducer)
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
        self._hooked_layers = tuple(adapter.layers)
        parameters = list(inspect.signature(checkpointed(uncompiled(adapter.layers[0])).forward).parameters)
        self._token_arguments = {name: parameters.index(name) for name in adapter.token_arguments}
        deciding = {stage.start for stage in self._layers.stages} | self._ranks_ahead
        self._modules_of = {layer_idx: tuple(adapter.layers[layer_idx].modules()) for layer_idx in deciding}
        self._model_signature = inspect.signature(adapter.model.forward)
        add(adapter.model.register_forward_pre_hook(self._enter_model, with_kwargs=True))
        add(adapter.model.register_forward_hook(self._leave_model, always_call=True))
        self._decoder_signature = inspect.signature(adapter.decoder.forward)
        add(adapter.core.register_forward_pre_hook(self._begin, with_kwargs=True))
        add(adapter.core.register_forward_hook(self._end, always_call=True))
        add(adapter.decoder.register_forward_pre_hook(self._enter_decoder, with_kwargs=True))
        add(adapter.layers[0].register_forward_pre_hook(self._enter_first_layer))
        first = self._layers.stages[0].start
        if first - 1 in self._ranks_ahead:
            add(adapter.layers[first - 1].register_forward_pre_hook(self._enter_last_unrouted_layer, with_kwargs=True))
        for stage, layer_indices in enumerate(self._layers.stages):
            for layer_idx in layer_indices:
                hook = partial(self._enter_layer, stage, layer_idx)
                layer = adapter.layers[layer_idx]
                add(layer.register_forward_pre_hook(hook, with_kwargs=True, prepend=runs_first(layer)))
        if self._vision is not None:
            self._vision.install(add)
        # Features of layers before the first decision are added by the model itself.
        self._routes_features = adapter.feature_layers > first
        for layer_idx in range(adapter.feature_layers if self._routes_features else 0):
            add(adapter.layers[layer_idx].register_forward_hook(partial(self._add_layer_features, layer_idx)))
        add(adapter.layers[-1].register_forward_hook(self._leave_last_layer))
        _routings[adapter.core] = _routings[adapter.decoder] = weakref.ref(self)
        if self.graphs is not None:
            own_hooks = frozenset(handle.id for handle in self._handles)
            self._graphed = RoutedPrefills(adapter, self.graphs, own_hooks, self._prompt, self._note_trace)
        _forget_compiled_code()

    def remove(self) -> None:
        """Take every hook off the model, which then is as it was before. Calling it again does nothing."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            if self._vision is not None:
                self._vision.remove()
            for module in (self._adapter.core, self._adapter.decoder):
                _routings.pop(module, None)
            if self._graphed is not None:
                self._graphed.remove()
            _forget_compiled_code()
        self._handles.clear()
        self._running = _Calls()  # an interrupted call may have left its state

    def __enter__(self) -> Routing:
        if not self._handles:
            raise RuntimeError("routing must be on its model, got one that was removed: apply the policy anew")
        return self

    def __exit__(self, *exception) -> None:
        self.remove()

    def __deepcopy__(self, memo):
        raise TypeError("a routed model cannot be copied: remove() the routing first")

    def __reduce__(self):
        raise TypeError("a routed model cannot be pickled: remove() the routing first")

    @property
    def answers_from(self) -> int | Tensor | None:
        """Where answers begin in prompts that are scored together with them: the last token before an answer ranks.

        A position in the rows of `input_ids`, padding included, behind all visual tokens: an integer for all samples,
        or (B,) integers. A row that ends before has no answer. It holds until it is set anew, and takes precedence over
        `labels`; None leaves it to them.
        """
        return self._answers_from

    @answers_from.setter
    def answers_from(self, position: int | Tensor | None) -> None:
        self._answers_from = checked(position)

    # One call of the model

    @property
    def _call(self) -> _Call | None:
        """The innermost call of the model that runs in this thread."""
        stack = self._running.stack
        return stack[-1] if stack else None

    @property
    def _routed(self) -> Prefill | Continuation | None:
        """The part of the call that is routed."""
        return self._running.stack[-1].routed if self._running.stack else None

    def _enter_model(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        arguments = by_name(self._model_signature, args, kwargs)
        self._running.labels, self._running.mask = arguments.get("labels"), None
        if (changed := self._calls.new_tokens_alone(arguments)) is not None:
            return (), {**arguments, **changed}
        mask = arguments.get("attention_mask")
        if mask is None or not self._calls.brings_features(arguments):
            return None
        if not asks_for_router_logits(arguments, self._adapter.decoder.config):
            return None
        self._running.mask = mask
        return (), {**arguments, "attention_mask": None}

    def _leave_model(self, model: nn.Module, args: tuple, output) -> None:
        self._running.labels = self._running.mask = None

    def _begin(self, core: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self._running.stack:
            self._forget_calls(self._count_calls() - 1)  # of an interrupted call
        call = _Call()
        self._running.stack.append(call)
        answers, self._running.labels = Answers(self._running.labels, self._answers_from), None
        call.mask, self._running.mask = self._running.mask, None
        if call.mask is not None:
            kwargs = {**kwargs, "attention_mask": call.mask}
        if self._vision is None:
            call.routed = self._calls.read(args, kwargs, answers=answers)
            if call.routed is not None:
                self._check_parts()
        else:
            call.unread = args, kwargs, answers  # the decoder's input shows which tokens were dropped
        call.awaits_decoder = True
        return None if call.mask is None else (args, kwargs)

    def _end(self, core: nn.Module, args: tuple, output) -> object:
        if output is None:  # an error; `_begin` may not have seen the call
            self._forget_calls(self._count_calls() - 1)
            return None
        if not self._running.stack:
            raise RuntimeError("a routed model lost the state of a call, during which it was called anew")
        call = self._running.stack.pop()
        if call.awaits_decoder:
            raise RuntimeError(
                f"a routed {type(core).__name__} must run its decoder, and it did not: was it replaced after apply?"
            )
        if isinstance(call.routed, Prefill) and not call.routed.finished:
            raise RuntimeError(
                f"a routed prompt must run through all {len(self._adapter.layers)} decoder layers, and it did not: "
                "does the configuration name fewer (num_hidden_layers)?"
            )
        if call.mask is None or getattr(output, "router_logits", None) is None:
            return None
        if isinstance(call.routed, Prefill):
            starts = [stage.start for stage in self._layers.stages]
            rows = with_tokens(output.router_logits, self._adapter.layers, starts, call.routed.forward)
        else:
            rows = without_padding(output.router_logits, call.mask)
        output.router_logits = rows
        return output

    def _forget_calls(self, running: int) -> None:
        """Drop the state of all but the first `running` calls: the others have ended."""
        del self._running.stack[max(running, 0) :]

    def _check_parts(self) -> None:
        """Refuse modules that took the place of those with hooks, and those that were sharded since."""
        adapter = self._adapter
        check_not_sharded(*self._hooked_layers)
        if uncompiled(attrgetter(adapter.decoder_name)(adapter.core)) is not adapter.decoder:
            raise refusals.REPLACED_DECODER.because(name=adapter.decoder_name)
        layers = list(adapter.decoder.layers)
        if len(layers) != len(self._hooked_layers) or not all(map(is_, layers, self._hooked_layers)):
            pairs = zip_longest(layers, self._hooked_layers)
            layer_idx = next(layer_idx for layer_idx, (layer, hooked) in enumerate(pairs) if layer is not hooked)
            raise refusals.REPLACED_LAYER.because(layer_idx=layer_idx)

    def _text_beside_images(self) -> PromptText | None:
        """The text of the prompt whose images are encoded; None if it is not known."""
        call = self._call
        return self._calls.text_beside_images(call.unread if call is not None and self._count_calls() else None)

    # Inside the language model

    def _enter_decoder(self, decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        state = self._call
        if state is None or not state.awaits_decoder:
            raise self._called_alone()
        state.awaits_decoder = False
        if self._vision is None and state.routed is None:
            return None
        arguments = by_name(self._decoder_signature, args, kwargs)
        if self._vision is not None:
            (args, kwargs, answers), state.unread = state.unread, None
            state.routed = self._read_reduced(args, kwargs, answers, arguments)
            if state.routed is not None:
                self._check_parts()
        call = state.routed
        if call is None:
            return (), arguments
        given = arguments.get("position_ids")
        changed = self._adapter.keep_rows(arguments)
        if isinstance(call, Prefill):
            call.forward.inputs = arguments.get("inputs_embeds")
            call.note_positions(given)
            if self._routes_features:
                call.layer_features = self._adapter.take_layer_features(arguments)
            return ((), arguments) if changed or call.layer_features or self._vision is not None else None
        positions = call.position_ids(given)
        if positions is not None:
            arguments["position_ids"] = positions
        return ((), arguments) if changed or positions is not None else None

    def _enter_first_layer(self, layer: Module, args: tuple) -> None:
        if self._call is None and self._decoder_runs():  # by its `forward`, past its hooks
            raise self._called_alone()

    def _called_alone(self) -> Exception:
        return refusals.DECODER_ALONE.because(decoder=type(self._adapter.decoder).__name__)

    def _read_reduced(
        self, args: tuple, kwargs: dict, answers: Answers, arguments: dict
    ) -> Prefill | Continuation | None:
        """Read a call of the model; the marks of dropped tokens are taken out of its decoder's input."""
        vision, embeds = self._vision, arguments["inputs_embeds"]
        found: list[tuple[Tensor, Tensor]] = []

        def marks() -> tuple[Tensor, Tensor]:
            found.append(vision.marks(embeds))
            return found[-1]

        call = self._calls.read(args, kwargs, marks, answers)
        if isinstance(call, Prefill):
            counted, visual = call.forward.prompt.extra_counts, sum(call.forward.prompt.visual_counts)
            if counted["foreign"] or not (counted["dropped"] or vision.kept_all):
                raise refusals.FOREIGN_FEATURES.because(
                    visual=visual, dropped=counted["dropped"], foreign=counted["foreign"]
                )
        if found:
            arguments["inputs_embeds"] = embeds.masked_fill(found[-1][1][:, :, None], 0)
        return call

    def _enter_layer(
        self, stage: int, layer_idx: int, layer: Module, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict] | None:
        # This runs in every layer of every call. `kwargs` is the hooks' own: it is changed in place.
        stack = self._running.stack
        call = stack[-1].routed if stack else None
        if call is None:
            return None
        if not isinstance(call, Prefill):
            if self.policy.positions == "contiguous" and kwargs["position_embeddings"] is not None:
                embeddings_at = partial(self._adapter.embeddings_at, args[0], kind=self._layers.kinds[layer_idx])
                kwargs["position_embeddings"] = call.position_embeddings(stage, layer_idx, embeddings_at)
            kwargs["attention_mask"] = call.mask(stage, layer_idx, args[0], kwargs)
            return None
        given = kwargs["position_embeddings"]  # of the full sequence
        decides = call.stage == stage
        if decides:
            args = self._decide(call, layer_idx, layer, args[0], kwargs), *args[1:]
        if layer_idx in self._ranks_ahead:
            self._rank_ahead(call, layer_idx, layer, args[0], given)
        kwargs["position_embeddings"] = self._position_embeddings(call, stage, layer_idx, args[0], given)
        kwargs["position_ids"] = None  # of the full sequence; layers rotate by the embeddings
        kwargs["attention_mask"] = call.mask(stage, layer_idx, args[0], kwargs["attention_mask"])
        if call.forward.freezes(stage):
            cache_frozen(self._adapter, layer, call.forward.frozen(), kwargs)
        if self._token_arguments:
            args = self._of_running_tokens(call, stage, args, kwargs)
        return (args, kwargs) if decides or self._token_arguments else None

    def _of_running_tokens(self, call: Prefill, stage: int, args: tuple, kwargs: dict) -> tuple:
        """Arguments of a layer, those with a row for each token cut to the tokens that run; kwargs are changed."""
        arguments = list(args)
        for name, place in self._token_arguments.items():
            if name in kwargs:
                kwargs[name] = call.of_tokens(stage, kwargs[name])
            elif place < len(arguments):
                arguments[place] = call.of_tokens(stage, arguments[place])
        return tuple(arguments)

    def _enter_last_unrouted_layer(self, layer: Module, args: tuple, kwargs: dict) -> None:
        call = self._routed
        if isinstance(call, Prefill):
            layer_idx = self._layers.stages[0].start - 1
            self._rank_ahead(call, layer_idx, layer, args[0], kwargs["position_embeddings"])

    def _decide(self, call: Prefill, layer_idx: int, layer: Module, hidden: Tensor, kwargs: dict) -> Tensor:
        call.fill(cache_of(kwargs))
        hidden, given = to_execution_device(self._modules_of[layer_idx], hidden), kwargs["position_embeddings"]
        rotary = self._tables(call, layer, given, hidden)
        hidden = call.forward.decide(hidden, rotary, LayerProjection(self._adapter, layer_idx, self._head_group, call))
        kind = self._layers.kinds[layer_idx]
        if given is None:
            call.position_embeddings = {}
            return hidden
        if self.policy.positions == "contiguous":
            embeddings = self._adapter.embeddings_at(hidden, call.forward.position_ids(hidden.device), kind)
            call.forward.rotary = self._adapter.tables(layer, embeddings, hidden.shape[0])
        else:
            embeddings = self._adapter.position_embeddings(*call.forward.rotary)
        call.position_embeddings = {kind: embeddings}
        return hidden

    def _position_embeddings(self, call: Prefill, stage: int, layer_idx: int, hidden: Tensor, given: object) -> object:
        """Those of the tokens that run in a layer of a stage; given: those of the full sequence, None without any."""
        if given is None:
            return None
        adapter, found = self._adapter, call.position_embeddings
        kind = self._layers.kinds[layer_idx if adapter.rotates_by_kind else self._layers.stages[stage].start]
        if kind not in found:
            if self.policy.positions == "contiguous":
                found[kind] = adapter.embeddings_at(hidden, call.forward.position_ids(hidden.device), kind)
            else:
                tables = adapter.tables(adapter.layers[layer_idx], given, hidden.shape[0])
                index = on_device(tables[0].device, call.forward.kept[-1])
                found[kind] = adapter.position_embeddings(*ops.gather_tokens(index, *tables))
        return found[kind]

    def _tables(self, call: Prefill, layer: Module, given: object, hidden: Tensor) -> tuple[Tensor, ...]:
        """cos and sin of the full sequence, from its position embeddings; without any, those that rotate nothing."""
        if given is None:
            shape = hidden.shape[0], call.forward.prompt.length, 2
            return hidden.new_ones(shape), hidden.new_zeros(shape)
        return self._adapter.tables(layer, given, hidden.shape[0])

    def _rank_ahead(
        self, call: Prefill, layer_idx: int, layer: Module, hidden: Tensor, position_embeddings: object
    ) -> None:
        """Rank for the decision in the next layer; position_embeddings are those of the full sequence."""
        hidden = to_execution_device(self._modules_of[layer_idx], hidden)
        rotary = self._tables(call, layer, position_embeddings, hidden)
        call.forward.score(hidden, rotary, LayerProjection(self._adapter, layer_idx, self._head_group, call))

    def _add_layer_features(self, layer_idx: int, layer: Module, args: tuple, output: Tensor) -> Tensor | None:
        call = self._routed
        if not isinstance(call, Prefill) or layer_idx >= len(call.layer_features):
            return None
        return call.forward.add(output, call.layer_features[layer_idx])

    def _leave_last_layer(self, layer: Module, args: tuple, output: Tensor) -> Tensor | None:
        call = self._routed
        if not isinstance(call, Prefill):
            return None
        full = call.forward.finish(output)
        call.record()
        self._note_trace(call)
        return full

    def _note_trace(self, call: Prefill) -> None:
        self.trace = Trace.of(call.forward, call.past.length if call.past else 0)

    # In CUDA graphs

    def _prompt(self) -> Prefill | None:
        """The prompt that is routed in the call that runs, if it is one."""
        call = self._routed
        return call if isinstance(call, Prefill) else None

    def capture(
        self,
        batch: int = 1,
        lengths: Iterable[int] = (),
        visual: Iterable[int | Sequence[int]] = (),
        padded: bool = False,
    ) -> list[PrefillKey]:
        """Capture prefills in CUDA graphs ahead, each length with each number of visual tokens.

        A graph serves prompts whose length, padded to `CudaGraphs.multiple`, and visual tokens are the same, and which
        do not end with an image.

        Args:
            batch: samples of a call.
            lengths: of prompts, all tokens counted, padding too.
            visual: visual tokens of each sample: a number for all samples, or one for each.
            padded: whether the samples are of different lengths.

        Returns:
            The keys of the prefills, as `graphs.keys` has them.

        Raises:
            RuntimeError: the policy was applied without `cuda_graph`, or was removed.
            ValueError: the numbers do not fit each other.
            NotImplementedError: something cannot be captured, which is named.
        """
        if self.graphs is None or not self._handles:
            raise RuntimeError("routing must be on its model with cuda_graph=True to capture prefills, got one without")
        return self.graphs.capture(batch, lengths, visual, padded)


def routings_on(model: nn.Module) -> list[Routing]:
    """The routings that are on a module or on modules inside it."""
    found = (_routings.get(module, lambda: None)() for module in model.modules())
    return list(dict.fromkeys(routing for routing in found if routing is not None))


def _routing_on(adapter: Adapter) -> Routing | None:
    """The routing that is on a model."""
    return next(iter(routings_on(adapter.core)), None)


def _forget_compiled_code() -> None:
    """Code that `torch.compile` made before hooks came or went does not look for them again."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
