"""The operations as Triton kernels, for CUDA and ROCm devices, or for the CPU under Triton's interpreter."""

from ..decision import route_tokens_by
from .gather import gather_tokens
from .rank import rank_tokens
from .scatter import scatter_tokens_
from .select import select_tokens

route_tokens = route_tokens_by(rank_tokens, select_tokens, gather_tokens)

__all__ = ["gather_tokens", "rank_tokens", "route_tokens", "scatter_tokens_", "select_tokens"]
