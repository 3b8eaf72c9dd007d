"""The argument of operations that select by scores in which those of the decisions before live on."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Memory(NamedTuple):
    """Scores of the decision before, and how much of them counts.

    A selection with a memory divides the scores by their sum over the pool, and adds `decay` times what the same token
    had in the decision before. The result ranks, and is the next decision's `scores`. If the sum is not above 0, or not
    finite, what is remembered ranks alone.
    """

    decay: float
    """Factor on what is remembered; 0 or more."""
    scores: Tensor | None = None
    """(B, P) float32, the scores that ranked in the decision before; None at the first one."""
    places: Tensor | None = None
    """(B, L) int64, the place of each token in `scores`; one outside 0 ... P - 1, such as -1, has nothing remembered.
    None: every token has the place that it has now, and P is L."""

    def operands(self) -> tuple[Tensor | None, Tensor | None]:
        """The fields that hold a tensor."""
        return self.scores, self.places

    def samples(self, part: slice) -> Memory:
        """Memory of some samples of the batch."""
        scores, places = (None if x is None else x[part] for x in self.operands())
        return Memory(self.decay, scores, places)

    @classmethod
    def of(
        cls, decay: float | None = None, scores: Tensor | None = None, places: Tensor | None = None
    ) -> Memory | None:
        """From the arguments of the registered operations, where no decay means no memory."""
        return None if decay is None else cls(decay, scores, places)
