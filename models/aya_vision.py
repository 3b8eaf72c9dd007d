"""Aya Vision."""

from __future__ import annotations

from .adapter import Adapter


class AyaVisionAdapter(Adapter):
    """`AyaVisionForConditionalGeneration`: most layers see a sliding window; the others do not rotate."""

    text_model_types = ("cohere2",)

    def ranking(self, *args, **kwargs) -> dict[str, object]:
        return {**super().ranking(*args, **kwargs), "cos": None, "sin": None}
