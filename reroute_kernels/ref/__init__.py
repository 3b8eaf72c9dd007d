"""The four operations in plain PyTorch: the specification of every other backend."""

from .gather import gather_tokens
from .rank import rank_tokens
from .scatter import scatter_tokens_
from .select import select_tokens

__all__ = ["gather_tokens", "rank_tokens", "scatter_tokens_", "select_tokens"]
