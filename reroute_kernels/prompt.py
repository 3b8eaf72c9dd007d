"""Where the visual and text tokens of a batch stand, and how many there are."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor


class Prompt:
    """Where the visual and text tokens of a batch stand, and how many there are.

    The masks are read from the device in one transfer, the only one that a routed prefill makes. Everything is counted
    on the host, where an operation on a few thousand flags takes less time than the launch of a kernel.

    Args:
        visual: (B, L) bool, positions that hold image or video features.
        valid: (B, L) bool, False at padding; None without one.
        draft_tokens: how many tokens at the end of every row come from a draft model. They run, and do not rank.
        starts: (B,) int64, the place of the first token of an answer that is scored with its prompt, behind all visual
            tokens; L if a row has none. Answers run, and do not rank. None if no row has one.
        marks: (B, L) bool, tokens that a reducer dropped, and those that any did; None without a reducer.
        extra: integer tensors without dimensions, by name, to be read in the same transfer.

    Attributes:
        extra_counts: their values, by name, and the counts of tokens that a reducer dropped.
    """

    end: Tensor | None
    last: Tensor | None
    visible: Tensor | None

    def __init__(
        self,
        visual: Tensor,
        valid: Tensor | None,
        draft_tokens: int = 0,
        marks: tuple[Tensor, Tensor] | None = None,
        extra: Mapping[str, Tensor] | None = None,
        starts: Tensor | None = None,
    ):
        extra = extra or {}
        self.length = visual.shape[1]
        self.draft_tokens = draft_tokens
        masks = [visual, *(() if valid is None else (valid,)), *(marks or ())]
        (found, *others), numbers = _on_host(masks, [*extra.values(), *(() if starts is None else (starts,))])
        self.extra_counts: dict[str, int] = dict(zip(extra, numbers, strict=False))
        is_valid = None if valid is None else others.pop(0)
        if is_valid is not None and is_valid.all():
            is_valid = None
        self.valid = None if is_valid is None else valid
        if is_valid is None and starts is None and marks is None and not draft_tokens:
            self._count_whole(visual, found)
            return
        starting = None if starts is None else np.array(numbers[len(extra) :], dtype=np.int64)
        self._count(visual.device, found, is_valid, starting, others)

    def _count_whole(self, visual: Tensor, found: np.ndarray) -> None:
        """Count a prompt without padding, whose last token of each row ranks."""
        batch, length = found.shape
        self.visual, self.pool = visual, visual.clone()
        self.pool[:, -1] = False
        self.pinned = ~self.pool
        self.visual_counts = [row.count(1) for row in map(bytes, found)]
        last_is_visual = found[:, -1].tolist()
        self.pool_counts = list(map(operator.sub, self.visual_counts, last_is_visual))
        self.pinned_counts = [length - count for count in self.pool_counts]
        self.valid_counts, self.unranked_counts = [length] * batch, [0] * batch
        self.padded = self.right_padded = self.has_empty_rows = False
        self.end = self.last = self.visible = None

    def _count(
        self,
        device: torch.device,
        found: np.ndarray,
        is_valid: np.ndarray | None,
        starts: np.ndarray | None,
        marks: Sequence[np.ndarray],
    ) -> None:
        """Count any prompt; arguments as above, on the host."""
        if is_valid is None:
            is_valid = np.ones_like(found)
        positions = np.arange(self.length)
        has_tokens = is_valid.any(axis=1)
        end = np.where(has_tokens, self.length - 1 - is_valid[:, ::-1].argmax(axis=1), -1)  # (B,)
        last = end - self.draft_tokens  # of the prompt itself
        if starts is not None:
            last = np.minimum(last, starts - 1)
        is_prompt = is_valid & (positions <= last[:, None])
        is_last = positions == last[:, None]
        is_visual = found & is_prompt
        # The next token is predicted from the last one, so the last one runs even if it is visual.
        pinned = (is_valid & ~is_visual) | is_last
        pool = is_visual & ~is_last
        if marks:
            dropped, foreign = marks[0] & is_visual, marks[1] & ~marks[0] & is_visual
            pool &= ~dropped
            marked = {"dropped": dropped, "last_dropped": dropped & is_last, "foreign": foreign}
            self.extra_counts |= {name: int(np.count_nonzero(tokens)) for name, tokens in marked.items()}
        counted = (is_visual, pool, pinned, is_valid, is_valid & ~is_prompt)
        counts = [np.count_nonzero(tokens, axis=1).tolist() for tokens in counted]
        self.visual_counts, self.pool_counts, self.pinned_counts, self.valid_counts, unranked = counts
        self.unranked_counts = [self.draft_tokens] * len(unranked) if starts is None else unranked
        self.padded = min(self.valid_counts) < self.length
        # A sample without any token takes no part in this prompt: it is padded on neither side.
        self.right_padded = bool((has_tokens & (end < self.length - 1)).any())
        self.has_empty_rows = min(self.valid_counts) == 0
        # Each in memory of its own: kernels are compiled for addresses that are multiples of 16.
        self.visual, self.pool, self.pinned = (
            torch.from_numpy(tokens).to(device) for tokens in (is_visual, pool, pinned)
        )
        self.end = torch.from_numpy(end).to(device) if self.padded else None
        # The token that ranks, and the tokens it sees: the prompt without draft tokens and answers.
        self.last = torch.from_numpy(last).to(device) if self.padded or self.ranks_within else None
        self.visible = torch.from_numpy(is_prompt).to(device) if self.ranks_within else self.valid

    @property
    def ranks_within(self) -> bool:
        """Whether tokens stand behind the one that ranks, in some row."""
        return any(self.unranked_counts)

    @property
    def most_text(self) -> int:
        """The text tokens that may rank, of the sample that has most."""
        return max(map(operator.sub, self.pinned_counts, self.unranked_counts))

    @property
    def has_visual_tokens(self) -> bool:
        return any(self.visual_counts)

    @property
    def ends_in_image(self) -> bool:
        """Whether the last token of some row, before an answer, is a visual one."""
        return sum(self.visual_counts) > sum(self.pool_counts) + self.extra_counts.get("dropped", 0)


def _on_host(masks: Sequence[Tensor], numbers: Sequence[Tensor]) -> tuple[list[np.ndarray], list[int]]:
    """Masks (B, L) bool and integers, copied from their device in one transfer."""
    shape = (len(masks), *masks[0].shape)
    if not numbers:
        return list((torch.stack(tuple(masks)) if len(masks) > 1 else masks[0][None]).numpy(force=True)), []
    integers = torch.cat([number.to(masks[0].device, torch.int64).flatten() for number in numbers])
    flags = torch.stack(tuple(masks)).flatten().view(torch.uint8)
    read = torch.cat([integers.view(torch.uint8), flags]).numpy(force=True)
    size = 8 * len(integers)
    return list(read[size:].view(bool).reshape(shape)), read[:size].view(np.int64).tolist()
