"""Where the answers begin in a prompt that is scored together with them: the last token before an answer ranks."""

from __future__ import annotations

import torch
from torch import Tensor

_UNSCORED = -100  # of transformers' losses


class Answers:
    """Where the answers of a call begin, as its arguments tell.

    Args:
        labels: of the call, (B, L), or None.
        answers_from: of the routing, an integer or (B,). It takes precedence over the labels. None leaves it to them.
    """

    def __init__(self, labels: Tensor | None = None, answers_from: int | Tensor | None = None):
        self._labels = labels
        self._answers_from = answers_from

    def starts(self, visual: Tensor, valid: Tensor | None) -> Tensor | None:
        """The place of each answer's first token, L if a row has none; None if no row has.

        Args:
            visual: (B, L) bool.
            valid: (B, L) bool, False at padding; None without one.

        Returns:
            (B,) int64, not read from the device.

        Raises:
            ValueError: a shape does not fit the call.
        """
        if valid is not None:
            visual = visual & valid
        if self._answers_from is not None:
            starts = self._given(visual)
        elif isinstance(self._labels, Tensor):
            starts = self._labelled(self._labels, visual, valid)
        else:
            return None
        # Nothing is ranked if there is no visual token.
        return starts.where(visual.any(dim=1), visual.shape[1])

    def too_early(self, visual: Tensor, starts: Tensor) -> Tensor:
        """How many visual tokens (B, L) stand in an answer. The last token before the answer could not rank them."""
        positions = torch.arange(visual.shape[1], device=visual.device)
        return (visual & (positions >= starts[:, None])).sum()

    def _given(self, visual: Tensor) -> Tensor:
        batch, length = visual.shape
        starts = torch.as_tensor(self._answers_from, device=visual.device, dtype=torch.int64)
        if starts.ndim == 1 and len(starts) != batch:
            raise ValueError(f"answers_from must hold a position for each of {batch} samples, got {len(starts)}")
        return starts.expand(batch).clamp(max=length)

    @staticmethod
    def _labelled(labels: Tensor, visual: Tensor, valid: Tensor | None) -> Tensor:
        """Starts from labels: the answer begins at the first labelled token behind the last visual one.

        A row whose labels begin before its last visual token and go on right behind it has no answer: its text is
        scored as a whole.
        """
        batch, length = visual.shape
        if tuple(labels.shape) != (batch, length):
            raise ValueError(
                f"labels must be of shape {(batch, length)} as the routed prompt, got {tuple(labels.shape)}"
            )
        scored = labels.to(visual.device) != _UNSCORED
        if valid is not None:
            scored = scored & valid
        positions = torch.arange(length, device=visual.device)
        image_end = torch.where(visual, positions, -1).amax(dim=1, keepdim=True)
        starts = torch.where(scored & (positions > image_end), positions, length).amin(dim=1)
        before = (scored & (positions < image_end)).any(dim=1)
        return starts.masked_fill(before & (starts == image_end[:, 0] + 1), length)


def checked(answers_from: object) -> int | Tensor | None:
    """Check a value of `Routing.answers_from`.

    Raises:
        TypeError: it is of another type.
        ValueError: it is negative, or has too many dimensions.
    """
    if answers_from is None:
        return None
    if isinstance(answers_from, Tensor):
        if answers_from.is_floating_point() or answers_from.is_complex() or answers_from.dtype == torch.bool:
            raise TypeError(f"answers_from must be None, an integer or a tensor of them, got {answers_from.dtype}")
        if answers_from.ndim > 1:
            raise ValueError(
                f"answers_from must be an integer or of shape (B,), got a tensor of shape {tuple(answers_from.shape)}"
            )
        return answers_from
    if not isinstance(answers_from, int) or isinstance(answers_from, bool):
        raise TypeError(f"answers_from must be None, an integer or a tensor of them, got {answers_from!r}")
    if answers_from < 1:
        raise ValueError(f"answers_from must be 1 or more, got {answers_from}")
    return answers_from
