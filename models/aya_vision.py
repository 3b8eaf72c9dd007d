"""Aya Vision."""

from __future__ import annotations

from ..attention import Attention
from .adapter import Adapter


class AyaVisionAdapter(Adapter):
    """`AyaVisionForConditionalGeneration`: most layers see a sliding window; the others do not rotate."""

    text_model_types = ("cohere2",)

    def ranking(self, *args, **kwargs) -> Attention:
        return super().ranking(*args, **kwargs)._replace(cos=None, sin=None)
