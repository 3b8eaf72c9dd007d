"""The text beside images that are encoded, for reducers that rank tokens by it.

The images of a batch are encoded together: in the call of the model that brings the prompt, or by `generate` before it.
An image stands in the row whose placeholders it fills, which is found from how many each image and each row has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class PromptText:
    """Rows of a prompt.

    Args:
        ids: (B, L) int64.
        text: (B, L) bool, tokens of text; no padding, answers that are scored, or draft tokens.
        valid: (B, L) bool, False at padding; None without one.
    """

    ids: Tensor
    text: Tensor
    valid: Tensor | None

    def rows_of(self, images: Sequence[int], token_id: int) -> list[int] | None:
        """The row in which each image stands.

        Args:
            images: how many placeholders each image fills, in their order.
            token_id: of these placeholders.

        Returns:
            None if the images do not fill the placeholders row by row.
        """
        placeholders = self.ids == token_id
        if self.valid is not None:
            placeholders = placeholders & self.valid
        rows: list[int] = []
        left = list(images)
        for row, count in enumerate(placeholders.sum(dim=1).tolist()):
            while left and 0 < left[0] <= count:
                count -= left.pop(0)
                rows.append(row)
            if count:
                return None
        return None if left else rows

    @torch.no_grad()
    def embedded(self, rows: Sequence[int], embeddings: nn.Module) -> tuple[Tensor, ...]:
        """The text of each of these rows, (M, d); those of the same row are one tensor."""
        made = {row: embeddings(self.ids[row][self.text[row]]) for row in dict.fromkeys(rows)}
        return tuple(made[row] for row in rows)
