"""The configurations that the Reroute paper released (arXiv 2606.12412), and those of the methods' own authors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

from .budget import keep_ratio, solve, solve_like
from .checks import expect_one_of
from .cost import DECODERS, Decoder, deciding_layers, layer_types, surviving_tokens, text_config, unknown_name
from .policy import Policy, Stage, recycled_tokens
from .rankings import LastQuery, TextRaters
from .reduced import IMAGE_METHODS, REDUCED, VIDEO_METHODS, amounts, of_layers, reduced_policy, share_of
from .reducers import Nuwa

VISUAL_TOKENS = 576
"""Visual tokens that published presets are stated for: 24 x 24 patches of LLaVA-1.5, and 451,584 pixels of Qwen2.5-VL.
So are those of models whose configuration leaves open how many an image has."""

_OF_AN_IMAGE = ("mm_tokens_per_image", "vision_soft_tokens_per_image", "num_image_tokens")
"""Names under which configurations fix how many visual tokens an image has. `image_seq_length` is not among them: the
models do not read it, and where images are cut it is that of a tile."""

_OF_AN_IMAGE_BY_TYPE = {"gemma4": 280, "gemma4_unified": 280}
"""By type, where a configuration leaves it to the image processor: the most that it makes of an image."""


@dataclass(frozen=True)
class PublishedModel:
    """A model that configurations were published for, and their decision layers in it."""

    name: str
    model_type: str
    """`config.model_type`."""
    architecture: str
    """Name of its class in transformers and in vLLM."""
    decoder: Decoder
    later_layers: tuple[int, ...]
    """Decision layers after the first, which is 3 in schedules matched to FastV and 2 in the others."""
    pyramiddrop_layers: tuple[int, ...]
    """Decision layers of PyramidDrop's authors; on Qwen2.5-VL at the same depths."""
    nuwa_layers: tuple[int, int]
    """Decision layers of the second stage of Nüwa: its own, and one more for `reroute-nuwa`."""
    nuwa_ranking: LastQuery
    nuwa: dict[int, tuple[Nuwa, int]]
    """By tier: the reducer, and how many of 576 tokens the second stage keeps; on Qwen2.5-VL a share of the anchors."""


_LLAVA = PublishedModel(
    name="llava-1.5-7b",
    model_type="llava",
    architecture="LlavaForConditionalGeneration",
    decoder=DECODERS["llava-1.5-7b"],
    later_layers=(7, 15, 23),
    pyramiddrop_layers=(8, 16, 24),
    nuwa_layers=(16, 23),
    nuwa_ranking=LastQuery(layer="previous"),
    nuwa={
        192: (Nuwa(keep=336 / 576, per_cell=3), 48),
        128: (Nuwa(keep=224 / 576, per_cell=2), 32),
        64: (Nuwa(keep=112 / 576, per_cell=1), 16),
    },
)
_QWEN = PublishedModel(
    name="qwen2.5-vl-7b",
    model_type="qwen2_5_vl",
    architecture="Qwen2_5_VLForConditionalGeneration",
    decoder=DECODERS["qwen2.5-vl-7b"],
    later_layers=(6, 13, 20),
    pyramiddrop_layers=(7, 14, 21),
    nuwa_layers=(15, 21),
    nuwa_ranking=LastQuery(layer="previous", queries=3, head_reduction="max"),
    nuwa={
        tier: (
            Nuwa(keep=fraction, per_cell=per_cell, distance=0.8, quantile=0.1, keeps_own=False),
            math.trunc(math.ceil(VISUAL_TOKENS * fraction) * share),
        )
        for tier, fraction, share, per_cell in ((432, 0.85, 0.7, 4), (288, 0.6, 0.66, 3), (144, 0.35, 0.42, 3))
    },
)
MODELS: dict[str, PublishedModel] = {model.name: model for model in (_LLAVA, _QWEN)}
"""The published models by name."""


def layers_of(model: object) -> int:
    """Decoder layers of a model; of a published one by its name, else of a transformers model or configuration."""
    return MODELS[model].decoder.layers if isinstance(model, str) else text_config(model).num_hidden_layers


_FASTV = {192: 0.2644, 128: 0.1418, 64: 0.01916}
"""Keep ratio of FastV's one decision, and of each decision of `reroute-fastv`, by tier."""

_PYRAMIDS = {
    "pdrop": {
        192: (0.5965, 0.3558, 0.2123, 0.1266),
        128: (0.4570, 0.2088, 0.0954, 0.0436),
        64: (0.2789, 0.0937, 0.0315, 0.0106),
    },
    "reroute-pdrop": {
        192: (0.4502, 0.4502, 0.2251, 0.1126),
        128: (0.2655, 0.2655, 0.1328, 0.0664),
        64: (0.1392, 0.1392, 0.0696, 0.0348),
    },
}
"""Keep ratios of the decisions, by method and tier."""

_SPARSEVLM = {192: (300, 200, 110), 128: (303, 110, 36), 64: (66, 30, 17)}
"""Tokens of 576 that SparseVLM selects at its decisions, by tier."""

_RECYCLED = 0.3
"""Share of the tokens that SparseVLM removes at a decision, of which it keeps means."""

_SPARSEVLM_LAYERS = (3, 7, 16)
"""Those behind the layers by which SparseVLM ranks, of 32; in other decoders at the same depths."""

METHODS = (
    "fastv",
    "pdrop",
    "reroute-fastv",
    "reroute-fastv-stagewise",
    "reroute-pdrop",
    "reroute-pdrop-stagewise",
)
"""The methods of the Reroute paper."""

ORIGINALS = ("fastv-original", "pdrop-original", "nuwa", "reroute-nuwa", "sparsevlm", "reroute-sparsevlm")
"""FastV, PyramidDrop, Nüwa and SparseVLM as their own authors run them, the latter two under `reroute`, too."""

ALL_METHODS = METHODS + ORIGINALS + REDUCED
"""Every method that has presets."""

_REDUCED_ON = {"llava-1.5-7b": tuple(IMAGE_METHODS), "qwen2.5-vl-7b": VIDEO_METHODS}
"""The methods that reduce among a model's listed presets; other models take them, too."""

TIERS = tuple(_FASTV)


class Preset(NamedTuple):
    """The name of a published configuration; `preset(*name)` builds its policy."""

    model: str
    method: str
    avg_tokens: int | str
    """Visual tokens per layer on average, of 576; a percentage, such as `"10%"`, for methods that reduce videos."""

    def __str__(self) -> str:
        return f"{self.model}/{self.method}/{self.avg_tokens}"


def model_of(config_or_model: object) -> PublishedModel | None:
    """The published model that a transformers model or configuration is, by its type and number of decoder layers."""
    config = getattr(config_or_model, "config", config_or_model)
    found = (each for each in MODELS.values() if each.model_type == getattr(config, "model_type", None))
    return next((each for each in found if each.decoder.layers == text_config(config).num_hidden_layers), None)


def visual_tokens_of(config_or_model: object) -> int:
    """Visual tokens that presets of a model are stated for: of one image, if its configuration fixes them, else 576."""
    config = getattr(config_or_model, "config", config_or_model)
    if model_of(config) is not None:
        return VISUAL_TOKENS
    parts = (config, getattr(config, "text_config", None), getattr(config, "vision_config", None))
    stated = (getattr(part, name, None) for part in parts for name in _OF_AN_IMAGE)
    return next(filter(None, stated), _OF_AN_IMAGE_BY_TYPE.get(getattr(config, "model_type", ""), VISUAL_TOKENS))


def presets(*, originals: bool = False) -> list[Preset]:
    """The configurations that the Reroute paper released.

    Args:
        originals: whether those in `ORIGINALS` and `REDUCED` follow; of the latter those for images on LLaVA-1.5, and
            those for videos on Qwen2.5-VL.

    >>> print(*presets()[:2], len(presets(originals=True)))
    llava-1.5-7b/fastv/192 llava-1.5-7b/fastv/128 116
    """
    return [
        Preset(model, method, tier)
        for model in MODELS
        for method in (_listed(model) if originals else METHODS)
        for tier in tiers(model, method)
    ]


def _listed(model: str) -> tuple[str, ...]:
    """The methods of a model's listed presets."""
    own = _REDUCED_ON[model]
    return METHODS + ORIGINALS + tuple(each for each in REDUCED if each.removeprefix("reroute-") in own)


def tiers(model: str, method: str) -> tuple[int | str, ...]:
    """The published budgets of a method: visual tokens per layer on average, or a percentage of them.

    Raises:
        ValueError: a name is unknown.

    >>> tiers("qwen2.5-vl-7b", "flashvid")
    ('25%', '20%', '15%', '10%')
    """
    expect_one_of(model=(model, tuple(MODELS)), method=(method, ALL_METHODS))
    if method in REDUCED:
        return amounts(method)
    if method == "pdrop-original":
        return (270,)
    return tuple(MODELS[model].nuwa) if method.endswith("nuwa") else TIERS


def preset(
    model: object, method: str, avg_tokens: float | str, *, matched: bool = False, visual_tokens: int | None = None
) -> Policy:
    """Policy of a published configuration, or one like it for another model.

    Other models decide where LLaVA-1.5 does by relative depth, at the nearest layers that can, the first early enough
    for the budget. The published keep ratios are the shape of the schedule, which is solved for the budget at the
    visual tokens of an image. So are published models for budgets that are not.

    Args:
        model: `"llava-1.5-7b"` (32 decoder layers) or `"qwen2.5-vl-7b"` (28); or a transformers model or its
            configuration, which takes the methods of the Reroute paper and those that reduce.
        method: `"fastv"` and `"pdrop"` remove tokens as the Reroute paper's code runs these methods; `"reroute-fastv"`
            and `"reroute-pdrop"` defer them at a matched budget. The authors also list a `-stagewise` variant of both,
            which computes the same thing faster; here every policy runs stagewise, so it is the same policy.
            `"fastv-original"` (arXiv 2403.06764; at the Reroute paper's keep ratios), `"pdrop-original"` (arXiv
            2410.17247; on Qwen2.5-VL at the same depths) and `"nuwa"` (arXiv 2602.02951) follow their own authors'
            code. `"reroute-nuwa"` defers in the second stage of Nüwa, by two decisions, and runs as many tokens in
            every layer. `"sparsevlm"` (arXiv 2410.04417) ranks by the text that resembles the image, and
            keeps means of what it removes; `"reroute-sparsevlm"` defers at its layers. `"visionzip"`, `"divprune"`,
            `"cdpruner"`, `"holov"` and `"vispruner"` reduce images before the decoder, `"vidcom2"` videos, and nothing
            else; behind the prefix `reroute-` they leave twice as many tokens, of which the decoder defers at the
            layers of `reroute-fastv`, at the same budget. `"flashvid"` (arXiv 2602.08024) reduces videos, and removes
            tokens at one layer of the decoder; `"reroute-flashvid"` defers there, and decides once more halfway to the
            end. All of these run on any model, at any budget if it is no published one. The codes for LLaVA number the
            tokens that stay anew; so do these methods on models of such types, unless they defer.
        avg_tokens: the published tier, one of `tiers(model, method)`: visual tokens per layer on average, of 576. It is
            a name. On LLaVA the true averages are within 1 of it, but for the pdrop pair at 64, which averages 80 and
            84. On Qwen2.5-VL they are 197, 134 and 72 for methods named after FastV (the original at 128: 135). They
            are 192, 129 and 83 for pdrop, 193, 131 and 88 for reroute-pdrop, and 422, 291 and 147 for both of Nüwa at
            432, 288 and 144. Those of SparseVLM are 207, 145 and 82 on LLaVA. `reroute_kernels.cost` counts. For
            another model any number is taken, and is a limit, of `visual_tokens`. `"flashvid"` and `"vidcom2"` take a
            percentage of the visual tokens instead, such as `"10%"`.
        matched: solve the schedule anew, with its published keep ratios as the shape, so that pairs match at 576
            tokens, or at `visual_tokens`. A method that removes comes as close to `avg_tokens` as `solve` does, never
            above: with one decision, as in FastV, to less than 1 token, with several to an eighth of one. A method that
            defers comes as close to the average of its removing partner. `policy.budget` tells how close. Methods that
            reduce before the decoder meet their budgets anyway, but for Nüwa.
        visual_tokens: those that `avg_tokens` is stated of. None: of a published model 576; of others those of an
            image, if the configuration fixes them (Gemma 3: 256, Gemma 4: 280, PaliGemma by its resolution), else 576.
            If it is given, published configurations are solved anew, too.

    Raises:
        TypeError: the model, the budget or the number of visual tokens is none of what is taken.
        ValueError: an argument names no published configuration, no layer can decide, or the budget is below what the
            layers before the first decision cost.

    >>> print(preset("llava-1.5-7b", "reroute-fastv", 192))
    3:0.2644,7:0.2644,15:0.2644,23:0.2644
    >>> print(preset("qwen2.5-vl-7b", "flashvid", "10%").selected_counts(visual_tokens=6272))
    (235,)
    """
    is_given, count = visual_tokens is not None, _visual_tokens(model, visual_tokens)
    if method in REDUCED:
        return _reduced(model, method, avg_tokens, count)
    if not isinstance(model, str):
        published = model_of(model)
        if published is None or avg_tokens not in tiers(published.name, method):
            return _solved(model, method, avg_tokens, matched, count)
        model = published.name
    expect_one_of(avg_tokens=(avg_tokens, tiers(model, method)))
    tier = int(avg_tokens)
    policy = _published(MODELS[model], method.removesuffix("-stagewise"), tier)
    if not (matched or is_given):
        return policy
    limit = _partners_average(model, method, tier, count) if matched and policy.action == "reroute" else tier
    return solve_like(model, policy, avg_tokens=limit, visual_tokens=count)


def _visual_tokens(model: object, given: int | None) -> int:
    """The visual tokens that a budget is stated of."""
    if given is None:
        return VISUAL_TOKENS if isinstance(model, str) else visual_tokens_of(model)
    if surviving_tokens(None, given) < 1:
        raise ValueError(f"visual_tokens must be 1 or more, got {given}")
    return given


def _reduced(model: object, method: str, avg_tokens: object, visual_tokens: int) -> Policy:
    """A method that reduces; on models without a name at any budget."""
    if isinstance(model, str):
        expect_one_of(avg_tokens=(avg_tokens, tiers(model, method)))
        published: PublishedModel | None = MODELS[model]
    else:
        published = model_of(model)
    if published is None:
        config = text_config(model)
        count, able = config.num_hidden_layers, _able_layers(config)
        model_type = getattr(getattr(model, "config", model), "model_type", None) or ""
        decisions = [layer * count / _LLAVA.decoder.layers for layer in (3, *_LLAVA.later_layers)]
    else:
        count, model_type = published.decoder.layers, published.model_type
        able, decisions = list(range(count)), [3, *published.later_layers]
    share = share_of(method, avg_tokens, visual_tokens)
    return reduced_policy(method, share, count, able, decisions, model_type, visual_tokens)


def _partners_average(model: object, method: str, avg_tokens: float, visual_tokens: int) -> float:
    """Tokens a layer that the removing partner of a method reaches."""
    partner = method.removeprefix("reroute-").removesuffix("-stagewise")
    budget = preset(model, partner, avg_tokens, matched=True, visual_tokens=visual_tokens).budget
    return avg_tokens if budget is None else budget.reached


def _solved(config_or_model: object, method: str, avg_tokens: float | str, matched: bool, visual_tokens: int) -> Policy:
    """A method at the relative depths of LLaVA-1.5, solved for a budget."""
    expect_one_of(method=(method, METHODS + REDUCED))
    if isinstance(avg_tokens, str) and avg_tokens.endswith("%"):
        raise ValueError(f"avg_tokens must be a number for {method!r}, got {avg_tokens!r}")
    if isinstance(avg_tokens, bool | str) or not isinstance(avg_tokens, Real):
        raise TypeError(f"avg_tokens must be a number, got {avg_tokens!r}")
    config = text_config(config_or_model)
    count = config.num_hidden_layers
    of_576 = avg_tokens * VISUAL_TOKENS / visual_tokens
    tier = min(TIERS, key=lambda tier: abs(tier - of_576))
    published = _published(_LLAVA, method.removesuffix("-stagewise"), tier)
    shape = _at_relative_depth(published, config, avg_tokens, visual_tokens)
    limit = avg_tokens
    if matched and published.action == "reroute":
        limit = _partners_average(config_or_model, method, avg_tokens, visual_tokens)
    return solve(
        of_layers(count),
        list(shape),
        list(shape.values()),
        avg_tokens=limit,
        visual_tokens=visual_tokens,
        action=published.action,
    )


def _at_relative_depth(published: Policy, config: Any, avg_tokens: float, visual_tokens: int) -> dict[int, float]:
    """Keep ratios of LLaVA-1.5 by layers at the same depth of a decoder; the first leaves room in the budget."""
    able, count = _able_layers(config), config.num_hidden_layers
    spent = [layer for layer in able if (layer * (visual_tokens - 1) + count) / count <= avg_tokens]
    ratios: dict[int, float] = {}
    for stage in published.schedule:
        depth = stage.layer * count / _LLAVA.decoder.layers
        among = able if ratios else spent or able[:1]
        ratios.setdefault(min(among, key=lambda layer: abs(layer - depth)), stage.keep)
    return dict(sorted(ratios.items()))


def suggest(config_or_model: object, keep: float = 1 / 3) -> Policy:
    """A rerouting policy to begin with: decisions at four depths, all with the same keep ratio.

    Published models decide where the Reroute paper does, and at a third follow its preset `reroute-fastv/192`, which
    averages 191.8 of 576 tokens on LLaVA-1.5 and 197.4 on Qwen2.5-VL. Others decide at an eighth, a quarter, a half and
    three quarters of their depth, at the next layers that can.

    Args:
        config_or_model: a transformers model or its configuration, or the name of a published model.
        keep: share of the visual tokens that run in a layer, mean over all decoder layers, in (0, 1]. The layers before
            the first decision run all of them.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the name is unknown, no layer can decide, or `keep` is out of range for the first decision layer.

    >>> print(suggest("llava-1.5-7b"))
    3:0.2644,7:0.2644,15:0.2644,23:0.2644
    >>> print(suggest("llava-1.5-7b", keep=0.5))
    3:0.4482,7:0.4482,15:0.4482,23:0.4482
    """
    if isinstance(keep, bool) or not isinstance(keep, Real):
        raise TypeError(f"keep must be a number in (0, 1], got {keep!r}")
    if isinstance(config_or_model, str):
        if config_or_model not in MODELS:
            raise unknown_name(config_or_model)
        published = MODELS[config_or_model]
    else:
        published = model_of(config_or_model)
    if published is not None and keep == 1 / 3:
        return preset(*_suggested_preset(published))
    if published is not None:
        count, layers = published.decoder.layers, [3, *published.later_layers]
    else:
        config = text_config(config_or_model)
        count, layers = config.num_hidden_layers, _decision_layers(config)
    first = layers[0]
    if not first / count < keep <= 1:
        least = f"{first / count:.4g} ({first} of {count} layers run all tokens)"
        raise ValueError(f"keep must be above {least} and at most 1, got {keep}")
    # Rounded down, as the published ratios are.
    ratio = math.floor((keep * count - first) / (count - first) * 1e4) / 1e4
    return Policy([Stage(layer, max(ratio, 1e-4)) for layer in layers])


def suggested(config_or_model: object) -> str:
    """Text of the default suggestion, for `Policy.parse`: the name of a preset if there is one."""
    published = model_of(config_or_model)
    return str(suggest(config_or_model) if published is None else _suggested_preset(published))


def _suggested_preset(model: PublishedModel) -> Preset:
    return Preset(model.name, "reroute-fastv", 192)


def _decision_layers(config: Any) -> list[int]:
    """Layers with full attention at four depths, or next behind these."""
    able = _able_layers(config)
    depths = (config.num_hidden_layers * eighths // 8 for eighths in (1, 2, 4, 6))
    return sorted({next((layer for layer in able if layer >= depth), able[-1]) for depth in depths})


def _able_layers(config: Any) -> list[int]:
    able, kinds = deciding_layers(config), layer_types(config)
    if not able:
        raise ValueError(f"config_or_model must have layers with full attention, got {', '.join(sorted(set(kinds)))}")
    return able


def _sparsevlm(layers: int, counts: tuple[int, ...], defers: bool) -> Policy:
    """SparseVLM; deferring, it recycles nothing, and runs as many tokens at each decision, and no more in all."""
    starts = tuple(round(layer * layers / _LLAVA.decoder.layers) for layer in _SPARSEVLM_LAYERS)
    counts = _with_recycled(counts)
    if defers:
        lengths = [end - start for start, end in zip(starts, (*starts[1:], layers), strict=True)]
        total = sum(count * length for count, length in zip(counts, lengths, strict=True))
        counts = (total // sum(lengths),) * len(starts)
    keeps = tuple(keep_ratio(count, VISUAL_TOKENS) for count in counts)
    if defers:
        return Policy(_stages(starts, keeps), ranking=TextRaters())
    return Policy(_stages(starts, keeps), "remove", TextRaters(), recycle=_RECYCLED)


def _with_recycled(counts: tuple[int, ...]) -> tuple[int, ...]:
    """Tokens that run behind each decision of SparseVLM, with the means of those that it recycles."""
    total, candidates = [], VISUAL_TOKENS
    for count in counts:
        total.append(count + recycled_tokens(candidates - count, _RECYCLED)[1])
        candidates = total[-1]
    return tuple(total)


def _published(model: PublishedModel, method: str, tier: int) -> Policy:
    if method == "pdrop-original":
        return Policy(_stages(model.pyramiddrop_layers, (0.5, 0.25, 0.125)), "remove", positions="contiguous")
    if method.endswith("nuwa"):
        reducer, selected = model.nuwa[tier]
        decisions = 1 if method == "nuwa" else 2
        stages = _stages(model.nuwa_layers[:decisions], (keep_ratio(selected, VISUAL_TOKENS),) * decisions)
        action = "remove" if method == "nuwa" else "reroute"
        return Policy(stages, action, model.nuwa_ranking, reducer=reducer)
    if method.endswith("sparsevlm"):
        return _sparsevlm(model.decoder.layers, _SPARSEVLM[tier], defers=method.startswith("reroute-"))
    if method == "fastv-original":
        keep = keep_ratio(round(VISUAL_TOKENS * _FASTV[tier]), VISUAL_TOKENS)
        return Policy(_stages((3,), (keep,)), "remove", LastQuery(layer="previous"))
    if method == "fastv":
        return Policy(_stages((3,), (_FASTV[tier],)), "remove")
    if method == "reroute-fastv":
        return Policy(_stages((3, *model.later_layers), (_FASTV[tier],) * 4))
    action = "remove" if method == "pdrop" else "reroute"
    return Policy(_stages((2, *model.later_layers), _PYRAMIDS[method][tier]), action)


def _stages(layers: tuple[int, ...], keeps: tuple[float, ...]) -> list[Stage]:
    return [Stage(layer, keep) for layer, keep in zip(layers, keeps, strict=True)]
