"""The tiny grounding model: its architecture, its tokenizer and its processor's files."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlavaConfig, LlavaForConditionalGeneration

from bench.grounding.llava_folder import SPECIAL, UNK, add_special_tokens, make_config, write

from . import scenes

FOLDER = Path(__file__).resolve().parents[2] / "models" / "tiny_grounding"

MAX_LENGTH = 512
WORDS = (
    *("box", "of", "the", "what", "is", "left", "right", "above", "below", "colour", "object", "at", "top", "bottom"),
    *("how", "many", "objects", "it", "day", "or", "night"),
    *scenes.SIDES,
    *scenes.COLOURS,
    *scenes.SHAPES,
    *scenes.NUMBERS,
    *scenes.COORDINATES,
)
VOCAB = (*SPECIAL, *WORDS)
TOKEN_ID = {word: number for number, word in enumerate(VOCAB)}

CONFIG = make_config(
    TOKEN_ID,
    MAX_LENGTH,
    {
        "image_size": scenes.SIDE,
        "patch_size": scenes.PATCH,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    },
    {
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
    },
    dtype="float16",
    vision_feature_layer=-1,
)

CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for content in message['content'] | selectattr('type', 'equalto', 'image') -%}
            {{- '<image> ' -}}
        {%- endfor -%}
        {%- for content in message['content'] | selectattr('type', 'equalto', 'text') -%}
            {{- content['text'] -}}
        {%- endfor -%}
    {%- endif -%}
    {{- ' ' -}}
{%- endfor -%}
"""


def make_tokenizer() -> Tokenizer:
    """One token a word."""
    tokenizer = Tokenizer(models.WordLevel(vocab=TOKEN_ID, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    add_special_tokens(tokenizer)
    assert tokenizer.get_vocab() == TOKEN_ID
    return tokenizer


def make_model(seed: int) -> LlavaForConditionalGeneration:
    """The model before training, in float32."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(LlavaConfig(**CONFIG)).float()
    layers = CONFIG["text_config"]["num_hidden_layers"]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
                if name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight")):
                    # Every layer changes the residual stream a little, however many there are.
                    parameter /= (2 * layers) ** 0.5
            elif "embed" in name:
                torch.nn.init.normal_(parameter, std=0.5 if "embed_tokens" in name else 0.1)
    return model


def save(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write the model in float16, and the files from which transformers makes its processor."""
    write(folder, CONFIG, model.state_dict(), make_tokenizer(), CHAT_TEMPLATE)
