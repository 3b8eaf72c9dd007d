"""Small prompts for the golden checkpoints, alone and in padded batches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import reroute_kernels as rk
from reroute_kernels.trace import Trace

GOLDEN = Path(__file__).parents[1] / "golden"
IMAGE, VIDEO, VISION_START, VISION_END = 500, 501, 502, 503

SCHEDULE = (rk.Stage(2, 0.4), rk.Stage(5, 0.2), rk.Stage(8, 0.1))
ACTIONS = ("reroute", "remove")


def policy(action: str = "reroute", schedule: tuple[rk.Stage, ...] = SCHEDULE) -> rk.Policy:
    return rk.Policy(schedule, action)


@dataclass
class Prompt:
    """Token ids of one sample with the features its images need."""

    ids: Tensor
    features: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.ids)


def _text(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(3, 400, (count,), generator=generator)


def llava_prompt(images: int, before: int, after: int, seed: int) -> Prompt:
    """`before` text tokens, then each image (196 tokens) followed by 3 text tokens, then `after` text tokens."""
    generator = torch.Generator().manual_seed(seed)
    parts = [_text(before, generator)]
    for _ in range(images):
        parts += [torch.full((196,), IMAGE), _text(3, generator)]
    parts.append(_text(after, generator))
    pixels = torch.randn(images, 3, 112, 112, generator=generator)
    return Prompt(torch.cat(parts), {"pixel_values": pixels} if images else {})


def qwen_prompt(images: int, before: int, after: int, seed: int) -> Prompt:
    """As `llava_prompt`, with images of different sizes: 8 x 12 patches (24 tokens), 16 x 12 (48), and so on."""
    generator = torch.Generator().manual_seed(seed)
    parts, grids, pixels = [_text(before, generator)], [], []
    for number in range(images):
        grid = (1, 8 * (number + 1), 12)
        patches = grid[1] * grid[2]
        parts += [torch.tensor([VISION_START]), torch.full((patches // 4,), IMAGE), torch.tensor([VISION_END])]
        parts.append(_text(3, generator))
        grids.append(grid)
        pixels.append(torch.randn(patches, 1176, generator=generator))
    parts.append(_text(after, generator))
    features = {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.tensor(grids)} if images else {}
    return Prompt(torch.cat(parts), features)


PROMPTS = {"llava": llava_prompt, "qwen2_5_vl": qwen_prompt}


def batch(prompts: list[Prompt], side: str = "left") -> dict[str, Tensor]:
    """The model's arguments for prompts padded on one side."""
    length = max(map(len, prompts))
    ids = torch.zeros(len(prompts), length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        columns = slice(length - len(prompt), length) if side == "left" else slice(0, len(prompt))
        ids[row, columns], mask[row, columns] = prompt.ids, 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if any("image_grid_thw" in prompt.features for prompt in prompts):
        inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    for name in sorted({name for prompt in prompts for name in prompt.features}):
        inputs[name] = torch.cat([prompt.features[name] for prompt in prompts if name in prompt.features])
    return inputs


def offset(prompt: Prompt, length: int, side: str) -> int:
    """Position at which a prompt begins in its padded row."""
    return length - len(prompt) if side == "left" else 0


def selections(trace: Trace, row: int = 0, shift: int = 0) -> list[list[int]]:
    """Selected positions of one sample at every stage, relative to the beginning of its prompt."""
    return [(stage.selected[row] - shift).tolist() for stage in trace.stages]


def cached_lengths(cache) -> list[int]:
    return [cache.get_seq_length(layer) for layer in range(len(cache.layers))]
