"""LLaVA-1.5."""

from .adapter import Adapter


class LlavaAdapter(Adapter):
    """`LlavaForConditionalGeneration`."""

    text_model_types = ("llama", "mistral", "qwen2")
