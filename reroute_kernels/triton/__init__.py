"""The operations as Triton kernels, for CUDA and ROCm devices, or for the CPU under Triton's interpreter."""

from .align import align_tokens_
from .diverse import select_diverse
from .dpp import select_dpp
from .gather import gather_tokens
from .merge import merge_tokens
from .rank import rank_tokens
from .route import route_tokens
from .saliency import column_saliency
from .scatter import scatter_tokens_
from .scatter_norm import scatter_norm_tokens_
from .select import select_tokens

__all__ = [
    "align_tokens_",
    "column_saliency",
    "gather_tokens",
    "merge_tokens",
    "rank_tokens",
    "route_tokens",
    "scatter_norm_tokens_",
    "scatter_tokens_",
    "select_diverse",
    "select_dpp",
    "select_tokens",
]
