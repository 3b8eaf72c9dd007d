"""FlashVID (arXiv 2602.08024): diverse salient tokens of each frame, and means of what stays alike over time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..checks import expect_one_of
from ..density import SIMILARITIES, density_peaks
from ..precision import full_precision
from .base import Reducer, VisionFeatures, check_clip, check_count, check_numbers, check_share, rounded_up

SELECTIONS = ("v1", "v2")

NEIGHBOURS = 7
"""Most tokens that the density around a token is estimated from, itself included."""

_EXACT = 25
"""Tokens up to which `torch.cdist` uses no matrix product."""


def flashvid_segments(features: Tensor, *, threshold: float = 0.9, least: int = 8) -> Tensor:
    """Number of each frame's segment: runs of frames whose mean features are alike.

    Args:
        features: (T, N, d), of the frames of one video.
        threshold: cosine of the means of two frames in succession below which a segment ends.
        least: segments; if there are fewer, frames are parted where they are least alike, as far as there are frames.

    Returns:
        (T,) int64, from 0, ascending.
    """
    means = features.float().mean(dim=1)
    alike = cosine_similarity(means[1:], means[:-1], dim=-1)
    ends = alike < threshold
    missing = least - 1 - ends.sum()
    order = alike.masked_fill(ends, math.inf).argsort(stable=True)
    ends = ends | (order.argsort() < missing)
    return torch.cat([ends.new_zeros(1), ends]).cumsum(dim=0)


def flashvid_diverse(
    features: Tensor, saliency: Tensor, segments: Tensor, *, keep: int, selection: str = "v2"
) -> Tensor:
    """Tokens of each frame that are salient and unlike each other.

    Tokens are picked one after the other: the one whose weight times its distance to the picked tokens is largest.
    Distance is 1 - cosine. The weight is the saliency (`"v1"`), times the product of the token's feature with the
    mean feature of its segment (`"v2"`).

    Args:
        features: (T, N, d).
        saliency: (T, N).
        segments: (T,) int64, as of `flashvid_segments`.
        keep: tokens of each frame.
        selection: `"v1"` or `"v2"`.

    Returns:
        (T, keep) int64, ascending.
    """
    from .. import ops  # a policy that names a reducer needs no kernels

    expect_one_of(selection=(selection, SELECTIONS))
    weights = saliency.float()
    if selection == "v2":
        with full_precision(features.device):
            means = _mean_of_segment(features.float().mean(dim=1), segments)
            weights = weights * (features.float() @ means[:, :, None])[:, :, 0]
    return ops.select_diverse(features, weights, keep=keep)


def flashvid_tokens(
    features: Tensor,
    saliency: Tensor,
    *,
    retention: float,
    expansion: float = 1.25,
    alpha: float = 0.7,
    tau: float = 0.8,
    segment_threshold: float = 0.9,
    min_segments: int = 8,
    selection: str = "v2",
    published: bool = False,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compression of a video by FlashVID (arXiv 2602.08024).

    Of the N tokens of a frame B = ceil(N * retention * expansion) are the budget. A share `alpha` of them are diverse
    salient tokens, which stay as they are. Within a segment each of the other tokens joins the most similar one of the
    frame before, if their cosine is above `tau`, and a tree of such tokens becomes its mean, at the place of its first
    one. If more than the budget are left, they are clustered in each frame around peaks of density, and a cluster
    becomes its mean, at the place of its peak. The budget holds for a segment; each frame may exceed it by one token.

    Args:
        features: (T, N, d), of the frames of one video; float32, float16 or bfloat16. Sums are in float32.
        saliency: (T, N), attention that each token receives in the vision tower; its scale does not matter.
        retention: share of the visual tokens that a decoder layer runs on average, in (0, 1].
        expansion: how many times as many tokens enter the decoder, which drops some at a later layer; 1 or more.
        alpha: share of the budget for diverse salient tokens, in [0, 1].
        tau: cosine above which tokens of successive frames join. It is raised if too many would join.
        segment_threshold: see `flashvid_segments`.
        min_segments: least number of segments, see `flashvid_segments`.
        selection: see `flashvid_diverse`.
        published: compute what the code of the authors does: the sum of a tree is divided by the number of its root's
            children and one, and in segments of one frame the diverse tokens are clustered, too, so that a token may be
            in the result twice.
        segments: (T,) int64, the segments if they are known. Frames that are no video have one each.

    Returns:
        index (M,) int64, ascending over T x N, and merged (M, d), in the dtype of `features`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or a tensor has another shape.
    """
    check_clip(features, saliency)
    if not 0 < retention <= 1:
        raise ValueError(f"retention must be in (0, 1], got {retention}")
    check_options(expansion, alpha, min_segments, selection)
    budget = _Budget.of(features.shape[1], retention, expansion, alpha)
    if segments is None:
        segments = flashvid_segments(features, threshold=segment_threshold, least=min_segments)
    diverse = flashvid_diverse(features, saliency, segments, keep=budget.diverse, selection=selection)
    picked = torch.zeros(features.shape[:2], dtype=torch.bool, device=features.device).scatter(1, diverse, True)
    values = features.float()
    with full_precision(features.device):
        others, values = _others(values, picked, _Segments.of(segments), budget, tau, published)
    index, is_other = torch.stack([picked, others], dim=-1).flatten(0, 1).nonzero().unbind(dim=1)
    values, features = (each.flatten(0, 1)[index] for each in (values.to(features.dtype), features))
    return index, torch.where(is_other[:, None].bool(), values, features)


@dataclass(frozen=True)
class FlashVid(Reducer):
    """Compression of videos by FlashVID (arXiv 2602.08024), see `flashvid_tokens`.

    An image is a video of one frame, and so is each of several images or tiles: its diverse salient tokens, and the
    others around peaks of density.

    Args:
        retention: share of the visual tokens that a decoder layer runs on average, in (0, 1], if a later layer drops
            as many as `presets.flashvid` has it do.
        expansion, alpha, tau, segment_threshold, min_segments, selection: see `flashvid_tokens`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.

    >>> FlashVid(retention=0.1).survivors(196)
    25
    """

    retention: float
    expansion: float = 1.25
    alpha: float = 0.7
    tau: float = 0.8
    segment_threshold: float = 0.9
    min_segments: int = 8
    selection: str = "v2"

    def __post_init__(self):
        check_share(self, "retention")
        check_numbers(self, "expansion", "alpha", "tau", "segment_threshold")
        check_options(self.expansion, self.alpha, self.min_segments, self.selection)

    def reduce(self, image: VisionFeatures) -> tuple[Tensor, Tensor]:
        features = image.features
        frames = None if image.is_video else torch.arange(len(features), device=features.device)
        return flashvid_tokens(
            features,
            image.saliency,
            retention=self.retention,
            expansion=self.expansion,
            alpha=self.alpha,
            tau=self.tau,
            segment_threshold=self.segment_threshold,
            min_segments=self.min_segments,
            selection=self.selection,
            segments=frames,
        )

    def survivors(self, visual_tokens: int) -> int:
        """The budget of a frame or image; of the tokens of a video that is exceeded by one token a frame at most."""
        return _Budget.of(visual_tokens, self.retention, self.expansion, self.alpha).tokens


def check_options(expansion: float, alpha: float, min_segments: int, selection: str) -> None:
    """Refuse options of FlashVID that are out of range."""
    if not 1 <= expansion < math.inf:
        raise ValueError(f"expansion must be 1 or more, got {expansion}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    check_count("min_segments", min_segments)
    expect_one_of(selection=(selection, SELECTIONS))


@dataclass(frozen=True)
class _Budget:
    """Tokens of a frame that stay as they are, and those that others are merged into."""

    diverse: int
    merged: int

    @classmethod
    def of(cls, tokens: int, retention: float, expansion: float, alpha: float) -> _Budget:
        budget = min(tokens, rounded_up(tokens, retention * expansion))
        diverse = rounded_up(budget, alpha)
        return cls(diverse, budget - diverse)

    @property
    def tokens(self) -> int:
        return self.diverse + self.merged


@dataclass(frozen=True)
class _Segments:
    """Segments of T frames, without reading from the device how many there are."""

    together: Tensor
    """(T, T) float32, 1 where two frames are of one segment."""
    goes_on: Tensor
    """(T,) bool, whether a frame is of the segment of the one before."""

    @classmethod
    def of(cls, number: Tensor) -> _Segments:
        first = torch.ones(len(number), dtype=torch.bool, device=number.device)
        first[1:] = number[1:] != number[:-1]
        return cls((number[:, None] == number).float(), ~first)

    def total(self, of_frames: Tensor) -> Tensor:
        """(T,) int64: the sum over the segment of each frame of (T,) integers."""
        return (self.together @ of_frames.float()).long()

    @property
    def frames(self) -> Tensor:
        """(T,) int64, how many frames the segment of each frame has."""
        return self.together.sum(dim=1).long()


def _mean_of_segment(of_frames: Tensor, number: Tensor) -> Tensor:
    """(T, d): the mean over the segment of each frame of (T, d) float32."""
    together = (number[:, None] == number).float()
    return together @ of_frames / together.sum(dim=1, keepdim=True)


def _others(
    values: Tensor, picked: Tensor, segments: _Segments, budget: _Budget, tau: float, published: bool
) -> tuple[Tensor, Tensor]:
    """The tokens beside the picked ones that stay, (T, N) bool, and their values within (T, N, d) float32."""
    free = ~picked
    if not budget.merged:
        return torch.zeros_like(picked), values
    parent, joins = _joined(values, free, segments, budget, tau)
    stay, trees = _trees(values, parent, joins, published)
    stay &= free
    if published:
        alone = segments.frames == 1
        stay |= alone[:, None]
    left, most = segments.total(stay.sum(dim=1)), segments.frames * budget.merged
    # A share most / left of a frame's tokens, rounded up.
    peaks = torch.where(most < left, -(-stay.sum(dim=1) * most // left.clamp(min=1)), stay.sum(dim=1))
    return _clustered(trees, stay, peaks)


def _joined(values: Tensor, free: Tensor, segments: _Segments, budget: _Budget, tau: float) -> tuple[Tensor, Tensor]:
    """The most similar token of the frame before, (T, N) int64 over T x N, and which tokens join it, (T, N) bool."""
    frames, tokens = free.shape
    similarity, parent = _most_similar_before(values, free)
    may_join = free & segments.goes_on[:, None]
    similarity = similarity.masked_fill(~may_join, -math.inf)
    joins = similarity > tau
    # Where fewer than the budget would be left, only those join that are more similar than the last one too many.
    left = segments.frames * tokens - segments.total(joins.sum(dim=1))
    number = (~segments.goes_on).cumsum(dim=0)
    order = similarity.flatten().argsort(descending=True, stable=True)
    order = order[number.repeat_interleave(tokens)[order].argsort(stable=True)]
    first = torch.searchsorted(number, number) * tokens
    last = first + segments.frames * (tokens - budget.tokens) - 1
    limit = similarity.flatten()[order[last.clamp(min=0)]]
    limit = limit if tokens > budget.tokens else torch.full_like(limit, math.inf)
    joins = torch.where((left < segments.frames * budget.tokens)[:, None], similarity > limit[:, None], joins)
    before = (torch.arange(frames, device=free.device) - 1).clamp(min=0)[:, None] * tokens
    return before + parent, joins


def _most_similar_before(values: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine (T, N) with the most similar free token of the frame before, and its place (T, N) int64 in that frame."""
    frames, tokens = free.shape
    similarity, place = values.new_full((frames, tokens), -math.inf), torch.zeros_like(free, dtype=torch.int64)
    inverse = torch.linalg.vector_norm(values, dim=-1).clamp(min=1e-12).reciprocal()
    step = max(1, SIMILARITIES // tokens**2)
    for start in range(1, frames, step):
        end = min(start + step, frames)
        products = values[start:end] @ values[start - 1 : end - 1].transpose(1, 2)
        products *= inverse[start:end, :, None]
        products *= inverse[start - 1 : end - 1, None]
        products.masked_fill_(~free[start - 1 : end - 1, None], -math.inf)
        similarity[start:end], place[start:end] = products.max(dim=-1)
    return similarity, place


def _trees(values: Tensor, parent: Tensor, joins: Tensor, published: bool) -> tuple[Tensor, Tensor]:
    """The roots of trees of joined tokens, (T, N) bool, and at their places the means of the trees, (T, N, d)."""
    from .. import ops

    own = torch.arange(joins.numel(), device=joins.device)
    root = torch.where(joins.flatten(), parent.flatten(), own)
    for _ in range(len(joins).bit_length()):  # twice as far each time
        root = root[root]
    means, size = (each[0] for each in ops.merge_tokens(values.flatten(0, 1)[None], root[None], groups=len(own)))
    if published:
        ones = joins.flatten().long()
        children = torch.zeros_like(own).scatter_add(0, parent.flatten(), ones)
        means = means * (size / (children + 1))[:, None]
    return ~joins, means.view_as(values)


def _clustered(values: Tensor, stay: Tensor, peaks: Tensor) -> tuple[Tensor, Tensor]:
    """Cluster the tokens of each frame that stay around peaks of density.

    Args:
        values: (T, N, d) float32; may be written to.
        stay: (T, N) bool.
        peaks: (T,) int64, clusters of each frame.

    Returns:
        (T, N) bool, the peaks, and at their places the means of the clusters, (T, N, d).
    """
    if stay.device.type == "cpu":  # nothing waits for it to tell how many tokens stay in a frame
        is_peak = torch.zeros_like(stay)
        for frame, is_left in enumerate(stay):
            if len(places := is_left.nonzero().flatten()):
                part = values[frame, places][None]
                found, part = _all_clustered(part, stay[frame, places][None], peaks[frame : frame + 1])
                is_peak[frame, places], values[frame, places] = found[0], part[0]
        return is_peak, values
    return _all_clustered(values, stay, peaks)


def _all_clustered(values: Tensor, stay: Tensor, peaks: Tensor) -> tuple[Tensor, Tensor]:
    """As `_clustered`, comparing all tokens of a frame."""
    from .. import ops

    frames, tokens = stay.shape
    is_peak, nearest = torch.empty_like(stay), torch.empty_like(stay, dtype=torch.int64)
    step = max(1, SIMILARITIES // tokens**2)
    for start in range(0, frames, step):
        part = slice(start, start + step)
        is_peak[part], nearest[part] = _peaks(values[part], stay[part], peaks[part])
    return is_peak, ops.merge_tokens(values, nearest, groups=tokens)[0]


def _peaks(values: Tensor, stay: Tensor, peaks: Tensor) -> tuple[Tensor, Tensor]:
    """The peaks of density, (T, N) bool, and the place of the one nearest to each token, (T, N) int64."""
    own = torch.arange(stay.shape[1], device=stay.device)
    apart = torch.cdist(values, values) / math.sqrt(values.shape[-1])
    # Equal densities, of tokens that are nearest to each other, are told apart by rounding alone. So it is that of the
    # authors' code, which hands `cdist` these tokens only, and gets exact zeros for few of them.
    is_exact = (stay.sum(dim=1) <= _EXACT)[:, None, None] & (own[:, None] == own)
    return density_peaks(apart.masked_fill(is_exact, 0), stay, peaks, peaks.clamp(1, NEIGHBOURS), NEIGHBOURS, False)
