"""Idefics3 and SmolVLM."""

from .adapter import Adapter


class Idefics3Adapter(Adapter):
    """`Idefics3ForConditionalGeneration`, `SmolVLMForConditionalGeneration`."""

    decoder_name = "text_model"
