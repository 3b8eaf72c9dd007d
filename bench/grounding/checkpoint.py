"""The tiny grounding model: its architecture, its tokenizer and its processor's files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save as serialize
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import LlavaConfig, LlavaForConditionalGeneration

from . import scenes

FOLDER = Path(__file__).resolve().parents[2] / "models" / "tiny_grounding"

MAX_LENGTH = 512
UNK, BOS, EOS, IMAGE, PAD = "<unk>", "<s>", "</s>", "<image>", "<pad>"
WORDS = (
    *("box", "of", "the", "what", "is", "left", "right", "above", "below", "colour", "object", "at", "top", "bottom"),
    *("how", "many", "objects", "it", "day", "or", "night"),
    *scenes.SIDES,
    *scenes.COLOURS,
    *scenes.SHAPES,
    *scenes.NUMBERS,
    *scenes.COORDINATES,
)
VOCAB = (UNK, BOS, EOS, IMAGE, PAD, *WORDS)
TOKEN_ID = {word: number for number, word in enumerate(VOCAB)}

CONFIG = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "dtype": "float16",
    "image_seq_length": scenes.GRID**2,
    "image_token_index": TOKEN_ID[IMAGE],
    "pad_token_id": TOKEN_ID[PAD],
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
    "tie_word_embeddings": False,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
    "vision_config": {
        "model_type": "clip_vision_model",
        "image_size": scenes.SIDE,
        "patch_size": scenes.PATCH,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": 128,
    },
    "text_config": {
        "model_type": "llama",
        "vocab_size": len(VOCAB),
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_LENGTH,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": TOKEN_ID[BOS],
        "eos_token_id": TOKEN_ID[EOS],
        "pad_token_id": TOKEN_ID[PAD],
        "tie_word_embeddings": False,
    },
}

GENERATION_CONFIG = {
    "bos_token_id": TOKEN_ID[BOS],
    "eos_token_id": TOKEN_ID[EOS],
    "pad_token_id": TOKEN_ID[PAD],
}

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]

PREPROCESSOR_CONFIG = {
    "image_processor_type": "CLIPImageProcessor",
    "processor_class": "LlavaProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": scenes.SIDE},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": scenes.SIDE, "width": scenes.SIDE},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": MEAN,
    "image_std": STD,
}

PROCESSOR_CONFIG = {
    "processor_class": "LlavaProcessor",
    "image_token": IMAGE,
    "num_additional_image_tokens": 1,
    "patch_size": scenes.PATCH,
    "vision_feature_select_strategy": "default",
}

TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "processor_class": "LlavaProcessor",
    "bos_token": BOS,
    "eos_token": EOS,
    "pad_token": PAD,
    "unk_token": UNK,
    "clean_up_tokenization_spaces": False,
    "model_max_length": MAX_LENGTH,
    "padding_side": "left",
}

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
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, TOKEN_ID[BOS])])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (UNK, BOS, EOS, IMAGE, PAD)])
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


def published_name(name: str) -> str:
    """The name in the published LLaVA-1.5 checkpoints of a parameter of the model.

    transformers renames these on loading, to names that differ between its versions.
    """
    name = name.removeprefix("model.")
    if name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model."):
        return name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    if name.startswith("language_model."):
        return name.replace("language_model.", "language_model.model.", 1)
    if name.startswith("lm_head."):
        return "language_model." + name
    return name


def save(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write the model in float16, and the files from which transformers makes its processor."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {published_name(name): weight.half().contiguous() for name, weight in model.state_dict().items()}
    (folder / "model.safetensors").write_bytes(serialize(weights, metadata={"format": "pt"}))
    make_tokenizer().save(str(folder / "tokenizer.json"))
    for name, value in (
        ("config.json", CONFIG),
        ("generation_config.json", GENERATION_CONFIG),
        ("preprocessor_config.json", PREPROCESSOR_CONFIG),
        ("processor_config.json", PROCESSOR_CONFIG),
        ("tokenizer_config.json", TOKENIZER_CONFIG),
    ):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
