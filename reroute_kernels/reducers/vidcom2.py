"""VidCom2: the tokens of a video that are least like its mean and that of their frame."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .base import ShareReducer, VisionFeatures

WIDTHS = tuple(2.0**power for power in range(-3, 2))
"""Variances of the Gaussians that are added up to a similarity."""

TEMPERATURE = 0.01
"""Of the softmax over frames."""


def vidcom2_tokens(features: Tensor, *, keep: float) -> Tensor:
    """Tokens that VidCom2 (arXiv 2505.14454) leaves of a video.

    Tokens are compared by the half of the channels that vary least, as vectors of length 1. The similarity to a centre
    is a sum of Gaussians of the distance to it; the centres are the means of the video and of the frame. Frames that
    are less like the video get more tokens, around a share `keep` of them; those with the least similarities stay.

    Args:
        features: (T, N, d), of the frames of one video.
        keep: share of the tokens that stay, in (0, 1]; of each frame a whole number, rounded down, at least one.

    Returns:
        (M,) int64, ascending over T x N.
    """
    _, tokens, width = features.shape
    values = features.float()
    variance = (values - values.mean(dim=(0, 1))).square_().mean(dim=(0, 1))
    calm = variance.argsort(stable=True)[: max(1, width // 2)]
    unit = normalize(values[..., calm], dim=-1)
    to_video = _similarity(unit, unit.mean(dim=(0, 1), keepdim=True))
    to_frame = _similarity(unit, unit.mean(dim=1, keepdim=True))
    distinct = (-to_video.mean(dim=1) / TEMPERATURE).softmax(dim=0)
    share = keep * (1 + distinct - distinct.mean())
    counts = (share * tokens + 1e-4).long().clamp(1, tokens)  # rounding must not make 16 of 15.999998
    place = (to_video + to_frame).argsort(dim=1, stable=True).argsort(dim=1)
    return (place < counts[:, None]).flatten().nonzero()[:, 0]


def _similarity(unit: Tensor, centre: Tensor) -> Tensor:
    """(T, N), of vectors (T, N, d) to a centre of broadcasting shape."""
    apart = torch.linalg.vector_norm(unit - normalize(centre, dim=-1), dim=-1).square()
    return sum((torch.exp(-apart / (2 * width)) for width in WIDTHS), torch.zeros_like(apart))


@dataclass(frozen=True)
class VidCom2(ShareReducer):
    """VidCom2 (arXiv 2505.14454), see `vidcom2_tokens`. Images stay whole.

    Args:
        keep: share of the tokens that stay, in (0, 1]; of each frame a whole number, rounded down, at least one.

    Raises:
        TypeError, ValueError: `keep` is no such number.

    >>> VidCom2(keep=0.25).survivors(196)
    49
    """

    def reduce(self, image: VisionFeatures) -> tuple[Tensor, Tensor]:
        if not image.is_video:
            count, tokens, _ = image.features.shape
            index = torch.arange(tokens, device=image.features.device).expand(count, -1)
            return index, image.features.clone()
        index = vidcom2_tokens(image.projected, keep=self.keep)
        return index, image.features.flatten(0, 1)[index]

    def survivors(self, visual_tokens: int) -> int:
        """Number of tokens that stay of a frame of a video, about; of an image all do."""
        return max(1, int(visual_tokens * self.keep + 1e-4))
