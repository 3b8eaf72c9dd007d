"""The runs of a calibration: for each sample one prefill that ranks in all layers, and one for each layer alone."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from math import floor, isfinite
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .calibration_log import Log, SampleRecord
from .cost import deciding_layers as able_layers
from .cost import layer_types, text_config
from .policy import Policy, Stage
from .rankings import Candidates, RankingLike
from .trace import Trace

AGREEMENT = "agreement"
"""Name of the measure that needs no labels."""
Score: TypeAlias = Callable[[nn.Module, Any], Any]

_SPREAD = 16
"""Entries of a parameter that a model is recognised by."""


@dataclass(frozen=True)
class Plan:
    """Layers to measure, and how.

    layers: ascending; early: the layer from which on the `share` of visual tokens runs; ranking: gives their scores;
    score: the user's, or None for the agreement with the unrouted model.
    """

    layers: tuple[int, ...]
    early: int
    share: float
    ranking: RankingLike
    score: Score | None

    @property
    def measure(self) -> str:
        """Name of the measure."""
        if self.score is None:
            return AGREEMENT
        kind = self.score if hasattr(self.score, "__qualname__") else type(self.score)
        return f"{kind.__module__}.{kind.__qualname__}"

    def header(self, model: nn.Module) -> dict[str, object]:
        """Values that tell a measurement from others."""
        return {
            "model": name_of(model),
            "weights": weights_digest(model),
            "layers": list(self.layers),
            "early": self.early,
            "share": self.share,
            "ranking": repr(self.ranking),
            "score": self.measure,
        }


def name_of(model: nn.Module) -> str:
    """Name of a model: where its configuration was loaded from, or its class."""
    config = getattr(model, "config", None)
    return getattr(config, "_name_or_path", None) or type(model).__name__


def deciding_layers(model: nn.Module, ranking: RankingLike) -> list[int]:
    """The layers that may decide: those with full attention, behind another one if the previous layer ranks.

    Raises:
        TypeError: the argument is no transformers model.
        ValueError: there are none.
    """
    config = text_config(model)
    able = able_layers(config)
    if getattr(ranking, "layer", "this") == "previous":
        able = [layer for layer in able if layer - 1 in able]
    if not able:
        raise ValueError(
            f"model must have layers that may decide, got {', '.join(sorted(set(layer_types(config))))} only"
        )
    return able


def early_layer(able: Sequence[int], num_layers: int) -> int:
    """The first layer that may decide at or after 3/32 of the depth, or the last one."""
    depth = max(1, floor(3 * num_layers / 32 + 0.5))
    return next((layer for layer in able if layer >= depth), able[-1])


def measure_samples(
    model: nn.Module, samples: Iterable[Any], plan: Plan, log: Log, progress: bool | None
) -> list[SampleRecord]:
    """Measure the samples that a log does not hold, and add them to it.

    Returns:
        The records of these samples, in order.
    """
    from .models import apply

    given = _Given()
    ranks = Policy([Stage(layer, 1.0) for layer in plan.layers], ranking=plan.ranking)
    limited = Policy([Stage(plan.early, plan.share)], "remove", given)
    for policy in (ranks, limited):
        apply(model, policy).remove()  # refused before any sample is asked for
    run = _Run(model, plan, ranks, limited, given)
    count = 0
    with evaluating(model), progress_bar(progress, samples, "calibration") as advance, torch.no_grad():
        for number, sample in enumerate(samples):
            inputs = _arguments(sample, number, plan)
            digest = _digest(inputs)
            if not log.found(number, digest):
                log.add(run.measured(sample, inputs, number, digest))
            count += 1
            advance()
    if not count:
        raise ValueError("samples must hold at least one, got none")
    return log.records[:count]


class _Given:
    """A ranking whose scores were found before, (N,) for each sample of a batch; NaN at tokens that do not rank."""

    def __init__(self):
        self.scores: list[Tensor] = []

    def rank(self, candidates: Candidates) -> Tensor:
        pool = candidates.pool
        each_row = [row[~row.isnan()] for row in self.scores for _ in range(len(pool) // len(self.scores))]
        if pool.sum(dim=1).tolist() != [len(row) for row in each_row]:  # beams are rows beside each other
            raise ValueError(
                "score must call the model with the prompts of its sample alone, got one with other visual tokens"
            )
        scores = torch.zeros(pool.shape, dtype=torch.float32, device=pool.device)
        scores[pool] = torch.cat(each_row).to(pool.device)
        return scores


@dataclass(frozen=True)
class _Run:
    """The model under the policies of a plan."""

    model: nn.Module
    plan: Plan
    ranks: Policy
    limited: Policy
    given: _Given

    def measured(self, sample: Any, inputs: Mapping[str, Any], number: int, digest: str) -> SampleRecord:
        """Measure one sample."""
        from .models import apply

        with apply(self.model, self.ranks) as routing:
            reference = self._next_token(inputs)
            trace = routing.trace
        if trace is None or not any(trace.visual_counts):
            raise ValueError(f"samples must hold prompts with visual tokens, got none in sample {number}")
        counts = trace.visual_counts
        all_scores = [stage.scores for stage in trace.stages]

        def values() -> list[float]:
            if self.plan.score is None:
                return _with_image(_agreement(reference, self._next_token(inputs)), counts)
            return _with_image(_values(self.plan.score(self.model, sample), len(counts), number), counts)

        unrouted = [1.0] * sum(map(bool, counts)) if self.plan.score is None else values()
        of_layers = []
        with apply(self.model, self.limited):
            for scores in all_scores:
                assert scores is not None
                self.given.scores = scores
                of_layers.append(values())
                if len(of_layers[-1]) != len(unrouted):
                    raise ValueError(
                        f"score must return as many numbers whatever runs, got {len(of_layers[-1])} and "
                        f"{len(unrouted)} for sample {number}"
                    )
        text = [length - visual for length, visual in zip(_lengths(inputs, trace), counts, strict=True)]
        return SampleRecord(digest, list(counts), text, unrouted, of_layers)

    def _next_token(self, inputs: Mapping[str, Any]) -> Tensor:
        """(B, V) float64, log-probabilities of the token after each prompt."""
        shorter = {} if "labels" in inputs else {"logits_to_keep": 1}
        logits = self.model(**{**inputs, "use_cache": False, **shorter}).logits
        return logits[:, -1].cpu().double().log_softmax(dim=-1)


def divergence(reference: Tensor, found: Tensor) -> Tensor:
    """KL(reference || found) of each row, in nats; (B, V) log-probabilities."""
    apart = reference.exp() * (reference - found)
    return apart.masked_fill(reference.isneginf(), 0.0).sum(dim=-1).clamp(min=0)


def _agreement(reference: Tensor, found: Tensor) -> list[float]:
    """exp(-KL(reference || found)) of each row; (B, V) log-probabilities."""
    return (-divergence(reference, found)).exp().tolist()


def _with_image(values: list[float], counts: Sequence[int]) -> list[float]:
    """The values of rows with visual tokens; one value for all rows as it is."""
    if len(values) != len(counts):
        return values
    return [value for value, count in zip(values, counts, strict=True) if count]


def _values(scored: Any, rows: int, number: int) -> list[float]:
    """The numbers that a score returned for a sample, or an error."""
    values = scored.tolist() if hasattr(scored, "tolist") else scored  # of a tensor or array
    values = list(values) if isinstance(values, Iterable) and not isinstance(values, str) else [values]
    if len(values) not in (1, rows) or not all(map(_is_value, values)):
        raise ValueError(
            f"score must return a finite number of 0 or more, or one for each row, got {scored!r} for sample {number}"
        )
    return [float(value) for value in values]


def _is_value(value: Any) -> bool:
    return isinstance(value, Real) and isfinite(value) and float(value) >= 0


def _arguments(sample: Any, number: int, plan: Plan) -> Mapping[str, Any]:
    """The model's arguments in a sample."""
    from .models.adapter import CACHE_NAMES

    inputs = sample[0] if plan.score is not None and isinstance(sample, tuple) and sample else sample
    if not isinstance(inputs, Mapping):
        pair = "" if plan.score is None else ", or tuples that begin with one"
        raise TypeError(
            f"samples must hold mappings of the model's arguments{pair}, got {type(inputs).__name__} in sample {number}"
        )
    refused = next((name for name in (*CACHE_NAMES, *(() if plan.score else ("labels",))) if name in inputs), None)
    if refused is not None:
        raise ValueError(f"samples must hold prompts alone, got {refused!r} in sample {number}")
    return inputs


def _lengths(inputs: Mapping[str, Any], trace: Trace) -> list[int]:
    """Tokens of each row, without padding if the mask tells it."""
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return (mask != 0).sum(dim=1).tolist()
    return [trace.length] * len(trace.visual_counts)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and each of its modules afterwards as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def progress_bar(progress: bool | None, samples: Iterable[Any], title: str) -> Iterator[Callable[[], object]]:
    """A bar over the samples on standard error, to be advanced by calls; None: if rich is installed."""
    if progress is False:
        yield lambda: None
        return
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ModuleNotFoundError:
        if progress:
            raise
        yield lambda: None
        return
    total = len(samples) if isinstance(samples, Sized) else None
    with Progress(console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)


# Recognised again


def weights_digest(model: nn.Module) -> str:
    """Digest of some entries of every parameter, which recognises a model; those on the meta device by their shape."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        found.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if not parameter.is_meta:
            flat = parameter.detach().flatten()
            _update(found, flat[:: max(1, len(flat) // _SPREAD)])
    return found.hexdigest()[:16]


def _digest(inputs: Mapping[str, Any]) -> str:
    found = hashlib.sha256()
    _update(found, inputs)
    return found.hexdigest()[:16]


def _update(found: Any, value: Any) -> None:
    """Add a value to a digest, with the values in it."""
    if isinstance(value, Tensor):
        found.update(f"{value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            found.update(str(key).encode())
            _update(found, value[key])
    elif isinstance(value, list | tuple):
        for each in value:
            _update(found, each)
    elif value is None or isinstance(value, bool | int | float | str):
        found.update(repr(value).encode())
    else:
        found.update(type(value).__qualname__.encode())
