"""Write compact rows back to their places in the full sequence."""

from __future__ import annotations

from torch import Tensor

from ..checks import check_scatter, check_written


def scatter_tokens_(full: Tensor, index: Tensor, compact: Tensor) -> Tensor:
    """See `reroute_kernels.ops.scatter_tokens_`."""
    check_scatter(full, index, compact)
    check_written(full)
    sample, row = ((index >= 0) & (index < full.shape[1])).nonzero(as_tuple=True)
    full[sample, index[sample, row]] = compact[sample, row]
    return full
