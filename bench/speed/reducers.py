"""Whole reducers at the sizes of their papers, and the same by loops of torch calls, written from the formulas.

    python -m bench.speed.reducers

The loops go over images, frames and picks, and hold matrices of all pairs, as the codes of the papers do. They are
handed what the vision tower gives: features, saliency, keys, text. On a CPU the command writes reducers.json to
bench/results/cpu, with the greedy selections alone; a GPU is measured by `make gpu-report`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from bench.speed.device import Clock, cpu_name, description, results_folder
from bench.speed.greedy import SHAPES as SELECTIONS
from bench.speed.greedy import eager_diverse, eager_dpp, measure_greedy
from reroute_kernels.reducers import (
    CDPruner,
    DivPrune,
    FlashVid,
    HoloV,
    Reducer,
    VidCom2,
    VisionFeatures,
    VisionZip,
    VisPruner,
    flashvid_segments,
)

Chosen = tuple[Tensor, Tensor]
"""Places over all images or frames (M,), ascending, and features (M, d)."""


@dataclass
class Given:
    """Output of a tower for T images or frames."""

    features: Tensor
    saliency: Tensor
    keys: Tensor
    text: Tensor

    def image(self, is_video: bool) -> VisionFeatures:
        """The same as reducers are handed it."""
        tokens = self.features.shape[1]
        return VisionFeatures(
            self.features,
            (1, tokens),
            lambda: self.saliency,
            lambda: self.features,
            is_video,
            lambda: self.keys,
            lambda: self.features,
            lambda: [self.text] * len(self.features),
        )


def eager_divprune(given: Given, keep: int) -> Chosen:
    """DivPrune: a greedy selection in each image."""
    return _of_images(given, eager_diverse(given.features, torch.ones_like(given.saliency), keep))


def eager_cdpruner(given: Given, keep: int) -> Chosen:
    """CDPruner: relevance of each image, then greedy MAP."""
    rows = []
    for features in given.features:
        likeness = -(normalize(features.float(), dim=-1) @ normalize(given.text.float(), dim=-1).T).mean(dim=1)
        rows.append((likeness - likeness.min()) / (likeness.max() - likeness.min()))
    return _of_images(given, eager_dpp(given.features, torch.stack(rows), keep))


def eager_visionzip(given: Given, keep: int) -> Chosen:
    """VisionZip: dominant tokens, and targets that others join."""
    contextual = int(keep * 10 / 64 + 0.5)
    index, made = [], []
    for features, saliency, keys in zip(given.features, given.saliency, given.keys, strict=True):
        dominant = saliency.topk(keep - contextual).indices
        is_rest = torch.ones_like(saliency, dtype=torch.bool)
        is_rest[dominant] = False
        rest = is_rest.nonzero().flatten()
        step = max(1, len(rest) // contextual)
        is_target = torch.zeros(len(rest), dtype=torch.bool, device=rest.device)
        is_target[torch.arange(contextual, dtype=torch.int64, device=rest.device) * step] = True
        targets, others = rest[is_target], rest[~is_target]
        unit = normalize(keys.float(), dim=-1)
        nearest = (unit[others] @ unit[targets].T).argmax(dim=1)
        merged = []
        for number, target in enumerate(targets):
            members = others[nearest == number]
            mean = features[members].float().mean(dim=0) if len(members) else 0
            merged.append((features[target].float() + mean).to(features.dtype))
        places, order = torch.cat([dominant, targets]).sort()
        index.append(places)
        made.append(torch.cat([features[dominant], torch.stack(merged)])[order])
    return _joined(given, index, made)


def eager_holov(given: Given, keep: int, parts: int = 16, variation: float = 0.09) -> Chosen:
    """HoloV: scores and quotas of parts, one after the other."""
    index = []
    for features, saliency in zip(given.features, given.saliency, strict=True):
        unit, chunks = normalize(features.float(), dim=-1), torch.arange(len(features), dtype=torch.int64).chunk(parts)
        variances = []
        for chunk in chunks:
            cosines = unit[chunk] @ unit[chunk].T
            others = ~torch.eye(len(chunk), dtype=torch.bool, device=cosines.device)
            variances.append(torch.stack([row[mask].var() for row, mask in zip(cosines, others, strict=True)]))
        variance = torch.cat(variances)
        scores = saliency + variation * variance * saliency.mean() / variance.mean()
        means = torch.stack([scores[chunk].mean() for chunk in chunks])
        quotas = (keep * means / means.sum()).long()
        for part in means.argsort(descending=True).tolist():
            quotas[part] += min(len(chunks[part]) - int(quotas[part]), keep - int(quotas.sum()))
        best = [
            chunk[scores[chunk].topk(int(quota)).indices.cpu()] for chunk, quota in zip(chunks, quotas, strict=True)
        ]
        index.append(torch.cat(best).sort().values.to(features.device))
    return _of_images(given, torch.stack(index))


def eager_vispruner(given: Given, keep: int) -> Chosen:
    """VisPruner: rounds that each drop 8 tokens."""
    index = []
    for features, saliency in zip(given.features, given.saliency, strict=True):
        order, salient = saliency.argsort(descending=True), keep // 2
        rest = order[salient:]
        unit = normalize(features.float(), dim=-1)
        while len(rest) > keep - salient:
            even, odd = rest[::2], rest[1::2]
            likeness = (unit[even] @ unit[odd].T).max(dim=1).values
            stays = torch.ones(len(rest), dtype=torch.bool, device=rest.device)
            stays[2 * likeness.topk(min(8, len(even), len(rest) - keep + salient)).indices] = False
            rest = rest[stays]
        index.append(torch.cat([order[:salient], rest]).sort().values)
    return _of_images(given, torch.stack(index))


def eager_vidcom2(given: Given, keep: float) -> Chosen:
    """VidCom2: distances to two means, frame by frame."""
    features = given.features.float()
    calm = features.flatten(0, 1).var(dim=0, correction=0).argsort(stable=True)[: features.shape[2] // 2]
    unit = normalize(features[:, :, calm], dim=-1)
    video = normalize(unit.flatten(0, 1).mean(dim=0), dim=-1)

    def similarity(tokens: Tensor, centre: Tensor) -> Tensor:
        apart = (tokens - centre).square().sum(dim=-1)
        return sum(torch.exp(-apart / (2 * 2.0**power)) for power in range(-3, 2))

    to_video = [similarity(frame, video) for frame in unit]
    to_frame = [similarity(frame, normalize(frame.mean(dim=0), dim=-1)) for frame in unit]
    distinct = (-torch.stack([each.mean() for each in to_video]) / 0.01).softmax(dim=0)
    shares = keep * (1 + distinct - distinct.mean())
    index = []
    for frame, share in enumerate(shares):
        count = max(1, int(share * unit.shape[1] + 1e-4))
        index.append((to_video[frame] + to_frame[frame]).topk(count, largest=False).indices.sort().values)
    return _joined(given, index, [given.features[frame][places] for frame, places in enumerate(index)])


def eager_flashvid(given: Given, retention: float, selection: str) -> Chosen:
    """FlashVID: segment by segment, frame by frame, and trees from the last frame to the first."""
    tokens = given.features.shape[1]
    budget = math.ceil(tokens * retention * 1.25 - 1e-9)
    diverse = math.ceil(budget * 0.7 - 1e-9)
    index, made = [], []
    for segment in flashvid_segments(given.features).unique_consecutive(return_counts=True)[1].tolist():
        start = len(index)
        frames, saliency = given.features[start : start + segment], given.saliency[start : start + segment]
        weights = saliency.float()
        if selection == "v2":
            weights = weights * (frames.float() @ frames.float().mean(dim=(0, 1)))
        picked = eager_diverse(frames, weights, diverse)
        free = torch.ones(segment, tokens, dtype=torch.bool, device=frames.device).scatter(1, picked, False)
        stay, values = _trees(frames.float(), free, budget)
        left, most = int(stay.sum()), (budget - diverse) * segment
        for frame in range(segment):
            places = stay[frame].nonzero().flatten()
            features = values[frame, places]
            if most < left:
                places, features = _clusters(places, features, math.ceil(len(places) * most / left - 1e-9))
            places, order = torch.cat([picked[frame], places]).sort()
            index.append(places)
            made.append(torch.cat([frames[frame, picked[frame]], features.to(frames.dtype)])[order])
    return _joined(given, index, made)


def _trees(frames: Tensor, free: Tensor, budget: int, tau: float = 0.8) -> Chosen:
    """The roots of trees of one segment, (F, N) bool, and their means (F, N, d)."""
    segment, tokens = free.shape
    similarity = frames.new_full((segment, tokens), -1.0)
    parent = torch.zeros(segment, tokens, dtype=torch.int64, device=frames.device)
    for frame in range(1, segment):
        cosines = normalize(frames[frame], dim=-1) @ normalize(frames[frame - 1], dim=-1).T
        best = cosines.masked_fill(~free[frame - 1], -1.0).max(dim=1)
        similarity[frame] = best.values.masked_fill(~free[frame], -1.0)
        parent[frame] = best.indices
    joins = similarity > tau
    if segment * tokens - int(joins.sum()) < budget * segment:
        limit = similarity.flatten().topk(segment * (tokens - budget)).values[-1].clamp(min=-1)
        joins = similarity > limit
    sums, counts = frames.clone(), frames.new_ones(segment, tokens)
    for frame in range(segment - 1, 0, -1):
        child = joins[frame].nonzero().flatten()
        sums[frame - 1].index_add_(0, parent[frame, child], sums[frame, child])
        counts[frame - 1].index_add_(0, parent[frame, child], counts[frame, child])
    return free & ~joins, sums / counts[:, :, None]


def _clusters(places: Tensor, features: Tensor, peaks: int) -> Chosen:
    """The peaks of density of a frame's tokens, and the means of the tokens nearest to each."""
    apart = torch.cdist(features, features) / math.sqrt(features.shape[1])
    density = (-apart.topk(min(peaks, 7), largest=False).values.square().mean(dim=1)).exp()
    is_denser = density[None] > density[:, None]
    to_denser = torch.where(is_denser, apart, apart.max()).amin(dim=1)
    centres = (density * to_denser).topk(peaks).indices
    nearest = apart[:, centres].argmin(dim=1)
    nearest[centres] = torch.arange(peaks, dtype=torch.int64, device=features.device)
    means = torch.stack([features[nearest == number].mean(dim=0) for number in range(peaks)])
    return places[centres], means


def _of_images(given: Given, index: Tensor) -> Chosen:
    """Tokens (T, K) as they are."""
    return _joined(
        given, list(index), [features[places] for features, places in zip(given.features, index, strict=True)]
    )


def _joined(given: Given, index: list[Tensor], made: list[Tensor]) -> Chosen:
    tokens = given.features.shape[1]
    return torch.cat([places + frame * tokens for frame, places in enumerate(index)]), torch.cat(made)


@dataclass(frozen=True)
class ReducerShape:
    """One reducer on `rows` images, or frames of a video, of `tokens` tokens of `width` channels."""

    name: str
    method: str
    rows: int
    tokens: int
    width: int
    keep: float
    """Tokens that stay; a share of them for methods that reduce videos."""
    selection: str = "v2"

    @property
    def is_video(self) -> bool:
        """Whether the rows are frames of a video."""
        return self.keep < 1

    def given(self, device: torch.device, dtype: torch.dtype) -> Given:
        """Features that resemble each other as those of towers do, and change slowly over time."""
        generator = torch.Generator().manual_seed(0)
        randn = partial(torch.randn, generator=generator, dtype=torch.float32)
        scenes = max(1, self.rows // 4) if self.is_video else self.rows
        base = randn(scenes, self.tokens, 64) @ randn(64, self.width) / 8 + 0.5 * randn(scenes, 1, self.width)
        shown = base[torch.arange(self.rows, dtype=torch.int64) * scenes // self.rows]
        features = shown + 0.4 * randn(self.rows, self.tokens, self.width)
        saliency = torch.rand(self.rows, self.tokens, generator=generator, dtype=torch.float32) + 0.1
        keys, text = randn(self.rows, self.tokens, 64), randn(16, self.width)
        return Given(features.to(device, dtype), saliency.to(device), keys.to(device, dtype), text.to(device, dtype))

    def reducer(self) -> Reducer:
        """The reducer."""
        if self.method == "FlashVid":
            return FlashVid(self.keep, selection=self.selection)
        kinds = {each.__name__: each for each in (CDPruner, DivPrune, HoloV, VidCom2, VisionZip, VisPruner)}
        return kinds[self.method](self.keep if self.is_video else self.keep / self.tokens)

    def calls(self, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Chosen]]:
        """The loops, and the reducer."""
        given = self.given(device, dtype)
        image, reducer = given.image(self.is_video), self.reducer()
        if self.method == "FlashVid":
            loops = partial(eager_flashvid, given, self.keep, self.selection)
        else:
            loops = partial(EAGER[self.method], given, self.keep)
        return {"eager": loops, "reducer": lambda: _flat(image, *reducer.reduce(image))}


EAGER: dict[str, Callable[..., Chosen]] = {
    "CDPruner": eager_cdpruner,
    "DivPrune": eager_divprune,
    "HoloV": eager_holov,
    "VidCom2": eager_vidcom2,
    "VisionZip": eager_visionzip,
    "VisPruner": eager_vispruner,
}


def _flat(image: VisionFeatures, index: Tensor, features: Tensor) -> Chosen:
    if index.ndim == 1:
        return index, features
    start = torch.arange(len(index), dtype=torch.int64, device=index.device) * image.features.shape[1]
    return (index + start[:, None]).flatten(), features.flatten(0, 1)


ROUNDS = 9
SHAPES = (
    ReducerShape("DivPrune, 576 tokens", "DivPrune", 1, 576, 4096, 64),
    ReducerShape("DivPrune, 2,880 tokens", "DivPrune", 1, 2880, 4096, 282),
    ReducerShape("CDPruner, 576 tokens", "CDPruner", 1, 576, 4096, 64),
    ReducerShape("VisionZip, 576 tokens", "VisionZip", 1, 576, 1024, 64),
    ReducerShape("HoloV, 576 tokens", "HoloV", 1, 576, 1024, 64),
    ReducerShape("VisPruner, 576 tokens", "VisPruner", 1, 576, 1024, 64),
    ReducerShape("FlashVID, LLaVA-OneVision, 10%", "FlashVid", 32, 196, 3584, 0.1),
    ReducerShape("FlashVID, LLaVA-OneVision, 25%", "FlashVid", 32, 196, 3584, 0.25),
    ReducerShape("FlashVID, LLaVA-Video, 10%", "FlashVid", 64, 169, 3584, 0.1),
    ReducerShape("FlashVID, LLaVA-Video, 25%", "FlashVid", 64, 169, 3584, 0.25),
    ReducerShape("VidCom2, LLaVA-OneVision, 25%", "VidCom2", 32, 196, 3584, 0.25),
)
TINY_SHAPES = (
    *(ReducerShape("tiny", method, 1, 48, 16, 8) for method in EAGER if method != "VidCom2"),
    ReducerShape("tiny", "FlashVid", 3, 20, 8, 0.25),
    ReducerShape("tiny", "VidCom2", 3, 20, 8, 0.25),
)


def same_tokens(one: Chosen, other: Chosen) -> float:
    """Share of the tokens that two reductions have in common, with features that are equal but for rounding."""
    (places, features), (others, made) = one, other
    here = torch.isin(places, others)
    there = torch.isin(others, places)
    alike = cosine_similarity(features[here].float(), made[there].float(), dim=-1) > 0.999
    return alike.sum().item() / max(len(places), len(others))


def measure_reducers(clock: Clock, shapes: tuple[ReducerShape, ...], dtype: torch.dtype) -> Iterator[dict[str, object]]:
    """Each reducer and its loops, one after the other in turns."""
    for shape in shapes:
        calls = shape.calls(clock.device, dtype)
        row: dict[str, object] = {**asdict(shape), "same_tokens": same_tokens(*(call() for call in calls.values()))}
        row["microseconds"] = clock.in_turn(calls)
        yield row


class ProcessorClock(Clock):
    """Times the processor's work of one thread, in which other programs have no part."""

    def once(self, call: Callable[[], object]) -> float:
        start = time.process_time()
        call()
        return time.process_time() - start


def main():
    device = torch.device("cpu")
    torch.set_num_threads(1)
    clock = ProcessorClock(device, seconds=0, least=ROUNDS)
    record = {
        **description(device),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "rounds": ROUNDS,
    }
    with torch.no_grad():
        for shape in TINY_SHAPES:  # what is done once a process does not count
            for call in shape.calls(device, torch.float32).values():
                call()
        record["selections"] = list(measure_greedy(clock, SELECTIONS, torch.float32, graphs=False))
        record["reducers"] = list(measure_reducers(clock, SHAPES, torch.float32))
    path = results_folder(device) / "reducers.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
