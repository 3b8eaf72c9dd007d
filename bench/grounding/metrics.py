"""How good answers are."""

from __future__ import annotations

import torch
from torch import Tensor


def overlap(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of pairs of boxes, each left, top, right, bottom: `[..., 4]` to `[...]`."""
    low = torch.maximum(boxes[..., :2], others[..., :2])
    high = torch.minimum(boxes[..., 2:], others[..., 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    areas = sum((each[..., 2:] - each[..., :2]).clamp(min=0).prod(-1) for each in (boxes, others))
    return torch.where(areas > shared, shared / (areas - shared), torch.zeros_like(shared))
