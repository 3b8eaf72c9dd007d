"""LLaVA-1.5 and LLaVA-NeXT."""

from __future__ import annotations

from .adapter import Adapter
from .vision import ClipVision


class LlavaAdapter(Adapter):
    """`LlavaForConditionalGeneration`, `LlavaNextForConditionalGeneration`, whose CLIP towers can be reduced."""

    vision = ClipVision
