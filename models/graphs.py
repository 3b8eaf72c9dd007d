"""Prefills captured in CUDA graphs: which calls are, how many are held, and what replaces the decoder's `forward`."""

from __future__ import annotations

import functools
import inspect
import itertools
import operator
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, compress, product, repeat
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from reroute_kernels.backends import active_backend
from reroute_kernels.policy import Policy
from reroute_kernels.rankings import (
    AllText,
    KeyNorm,
    LastQuery,
    Mixed,
    Random,
    RankingLike,
    Remembered,
    Uniform,
    part_of,
)
from reroute_kernels.routing import RoutedForward
from reroute_kernels.trace import DecisionScores

from . import refusals
from .adapter import CACHE_NAMES, Adapter, cache_name, cache_of
from .calls import by_name
from .checkpointing import checkpointed
from .masks import mask_format
from .modules import Module, uncompiled
from .prefill import Prefill
from .refusals import refuse
from .static import Counts, PrefillKey, Result, StaticPrefill, decoder_positions, tables_of
from .tensor_parallel import head_group

_STATIC_RANKINGS = (AllText, KeyNorm, LastQuery, Random, Uniform)
_STATIC_WRAPPERS = (Mixed, Remembered)
_STATIC_FORMS = ("eager", "flash_attention", "sdpa")
_STATIC_EXPERTS = ("batched_mm", "grouped_mm")
_PARTS = ("embed_tokens", "layers", "norm", "rotary_emb")
_GLOBAL = torch.nn.modules.module
_FEATURES = ("visual_pos_masks", "deepstack_visual_embeds")
# Arguments of a decoder that are read, or that tell nothing of an empty cache.
_KNOWN_ARGUMENTS = {
    *("input_ids", "inputs_embeds", "attention_mask", "position_ids", "use_cache", "cache_position", "logits_to_keep"),
    *CACHE_NAMES,
    *_FEATURES,
}


@dataclass(frozen=True)
class CudaGraphs:
    """How prefills are captured in CUDA graphs, as the argument `cuda_graph` of `apply` takes it.

    Args:
        require: whether what cannot be captured is refused; else it runs without a graph, after one warning a reason.
        multiple: prompts are padded to multiples of so many tokens, so that those of similar lengths share a graph.
        limit: how many graphs are held; the one that was used longest ago goes first.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is below 1.

    >>> CudaGraphs(multiple=128, limit=4)
    CudaGraphs(require=False, multiple=128, limit=4)
    """

    require: bool = False
    multiple: int = 64
    limit: int = 16

    def __post_init__(self):
        if not isinstance(self.require, bool):
            raise TypeError(f"require must be a bool, got {self.require!r}")
        for name in ("multiple", "limit"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")

    @classmethod
    def of(cls, cuda_graph: object) -> CudaGraphs | None:
        """From the argument of `apply`: False, True, `"require"` or the settings themselves.

        Raises:
            ValueError: it is none of these.
        """
        if isinstance(cuda_graph, cls):
            return cuda_graph
        if isinstance(cuda_graph, bool):
            return cls() if cuda_graph else None
        if cuda_graph == "require":
            return cls(require=True)
        raise ValueError(f'cuda_graph must be False, True, "require" or CudaGraphs, got {cuda_graph!r}')


# Facts that refusals.GRAPH_MODEL_RULES and refusals.GRAPH_CALL_RULES read


def _is_static(ranking: Any) -> bool:
    """Whether a ranking is known to give scores of fixed shapes, and to read nothing from the device."""
    while type(ranking) in _STATIC_WRAPPERS:
        ranking = ranking.ranking
    return type(ranking) in _STATIC_RANKINGS


class _Parts:
    """Modules and weights that a captured prefill reads: it holds as long as these are where they were."""

    def __init__(self, adapter: Adapter):
        decoder = adapter.decoder
        norm, rotary = (getattr(decoder, name, None) for name in ("norm", "rotary_emb"))
        roots = [*decoder.layers, *(module for module in (norm, rotary) if isinstance(module, nn.Module))]
        self.modules = list(dict.fromkeys(module for root in roots for module in root.modules()))
        # This is read in every call. Whatever is put into a module takes the place of something, or comes beside it.
        tables = (table for module in self.modules for table in (module._modules, module._parameters) if table)
        self._tables = [*tables, decoder._modules, decoder.layers._modules]
        self._found = list(self._values())
        tensors = (value for value in self._found if isinstance(value, Tensor))
        self._weights = [tensor for tensor in tensors if type(tensor) in (Tensor, nn.Parameter)]
        self._places = self._pointers()
        self.attributes = [vars(module) for module in self.modules]
        self.hooks = [table for module in self.modules for table in (module._forward_hooks, module._forward_pre_hooks)]
        kinds = map(type, self.modules)
        self.has_experts = any(hasattr(module, "experts") for module in self.modules)
        self.peft_module = next((kind.__name__ for kind in kinds if kind.__module__.partition(".")[0] == "peft"), None)
        wrapped = (layer for layer in decoder.layers if checkpointed(uncompiled(layer)) is not layer)
        self.wrapped_layer = next((type(layer).__name__ for layer in wrapped), None)

    def _values(self) -> Iterator[object]:
        return chain.from_iterable(map(dict.values, self._tables))

    def _pointers(self) -> list[int]:
        return list(map(Tensor.data_ptr, self._weights))

    def hold(self) -> bool:
        """Whether the modules and the places of their weights are what they were."""
        found = list(self._values())
        same = len(found) == len(self._found) and all(map(operator.is_, found, self._found))
        return same and self._pointers() == self._places


@dataclass(eq=False)
class DecoderFacts:
    """Facts about a model and a policy, None if its prompts are not routed."""

    adapter: Adapter
    policy: Policy | None
    parts: _Parts

    known_parts = ", ".join(_PARTS)
    static_experts = (None, *_STATIC_EXPERTS)
    accepted_experts = ", ".join(_STATIC_EXPERTS)
    static_forms = _STATIC_FORMS
    accepted_forms = ", ".join(_STATIC_FORMS)

    @property
    def unable_layer(self) -> int | None:
        """The first layer without full attention."""
        kinds = self.adapter.layer_types
        return next((layer for layer, kind in enumerate(kinds) if kind != "full_attention"), None)

    @property
    def unable_kind(self) -> str | None:
        return None if self.unable_layer is None else self.adapter.layer_types[self.unable_layer]

    @property
    def own_ranking(self) -> RankingLike | None:
        """The first ranking that is not of this library."""
        rankings = () if self.policy is None else self.policy.rankings
        return next((ranking for ranking in rankings if not _is_static(ranking)), None)

    @property
    def freezes(self) -> bool:
        return self.policy is not None and self.policy.action == "freeze"

    @property
    def head_group(self) -> object:
        return head_group(self.adapter.model)

    @property
    def unknown_part(self) -> str | None:
        """A part of the decoder that no prefill here runs, or one that is missing."""
        return next(iter(set(self.adapter.decoder._modules).symmetric_difference(_PARTS)), None)

    @property
    def embedding_scale(self) -> float:
        """The factor of the embeddings that the decoder multiplies them by, which no prefill here does."""
        return getattr(self.adapter.decoder, "embedding_multiplier", None) or 1.0

    @property
    def token_argument(self) -> str | None:
        """An argument with entries for single tokens, which no prefill here hands the layers or adds before them."""
        features = (name for name in self.adapter.decoder_arguments if name == "deepstack_features")
        return next(iter((*self.adapter.token_arguments, *features)), None)

    @property
    def wrapped_layer(self) -> str | None:
        """Class of the first layer that something is put around."""
        return self.parts.wrapped_layer

    @property
    def peft_module(self) -> str | None:
        """Class of the first module that PEFT put in."""
        return self.parts.peft_module

    @property
    def experts(self) -> str | None:
        """How mixtures of experts run; None if there are none."""
        config = self.adapter.decoder.config
        return getattr(config, "_experts_implementation", "eager") if self.parts.has_experts else None

    @property
    def implementation(self) -> str:
        return self.adapter.decoder.config._attn_implementation

    @property
    def form(self) -> str | None:
        """Of the attention masks, as in masks.py."""
        return mask_format(self.implementation)

    @property
    def rope_type(self) -> str:
        return getattr(self.adapter.decoder.rotary_emb, "rope_type", "default")

    @property
    def rotates_by_length(self) -> bool:
        contiguous = self.policy is not None and self.policy.positions == "contiguous"
        return contiguous and self.rope_type in ("dynamic", "longrope")

    @property
    def device(self) -> torch.device:
        return next(self.adapter.layers.parameters()).device

    @property
    def device_captures(self) -> bool:
        return self.device.type in _RUNNERS


@dataclass(eq=False)
class PrefillFacts:
    """Facts about a prompt that is prefilled.

    Args:
        adapter: of the model.
        parts: of its decoder.
        arguments: of the decoder, by name.
        cache: that is filled, or None.
        has_past: whether it holds tokens.
        is_padded: whether some sample has padding.
        ranks_within: whether tokens stand behind the one that ranks.
        own_hooks: numbers of the hooks that the routing has on the model.
        is_replaced: whether the decoder had a `forward` of its own before this one.
        is_compiled: whether `torch.compile` compiles the call.
    """

    adapter: Adapter
    parts: _Parts
    arguments: dict
    cache: object
    has_past: bool
    is_padded: bool
    ranks_within: bool
    own_hooks: frozenset[int]
    is_replaced: bool
    is_compiled: bool

    @property
    def has_gradients(self) -> bool:
        return torch.is_grad_enabled()

    @property
    def is_training(self) -> bool:
        return self.adapter.decoder.training

    @property
    def is_autocast(self) -> bool:
        return torch.is_autocast_enabled(self.arguments["inputs_embeds"].device.type)

    @property
    def is_watched(self) -> bool:
        """Whether a mode of PyTorch is told of every operation."""
        return torch._C._len_torch_dispatch_stack() > 0

    @property
    def replaced_module(self) -> str | None:
        """Class of the first module whose instance has a `forward` of its own."""
        attributes = self.parts.attributes
        if self.is_replaced:
            return type(self.adapter.decoder).__name__
        if not any(map(operator.contains, attributes, repeat("forward"))):
            return None
        found = zip(self.parts.modules, attributes, strict=True)
        return next(type(module).__name__ for module, attribute in found if "forward" in attribute)

    @property
    def hooked_module(self) -> str | None:
        """Class of the first module with a hook that neither the routing nor transformers put there."""
        if _GLOBAL._global_forward_hooks or _GLOBAL._global_forward_pre_hooks:
            return "Module"
        for number, table in compress(enumerate(self.parts.hooks), self.parts.hooks):
            for handle, hook in table.items():
                if handle not in self.own_hooks and "transformers" not in getattr(hook, "__module__", ""):
                    return type(self.parts.modules[number // 2]).__name__
        return None

    @property
    def cache_name(self) -> str:
        return cache_name(self.adapter.core)

    @property
    def cache_class(self) -> str:
        return type(self.cache).__name__

    @property
    def cache_is_plain(self) -> bool:
        from transformers import DynamicCache

        return self.cache is None or (type(self.cache) is DynamicCache and not getattr(self.cache, "offloading", False))

    @property
    def form(self) -> str | None:
        return mask_format(self.adapter.decoder.config._attn_implementation)

    @property
    def unknown_argument(self) -> str | None:
        """The first argument beside those that are read here."""
        for name, value in self.arguments.items():
            if name == "return_dict":
                if value is False:
                    return name
            elif name not in _KNOWN_ARGUMENTS and value is not None and value is not False:
                return name
        return None


# Graphs


class _Runner(Protocol):
    def replay(self) -> None: ...

    @property
    def nbytes(self) -> int: ...


class _CudaGraph:
    """A prefill in a CUDA graph.

    Args:
        prefill: with its buffers filled.
        pool: the memory that graphs share; what one leaves there is read before another runs.
    """

    def __init__(self, prefill: StaticPrefill, pool: Any):
        device = prefill.key.device
        with torch.cuda.device(device):
            current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                prefill.run()  # compiles kernels, and lets libraries take their memory
            current.wait_stream(stream)
            torch.cuda.empty_cache()  # as the capture does, which would hide what it takes
            before = torch.cuda.memory_reserved()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                prefill.run()
            self.nbytes = max(torch.cuda.memory_reserved() - before, 0)

    def replay(self) -> None:
        self._graph.replay()


def _cuda_pool() -> Any:
    return torch.cuda.graph_pool_handle()


# By type of device: what runs a prefill, and what makes the memory that its graphs share.
_RUNNERS: dict[str, tuple[Callable[[StaticPrefill, Any], _Runner], Callable[[], Any]]] = {
    "cuda": (_CudaGraph, _cuda_pool),
}


class _Held:
    """A prefill that is held, with what replays it."""

    def __init__(self, prefill: StaticPrefill, runner: _Runner):
        self.prefill, self.runner = prefill, runner

    @property
    def nbytes(self) -> int:
        return self.prefill.nbytes + self.runner.nbytes


class Graphs:
    """The prefills of one model that are held in CUDA graphs.

    Args:
        adapter: of the model.
        policy: what is routed; None if nothing is.
        settings: how prefills are captured.

    Attributes:
        settings: the same.
    """

    def __init__(self, adapter: Adapter, policy: Policy | None, settings: CudaGraphs):
        self.settings = settings
        self._adapter, self._policy = adapter, policy
        self._held: OrderedDict[PrefillKey, _Held] = OrderedDict()
        self._failed: dict[PrefillKey, str] = {}
        self._warned: set[str] = set()
        self._pools: dict[torch.device, Any] = {}
        self._lock = threading.Lock()
        self._read: dict[torch.device, Any] = {}  # events after which buffers and results may be overwritten
        self._parts = _Parts(adapter)
        if settings.require:
            refuse(self._facts(), refusals.GRAPH_MODEL_RULES)

    def __repr__(self) -> str:
        return f"Graphs({len(self)} held, {self.bytes:,} bytes)"

    def __len__(self) -> int:
        return len(self._held)

    @property
    def keys(self) -> list[PrefillKey]:
        """Keys of the prefills that are held, the one that was used longest ago first."""
        return list(self._held)

    @property
    def bytes(self) -> int:
        """Bytes of device memory that are held. Memory that several graphs share counts once, for the first of them."""
        return sum(held.nbytes for held in self._held.values())

    def clear(self) -> None:
        """Free all graphs; they are captured anew when they are needed."""
        with self._lock:
            self._held.clear()
            self._failed.clear()
            self._pools.clear()

    # Refused, or run without a graph

    def _facts(self) -> DecoderFacts:
        if not self._parts.hold():  # a module was replaced, or weights were moved
            self.clear()
            self._parts = _Parts(self._adapter)
        return DecoderFacts(self._adapter, self._policy, self._parts)

    def check(self, facts: PrefillFacts | None = None) -> None:
        """Check that a prefill can be captured.

        Raises:
            NotImplementedError: it cannot, for a reason that is named.
        """
        refuse(self._facts(), refusals.GRAPH_MODEL_RULES)
        if facts is not None:
            refuse(facts, refusals.GRAPH_CALL_RULES)

    @property
    def parts(self) -> _Parts:
        return self._parts

    def refused(self, reason: NotImplementedError) -> None:
        """Warn once of what runs without a graph, or raise the reason if graphs are required."""
        if self.settings.require:
            raise reason
        if str(reason) not in self._warned:
            self._warned.add(str(reason))
            warnings.warn(f"a prefill runs without a CUDA graph: {reason}", RuntimeWarning, stacklevel=2)

    # Captured and replayed

    def key(
        self,
        size: tuple[int, int],
        like: Tensor,
        padded: bool,
        features: int,
        counts: Counts,
    ) -> PrefillKey:
        """Of a prompt.

        Args:
            size: its samples, and their tokens.
            like: a tensor with the dtype and the device of the hidden states.
            padded: whether some sample has padding.
            features: how many layers are followed by an addition.
            counts: of its samples; empty if every token runs in every layer.
        """
        config = self._adapter.decoder.config
        implementation = config._attn_implementation
        form = mask_format(implementation)
        assert form is not None  # checked before
        return PrefillKey(
            batch=size[0],
            length=self._padded(size[1]),
            tokens=tuple(map(self._padded, counts.tokens)),
            visual=tuple(counts.visual),
            pool=tuple(counts.pool),
            skippable=tuple(counts.skippable),
            padded=padded,
            features=features,
            dtype=like.dtype,
            device=like.device,
            form=form,
            settings=(implementation, getattr(config, "_experts_implementation", None), active_backend(like.device)),
        )

    def _padded(self, length: int) -> int:
        return -(-length // self.settings.multiple) * self.settings.multiple

    def replay(
        self,
        key: PrefillKey,
        load: Callable[[StaticPrefill], None],
        tables: Sequence[Tensor],
        read: Callable[[Result], None],
    ) -> None:
        """Run a prefill, captured first if it is not held.

        Args:
            key: of the prefill.
            load: fills its buffers.
            tables: of the rotary embedding, for their sizes and dtypes.
            read: copies what is wanted of its result, which the next prefill overwrites.

        Raises:
            NotImplementedError: the prefill could not be captured.
        """
        with self._lock, torch.no_grad():
            self._wait(key.device)
            held = self._held.get(key)
            if held is None:
                held = self._capture(key, load, tables)
            else:
                self._held.move_to_end(key)
                load(held.prefill)
            held.runner.replay()
            assert held.prefill.result is not None
            read(held.prefill.result)
            self._note_read(key.device)

    def _capture(self, key: PrefillKey, load: Callable[[StaticPrefill], None], tables: Sequence[Tensor]) -> _Held:
        if key in self._failed:
            raise refusals.CAPTURE_FAILED.because(failure=self._failed[key])
        while len(self._held) >= self.settings.limit:
            self._held.popitem(last=False)
        new_runner, new_pool = _RUNNERS[key.device.type]
        pool = self._pools.get(key.device)
        if pool is None:
            pool = self._pools[key.device] = new_pool()
        try:
            with torch.inference_mode(False), torch.no_grad():
                prefill = StaticPrefill(key, self._adapter, self._policy, tables)
                load(prefill)
                held = _Held(prefill, new_runner(prefill, pool))
        except RuntimeError as failure:
            self._failed[key] = f"{type(failure).__name__}: {failure}"
            raise refusals.CAPTURE_FAILED.because(failure=self._failed[key]) from failure
        self._held[key] = held
        return held

    def _wait(self, device: torch.device) -> None:
        """Let the current stream wait until the result before has been read in another."""
        if device in self._read:
            torch.cuda.current_stream(device).wait_event(self._read[device])

    def _note_read(self, device: torch.device) -> None:
        if device.type == "cuda":
            self._read[device] = torch.cuda.current_stream(device).record_event()

    def capture(
        self, batch: int, lengths: Iterable[int], visual: Iterable[int | Sequence[int]], padded: bool
    ) -> list[PrefillKey]:
        """Capture prefills ahead; see `Routing.capture`."""
        self.check()
        adapter = self._adapter
        weight = next(adapter.layers.parameters())
        like = torch.zeros(
            batch, 1, adapter.decoder.config.hidden_size, dtype=adapter.model.dtype, device=weight.device
        )
        tables = tables_of(adapter, like, decoder_positions(adapter, None, like))
        keys = []
        for length, count in product(lengths, visual):
            counts = tuple(repeat(count, batch)) if isinstance(count, int) else tuple(count)
            if len(counts) != batch:
                raise ValueError(f"visual must hold numbers, or one for each of {batch} samples, got {counts}")
            if max(counts) >= length:
                raise ValueError(f"visual must stay below the length of the prompt, {length}, got {max(counts)}")
            features = adapter.feature_layers if any(counts) else 0
            key = self.key((batch, length), like, padded, features, Counts([length] * batch, counts, counts, counts))
            self.replay(key, StaticPrefill.load_any, tables, lambda result: None)
            keys.append(key)
        return keys


class DecoderForward:
    """Replaces the `forward` of one decoder, until it is restored.

    Args:
        decoder: of the model.
        run: takes the arguments of a call and what they are handed to if nothing replaces it.
    """

    def __init__(self, decoder: Module, run: Callable[[Callable, tuple, dict], object]):
        self._decoder = decoder
        self._run: Callable[[Callable, tuple, dict], object] | None = run
        self._before: Any = vars(decoder).get("forward")
        original = decoder.forward

        @functools.wraps(original)
        def forward(*args, **kwargs):
            return original(*args, **kwargs) if self._run is None else self._run(original, args, kwargs)

        self._forward = forward
        decoder.forward = forward

    @property
    def replaces_another(self) -> bool:
        """Whether the instance had a `forward` of its own before."""
        return self._before is not None

    def restore(self) -> None:
        """Put back what was there. Under a wrapper that came later, this one stays and changes nothing."""
        self._run = None
        if vars(self._decoder).get("forward") is not self._forward:
            return
        if self._before is None:
            del self._decoder.forward
        else:
            self._decoder.forward = self._before


class _Prefills:
    """Has prefills of one model replayed from CUDA graphs, and all else run as ever.

    Args:
        adapter: of the model.
        graphs: of its prefills.
        own_hooks: numbers of the hooks that the routing has on the model.
    """

    def __init__(self, adapter: Adapter, graphs: Graphs, own_hooks: frozenset[int] = frozenset()):
        self._adapter, self._graphs, self._own_hooks = adapter, graphs, own_hooks
        self._signature = inspect.signature(adapter.decoder.forward)
        # Whether a call can be captured is no matter of torch.compile.
        self._replayed = torch.compiler.disable(self._try)
        self._replaced = DecoderForward(adapter.decoder, self._forward)

    def remove(self) -> None:
        """Give the decoder its `forward` back, and free the graphs."""
        self._replaced.restore()
        self._graphs.clear()

    def _forward(self, original: Callable, args: tuple, kwargs: dict) -> object:
        prefill = self._prefill(args, kwargs)
        if prefill is None:
            return original(*args, **kwargs)
        output = self._replayed(prefill, args, kwargs, torch.compiler.is_compiling())
        return original(*args, **kwargs) if output is None else output

    def _try(self, prefill: object, args: tuple, kwargs: dict, is_compiled: bool) -> object:
        """The output of the decoder, or None if the call runs without a graph."""
        arguments = by_name(self._signature, args, kwargs)
        try:
            facts = PrefillFacts(
                adapter=self._adapter,
                parts=self._graphs.parts,
                arguments=arguments,
                cache=cache_of(arguments),
                own_hooks=self._own_hooks,
                is_replaced=self._replaced.replaces_another,
                is_compiled=is_compiled,
                **self._facts(prefill, arguments),
            )
            self._graphs.check(facts)
            return self._replay(prefill, arguments)
        except NotImplementedError as reason:
            self._graphs.refused(reason)
            return None

    def _run(
        self,
        arguments: dict,
        features: Sequence[Tensor],
        valid: Tensor | None,
        forward: RoutedForward | None,
        read: Callable[[Result], None],
    ) -> None:
        """Replay the prefill of the decoder's arguments; others as those of `StaticPrefill.load`."""
        embeds = arguments["inputs_embeds"]
        positions = decoder_positions(self._adapter, arguments.get("position_ids"), embeds)
        tables = tables_of(self._adapter, embeds, positions)
        counts = Counts() if forward is None else Counts.of(forward.prompt)
        key = self._graphs.key(embeds.shape[:2], embeds, valid is not None, len(features), counts)

        def load(prefill: StaticPrefill) -> None:
            prefill.load(embeds, tables, features, valid, forward)

        self._graphs.replay(key, load, tables, read)

    def _cache(self, arguments: dict) -> Any:
        """The cache that the decoder fills, made as it makes one."""
        from transformers import DynamicCache

        cache, config = cache_of(arguments), self._adapter.decoder.config
        used = arguments.get("use_cache")
        if cache is None and (getattr(config, "use_cache", False) if used is None else used):
            return DynamicCache(config=config)
        return cache

    # Of each kind

    def _prefill(self, args: tuple, kwargs: dict) -> Any:
        """The prefill that a call of the decoder is, or None."""
        raise NotImplementedError

    def _facts(self, prefill: Any, arguments: dict) -> dict[str, Any]:
        """Facts about it, by name."""
        raise NotImplementedError

    def _replay(self, prefill: Any, arguments: dict) -> object:
        """The output of the decoder."""
        raise NotImplementedError


class RoutedPrefills(_Prefills):
    """Has routed prompts replayed.

    Args:
        adapter, graphs, own_hooks: as in `_Prefills`.
        prompt: gives the prompt that is routed in the call that runs, or None.
        finished: is told of each prompt that was replayed.
    """

    def __init__(
        self,
        adapter: Adapter,
        graphs: Graphs,
        own_hooks: frozenset[int],
        prompt: Callable[[], Prefill | None],
        finished: Callable[[Prefill], None],
    ):
        self._prompt, self._finished = prompt, finished
        super().__init__(adapter, graphs, own_hooks)

    def _prefill(self, args: tuple, kwargs: dict) -> Prefill | None:
        prompt = self._prompt()
        return None if prompt is None or prompt.stage else prompt

    def _facts(self, prefill: Prefill, arguments: dict) -> dict[str, Any]:
        prompt = prefill.forward.prompt
        has_past = prefill.past is not None
        return {"has_past": has_past, "is_padded": prompt.padded, "ranks_within": prompt.ranks_within}

    def _replay(self, prefill: Prefill, arguments: dict) -> object:
        forward, cache = prefill.forward, self._cache(arguments)
        features = prefill.layer_features or self._adapter.take_layer_features(arguments)
        outputs: list[Tensor] = []

        def read(result: Result) -> None:
            prefill.fill(cache)
            hand_over(result, self._cached_lengths(forward), cache)
            take_decisions(result, forward)
            outputs.append(forward.with_padding(result.hidden[:, : forward.prompt.length].clone()))

        self._run(arguments, features, forward.prompt.valid, forward, read)
        prefill.record()
        self._finished(prefill)
        return output_of(outputs[0], cache)

    @staticmethod
    def _cached_lengths(forward: RoutedForward) -> Iterator[int]:
        """How many tokens each layer caches: those of the prompt, then those of its stage."""
        starts = dict(zip(forward.policy.stage_layers, forward.lengths, strict=True))
        length = forward.prompt.length
        for layer_idx in itertools.count():
            length = starts.get(layer_idx, length)
            yield length


class UnroutedPrefills(_Prefills):
    """Has the prompts of a model without a routing replayed; a context manager.

    Attributes:
        graphs: the prefills that are held.
    """

    def __init__(self, adapter: Adapter, graphs: Graphs):
        self.graphs = graphs
        super().__init__(adapter, graphs)

    def __enter__(self) -> UnroutedPrefills:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _prefill(self, args: tuple, kwargs: dict) -> bool | None:
        embeds = by_name(self._signature, args, kwargs).get("inputs_embeds")
        return None if embeds is None or embeds.shape[1] == 1 else True  # else a step

    def _facts(self, prefill: object, arguments: dict) -> dict[str, Any]:
        mask, cache = arguments.get("attention_mask"), cache_of(arguments)
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise refusals.UNROUTED_MASK.because(mask=type(mask).__name__)
        has_past = cache is not None and bool(cache.get_seq_length())
        return {"has_past": has_past, "is_padded": self._valid(arguments) is not None, "ranks_within": False}

    @staticmethod
    def _valid(arguments: dict) -> Tensor | None:
        """(B, L) bool, False at padding; None if there is none, which is read from the device."""
        mask = arguments.get("attention_mask")
        return None if mask is None or bool(mask.all()) else mask.bool()

    def _replay(self, prefill: object, arguments: dict) -> object:
        length, cache = arguments["inputs_embeds"].shape[1], self._cache(arguments)
        features = self._adapter.take_layer_features(arguments)
        outputs: list[Tensor] = []

        def read(result: Result) -> None:
            hand_over(result, repeat(length), cache)
            outputs.append(result.hidden[:, :length].clone())

        self._run(arguments, features, self._valid(arguments), None, read)
        return output_of(outputs[0], cache)


def hand_over(result: Result, lengths: Iterable[int], cache: Any) -> None:
    """Copy the keys and values of each layer, as many tokens as `lengths` tell, into a cache, or nowhere."""
    if cache is None:
        return
    for layer_idx, ((key, value), length) in enumerate(zip(result.cached, lengths, strict=False)):
        cache.update(key[:, :, :length].clone(), value[:, :, :length].clone(), layer_idx)


def take_decisions(result: Result, forward: RoutedForward) -> None:
    """Leave with a forward what a run of its prompt decided, without the rows that the bucket adds."""
    lengths = forward.lengths
    forward.kept = [kept[:, :width].clone() for kept, width in zip(result.kept, lengths, strict=True)]
    shares = [_share_of(ranking, result, forward) for ranking in forward.policy.rankings]
    shares = [1.0] * (len(result.scored) - len(shares)) + shares  # what a reducer left has no scores
    # Of a compact sequence, candidates are what the stage before left; under `reroute`, what a reducer left.
    before = lengths if forward.policy.action == "remove" else lengths[:1] * len(lengths)
    forward.scored = [
        _cut(scored, forward.prompt.length if scored is None or scored.kept is None else width, share)
        for scored, width, share in zip(result.scored, [0, *before], shares, strict=False)
    ]


def _share_of(ranking: RankingLike, result: Result, forward: RoutedForward) -> float:
    """The part of a run's scores that is left without the rows of the bucket, which count in a mean over text."""
    text, remembers = (
        part_of(ranking, AllText),
        part_of(ranking, Remembered) is not None,
    )  # by shares, which no rows change
    if text is not None and text.query_reduction == "mean" and not remembers:
        return result.most_text / forward.prompt.most_text
    return 1.0


def _cut(scored: DecisionScores | None, width: int, share: float) -> DecisionScores | None:
    """Scores of so many rows, multiplied by a share."""
    if scored is None:
        return None
    kept = None if scored.kept is None else scored.kept[:, :width].clone()
    return DecisionScores(scored.scores[:, :width] * share, scored.pool[:, :width].clone(), kept)


def output_of(hidden: Tensor, cache: Any) -> object:
    """Output of a decoder, of any family's."""
    from transformers.modeling_outputs import MoeModelOutputWithPast

    names = inspect.signature(MoeModelOutputWithPast).parameters
    name = next(name for name in CACHE_NAMES if name in names)
    return MoeModelOutputWithPast(last_hidden_state=hidden, **{name: cache})
