"""Decision layers chosen by how well each ranks, as in SwiftVLM (arXiv 2602.03134), and the policies that follow.

The quality of a layer is what is left of the answers when only the share of the visual tokens that this layer ranks
highest runs, from an early layer on. A choice of decision layers i_1 < ... < i_K of a decoder of L layers is worth the
sum of quality(i_k) * (i_{k+1} - i_k), with i_{K+1} = L: each stage counts by its length, and the layers before the
first decision do not count. Of all choices that a budget admits the one worth most is taken, and its counts are those
of `solve`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from math import isfinite
from numbers import Real
from operator import index as as_integer
from statistics import median_low
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from .budget import OverBudget, solve
from .calibration_log import Log
from .calibration_run import AGREEMENT, Plan, deciding_layers, early_layer, measure_samples, name_of
from .cost import Decoder, text_config
from .intervals import bootstrap_intervals
from .policy import LAST_QUERY, Policy, Stage
from .policy_file import FilePath, check_keys, mapping_of, ranking_from_dict, ranking_to_dict, read_json, write_json
from .rankings import RankingLike, innermost

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

VERSION = 1
"""Version of the format of files; one of another version is refused."""
SHARE = 0.2
"""The share of visual tokens that runs while a layer is measured, as in SwiftVLM."""


class LayerQuality(NamedTuple):
    """How well a layer ranks: a mean over the samples, with the interval that holds 95% of bootstrap means."""

    layer: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Calibration:
    """Qualities of the layers that may decide, and how they were measured; made by `measure_layers`.

    Raises:
        ValueError: a quality is negative or no number, or layers are not ascending and below `num_layers`.

    >>> qualities = [LayerQuality(layer, mean, mean, mean) for layer, mean in ((3, 0.2), (8, 0.6), (20, 0.5))]
    >>> found = Calibration("llava", 32, qualities, early=3, share=0.2, decoder=Decoder.of("llava-1.5-7b"))
    >>> found.best_layers(2), round(found.objective([3, 8]), 4)
    ((3, 8), 15.4)
    >>> found.policy(2, avg_tokens=128).selected_counts(visual_tokens=576)
    (82, 81)
    """

    model: str
    """Name of the model."""
    num_layers: int
    """Decoder layers of the model."""
    qualities: Sequence[LayerQuality]
    """By layer, ascending."""
    early: int
    """The layer from which on the share ran."""
    share: float
    """The share of visual tokens that ran."""
    measure: str = AGREEMENT
    """`"agreement"`, or the name of the user's `score`."""
    unrouted: float = 1.0
    """The mean of the measure with all tokens."""
    samples: int = 0
    """Samples that were measured: rows of batches count, if each had a value of its own."""
    seed: int = 0
    """Seed of the intervals."""
    visual_tokens: int = 576
    """Visual tokens of a prompt: the median."""
    text_tokens: int = 64
    """Other tokens of a prompt: the median."""
    ranking: RankingLike = LAST_QUERY
    """The ranking whose layers were measured."""
    decoder: Decoder | None = None
    """The decoder, to be costed; None if it cannot be, for layers without full attention."""

    def __post_init__(self):
        object.__setattr__(self, "qualities", tuple(LayerQuality(*each) for each in self.qualities))
        layers = [each.layer for each in self.qualities]
        if not layers or layers != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < self.num_layers:
            raise ValueError(
                f"qualities must be of ascending layers from 0 to {self.num_layers - 1}, got layers {layers}"
            )
        for each in self.qualities:
            if not isfinite(each.mean) or each.mean < 0:
                raise ValueError(f"qualities must be finite and 0 or more, got {each.mean} at layer {each.layer}")

    def __repr__(self) -> str:
        return f"Calibration({self.summary()})"

    @property
    def quality(self) -> dict[int, float]:
        """Quality by layer."""
        return {each.layer: each.mean for each in self.qualities}

    def objective(self, layers: Sequence[int]) -> float:
        """The worth of a choice of decision layers: the sum over the stages of quality x length.

        Raises:
            ValueError: the layers are not ascending, or one was not measured.
        """
        chosen = list(layers)
        if not chosen or chosen != sorted(set(chosen)) or not set(chosen) <= self.quality.keys():
            raise ValueError(f"layers must be ascending ones of {', '.join(map(str, self.quality))}, got {chosen}")
        ends = [*chosen[1:], self.num_layers]
        exact = (Fraction(self.quality[layer]) * (end - layer) for layer, end in zip(chosen, ends, strict=True))
        return float(sum(exact, Fraction(0)))

    def best_layers(self, decisions: int) -> tuple[int, ...]:
        """The decision layers of the highest worth, whatever they cost; of equal choices the earlier layers.

        Args:
            decisions: how many.

        Raises:
            TypeError: `decisions` is no integer.
            ValueError: it is below 1, or above the number of layers that were measured.
        """
        return self._choices(decisions)[0]

    def _choices(self, decisions: int) -> list[tuple[int, ...]]:
        return best_layers(self.quality, _checked_decisions(decisions, len(self.qualities)), self.num_layers)

    def policy(
        self,
        decisions: int = 3,
        shape: str | Sequence[float] = "uniform",
        *,
        avg_tokens: float | None = None,
        flops: float | None = None,
        kv_bytes: float | None = None,
        visual_tokens: int | None = None,
        text_tokens: int | None = None,
        batch: int = 1,
        dtype: str | torch.dtype = "float16",
        action: str = "reroute",
        ranking: RankingLike | None = None,
        positions: str = "original",
    ) -> Policy:
        """The best layers that a budget admits, with the counts that `solve` finds for it; nothing is measured anew.

        The least that decisions cost depends on the first of them alone, since all tokens run before it. So if the best
        layers are too dear, these are the best of those that begin early enough.

        Args:
            decisions: how many decision layers. Qualities grow from one to the next, unless more are asked for than
                help.
            shape, avg_tokens, flops, kv_bytes, batch, dtype, action, positions: as in `solve`.
            visual_tokens, text_tokens: of the prompt that is costed; by default the medians of the samples.
            ranking: of the policy, such as the measured one within `rankings.Mixed`; by default the measured one.

        Raises:
            TypeError, ValueError: as in `solve` and `best_layers`; the budget is below the least of all choices.
            NotImplementedError: the decoder has layers without full attention, which cannot be costed.
        """
        decoder = _costed(self.decoder)
        refused: list[OverBudget] = []
        for layers in self._choices(decisions):
            try:
                return solve(
                    decoder,
                    layers,
                    shape,
                    avg_tokens=avg_tokens,
                    flops=flops,
                    kv_bytes=kv_bytes,
                    visual_tokens=self.visual_tokens if visual_tokens is None else visual_tokens,
                    text_tokens=self.text_tokens if text_tokens is None else text_tokens,
                    batch=batch,
                    dtype=dtype,
                    action=action,
                    ranking=self.ranking if ranking is None else ranking,
                    positions=positions,
                )
            except OverBudget as error:
                refused.append(error)
        raise min(refused, key=lambda error: error.least)

    # Shown

    def summary(self) -> str:
        """How the layers were measured, and the best of them: one line."""
        best = max(self.qualities, key=lambda each: each.mean)
        return (
            f"{self.model}: {self.measure} of {self.samples:,} samples with {self.share:.0%} of the visual tokens from "
            f"layer {self.early} on; best by layer {best.layer} of {self.num_layers}: {best.mean:.4g} "
            f"[{best.low:.4g}, {best.high:.4g}], unrouted {self.unrouted:.4g}"
        )

    def table(self, policy: Policy | None = None) -> Table:
        """Table of the qualities, which marks the decision layers of a policy; it needs rich."""
        from .cli.tables import qualities_table

        return qualities_table(self, policy)

    def plot(self, policy: Policy | None = None) -> Figure:
        """Picture of the qualities by layer with their intervals, and the decision layers of a policy.

        It needs matplotlib.

        Returns:
            A figure, to be saved by its method `savefig`.
        """
        from .cli.plot import draw_qualities

        return draw_qualities(self, policy)

    # Kept

    def to_dict(self) -> dict[str, object]:
        """The calibration as plain values, as JSON has them; `from_dict` is the inverse.

        Raises:
            TypeError: the ranking is none of `reroute_kernels.rankings`.
        """
        return {
            "version": VERSION,
            **vars(self),
            "qualities": [each._asdict() for each in self.qualities],
            "ranking": ranking_to_dict(self.ranking),
            "decoder": None
            if self.decoder is None
            else asdict(self.decoder) | {"mlp_weights": list(self.decoder.mlp_weights)},
        }

    @classmethod
    def from_dict(cls, given: object) -> Calibration:
        """The calibration of values as `to_dict` gives them.

        Raises:
            TypeError: a value has the wrong type.
            ValueError: the version of the format is another one, a key is unknown or missing, or a value is not
                accepted.
        """
        values = mapping_of(given, "calibration")
        version = values.pop("version", None)
        if type(version) is not int or version != VERSION:
            raise ValueError(f"version must be {VERSION}, the one that this reroute_kernels reads, got {version!r}")
        check_keys(values, "calibration", cls)
        for name, accepted in _PLAIN.items():
            if name in values and (not isinstance(values[name], accepted) or isinstance(values[name], bool)):
                raise TypeError(f"{name} must be {_TOLD[accepted]}, got {values[name]!r}")
        if "ranking" in values:
            values["ranking"] = ranking_from_dict(values["ranking"])
        if values.get("decoder") is not None:
            values["decoder"] = _decoder_of(values["decoder"])
        return cls(**values | {"qualities": _qualities_of(values["qualities"])})

    def save(self, path: FilePath) -> None:
        """Write the calibration to a file of JSON, which is replaced once the new one is whole.

        Raises:
            TypeError: as in `to_dict`, or `path` is no path; nothing is written.
            OSError: the file cannot be written; one that was there is as it was.
        """
        write_json(self.to_dict(), path)

    @classmethod
    def load(cls, path: FilePath) -> Calibration:
        """Read a calibration from a file that `save` wrote.

        Raises:
            TypeError: `path` is no path.
            ValueError: the file holds no JSON, or no calibration.
            OSError: the file cannot be read.
        """
        return read_json(path, "calibration", cls.from_dict)


def best_layers(quality: Mapping[int, float], decisions: int, num_layers: int) -> list[tuple[int, ...]]:
    """For each layer that may decide first, the choice of decision layers of the highest worth; the best one first.

    Sums are exact. Of equal choices the one with earlier layers is taken.

    Args:
        quality: by layer; finite and 0 or more.
        decisions: how many layers are chosen.
        num_layers: decoder layers.
    """
    exact = {layer: Fraction(value) for layer, value in quality.items()}
    best = {layer: _Choice(exact[layer] * (num_layers - layer), (layer,)) for layer in exact}
    for _ in range(decisions - 1):
        longer = {}
        for layer in exact:
            found = [
                _Choice(exact[layer] * (later - layer) + rest.worth, (layer, *rest.layers))
                for later, rest in best.items()
                if later > layer
            ]
            if found:
                longer[layer] = min(found, key=_Choice.place)
        best = longer
    return [each.layers for each in sorted(best.values(), key=_Choice.place)]


class _Choice(NamedTuple):
    worth: Fraction
    layers: tuple[int, ...]

    def place(self) -> tuple[Fraction, tuple[int, ...]]:
        """Key that sorts the best choice first."""
        return -self.worth, self.layers


def measure_layers(
    model: nn.Module,
    samples: Iterable[Any],
    *,
    score: Callable[[nn.Module, Any], Any] | None = None,
    share: float = SHARE,
    early: int | None = None,
    layers: Sequence[int] | None = None,
    ranking: RankingLike = LAST_QUERY,
    seed: int = 0,
    resume: FilePath | None = None,
    progress: bool | None = None,
) -> Calibration:
    """Measure how well each layer ranks: what is left when only its top share of the visual tokens runs.

    For each sample one prefill ranks in all layers, and one for each layer runs with its best tokens alone, from an
    early layer on. The model is in evaluation mode meanwhile and afterwards as it was, also after a failure.

    Args:
        model: as `apply` takes it, not routed.
        samples: keyword arguments of the model, one mapping for each call: prompts with images or videos, alone or in
            batches. With `score` a sample may also be a tuple of such a mapping and whatever else `score` reads.
        score: called with the model and a sample as it was given; returns a number, or one for each row of a batch: 0
            or more, higher is better. It may call the model, also through `generate`, with the prompts of the sample.
            Default: the agreement with the unrouted model, exp(-KL) of the distributions of the token after the prompt,
            which needs no labels.
        share: of the visual tokens that runs.
        early: the layer from which on it runs. Default: the first that may decide at or after 3/32 of the depth.
        layers: the layers to measure, ascending, from `early` on. Default: all that may decide.
        ranking: the rule by which layers rank. What one adds around another (`rankings.Mixed`) is not measured.
        seed: of the intervals.
        resume: a file, to which each sample's values are appended. If it is there, the samples that it holds are not
            measured again: they must come first, and in the same order.
        progress: whether a bar is shown on standard error, which needs rich. None: if it is installed.

    Raises:
        TypeError, ValueError, NotImplementedError: as in `apply`; an argument is not accepted; a sample has no visual
            tokens; `score` returns no numbers of 0 or more; or the file is of another measurement.
        ModuleNotFoundError: `progress` is True and rich is missing.
        OSError: the file cannot be read or written.

    >>> found = measure_layers(model, [inputs], share=0.25, early=2, layers=[2, 4, 6])  # a LLaVA and a prompt
    >>> [each.layer for each in found.qualities], found.measure
    ([2, 4, 6], 'agreement')
    """
    plan = _plan_of(model, score, share, early, layers, ranking)
    seed = _checked_integer("seed", seed)
    log = Log(resume, {} if resume is None else plan.header(model) | {"seed": seed})
    records = measure_samples(model, samples, plan, log, progress)
    rows = [[each.unrouted, *each.layers] for each in records]
    values = torch.cat([torch.tensor(row, dtype=torch.float64, device="cpu") for row in rows], dim=1)
    unrouted, *of_layers = bootstrap_intervals(values, seed)
    counts = [pair for each in records for pair in zip(each.visual_tokens, each.text_tokens, strict=True) if pair[0]]
    return Calibration(
        model=name_of(model),
        num_layers=text_config(model).num_hidden_layers,
        qualities=[LayerQuality(layer, *found) for layer, found in zip(plan.layers, of_layers, strict=True)],
        early=plan.early,
        share=plan.share,
        measure=plan.measure,
        unrouted=unrouted[0],
        samples=values.shape[1],
        seed=seed,
        visual_tokens=median_low(visual for visual, _ in counts),
        text_tokens=median_low(text for _, text in counts),
        ranking=plan.ranking,
        decoder=decoder_or_none(model),
    )


def calibrate(
    model: nn.Module,
    samples: Iterable[Any],
    *,
    decisions: int = 3,
    shape: str | Sequence[float] = "uniform",
    avg_tokens: float | None = None,
    flops: float | None = None,
    kv_bytes: float | None = None,
    visual_tokens: int | None = None,
    text_tokens: int | None = None,
    batch: int = 1,
    dtype: str | torch.dtype = "float16",
    action: str = "reroute",
    ranking: RankingLike = LAST_QUERY,
    positions: str = "original",
    score: Callable[[nn.Module, Any], Any] | None = None,
    share: float = SHARE,
    early: int | None = None,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    resume: FilePath | None = None,
    progress: bool | None = None,
) -> Policy:
    """Choose the decision layers of a model by how well each ranks, and solve for a budget.

    `measure_layers` and `Calibration.policy` in one call; to solve for several budgets, call them yourself.

    Args:
        model, samples, score, share, early, layers, seed, resume, progress: as in `measure_layers`.
        decisions: how many decision layers.
        shape, avg_tokens, flops, kv_bytes, batch, dtype, action, positions: as in `solve`; exactly one budget.
        visual_tokens, text_tokens: of the prompt that is costed; by default the medians of the samples.
        ranking: of the policy. What one adds around another (`rankings.Mixed`) takes no part in measuring.

    Returns:
        The policy; `policy.budget` has the cost that it reached.

    Raises:
        TypeError, ValueError, NotImplementedError, ModuleNotFoundError, OSError: as in `measure_layers` and
            `Calibration.policy`; a bad argument is refused before anything is measured.

    >>> policy = calibrate(model, [inputs], decisions=2, avg_tokens=24)  # a LLaVA and a prompt
    >>> len(policy.schedule), policy.budget.reached <= 24
    (2, True)
    """
    solved: dict[str, Any] = {
        "avg_tokens": avg_tokens,
        "flops": flops,
        "kv_bytes": kv_bytes,
        "visual_tokens": visual_tokens,
        "text_tokens": text_tokens,
        "batch": batch,
        "dtype": dtype,
        "action": action,
        "positions": positions,
        "ranking": ranking,
    }
    check_plan(model, decisions, shape, score=score, share=share, early=early, layers=layers, **solved)
    found = measure_layers(
        model,
        samples,
        score=score,
        share=share,
        early=early,
        layers=layers,
        ranking=ranking,
        seed=seed,
        resume=resume,
        progress=progress,
    )
    return found.policy(decisions, shape, **solved)


def check_plan(
    model: nn.Module,
    decisions: int,
    shape: str | Sequence[float],
    *,
    score: Callable[[nn.Module, Any], Any] | None = None,
    share: float = SHARE,
    early: int | None = None,
    layers: Sequence[int] | None = None,
    ranking: RankingLike = LAST_QUERY,
    **solved: Any,
) -> None:
    """Refuse arguments of `calibrate`, before anything is measured, as far as they do not depend on the samples.

    Raises:
        TypeError, ValueError, NotImplementedError: as in `calibrate`.
    """
    plan = _plan_of(model, score, share, early, layers, ranking)
    alike = Calibration(
        model=name_of(model),
        num_layers=text_config(model).num_hidden_layers,
        qualities=[LayerQuality(layer, 1.0, 1.0, 1.0) for layer in plan.layers],
        early=plan.early,
        share=plan.share,
        decoder=decoder_or_none(model),
    )
    try:
        alike.policy(decisions, shape, ranking=ranking, **solved)
    except OverBudget:
        if solved.get("visual_tokens") is not None:  # else the samples tell how many there are
            raise


def _plan_of(
    model: nn.Module,
    score: Callable[[nn.Module, Any], Any] | None,
    share: float,
    early: int | None,
    layers: Sequence[int] | None,
    ranking: RankingLike,
) -> Plan:
    """The layers to measure and how, or an error that names the argument."""
    if score is not None and not callable(score):
        raise TypeError(f"score must be callable with the model and a sample, or None, got {score!r}")
    if isinstance(share, bool) or not isinstance(share, Real):
        raise TypeError(f"share must be a number in (0, 1), got {share!r}")
    if not 0 < share < 1:
        raise ValueError(f"share must be in (0, 1), got {share}")
    alone = innermost(Policy([Stage(1, 1.0)], ranking=ranking).ranking)
    able = deciding_layers(model, alone)
    told = ", ".join(map(str, able))
    if early is None:
        early = early_layer(able, text_config(model).num_hidden_layers)
    elif _checked_integer("early", early) not in able:
        raise ValueError(f"early must be a layer that may decide ({told}), got {early}")
    later = [layer for layer in able if layer >= early]
    if layers is None:
        return Plan(tuple(later), early, float(share), alone, score)
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise TypeError(f"layers must be a sequence of integers, got {layers!r}")
    chosen = [_checked_integer("layers", layer) for layer in layers]
    if not chosen or chosen != sorted(set(chosen)) or not set(chosen) <= set(later):
        raise ValueError(
            f"layers must be ascending ones that may decide from layer {early} on "
            f"({', '.join(map(str, later))}), got {chosen}"
        )
    return Plan(tuple(chosen), early, float(share), alone, score)


def decoder_or_none(model: nn.Module) -> Decoder | None:
    """The decoder, to be costed; None if it cannot be."""
    try:
        return Decoder.of(model)
    except NotImplementedError:
        return None


def _costed(decoder: Decoder | None) -> Decoder:
    if decoder is None:
        raise NotImplementedError(
            "model must have full attention in all layers, and none latent, to be solved for a budget; best_layers and "
            "Policy need none"
        )
    return decoder


def _checked_integer(name: str, value: object) -> int:
    try:
        if not isinstance(value, bool):
            return as_integer(value)  # type: ignore[arg-type]
    except TypeError:
        pass
    raise TypeError(f"{name} must be {'integers' if name == 'layers' else 'an integer'}, got {value!r}")


def _checked_decisions(decisions: int, layers: int) -> int:
    if not 1 <= _checked_integer("decisions", decisions) <= layers:
        raise ValueError(f"decisions must be from 1 to {layers}, the layers that were measured, got {decisions}")
    return as_integer(decisions)


# Read from files

_TOLD = {str: "a string", int: "an integer", (int, float): "a number", (list, tuple): "a list"}
_PLAIN: dict[str, Any] = {
    **dict.fromkeys(("model", "measure"), str),
    **dict.fromkeys(("num_layers", "early", "samples", "seed", "visual_tokens", "text_tokens"), int),
    **dict.fromkeys(("share", "unrouted"), (int, float)),
    "qualities": (list, tuple),
}


def _qualities_of(given: Iterable[object]) -> list[LayerQuality]:
    found = []
    for number, each in enumerate(given):
        where = f"qualities[{number}]"
        values = mapping_of(each, where)
        check_keys(values, where, LayerQuality)
        for name, value in values.items():
            accepted = int if name == "layer" else (int, float)
            if not isinstance(value, accepted) or isinstance(value, bool):
                raise TypeError(f"{where}.{name} must be {_TOLD[accepted]}, got {value!r}")
        found.append(LayerQuality(**values))
    return found


def _decoder_of(given: object) -> Decoder:
    values = mapping_of(given, "decoder")
    check_keys(values, "decoder", Decoder)
    weights = values["mlp_weights"]
    numbers = [*(values[name] for name in values if name != "mlp_weights"), *(weights if weights else ())]
    if not isinstance(weights, list | tuple) or not all(type(each) is int for each in numbers):
        raise TypeError(f"decoder must hold integers, and mlp_weights a list of them, got {given!r}")
    return Decoder(**values | {"mlp_weights": tuple(weights)})
