"""Cost of a policy in floating-point operations and KV cache, counted from its schedule and a decoder's shape.

A multiplication and an addition are two operations. Only matrix products count, as `torch.utils.flop_counter` counts
them: the projections of attention, queries times keys and weights times values over all keys of the sequence (nothing
is halved for causality), the MLP, and the ranking. Norms, the input embedding and the vision tower do not; the LM head
is counted apart.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise
from operator import index as as_integer
from typing import NamedTuple

import torch

from .policy import Policy
from .rankings import RankingLike
from .reducers import ReducerLike


@dataclass(frozen=True)
class Decoder:
    """The shape of a decoder whose layers all have full attention, with projections as in Llama.

    Raises:
        ValueError: `mlp_weights` has not one entry for each layer.
    """

    hidden_size: int
    """Channels of a hidden state."""
    layers: int
    """Decoder layers."""
    heads: int
    """Query heads."""
    kv_heads: int
    """Key and value heads."""
    head_dim: int
    """Channels of a head."""
    vocab_size: int
    """Entries of the logits of a token."""
    mlp_weights: tuple[int, ...]
    """By layer, the entries of the matrices that one token is multiplied by in the MLP. For a mixture of experts, those
    of the router and of the experts that it sends a token to."""

    def __post_init__(self):
        if len(self.mlp_weights) != self.layers:
            raise ValueError(
                f"mlp_weights must have {self.layers} entries, as layers says, got {len(self.mlp_weights)}"
            )

    @property
    def projection_weights(self) -> int:
        """Entries of the query, key, value and output matrices of a layer."""
        return 2 * self.hidden_size * (self.heads + self.kv_heads) * self.head_dim

    @property
    def cached_weights(self) -> int:
        """Entries of the key and value matrices of a layer."""
        return 2 * self.hidden_size * self.kv_heads * self.head_dim

    @classmethod
    def of(cls, config_or_model) -> Decoder:
        """The decoder of a model.

        Args:
            config_or_model: a transformers model or its configuration, or that of its text model; the name of one in
                `DECODERS`; or a `Decoder`. MLPs are taken to be gated, with three matrices, as in all that `apply`
                supports.

        Raises:
            TypeError: the argument is none of these.
            ValueError: the name is unknown.
            NotImplementedError: a layer has other than full attention, or attention is latent.
        """
        if isinstance(config_or_model, Decoder):
            return config_or_model
        if isinstance(config_or_model, str):
            if config_or_model not in DECODERS:
                raise unknown_name(config_or_model)
            return DECODERS[config_or_model]
        config = text_config(config_or_model)
        for name in ("hidden_size", "num_attention_heads", "intermediate_size", "vocab_size"):
            if not hasattr(config, name):
                raise _no_config(config_or_model, name)
        _check_attention(config)
        heads = config.num_attention_heads
        return cls(
            hidden_size=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocab_size=config.vocab_size,
            mlp_weights=tuple(_mlp_weights(config, layer) for layer in range(config.num_hidden_layers)),
        )


def text_config(config_or_model: object):
    """Configuration of the text model of a transformers model, or of its configuration.

    Raises:
        TypeError: the argument is neither.
    """
    config = getattr(config_or_model, "config", config_or_model)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    if not hasattr(config, "num_hidden_layers"):
        raise _no_config(config_or_model, "num_hidden_layers")
    return config


def unknown_name(given: str) -> ValueError:
    """Error that tells which names stand for a model, and what else does."""
    names = ", ".join(map(repr, DECODERS))
    return ValueError(
        f"config_or_model must be one of {names}, a model or a configuration (AutoConfig.from_pretrained), "
        f"got {given!r}"
    )


def _no_config(given: object, missing: str) -> TypeError:
    return TypeError(
        "config_or_model must be a transformers model or configuration, or the name of a published model, got "
        f"{type(given).__name__}, which has no {missing!r}"
    )


def layer_types(config) -> list[str]:
    """Type of attention of each layer, in the words of transformers' configurations.

    Args:
        config: of a text model.
    """
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        slides = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
        kinds = ["sliding_attention" if slides else "full_attention"] * config.num_hidden_layers
    return list(kinds)[: config.num_hidden_layers]


def deciding_layers(config) -> list[int]:
    """Layers before which tokens can be selected: those with full attention.

    If the last layers read keys of others (`num_kv_shared_layers`), none behind the first of these others: a token that
    did not run there has no keys in the layers that read them.

    Args:
        config: of a text model.
    """
    kinds = layer_types(config)
    able = [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]
    own = kinds[: len(kinds) - (getattr(config, "num_kv_shared_layers", None) or 0)]
    if len(own) == len(kinds):
        return able
    last = {kind: layer for layer, kind in enumerate(own)}  # of each kind, whose keys are read
    return [layer for layer in able if layer <= min(last.values(), default=-1)]


def _check_attention(config) -> None:
    """Refuse decoders whose attention costs otherwise."""
    model_type = getattr(config, "model_type", type(config).__name__)
    for layer, kind in enumerate(layer_types(config)):
        if kind != "full_attention":
            raise NotImplementedError(
                "config_or_model must have a decoder whose layers all have 'full_attention', got "
                f"{model_type!r} with {kind!r} at layer {layer}"
            )
    if getattr(config, "kv_lora_rank", None):
        raise NotImplementedError(f"config_or_model must not have latent attention, got {model_type!r}")


def _mlp_weights(config, layer: int) -> int:
    size = config.hidden_size
    # The names of these counts differ between families and versions of transformers.
    counts = (getattr(config, name, None) for name in ("num_experts", "n_routed_experts", "num_local_experts"))
    experts = next((count for count in counts if count), 0)
    is_dense = (
        not experts
        or layer in (getattr(config, "mlp_only_layers", None) or ())
        or layer < getattr(config, "first_k_dense_replace", 0)
        or (layer + 1) % getattr(config, "decoder_sparse_step", 1)
    )
    if is_dense:
        return 3 * size * config.intermediate_size
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    used = config.num_experts_per_tok + (getattr(config, "n_shared_experts", None) or 0)
    weights = size * experts + 3 * size * width * used
    if shared := getattr(config, "shared_expert_intermediate_size", None):
        weights += 3 * size * shared + size  # with a gate of one channel
    return weights


DECODERS = {
    "llava-1.5-7b": Decoder(4096, 32, 32, 32, 128, 32064, mlp_weights=(3 * 4096 * 11008,) * 32),
    "qwen2.5-vl-7b": Decoder(3584, 28, 28, 4, 128, 152064, mlp_weights=(3 * 3584 * 18944,) * 28),
}
"""Decoders by name, with their published shapes."""


DECIMAL = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
BINARY = ((2**40, "Ti"), (2**30, "Gi"), (2**20, "Mi"), (2**10, "Ki"))


def unit_of(value: float, units: tuple[tuple[float, str], ...]) -> tuple[float, str]:
    """The largest unit that is not above a value, and its prefix; units: `DECIMAL` or `BINARY`."""
    return next(((size, prefix) for size, prefix in units if value >= size), (1, ""))


def scaled(value: float, units: tuple[tuple[float, str], ...]) -> str:
    """A value in the unit that fits it, as text up to the unit's name: `8.1 T`."""
    size, prefix = unit_of(value, units)
    return f"{value / size:.1f} {prefix}"


@dataclass(frozen=True)
class StageCost:
    """Cost of one stage's layers in a prefill. Tokens are of one sample; all else is of the whole batch."""

    first_layer: int
    layers: int
    visual_tokens: int
    """Visual tokens that run in each layer, and are cached there."""
    tokens: int
    """All tokens that run in each layer, text included."""
    frozen: int
    """Visual tokens that do not run, and are cached in each layer: under `freeze` alone."""
    projections: int
    """FLOPs of the query, key, value and output projections; of frozen tokens the key and value projections."""
    attention: int
    """FLOPs of queries times keys and of weights times values."""
    mlp: int
    """FLOPs."""
    ranking: int
    """FLOPs of the decision that begins the stage; with those of its proxies or clusters, if it has any."""
    kv_bytes: int
    """Bytes of the keys and values that the layers cache."""
    visual_kv_bytes: int
    """Bytes of the keys and values of visual tokens."""

    @property
    def cached_tokens(self) -> int:
        """All tokens that are cached in each layer: those that run, and frozen ones."""
        return self.tokens + self.frozen

    @property
    def flops(self) -> int:
        """FLOPs of the stage, ranking included."""
        return self.projections + self.attention + self.mlp + self.ranking


@dataclass(frozen=True)
class Cost:
    """Result of `cost`. Totals are of the whole batch, averages of one sample."""

    decoder: Decoder
    text_tokens: int
    visual_tokens: int
    batch: int
    stages: tuple[StageCost, ...]
    """The layers before the first decision are one, too."""

    def __repr__(self) -> str:
        step = self.decode_flops(self.text_tokens + self.visual_tokens)
        return (
            f"Cost({scaled(self.prefill_flops, DECIMAL)}FLOPs prefill, {scaled(step, DECIMAL)}FLOPs decode step, "
            f"{scaled(self.kv_bytes, BINARY)}B KV cache; {self.average_visual_tokens:.1f} visual tokens per layer)"
        )

    def _total(self, name: str) -> int:
        return sum(getattr(stage, name) for stage in self.stages)

    @property
    def average_visual_tokens(self) -> float:
        """Mean over the layers of the visual tokens that run."""
        return sum(stage.layers * stage.visual_tokens for stage in self.stages) / self.decoder.layers

    @property
    def prefill_flops(self) -> int:
        """FLOPs of the prompt in all layers, rankings included, without the LM head."""
        return self._total("flops")

    @property
    def projections(self) -> int:
        """FLOPs of the prompt in all layers: the query, key, value and output projections."""
        return self._total("projections")

    @property
    def attention(self) -> int:
        """FLOPs of the prompt in all layers: queries times keys and weights times values."""
        return self._total("attention")

    @property
    def mlp(self) -> int:
        """FLOPs of the prompt in all layers: the MLPs."""
        return self._total("mlp")

    @property
    def ranking(self) -> int:
        """FLOPs of the prompt in all layers: the decisions."""
        return self._total("ranking")

    @property
    def lm_head_flops(self) -> int:
        """FLOPs of the logits of one token for each sample."""
        return 2 * self.batch * self.decoder.hidden_size * self.decoder.vocab_size

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values that the prompt leaves in the cache."""
        return self._total("kv_bytes")

    @property
    def visual_kv_bytes(self) -> int:
        """Bytes of the keys and values of visual tokens."""
        return self._total("visual_kv_bytes")

    def decode_flops(self, length: int) -> int:
        """FLOPs of one decode step in all layers, one token for each sample, without the LM head.

        Args:
            length: tokens before the new one, of the sequence as if no token had been dropped or deferred; so the
                first step after the prompt has `text_tokens + visual_tokens`.

        Raises:
            ValueError: `length` is below the length of the prompt.
        """
        prompt = self.text_tokens + self.visual_tokens
        _check_count("length", length, prompt)
        keys = sum(stage.layers * (stage.cached_tokens + length - prompt + 1) for stage in self.stages)
        per_token = self.decoder.layers * self.decoder.projection_weights + sum(self.decoder.mlp_weights)
        return 2 * self.batch * (per_token + 2 * self.decoder.heads * self.decoder.head_dim * keys)

    def as_dict(self) -> dict[str, object]:
        """All of it as plain numbers, lists and dictionaries, for JSON."""
        totals = (
            "average_visual_tokens",
            "prefill_flops",
            "projections",
            "attention",
            "mlp",
            "ranking",
            "lm_head_flops",
            "kv_bytes",
            "visual_kv_bytes",
        )
        prompt = {name: getattr(self, name) for name in ("text_tokens", "visual_tokens", "batch")}
        return {
            "decoder": asdict(self.decoder) | {"mlp_weights": list(self.decoder.mlp_weights)},
            **prompt,
            **{name: getattr(self, name) for name in totals},
            "stages": [asdict(stage) | {"flops": stage.flops} for stage in self.stages],
        }


def cost(
    config_or_model,
    policy: Policy | str | None,
    text_tokens: int = 64,
    visual_tokens: int = 576,
    batch: int = 1,
    dtype: str | torch.dtype = "float16",
    images: int = 1,
) -> Cost:
    """Count the cost of a policy on a model.

    FLOPs: a multiplication and an addition are two. Only matrix products count: projections, attention over all keys
    (not halved for causality), MLPs and rankings; norms, the input embedding and the vision tower do not, and the LM
    head is counted apart.

    Args:
        config_or_model: whose decoder is costed, as in `Decoder.of`.
        policy: the policy, or its text as `Policy.parse` takes it for this model; None for no routing.
        text_tokens: other tokens of a sample's prompt; the last token is one of them.
        visual_tokens: visual tokens of a sample's prompt.
        batch: samples, all alike.
        dtype: of keys and values in the cache.
        images: images or frames that a sample's visual tokens are of, equally many each: a reducer rounds for each.

    Raises:
        TypeError: an argument has the wrong type; or a ranking has no method `flops`, the reducer no `survivors`.
        ValueError: a number or name is out of range, or the schedule has a layer that the model has not.
        NotImplementedError: the decoder has layers without full attention, or latent attention.

    >>> unrouted, routed = (cost("llava-1.5-7b", policy) for policy in (None, Policy.parse("3:0.25,15:0.1")))
    >>> routed
    Cost(2.7 TFLOPs prefill, 13.1 GFLOPs decode step, 101.1 MiB KV cache; 138.3 visual tokens per layer)
    >>> f"{routed.prefill_flops / unrouted.prefill_flops:.1%}"
    '31.7%'
    """
    decoder = Decoder.of(config_or_model)
    if isinstance(policy, str):
        policy = Policy.parse(policy, None if isinstance(config_or_model, Decoder) else config_or_model)
    if policy is not None and not isinstance(policy, Policy):
        raise TypeError(f"policy must be a Policy, its text or None, got {policy!r}")
    _check_count("text_tokens", text_tokens, 0)
    _check_count("batch", batch, 1)
    kv_width = 2 * decoder.kv_heads * decoder.head_dim * _dtype(dtype).itemsize * batch
    stages = []
    for span in _spans(policy, decoder.layers, visual_tokens, images):
        layers, tokens = span.end - span.first, text_tokens + span.visual_tokens
        cached = tokens + span.frozen
        weights = tokens * decoder.projection_weights + span.frozen * decoder.cached_weights
        ranked = text_tokens + span.ranked if span.ranked else 0
        stages.append(
            StageCost(
                first_layer=span.first,
                layers=layers,
                visual_tokens=span.visual_tokens,
                tokens=tokens,
                frozen=span.frozen,
                projections=2 * batch * layers * weights,
                attention=4 * batch * layers * tokens * cached * decoder.heads * decoder.head_dim,
                mlp=2 * batch * tokens * sum(decoder.mlp_weights[span.first : span.end]),
                ranking=batch
                * (
                    _ranking_flops(span.ranking, decoder, ranked, text_tokens)
                    + _similarity_flops(decoder, span.proxies, ranked)
                    + _similarity_flops(decoder, span.recycled, span.recycled)
                ),
                kv_bytes=layers * cached * kv_width,
                visual_kv_bytes=layers * (span.visual_tokens + span.frozen) * kv_width,
            )
        )
    return Cost(decoder, text_tokens, visual_tokens, batch, tuple(stages))


def visual_tokens_per_layer(policy: Policy, num_layers: int, visual_tokens: int, images: int = 1) -> list[int]:
    """Visual tokens that run in each decoder layer, which is also how many of them each layer caches, but for `freeze`.

    Args:
        policy: the policy.
        num_layers: decoder layers of the model.
        visual_tokens: visual tokens in the prompt of one sample.
        images: images or frames that they are of, as in `cost`.

    Returns:
        A list of `num_layers` counts.

    Raises:
        TypeError: the reducer has no method `survivors`.
        ValueError: a number is out of range, or the schedule has a layer that the model has not.
    """
    if num_layers < 1:
        raise ValueError(f"num_layers must be 1 or more, got {num_layers}")
    spans = _spans(policy, num_layers, visual_tokens, images)
    return [span.visual_tokens for span in spans for _ in range(span.first, span.end)]


def average_visual_tokens(policy: Policy, num_layers: int, visual_tokens: int, images: int = 1) -> float:
    """Mean over the decoder layers of the visual tokens that run; arguments as in `visual_tokens_per_layer`."""
    return sum(visual_tokens_per_layer(policy, num_layers, visual_tokens, images)) / num_layers


def surviving_tokens(reducer: ReducerLike | None, visual_tokens: int, images: int = 1) -> int:
    """Visual tokens of an image, or of several of one size, that a reducer leaves; all without one.

    Raises:
        TypeError: a number is no integer, or the reducer has no method `survivors`.
        ValueError: `visual_tokens` is negative, or is not divided evenly among `images` of 1 or more.
    """
    _check_count("visual_tokens", visual_tokens, 0)
    _check_count("images", images, 1)
    if visual_tokens % images:
        raise ValueError(f"visual_tokens must be a multiple of images, {images}, got {visual_tokens}")
    if reducer is None:
        return visual_tokens
    return images * _method(reducer, "reducer", "survivors")(visual_tokens // images)


# `reroute_kernels.cost` is the function, and these were reached by that name when it was this module.
cost.average_visual_tokens = average_visual_tokens  # type: ignore[attr-defined]
cost.visual_tokens_per_layer = visual_tokens_per_layer  # type: ignore[attr-defined]


class _Span(NamedTuple):
    """Layers that run the same tokens, up to `end`."""

    first: int
    end: int
    visual_tokens: int
    ranked: int = 0
    """Visual tokens that the decision before them ranks."""
    ranking: RankingLike | None = None
    """Of that decision."""
    frozen: int = 0
    """Visual tokens that the layers cache and do not run."""
    proxies: int = 0
    """Visual tokens that run in place of deferred ones."""
    recycled: int = 0
    """Removed visual tokens that are clustered."""


def _spans(policy: Policy | None, num_layers: int, visual_tokens: int, images: int) -> list[_Span]:
    """The layers before the first decision, and those of each stage."""
    schedule = () if policy is None else policy.schedule
    if schedule and schedule[-1].layer >= num_layers:
        raise ValueError(f"schedule must stay below layer {num_layers} of this model, got layer {schedule[-1].layer}")
    candidates = surviving_tokens(None if policy is None else policy.reducer, visual_tokens, images)
    ends = [*(stage.layer for stage in schedule), num_layers]
    spans = [_Span(0, ends[0], candidates)] if ends[0] else []
    if policy is not None and schedule:
        counts = policy.selected_counts(visual_tokens, candidates)
        proxies, recycled = policy.proxy_counts(counts, candidates), policy.recycled_counts(counts, candidates)
        stages = zip(pairwise(ends), counts, policy.rankings, proxies, recycled, strict=True)
        for (first, end), selected, ranking, led, (clustered, _) in stages:
            frozen = candidates - selected if policy.action == "freeze" else 0
            spans.append(_Span(first, end, selected, candidates, ranking, frozen, led, clustered))
            if policy.action == "remove":
                candidates = selected
    return spans


def _ranking_flops(ranking: RankingLike | None, decoder: Decoder, tokens: int, text_tokens: int) -> int:
    if ranking is None or not tokens:
        return 0
    return _method(ranking, "ranking", "flops")(decoder, tokens, text_tokens)


def _similarity_flops(decoder: Decoder, some: int, others: int) -> int:
    """FLOPs of a sample: similarities of all tokens to the leaders, or distances among recycled tokens."""
    return 2 * some * others * decoder.hidden_size


def _method(owner: object, name: str, method: str):
    found = getattr(owner, method, None)
    if not callable(found):
        raise TypeError(f"{name} must have a method {method!r} to be costed, got {owner!r}")
    return found


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype must be a torch.dtype or the name of one, got {dtype!r}")
    return found


def _check_count(name: str, value: int, least: int) -> None:
    try:
        as_integer(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if value < least:
        raise ValueError(f"{name} must be {least} or more, got {value}")
