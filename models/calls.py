"""Classify a call of a routed model: a routed prompt, new tokens on a routed cache, or nothing to route."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cached_property, partial

import torch
from torch import Tensor

from reroute_kernels.policy import Policy
from reroute_kernels.routing import CachedPrompt, CacheState, Prompt, RoutedForward

from .activated import activated_counts, activated_visual
from .adapter import Adapter, cache_name, cache_of
from .answers import Answers
from .checkpointing import recomputes_hooks
from .generation import PromptCall, prompt_call
from .layers import RoutedLayers
from .tensor_parallel import all_gather_scores
from .vision import ReducedVision

# The attribute of a cache object that holds its CachedPrompt: it lives, is copied and dies with the cache.
_CACHE_ATTRIBUTE = "_reroute_kernels_prompt"

# Arguments that tell where the sequences end that are packed into one row.
_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


class Prefill:
    """A routed prompt on its way through the layers.

    Args:
        layers: of the decoder.
        forward: what is routed.
        past: what the cache held before, if anything.
        generates: whether `generate` makes the call.
    """

    def __init__(self, layers: RoutedLayers, forward: RoutedForward, past: CacheState | None, generates: bool):
        self.forward = forward
        self.past = past
        self.generates = generates
        self.cache = None
        self.finished = False
        self.layer_features: list[Tensor] = []  # (B, L, d), added after the first layers
        self.position_embeddings: object = None  # of the stage
        self._layers = layers
        self._last_position: Tensor | None = None
        self._masks: dict[tuple[int, str], object] = {}

    @property
    def stage(self) -> int:
        """The number of the stage that runs, or of the next one before its decision is made."""
        return len(self.forward.kept)

    def mask(self, stage: int, number: int, hidden: Tensor, kwargs: dict) -> object:
        """Of a layer that is handed `hidden` and `kwargs`; all layers of a stage and a kind share one."""
        key = (stage, self._layers.kinds[number])
        if key not in self._masks:
            self._masks[key] = self._new_mask(stage, number, hidden)
        return self._masks[key]

    def _new_mask(self, stage: int, number: int, hidden: Tensor) -> object:
        forward, past, layers = self.forward, self.past, self._layers
        kept, ragged = forward.kept[stage], forward.is_ragged(stage)
        # Rows without a token that stand after all others are kept out by causality alone.
        own = kept >= 0 if ragged and forward.pad_left else None
        if layers.kinds[number] == "linear_attention":
            return own
        queries, total = hidden.shape[1], forward.prompt.length
        if past is None:
            return layers.mask(number, self.cache, queries, 0, total, own, lambda: kept, hidden)
        valid, positions = past.extended(stage, past.seen(stage), kept, ragged)
        before = past.lengths[stage]
        return layers.mask(number, self.cache, queries, before, past.length + total, valid, lambda: positions, hidden)

    def fill(self, cache) -> None:
        """Begin a stage, whose layers fill a cache. What a call that failed left there is not mistaken for a prompt."""
        self.cache = cache
        if cache is not None and not hasattr(cache, _CACHE_ATTRIBUTE):
            setattr(cache, _CACHE_ATTRIBUTE, None)

    def note_positions(self, positions: Tensor | None) -> None:
        """Record the last token's position if later calls cannot infer it.

        They cannot if the cache whose length transformers reads is routed, or if the prompt is right-padded.

        Args:
            positions: position_ids of the decoder, (..., B or 1, L), or None where they count from its cache on.
        """
        prompt = self.forward.prompt
        if not prompt.right_padded and not self._layers.length_is_routed:
            return
        batch, device = prompt.visual.shape[0], prompt.visual.device
        if positions is None:
            positions = torch.arange(prompt.length, device=device)[None] + (self.past.length if self.past else 0)
        positions = positions.expand(*positions.shape[:-2], batch, -1)
        if prompt.end is None:
            last = positions[..., -1:]
        else:
            index = prompt.end.clamp(min=0)[:, None].expand(*positions.shape[:-1], 1)
            last = positions.gather(-1, index)
        if positions.ndim == 3 and not (self.generates and prompt.right_padded):
            # Of three axes, later tokens stand behind the furthest one (a fourth counts the tokens); in `generate`,
            # which adds one to each axis, behind the last token.
            axes = positions[-3:]
            if prompt.valid is not None:
                axes = axes.masked_fill(~prompt.valid, 0)
            furthest = axes.amax(dim=(0, 2))[None, :, None].expand(3, -1, -1)
            last = torch.cat([last[:-3], furthest])
        self._last_position = last

    def record(self) -> None:
        """Leave with the cache what later calls on it must know."""
        self.finished = True
        if self.cache is not None:
            setattr(self.cache, _CACHE_ATTRIBUTE, CachedPrompt.of(self.forward, self.past, self._last_position))


class Continuation:
    """New tokens on a cache that a routed prompt filled.

    Args:
        layers: of the decoder.
        prompt: what the cache holds.
        batch: samples of the call.
        queries: new tokens of the call.
        new_tokens: after the prompt, those of the call included.
        mask: (batch, all tokens), False at padding; None where there is none.
        has_positions: whether the caller gave position_ids.
    """

    def __init__(
        self,
        layers: RoutedLayers,
        prompt: CachedPrompt,
        batch: int,
        queries: int,
        new_tokens: int,
        mask: Tensor | None,
        has_positions: bool,
    ):
        self._layers = layers
        self._prompt = prompt
        self._batch = batch
        self._queries = queries
        self._new_tokens = new_tokens
        self._mask = mask
        self._has_positions = has_positions
        self._masks: dict[tuple[int, str], object] = {}
        self._embeddings: dict[int, object] = {}

    @cached_property
    def _visible(self) -> Tensor | None:
        """(batch, all tokens) bool, False at padding; None where there is none. Most calls do not need it."""
        return None if self._mask is None else self._mask.bool()

    def mask(self, stage: int, number: int, hidden: Tensor, kwargs: dict) -> object:
        """Of a layer that is handed `hidden` and `kwargs`; all layers of a stage and a kind share one."""
        kind = self._layers.kinds[number]
        if kind == "linear_attention":
            return kwargs.get("attention_mask")  # of the new tokens alone
        key = (stage, kind)
        if key not in self._masks:
            if kwargs.get("attention_mask") is None and not self._layers.padding_is_hidden:
                self._mask = None  # the model looked for padding and found none
            past = self._prompt.past
            self._masks[key] = self._layers.mask(
                number,
                cache_of(kwargs),
                self._queries,
                past.lengths[stage] + self._new_tokens - self._queries,
                past.length + self._new_tokens,
                self._prompt.valid_keys(stage, self._batch, self._visible, self._new_tokens),
                partial(self._prompt.key_positions, stage, self._batch, self._new_tokens),
                hidden,
            )
        return self._masks[key]

    def position_ids(self, given: Tensor | None) -> Tensor | None:
        """Positions of the new tokens, (..., batch, queries), where those that the model was given must be replaced."""
        last = self._prompt.last_position
        if last is None or (self._has_positions and not self._prompt.right_padded):
            return None
        last = last.repeat_interleave(self._batch // self._prompt.batch, dim=-2)
        if given is not None and given.ndim == last.ndim == 3:
            last = last[last.shape[0] - given.shape[0] :]
        if last.ndim == 2 and not self._prompt.right_padded:
            # A model of one axis that is given none counts what its cache holds, padding too.
            later = self._prompt.past.length + torch.arange(self._new_tokens, device=last.device)
            return later[None, -self._queries :].expand(self._batch, -1)
        return last + 1 + self._offsets(last.device)

    def position_embeddings(self, stage: int, embeddings_at: Callable[[Tensor], object]) -> object:
        """Of a stage whose tokens are numbered from 0; made by `embeddings_at` from positions (batch, queries)."""
        if stage not in self._embeddings:
            rows = self._prompt.rows[stage].repeat_interleave(self._batch // self._prompt.batch)
            self._embeddings[stage] = embeddings_at(rows[:, None] + self._offsets(rows.device))
        return self._embeddings[stage]

    def _offsets(self, device: torch.device) -> Tensor:
        """(queries,) or (batch, queries), how many tokens stand between the prompt and each new one."""
        if self._visible is None:
            offsets = torch.arange(self._new_tokens, device=device)
        else:
            later = self._visible[:, self._prompt.past.length :]
            offsets = (later.to(device).cumsum(dim=1) - 1).clamp(min=0)
        return offsets[..., -self._queries :]


def _leave_graph() -> None:
    """End a graph of `torch.compile`; with `fullgraph=True` it raises and gives the reason."""


_NO_ONE_GRAPH = (
    "a prompt with images, or what follows on a routed cache, cannot be one graph on a routed model, because how many "
    "tokens run depends on input_ids: call torch.compile with fullgraph=False, or remove() the routing first"
)


class CallReader:
    """Tells what a call is, and refuses what cannot be routed, before the first layer runs.

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
        self._config = adapter.decoder.config
        self._cache_name = cache_name(adapter.core)
        self._combine = None if head_group is None else partial(all_gather_scores, head_group)
        self._signature = inspect.signature(adapter.core.forward)
        self._features = adapter.feature_arguments
        # The frames that it reads are no matter of torch.compile, which would warn.
        self._prompt_call = torch.compiler.disable(prompt_call)
        self._leave_graph = torch.compiler.disable(_leave_graph, reason=_NO_ONE_GRAPH)

    def read(
        self,
        args: tuple,
        kwargs: dict,
        marks: Callable[[], tuple[Tensor, Tensor]] | None = None,
        answers: Answers | None = None,
    ) -> Prefill | Continuation | None:
        """From the arguments of the model inside the head.

        Args:
            args, kwargs: its arguments.
            marks: gives (B, L) bool, the tokens of a prompt that a reducer dropped, and those that any did; None where
                there is no reducer.
            answers: what is known of answers that are scored with the prompt.

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
            return None  # the model says what is missing
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
            return self._on_cache(cache, tokens, arguments, generation)
        if cache is not None and hasattr(cache, _CACHE_ATTRIBUTE):
            delattr(cache, _CACHE_ATTRIBUTE)  # the cache was reset since
            lengths = set(_cached_tokens(cache, self._layers.attention))
            if lengths != {0}:
                raise ValueError(
                    f"{self._cache_name} must hold the whole routed prompt or nothing, got layers of "
                    f"{sorted(lengths)} cached tokens"
                )
        return self._prompt(cache, arguments, None, generation, marks)

    def _is_traced_text(self, cache, tokens: Tensor, arguments: dict) -> bool:
        """Whether a call that is made into a graph brings no image and follows on none, so that it runs untouched.

        A graph cannot branch on what input_ids hold: whether placeholders are among them is an assertion in it.
        """
        exported = torch.compiler.is_exporting() or torch.jit.is_tracing()
        if not exported and not torch.compiler.is_compiling():
            return False
        if arguments.get("input_ids") is None or self.brings_features(arguments) or hasattr(cache, _CACHE_ATTRIBUTE):
            if exported:
                raise NotImplementedError(
                    "a routed model can be exported (torch.export, torch.onnx.export, torch.jit.trace) with input_ids "
                    "of text alone, because how many tokens of a prompt with images run depends on input_ids; got one "
                    "with images, embeddings or a routed cache: remove() the routing first"
                )
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
            raise NotImplementedError(
                "use_cuda_graph must be False for continuous batching on a routed model, because a graph hides whether "
                "later requests bring images; got it on"
            )
        if count := int(visual.sum()):
            raise NotImplementedError(
                "inputs must be text in continuous batching (generate_batch, init_continuous_batching, transformers "
                f"serve) on a routed model, because transformers takes no images there; got {count} visual tokens and "
                f"a {type(cache).__name__}"
            )

    def _check_chunks(self, generation: PromptCall, held: int) -> None:
        ids = generation.chunked_ids
        if ids is None:
            return
        new = ids[:, held:] if ids.shape[1] > held else ids
        if bool(self._visual_tokens({"input_ids": new}).any()):
            raise NotImplementedError(
                "prefill_chunk_size must be None for a routed prompt, or not below its length, because a chunk without "
                f"the prompt's last token cannot rank by it; got {generation.chunk_size} for {ids.shape[1]} tokens"
            )

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
        queries = visual.shape[1]
        expected = (visual.shape[0], queries + (past.length if past else 0))
        mask, unlike_causal = _padding_mask(arguments.get("attention_mask"), queries, expected[1])
        is_padding_mask = isinstance(mask, Tensor) and tuple(mask.shape) == expected
        valid = mask[:, -queries:].to(visual.device, torch.bool) if is_padding_mask else None
        # A mask of another form may hide the visual tokens from the last one, which makes no prompt of text of this.
        is_padding_mask = is_padding_mask and unlike_causal is None
        answers: Answers = arguments["answers"]
        starts = answers.starts(visual, valid)
        activated = activated_counts(self._adapter.model, self._adapter.decoder)
        asked = {
            "placeholders": None if mask is None or is_padding_mask else visual.sum(),
            "jumps": self._position_jumps(cache, visual.shape[0], arguments),
            "unlike_causal": unlike_causal,
            "gaps": _gaps(valid) if valid is not None and self._layers.has_states else None,
            "early_answers": None if starts is None else answers.too_early(visual, starts),
            "activated": None if activated is None else activated_visual(visual, activated),
        }
        asked = {name: number for name, number in asked.items() if number is not None}
        marked = None if marks is None else tuple(tokens.to(visual.device) for tokens in marks())
        prompt = Prompt(visual, valid, generation.draft_tokens, marked, asked, starts)
        if not prompt.has_visual_tokens and not prompt.answers.get("placeholders"):
            return None
        if mask is not None and valid is None:
            raise NotImplementedError(
                f"attention_mask must be None or of shape {expected} for a routed prompt, got {_shape(mask)}"
            )
        _check_causal(prompt.answers.get("unlike_causal", 0))
        if not prompt.has_visual_tokens:
            return None
        _check_windows(arguments.get("attention_mask"), self._layers, expected[1])
        if mask is not None and not is_padding_mask and prompt.padded and self._layers.has_states:
            # Of four dimensions, these layers are not told: what is padding goes into their states.
            raise NotImplementedError(
                f"attention_mask must be of shape {expected} for a padded prompt on a text model with recurrent "
                f"states, got {_shape(arguments['attention_mask'])}"
            )
        if generation.drafts:
            raise NotImplementedError(
                "assistant_model must not be routed for a prompt with images, because transformers hands no image to a "
                f"model that drafts; got a routed {type(self._adapter.model).__name__}: route the model that it "
                "assists alone"
            )
        self._check_packing(arguments, prompt)
        if marks is None:  # else what no reducer has marked is refused
            self._check_features(arguments, prompt)
        if early := prompt.answers.get("early_answers"):
            raise ValueError(
                "answers_from must be positions behind the last visual token of each sample, got ones with "
                f"{early} visual tokens at or behind them"
            )
        if activated is not None and any(activated):
            self._check_activated(prompt)
        self._layers.check_attention()
        self._check_cache(cache)
        if past is not None:
            self._check_past(cache)
        if marks is not None and prompt.answers["last_dropped"]:
            raise ValueError(
                "input_ids must end with text where there is a reducer, and so must what stands before an answer, got "
                "a dropped visual token at the end"
            )
        if generation.assisted and self._layers.length_is_routed:
            raise NotImplementedError(
                "schedule must begin after the first attention layer for assisted decoding, which cuts the cache by "
                f"that layer's length; got a decision at layer {self._policy.stage_layers[0]}"
            )
        if prompt.right_padded and prompt.has_empty_rows:
            raise NotImplementedError(
                "attention_mask must put padding on the left where a sample sits a prompt out, got padding on the "
                "right beside a sample without a token"
            )
        if prompt.right_padded and self._layers.pad_left:
            raise NotImplementedError(
                "attention_mask must put padding on the left for a text model with layers of "
                f"{', '.join(sorted(set(self._layers.kinds)))}, got padding on the right"
            )
        if (
            generation.generates
            and cache is not None
            and prompt.right_padded
            and prompt.ends_in_image
            and self._adapter.position_axes > 1
        ):
            raise NotImplementedError(
                "attention_mask must put padding on the left in generate where position_ids have several axes and a "
                "prompt ends with an image, behind which generate and the model count on in two ways; got padding on "
                "the right and such a prompt"
            )
        if gaps := prompt.answers.get("gaps"):
            raise NotImplementedError(
                "attention_mask must hide no tokens between others on a text model with recurrent states, which count "
                f"them, got {gaps} that it hides"
            )
        for name in ("output_hidden_states", "output_attentions"):
            if arguments.get(name, getattr(self._config, name, False)):
                raise NotImplementedError(f"{name} must be off for a routed prompt, got {arguments.get(name, True)}")
        reduced = self._vision.tower.modules() if self._vision is not None else ()
        if any(map(recomputes_hooks, (*self._adapter.layers, *reduced))):
            raise NotImplementedError(
                "gradient checkpointing must be off for a routed prompt before transformers 5.24, got it on: torch's "
                "checkpoint_wrapper may be put around the layers before apply"
            )
        # Left padding of compact rows keeps in place what is counted from the end of a row.
        pad_left = self._layers.pad_left or activated is not None
        forward = RoutedForward(self._policy, prompt, pad_left, self._combine)
        if past is not None and self._layers.has_states:
            for stage, rows in enumerate(forward.row_lengths):
                if forward.is_ragged(stage):
                    raise NotImplementedError(
                        "input_ids that follow on a cache with recurrent states must keep equally many tokens of each "
                        f"sample, got {', '.join(map(str, rows))} at layer {self._policy.stage_layers[stage]}"
                    )
        return Prefill(self._layers, forward, past, generation.generates)

    @staticmethod
    def _check_activated(prompt: Prompt) -> None:
        """Whether rows of a stage end with the tokens with which those of the prompt end."""
        if number := prompt.answers["activated"]:
            raise NotImplementedError(
                "alora_invocation_tokens must stand behind the last visual token of each sample of a routed prompt, "
                f"got {number} visual tokens behind them"
            )
        if prompt.right_padded:
            raise NotImplementedError(
                "attention_mask must put padding on the left under activated LoRA (alora_invocation_tokens), which "
                "counts tokens from the end of a row, got padding on the right"
            )

    def _check_cache(self, cache) -> None:
        if cache is None:
            return
        from transformers import DynamicCache, StaticCache

        fixed_size = not (self._layers.pad_left or self._layers.length_is_routed or self._layers.uses_flash_attention)
        accepted = [DynamicCache, StaticCache] if fixed_size else [DynamicCache]
        if type(cache) not in accepted and type(cache).__name__ not in self._adapter.cache_types:
            names = " or ".join([kind.__name__ for kind in accepted] + list(self._adapter.cache_types))
            reason = ""
            if type(cache) is StaticCache:
                reason = (
                    " (a StaticCache needs full attention in all layers from the first decision on, that decision "
                    "after the first attention layer, and no flash attention)"
                )
            raise NotImplementedError(f"{self._cache_name} must be a {names}, got {type(cache).__name__}{reason}")

    def _check_past(self, cache) -> None:
        """Whether a routed prompt can follow on what the cache holds."""
        before: CachedPrompt | None = getattr(cache, _CACHE_ATTRIBUTE, None)
        if self._policy.ranks_by_previous_layer or self._policy.positions == "contiguous":
            raise NotImplementedError(
                f"{self._cache_name} must be empty where a prompt brings images and the previous layer ranks or "
                f"positions are contiguous, got one with tokens and {self._policy}"
            )
        if self._layers.length_is_routed:
            raise NotImplementedError(
                f"{self._cache_name} must be empty where a prompt brings images and the first decision is at layer "
                f"{self._policy.stage_layers[0]}, by whose cache transformers counts tokens; got one with tokens"
            )
        if getattr(cache, "offloading", False):
            raise NotImplementedError(
                f"{self._cache_name} must not be offloaded where a prompt brings images to a filled cache, "
                "got offloading"
            )
        if before is not None and before.right_padded:
            raise NotImplementedError(
                f"{self._cache_name} must hold prompts padded on the left where a prompt brings images to a filled "
                "cache, got one padded on the right"
            )

    def _position_jumps(self, cache, batch: int, arguments: dict) -> Tensor | None:
        """How often positions do not count by one, in a call in which transformers takes that for packed sequences.

        Flash attention does so in a batch of one if nothing is padded, the masks of the others if there is neither a
        mask nor a cache.
        """
        positions = arguments.get("position_ids")
        if self._layers.uses_flash_attention:
            tells_sequences = batch == 1
        else:
            uses_cache = cache is not None or arguments.get("use_cache", getattr(self._config, "use_cache", False))
            tells_sequences = not uses_cache and arguments.get("attention_mask") is None
        if positions is None or not tells_sequences:
            return None
        if positions.ndim == 3:
            positions = positions[0] if positions.shape[0] == 4 else None
        return None if positions is None else (positions.diff(dim=1) != 1).sum()

    def _check_packing(self, arguments: dict, prompt: Prompt) -> None:
        """Refuse several sequences packed into one row."""
        for name in _PACKING:
            if arguments.get(name) is not None:
                raise NotImplementedError(f"{name} must be None for a routed prompt, got {_shape(arguments[name])}")
        jumps = prompt.answers.get("jumps")
        if jumps and not prompt.padded:
            raise NotImplementedError(
                "position_ids of a routed prompt must count by one where transformers takes others for several packed "
                "sequences (without cache and mask, and under flash attention in a batch of one), got "
                f"{jumps} that do not"
            )

    def brings_features(self, arguments: dict) -> bool:
        return any(arguments.get(name) is not None and len(arguments[name]) for name in self._features)

    def _check_features(self, arguments: dict, prompt: Prompt) -> None:
        """Refuse placeholders that nothing replaces, which the model takes for text."""
        if arguments.get("input_ids") is not None and not self.brings_features(arguments):
            raise ValueError(
                f"input_ids must hold placeholders of images only beside their features ({', '.join(self._features)}), "
                f"got {sum(prompt.visual_counts)} and no features"
            )

    def _visual_tokens(self, arguments: dict) -> Tensor:
        """(B, L) bool, found by placeholder: `generate` may have encoded the images before this call."""
        input_ids = arguments.get("input_ids")
        if input_ids is not None:
            visual = torch.zeros_like(input_ids, dtype=torch.bool)
            for token_id in self._adapter.visual_token_ids:
                visual |= input_ids == token_id
            return visual
        embeds = arguments["inputs_embeds"]
        if not self.brings_features(arguments):
            raise ValueError(
                "input_ids must be given to a routed model, or image features beside inputs_embeds, as visual tokens "
                f"cannot be told from text in them; got inputs_embeds of shape {tuple(embeds.shape)} alone"
            )
        ids = torch.tensor(self._adapter.visual_token_ids, device=embeds.device)
        placeholders = self._adapter.core.get_input_embeddings()(ids)
        return (embeds[:, :, None] == placeholders).all(dim=-1).any(dim=-1)

    def _on_cache(
        self, cache, tokens: Tensor, arguments: dict, generation: PromptCall
    ) -> Prefill | Continuation | None:
        """New tokens on a filled cache."""
        if arguments.get("input_ids") is None and tokens.shape[1] > 1 and not self.brings_features(arguments):
            raise ValueError(
                "input_ids must be given to a routed model, because visual tokens cannot be told from text in "
                f"inputs_embeds; got {tokens.shape[1]} of these on a cache"
            )
        prompt: CachedPrompt | None = getattr(cache, _CACHE_ATTRIBUTE, None)
        if prompt is None and hasattr(cache, _CACHE_ATTRIBUTE):
            raise ValueError(
                f"{self._cache_name} must come from a finished call, got one that a call which failed filled"
            )
        if prompt is None:
            return self._on_unrouted_cache(cache, tokens, arguments, generation)
        if prompt.policy != self._policy:
            raise ValueError(
                f"{self._cache_name} must have been filled under this policy, {self._policy}, got a cache filled under "
                f"{prompt.policy}"
            )
        self._layers.check_attention()
        batch, queries = tokens.shape[:2]
        if batch % prompt.batch:
            raise ValueError(
                f"input_ids must hold {prompt.batch} samples or a multiple of it, as the cached prompt, got {batch}"
            )
        length = prompt.past.length
        new_tokens = self._tokens_after(cache, prompt) + queries
        mask, unlike_causal = _padding_mask(arguments.get("attention_mask"), queries, length + new_tokens)
        if unlike_causal is not None:
            _check_causal(int(unlike_causal))
            _check_windows(arguments["attention_mask"], self._layers, length + new_tokens)
        if mask is not None:
            expected = (batch, length + new_tokens)
            if not isinstance(mask, Tensor) or tuple(mask.shape) != expected:
                raise ValueError(
                    f"attention_mask must be None or of shape {expected}, the {length} tokens of the prompt and "
                    f"{new_tokens} after it, got {_shape(mask)}"
                )
        elif self._layers.length_is_routed and queries > 1 and not generation.uncut:
            # The length of the first attention layer, by which `generate` cuts off what is cached, is not the prompt's.
            raise NotImplementedError(
                f"attention_mask of the whole conversation must be given, and input_ids of the new tokens alone, on a "
                f"cache in which layer {self._policy.stage_layers[0]} lacks tokens; got {queries} tokens and no mask"
            )
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
        checked = [self._layers.attention[0], self._policy.stage_layers[0], self._layers.attention[-1]]
        lengths = set(_cached_tokens(cache, checked))
        if len(lengths) > 1:
            raise ValueError(
                f"{self._cache_name} must come from a finished call, got layers of {sorted(lengths)} cached tokens and "
                "no record of the routed prompt that filled them"
            )
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
        counted = {numbers[0]: length for numbers, length in zip(layers.stages, prompt.past.lengths, strict=True)}
        counted[layers.attention[-1]] = prompt.past.lengths[-1]
        counted.setdefault(layers.attention[0], prompt.past.length)
        numbers = sorted(counted)
        after = [held - counted[layer] for layer, held in zip(numbers, _cached_tokens(cache, numbers), strict=True)]
        if min(after) < 0:
            raise ValueError(
                f"{self._cache_name} must hold the whole routed prompt, got {-min(after)} of its tokens cropped"
            )
        if len(set(after)) == 1:
            return after[0]
        if not layers.length_is_routed and after[0] == min(after):
            # Cropped to a length for all layers, as assisted decoding does: those of the stages kept what it cut off.
            for stage, length in zip(layers.stages, prompt.past.lengths, strict=True):
                for number in stage:
                    if number in layers.attention:
                        cache.layers[number].crop(length + after[0])
            return self._tokens_after(cache, prompt)
        raise ValueError(
            f"{self._cache_name} must hold the same tokens in all layers after the routed prompt, got "
            f"{sorted(set(after))} of them: a call on it failed"
        )


def by_name(signature: inspect.Signature, args: tuple, kwargs: dict) -> dict:
    """All arguments of a call by name."""
    return {**dict(zip(signature.parameters, args, strict=False)), **kwargs}


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


def _check_windows(mask: object, layers: RoutedLayers, total: int) -> None:
    """One mask of four dimensions is the model's in all layers, which then have no window."""
    if isinstance(mask, Tensor) and mask.ndim == 4 and layers.has_windows(total):
        raise NotImplementedError(
            "attention_mask must have two dimensions, or be a dict of masks by the kind of layer, on a routed model "
            f"with sliding windows, got {_shape(mask)} for {total} tokens"
        )


def _check_causal(differences: int) -> None:
    if differences:
        raise NotImplementedError(
            "attention_mask of four dimensions must be causal with padding on a routed model, got one that differs "
            f"from that in {differences} places"
        )


def _padding_mask(mask: object, queries: int, total: int) -> tuple[object, Tensor | None]:
    """The (B, total) mask behind an attention mask.

    For caches of a fixed size `generate` makes masks of four dimensions, one for each kind of layer, of which the last
    query's row is what it made them from.

    Returns:
        The mask, or what it is if there is none behind it; and, of four dimensions, in how many places it differs from
        a causal mask with that padding. What padding sees is no matter, unless it sees other padding: then it is
        another sequence. Nor may the last token stand alone behind padding that sees itself: it may be padding, too.
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
