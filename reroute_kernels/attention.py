"""The argument of every operation that ranks: queries, the keys they see, and how attention becomes scores."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

from torch import Tensor


class Attention(NamedTuple):
    """Attention that a few queries pay to the tokens of a sequence, not computed yet.

    The fields are documented at `reroute_kernels.ops.rank_tokens`.
    """

    query: Tensor
    key: Tensor
    cos: Tensor | None = None
    sin: Tensor | None = None
    key_mask: Tensor | None = None
    query_index: Tensor | None = None
    past_key: Tensor | None = None
    past_mask: Tensor | None = None
    scale: float | None = None
    query_reduction: str = "mean"
    head_reduction: str = "mean"
    rotary_style: str = "rotate_half"

    def operands(self) -> tuple[Tensor | None, ...]:
        """The fields that hold a tensor, in order."""
        return self[:8]

    def options(self) -> tuple[float | str | None, ...]:
        """The other fields, in order."""
        return self[8:]

    def tensors(self) -> dict[str, Tensor | None]:
        """The fields that hold a tensor, by name."""
        return {name: getattr(self, name) for name in TENSORS}

    def samples(self, part: slice) -> Attention:
        """Attention in some samples of the batch; a table of one sample serves all."""
        tensors: dict[str, Any] = {
            name: x if x is None or x.shape[0] == 1 else x[part] for name, x in self.tensors().items()
        }
        return self._replace(**tensors)

    def scores(self) -> Tensor:
        """Compute the scores, (B, L) float32."""
        from . import ops

        return ops.rank_tokens(**self._asdict())


NUM_TENSORS = 8
TENSORS = Attention._fields[:NUM_TENSORS]
"""The fields that hold a tensor; in a call the others are given by keyword."""


_FIELDS = frozenset(Attention._fields)

Others = ParamSpec("Others")
Result = TypeVar("Result")


def takes_attention(function: Callable[Concatenate[Attention, Others], Result]) -> Callable[..., Result]:
    """Let a function of an `Attention` be called with its fields, too: tensors by position or name, options by name."""

    @wraps(function)
    def call(*args, **kwargs):
        if args and isinstance(args[0], Attention):
            return function(*args, **kwargs)
        options = {name: kwargs.pop(name) for name in kwargs.keys() & _FIELDS}
        return function(Attention(*args, **options), **kwargs)  # type: ignore[call-arg]

    own = inspect.signature(function)
    _, *others = own.parameters.values()
    flat = [
        parameter.replace(
            annotation=getattr(parameter.annotation, "__forward_arg__", parameter.annotation),
            kind=parameter.kind if parameter.name in TENSORS else parameter.KEYWORD_ONLY,
        )
        for parameter in (*inspect.signature(Attention).parameters.values(), *others)
    ]
    call.__signature__ = own.replace(parameters=flat)  # type: ignore[attr-defined]
    return call
