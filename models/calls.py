"""Classify a call of a routed model: a routed prompt, new tokens on a routed cache, or nothing to route.

The facts of a call are read here, refusals.py has the rules that they are held against, and prefill.py the state of a
routed prompt and of the calls that follow on it.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor

from reroute_kernels.policy import Policy
from reroute_kernels.prompt import Prompt
from reroute_kernels.routing import Combine, RoutedForward

from . import refusals
from .activated import activated_counts, activated_visual
from .adapter import Adapter, cache_name, cache_of
from .answers import Answers
from .cached import CachedPrompt, CacheState, drop_record, has_record, record_of
from .checkpointing import recomputes_hooks, recomputes_without_cache
from .generation import PromptCall, encoding_arguments, prompt_call
from .layers import RoutedLayers
from .prefill import Continuation, Prefill
from .prompt_text import PromptText
from .refusals import refuse
from .tensor_parallel import all_gather_scores
from .vision import ReducedVision

# Arguments that tell where the sequences end that are packed into one row.
_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


@dataclass(eq=False, kw_only=True)
class CallFacts:
    """Facts about a call of the model: its arguments, and the parts of the routing.

    Args:
        adapter, policy, layers: of the routing.
        arguments: of the call, by name.
        cache: among them, or None.
        generation: how `generate` makes the call.
        batch, queries: its samples, and the tokens of each.
        total: tokens of the full sequence, those that are cached included.
    """

    adapter: Adapter
    policy: Policy
    layers: RoutedLayers
    arguments: dict
    cache: object
    generation: PromptCall
    batch: int
    queries: int
    total: int

    @cached_property
    def _read_mask(self) -> tuple[Any, Tensor | None]:
        return _padding_mask(self.arguments.get("attention_mask"), self.queries, self.total)

    @property
    def mask(self) -> Any:
        """The padding mask (batch, total) behind the attention mask; the attention mask itself if there is none."""
        return self._read_mask[0]

    @property
    def differences(self) -> Tensor | None:
        """In how many places a mask of four dimensions is not causal with padding; None for other masks."""
        return self._read_mask[1]

    @property
    def expected(self) -> tuple[int, int]:
        """Shape of a mask of padding."""
        return self.batch, self.total

    @property
    def is_padding_mask(self) -> bool:
        return isinstance(self.mask, Tensor) and tuple(self.mask.shape) == self.expected

    @property
    def mask_shape(self) -> object:
        return _shape(self.mask)

    @property
    def given_mask_shape(self) -> object:
        return _shape(self.arguments.get("attention_mask"))

    @property
    def has_one_mask_for_windows(self) -> bool:
        """Whether one mask of four dimensions is the model's in all layers, which then have no window."""
        is_by_kind = isinstance(self.arguments.get("attention_mask"), dict)
        return self.differences is not None and self.layers.has_windows(self.total) and not is_by_kind

    @property
    def cache_name(self) -> str:
        return cache_name(self.adapter.core)

    @property
    def first_layer(self) -> int:
        """The first decision layer; 0 with a reducer."""
        return self.policy.stage_layers[0]

    @property
    def features(self) -> str:
        return ", ".join(self.adapter.feature_arguments)

    @property
    def brings_features(self) -> bool:
        return brings_features(self.adapter, self.arguments)


@dataclass(eq=False, kw_only=True)
class PromptFacts(CallFacts):
    """Facts about a prompt.

    Args:
        visual: (B, L) bool, its visual tokens.
        marks: (B, L) bool, the tokens that a reducer dropped, and those that any did; None without a reducer.
        past: contents of the cache before, or None.
        tower: the vision tower that is reduced, or None.
        combine: completes the scores if heads are split over processes.
    """

    visual: Tensor
    marks: tuple[Tensor, Tensor] | None
    past: CacheState | None
    tower: torch.nn.Module | None
    combine: Combine | None

    @cached_property
    def valid(self) -> Tensor | None:
        """(B, L) bool, False at padding; None without a padding mask."""
        if not self.is_padding_mask:
            return None
        return self.mask[:, -self.queries :].to(self.visual.device, torch.bool)

    @property
    def tells_padding(self) -> bool:
        """Whether the mask has two dimensions. One of four may hide the visual tokens from the last token, too."""
        return self.is_padding_mask and self.differences is None

    @cached_property
    def activated(self) -> list[int] | None:
        """How many tokens at the end of each row PEFT's activated LoRA acts on; None without it."""
        return activated_counts(self.adapter.model, self.adapter.decoder)

    @cached_property
    def prompt(self) -> Prompt:
        """The prompt with its counts, which are read from the device here."""
        answers: Answers = self.arguments["answers"]
        starts = answers.starts(self.visual, self.valid)
        extra = {
            "placeholders": None if self.mask is None or self.tells_padding else self.visual.sum(),
            "jumps": self._jumps(),
            "unlike_causal": self.differences,
            "gaps": _gaps(self.valid) if self.valid is not None and self.layers.has_states else None,
            "early_answers": None if starts is None else answers.too_early(self.visual, starts),
            "activated": None if self.activated is None else activated_visual(self.visual, self.activated),
        }
        given = {name: count for name, count in extra.items() if count is not None}
        return Prompt(self.visual, self.valid, self.generation.draft_tokens, self.marks, given, starts)

    def _jumps(self) -> Tensor | None:
        """How often positions do not count by one, in a call in which transformers takes that for packed sequences.

        Flash attention does so in a batch of one if nothing is padded, the masks of the others if there is neither a
        mask nor a cache.
        """
        positions = self.arguments.get("position_ids")
        if self.layers.uses_flash_attention:
            tells_sequences = self.batch == 1
        else:
            uses_cache = self.cache is not None or self._setting("use_cache", False)
            tells_sequences = not uses_cache and self.arguments.get("attention_mask") is None
        if positions is None or not tells_sequences:
            return None
        if positions.ndim == 3:
            positions = positions[0] if positions.shape[0] == 4 else None
        return None if positions is None else (positions.diff(dim=1) != 1).sum()

    def _setting(self, name: str, default: bool) -> object:
        """An argument, or its default in the configuration."""
        return self.arguments.get(name, getattr(self.adapter.decoder.config, name, default))

    @cached_property
    def counts(self) -> Counter[str]:
        """The counts read from the device, by name; 0 for those that were not counted."""
        return Counter(self.prompt.extra_counts)

    @property
    def unlike_causal(self) -> int:
        return self.counts["unlike_causal"]

    @property
    def is_activated(self) -> bool:
        return self.activated is not None and any(self.activated)

    @property
    def visual_tokens(self) -> int:
        return sum(self.prompt.visual_counts)

    @property
    def is_reduced(self) -> bool:
        return self.marks is not None

    @property
    def lacks_features(self) -> bool:
        """Whether nothing replaces the placeholders, which the model takes for text then."""
        return self.arguments.get("input_ids") is not None and not self.brings_features

    @property
    def packing(self) -> str | None:
        """The first argument that tells where packed sequences end."""
        return next((name for name in _PACKING if self.arguments.get(name) is not None), None)

    @property
    def packing_shape(self) -> object:
        return _shape(self.arguments[self.packing])

    @property
    def before(self) -> CachedPrompt | None:
        """Record of the routed prompt that the cache holds."""
        return record_of(self.cache)

    @cached_property
    def _caches(self) -> list[str]:
        """Classes of caches that the layers can fill."""
        layers = self.layers
        fixed_size = not (layers.pad_left or layers.length_is_routed or layers.uses_flash_attention)
        return ["DynamicCache", *(["StaticCache"] if fixed_size else []), *self.adapter.cache_types]

    @property
    def cache_is_accepted(self) -> bool:
        if type(self.cache) in _plain_caches():  # not their subclasses
            return self.cache_class in self._caches
        return self.cache is None or self.cache_class in self.adapter.cache_types

    @property
    def accepted_caches(self) -> str:
        return " or ".join(self._caches)

    @property
    def cache_class(self) -> str:
        return type(self.cache).__name__

    @property
    def static_hint(self) -> str:
        if self.cache_class != "StaticCache":
            return ""
        return (
            " (a StaticCache needs full attention in all layers from the first decision on, that decision after the "
            "first attention layer, and no flash attention)"
        )

    @property
    def asked_output(self) -> str | None:
        """The first output that is asked for and cannot be given."""
        names = ("output_hidden_states", "output_attentions")
        return next((name for name in names if self._setting(name, False)), None)

    @property
    def asked_output_value(self) -> object:
        return self.arguments.get(self.asked_output, True)

    @property
    def recomputes_hooks(self) -> bool:
        reduced = () if self.tower is None else self.tower.modules()
        return any(map(recomputes_hooks, (*self.adapter.layers, *reduced)))

    @property
    def recomputes_without_cache(self) -> bool:
        return torch.is_grad_enabled() and any(map(recomputes_without_cache, self.adapter.layers))

    @property
    def pad_left(self) -> bool:
        """Whether compact rows are left-padded, so that tokens counted from the end of a row stay in place."""
        return self.layers.pad_left or self.activated is not None

    @cached_property
    def uneven_stage(self) -> int | None:
        """The first stage that keeps different numbers of tokens of the samples."""
        rows = self.forward.row_lengths
        return next((stage for stage in range(len(rows)) if self.forward.is_ragged(stage)), None)

    @property
    def uneven_rows(self) -> str:
        return ", ".join(map(str, self.forward.row_lengths[self.uneven_stage or 0]))

    @property
    def uneven_layer(self) -> int:
        return self.policy.stage_layers[self.uneven_stage or 0]

    @cached_property
    def forward(self) -> RoutedForward:
        """The state of the prefill that is to run."""
        return RoutedForward(self.policy, self.prompt, self.pad_left, self.combine)


@dataclass(eq=False, kw_only=True)
class ContinuationFacts(CallFacts):
    """Facts about new tokens on a cache that a routed prompt filled.

    Args:
        record: of the routed prompt.
        new_tokens: after the prompt, those of the call included.
    """

    record: CachedPrompt
    new_tokens: int = 0

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return self.record.past.length

    @property
    def brings_new_tokens_alone(self) -> bool:
        """Whether no token of the call was cut off, or left, by the length of the cache."""
        generation = self.generation
        drafted = generation.crops_by_count and self.queries == generation.draft_tokens + 1
        return generation.uncut or (generation.assisted and drafted) or generation.conversation == self.total

    @cached_property
    def unlike_causal(self) -> int:
        return 0 if self.differences is None else int(self.differences)


def _leave_graph() -> None:
    """End a graph of `torch.compile`; with `fullgraph=True` it raises and gives the reason."""


_NO_ONE_GRAPH = (
    "a prompt with images, or what follows on a routed cache, cannot be one graph on a routed model, because how many "
    "tokens run depends on input_ids: call torch.compile with fullgraph=False, or remove() the routing first"
)


class CallReader:
    """Classifies calls, and refuses those that cannot be routed, before the first layer runs.

    Args:
        adapter: of the model.
        policy: of the routing.
        layers: of the decoder.
        head_group: the process group over which heads are split, or None.
        vision: the reducer at work on the vision tower, or None.
    """

    def __init__(
        self, adapter: Adapter, policy: Policy, layers: RoutedLayers, head_group, vision: ReducedVision | None
    ):
        self._adapter = adapter
        self._policy = policy
        self._layers = layers
        self._vision = vision
        self._routing: dict[str, Any] = {"adapter": adapter, "policy": policy, "layers": layers}
        self._cache_name = cache_name(adapter.core)
        self._combine = None if head_group is None else partial(all_gather_scores, head_group)
        self._signature = inspect.signature(adapter.core.forward)
        # torch.compile must not trace the reading of frames: it would warn.
        self._prompt_call = torch.compiler.disable(prompt_call)
        # Nor are the facts of a call and the rules that they are held against: a graph has ended before.
        self._read_prompt = torch.compiler.disable(self._prompt)
        self._read_on_cache = torch.compiler.disable(self._on_cache)
        self._leave_graph = torch.compiler.disable(_leave_graph, reason=_NO_ONE_GRAPH)

    def read(
        self,
        args: tuple,
        kwargs: dict,
        marks: Callable[[], tuple[Tensor, Tensor]] | None = None,
        answers: Answers | None = None,
    ) -> Prefill | Continuation | None:
        """Classify a call by the arguments of the model inside the head.

        Args:
            args, kwargs: its arguments.
            marks: gives (B, L) bool, the tokens of a prompt that a reducer dropped, and those that any did; None if
                there is no reducer.
            answers: the labels and positions that tell where answers begin, if any are scored with the prompt.

        Raises:
            ValueError, NotImplementedError: the call cannot be routed, for a reason that is named.
        """
        arguments = by_name(self._signature, args, kwargs) | {"answers": answers or Answers()}
        if self._vision is not None:
            self._vision.check_arguments(arguments)
        cache = cache_of(arguments)
        tokens = arguments.get("input_ids")
        if tokens is None:
            tokens = arguments.get("inputs_embeds")
        if tokens is None:
            return None  # the model's own error names the missing argument
        if cache is not None and not hasattr(cache, "get_seq_length"):
            self._check_paged(cache, arguments)
            return None
        if self._is_traced_text(cache, tokens, arguments):
            return None
        held = _cached_tokens(cache, [0])[0] if cache is not None else 0
        generation = PromptCall()
        if held == 0 or tokens.shape[1] > 1:
            generation = self._prompt_call(self._adapter.core)
            self._check_chunks(generation, held)
        if held:
            return self._read_on_cache(cache, tokens, arguments, generation)
        if cache is not None and has_record(cache):
            drop_record(cache)  # the cache was reset since
            lengths = set(_cached_tokens(cache, self._layers.attention))
            if lengths != {0}:
                raise refusals.HALF_RESET.because(cache=self._cache_name, lengths=sorted(lengths))
        return self._read_prompt(cache, arguments, None, generation, marks)

    def text_beside_images(self, call: tuple[tuple, dict, Answers] | None) -> PromptText | None:
        """The text of the prompt whose images are encoded; None if it is not known.

        Args:
            call: arguments of the call of the model in which they are, and its answers; None outside of calls.
        """
        if call is None:
            arguments, answers, drafts = encoding_arguments(self._adapter.core), Answers(), 0
        else:
            args, kwargs, answers = call
            arguments = by_name(self._signature, args, kwargs)
            drafts = prompt_call(self._adapter.core).draft_tokens
        ids = None if arguments is None else arguments.get("input_ids")
        if arguments is None or ids is None or not ids.shape[1]:
            return None
        visual, length = self._visual_tokens(arguments), ids.shape[1]
        mask, _ = _padding_mask(arguments.get("attention_mask"), length, length)
        valid = None
        if isinstance(mask, Tensor) and tuple(mask.shape) == tuple(ids.shape):
            valid = mask.to(ids.device, torch.bool)
        positions = torch.arange(length, device=ids.device)
        text = ~visual & (positions < length - drafts)
        if valid is not None:
            text = text & valid
        starts = answers.starts(visual, valid)
        return PromptText(ids, text if starts is None else text & (positions < starts[:, None]), valid)

    def new_tokens_alone(self, arguments: dict) -> dict | None:
        """Arguments without tokens that are cached: `generate` cuts off as many as the first layer holds, too few.

        Args:
            arguments: of the model, by name.

        Returns:
            Those that change; None if nothing does.
        """
        cache, tokens = cache_of(arguments), arguments.get("input_ids")
        if not self._layers.length_is_routed or not has_record(cache):
            return None
        if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.shape[1] == 1:  # of others the model complains
            return None
        prompt, whole = record_of(cache), self._prompt_call(self._adapter.core).conversation
        if prompt is None or whole is None:
            return None
        new = whole - prompt.past.length - self._tokens_after(cache, prompt)
        if not 0 < new < tokens.shape[1]:
            return None
        given = {name: arguments.get(name) for name in ("input_ids", "position_ids", "mm_token_type_ids")}
        return {name: values[..., -new:] for name, values in given.items() if values is not None}

    def _is_traced_text(self, cache, tokens: Tensor, arguments: dict) -> bool:
        """Whether a call that is made into a graph brings no image and follows on none, so that it runs untouched.

        A graph cannot branch on the values of input_ids: whether placeholders are among them is an assertion in it.
        """
        exported = torch.compiler.is_exporting() or torch.jit.is_tracing()
        if not exported and not torch.compiler.is_compiling():
            return False
        if arguments.get("input_ids") is None or self.brings_features(arguments) or has_record(cache):
            if exported:
                raise refusals.EXPORTED.because()
            self._leave_graph()
            return False
        length = 0 if cache is None else cache.get_seq_length()
        if tokens.shape[1] > 1 and (isinstance(length, Tensor) or length == 0):
            torch._assert_async(
                ~self._visual_tokens(arguments).any(),
                "input_ids of a routed model must hold no visual tokens in a graph that was made for text",
            )
        return True

    def _check_paged(self, cache, arguments: dict) -> None:
        """Refuse images in a batch of requests that share the pages of a cache."""
        visual = self._visual_tokens(arguments)
        if visual.is_cuda and torch.cuda.is_current_stream_capturing():
            raise refusals.PAGED_GRAPH.because()
        if count := int(visual.sum()):
            raise refusals.PAGED.because(count=count, cache=type(cache).__name__)

    def _check_chunks(self, generation: PromptCall, held: int) -> None:
        ids = generation.chunked_ids
        if ids is None:
            return
        new = ids[:, held:] if ids.shape[1] > held else ids
        if bool(self._visual_tokens({"input_ids": new}).any()):
            raise refusals.CHUNKED.because(size=generation.chunk_size, tokens=ids.shape[1])

    def _prompt(
        self,
        cache,
        arguments: dict,
        past: CacheState | None,
        generation: PromptCall,
        marks: Callable[[], tuple[Tensor, Tensor]] | None = None,
    ) -> Prefill | None:
        """A prompt, which is routed if it holds visual tokens."""
        visual = self._visual_tokens(arguments)
        batch, queries = visual.shape
        common = {**self._routing, "arguments": arguments, "cache": cache, "generation": generation}
        facts = PromptFacts(
            **common,
            batch=batch,
            queries=queries,
            total=queries + (past.length if past else 0),
            visual=visual,
            marks=None if marks is None else _on_device_of(visual, *marks()),
            past=past,
            tower=None if self._vision is None else self._vision.tower,
            combine=self._combine,
        )
        prompt = facts.prompt
        if prompt.has_visual_tokens or facts.counts["placeholders"]:
            refuse(facts, refusals.MASK_RULES)
        if not prompt.has_visual_tokens:
            return None
        self._layers.check_attention()
        refuse(facts, refusals.PROMPT_RULES)
        return Prefill(self._layers, facts.forward, past, generation.generates)

    def brings_features(self, arguments: dict) -> bool:
        return brings_features(self._adapter, arguments)

    def _visual_tokens(self, arguments: dict) -> Tensor:
        """(B, L) bool, found by placeholder: `generate` may have encoded the images before this call."""
        input_ids = arguments.get("input_ids")
        if input_ids is not None:
            first, *others = self._adapter.visual_token_ids
            visual = torch.eq(input_ids, first)
            for token_id in others:
                visual |= input_ids == token_id
            return visual
        embeds = arguments["inputs_embeds"]
        if not self.brings_features(arguments):
            raise refusals.EMBEDS_ALONE.because(shape=tuple(embeds.shape))
        ids = torch.tensor(self._adapter.visual_token_ids, device=embeds.device)
        placeholders = self._adapter.core.get_input_embeddings()(ids)
        return (embeds[:, :, None] == placeholders).all(dim=-1).any(dim=-1)

    def _on_cache(
        self, cache, tokens: Tensor, arguments: dict, generation: PromptCall
    ) -> Prefill | Continuation | None:
        """New tokens on a filled cache."""
        if arguments.get("input_ids") is None and tokens.shape[1] > 1 and not self.brings_features(arguments):
            raise refusals.EMBEDS_ON_CACHE.because(count=tokens.shape[1])
        prompt = record_of(cache)
        if prompt is None and has_record(cache):
            raise refusals.UNFINISHED.because(cache=self._cache_name)
        if prompt is None:
            return self._on_unrouted_cache(cache, tokens, arguments, generation)
        batch, queries = tokens.shape[:2]
        common = {**self._routing, "arguments": arguments, "cache": cache, "generation": generation}
        facts = ContinuationFacts(**common, batch=batch, queries=queries, total=0, record=prompt)
        refuse(facts, refusals.CONTINUATION_RULES)
        self._layers.check_attention()
        facts.new_tokens = new_tokens = self._tokens_after(cache, prompt) + queries
        facts.total = facts.length + new_tokens
        refuse(facts, refusals.CONTINUATION_MASK_RULES)
        mask = facts.mask
        if self.brings_features(arguments):
            earlier = mask[:, :-queries].bool() if mask is not None else None
            past = prompt.with_later(batch, earlier, new_tokens - queries)
            call = self._prompt(cache, arguments, past, generation)
            if call is not None:
                return call
        has_positions = arguments.get("position_ids") is not None
        return Continuation(self._layers, prompt, batch, queries, new_tokens, mask, has_positions)

    def _on_unrouted_cache(self, cache, tokens: Tensor, arguments: dict, generation: PromptCall) -> Prefill | None:
        queries = tokens.shape[1]
        first = self._layers.cached_first(range(self._policy.stage_layers[0], self._layers.attention[-1] + 1))
        checked = [self._layers.attention[0], *first, self._layers.attention[-1]]
        lengths = set(_cached_tokens(cache, checked))
        if len(lengths) > 1:
            raise refusals.UNFINISHED_UNROUTED.because(cache=self._cache_name, lengths=sorted(lengths))
        if not self.brings_features(arguments):
            return None
        (length,) = lengths
        mask, _ = _padding_mask(arguments.get("attention_mask"), queries, length + queries)
        visible = mask[:, :length].bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
        past = CacheState.unrouted(length, visible, len(self._policy.stage_layers), tokens.device)
        return self._prompt(cache, arguments, past, generation)

    def _tokens_after(self, cache, prompt: CachedPrompt) -> int:
        """Tokens that a cache holds after its routed prompt."""
        layers = self._layers
        counted = {layers.attention[0]: prompt.past.length}
        for stage, length in zip(layers.stages, prompt.past.lengths, strict=True):
            counted |= dict.fromkeys(layers.cached_first(stage), length)
        counted[layers.attention[-1]] = prompt.past.lengths[-1]
        checked = sorted(counted)
        after = [held - counted[layer] for layer, held in zip(checked, _cached_tokens(cache, checked), strict=True)]
        if min(after) < 0:
            raise refusals.CROPPED.because(cache=self._cache_name, count=-min(after))
        if len(set(after)) == 1:
            return after[0]
        if not layers.length_is_routed and after[0] == min(after):
            # Assisted decoding crops all layers to one length, which leaves the rejected tokens in the shorter layers
            # of stages.
            for stage, length in zip(layers.stages, prompt.past.lengths, strict=True):
                for layer_idx in stage:
                    if layer_idx in layers.attention:
                        cache.layers[layer_idx].crop(length + after[0])
            return self._tokens_after(cache, prompt)
        raise refusals.UNEVEN.because(cache=self._cache_name, counts=sorted(set(after)))


@cache
def _plain_caches() -> tuple[type, ...]:
    from transformers import DynamicCache, StaticCache  # when they are needed first

    return DynamicCache, StaticCache


def by_name(signature: inspect.Signature, args: tuple, kwargs: dict) -> dict:
    """All arguments of a call by name."""
    return {**dict(zip(signature.parameters, args, strict=False)), **kwargs}


def _on_device_of(visual: Tensor, dropped: Tensor, dropped_by_any: Tensor) -> tuple[Tensor, Tensor]:
    return dropped.to(visual.device), dropped_by_any.to(visual.device)


def brings_features(adapter: Adapter, arguments: dict) -> bool:
    """Whether a call brings images or videos, or their features."""
    names = adapter.feature_arguments
    return any(arguments.get(name) is not None and len(arguments[name]) for name in names)


def _gaps(valid: Tensor) -> Tensor:
    """How many tokens are hidden between others of their row; valid: (B, L) bool."""
    count = valid.cumsum(dim=1)
    return (~valid & (count > 0) & (count < count[:, -1:])).sum()


def _shape(value: object) -> object:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def _cached_tokens(cache, layers: list[int]) -> list[int]:
    """How many tokens layers have cached; a cache of fixed size keeps that on its device, read in one transfer."""
    lengths = [cache.get_seq_length(layer) for layer in layers]
    device = next((length.device for length in lengths if isinstance(length, Tensor)), None)
    if device is not None:
        return torch.stack([torch.as_tensor(length, device=device).reshape(()) for length in lengths]).tolist()
    return lengths


def _padding_mask(mask: object, queries: int, total: int) -> tuple[object, Tensor | None]:
    """The padding mask (B, total) that an attention mask was made of.

    For caches of a fixed size `generate` makes masks of four dimensions, one for each kind of layer. The row of the
    last query is the padding mask.

    Returns:
        The padding mask, or the argument itself if there is none behind it; and, if that has four dimensions, in how
        many places it differs from a causal mask with that padding. Rows of padding may differ, unless padding sees
        other padding: then it is another sequence. The last token must not stand alone behind padding that sees itself:
        it may be padding, too. That counts as a difference.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[1:3] != (1, queries) or mask.shape[3] < total:
        return mask, None
    seen = (mask if mask.dtype == torch.bool else mask == 0)[:, 0, :, :total]
    valid = seen[:, -1]
    causal = torch.ones(queries, total, dtype=torch.bool, device=seen.device).tril(total - queries)
    itself = causal.triu(total - queries)
    expected = causal & valid[:, None]
    differs = torch.where(valid[:, -queries:, None], seen ^ expected, seen & ~expected & ~itself)
    if queries == 1:
        return valid, differs.sum()
    unclear = valid[:, -1] & ~valid[:, -2] & seen[:, -2, -2] & valid[:, -queries:-1].any(dim=1)
    return valid, differs.sum() + unclear.sum()
