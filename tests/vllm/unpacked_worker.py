"""Extension of vLLM's worker. Its process imports it before it loads a model, which then keeps its weights."""

from __future__ import annotations

from contextlib import ExitStack

from tests.vllm.unpacked import recorded, unpacked

_process = ExitStack()
_process.enter_context(unpacked())
_decisions = _process.enter_context(recorded())


class UnpackedWorker:
    """Adds a method to a worker."""

    def decisions(self) -> list[dict[str, int]]:
        """Projections of the decisions of this rank until now."""
        return _decisions
