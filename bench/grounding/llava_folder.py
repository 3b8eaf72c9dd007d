"""A LLaVA as a checkpoint folder that every supported transformers loads, without torchvision."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save
from tokenizers import AddedToken, Tokenizer, processors
from torch import Tensor

UNK, BOS, EOS, IMAGE, PAD = SPECIAL = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
"""Mean and deviation with which the processor normalizes the three channels, as CLIP's does."""


def make_config(token_id: dict[str, int], length: int, tower: dict, text: dict, **others: object) -> dict[str, object]:
    """Configuration of a LLaVA with a CLIP tower and a Llama decoder.

    Args:
        token_id: of the vocabulary.
        length: the longest prompt.
        tower, text: sizes of the vision tower and of the decoder, by the names of their configurations.
        others: of the model.
    """
    side, patch = tower["image_size"], tower["patch_size"]
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_seq_length": (side // patch) ** 2,
        "image_token_index": token_id[IMAGE],
        "pad_token_id": token_id[PAD],
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": False,
        "vision_feature_select_strategy": "default",
        **others,
        "vision_config": {
            "model_type": "clip_vision_model",
            **tower,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
            "projection_dim": tower["hidden_size"],
        },
        "text_config": {
            "model_type": "llama",
            "vocab_size": len(token_id),
            **text,
            "hidden_act": "silu",
            "max_position_embeddings": length,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "bos_token_id": token_id[BOS],
            "eos_token_id": token_id[EOS],
            "pad_token_id": token_id[PAD],
            "tie_word_embeddings": False,
        },
    }


def add_special_tokens(tokenizer: Tokenizer) -> None:
    """Add those in `SPECIAL`, with BOS before every text."""
    number = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, number)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])


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


def processor_files(side: int, patch: int, mean: list[float], std: list[float]) -> dict[str, dict[str, object]]:
    """Configurations of a LLaVA's processors, by file; images are squares of `side` pixels, in patches of `patch`.

    Args:
        side: pixels along an edge of the image.
        patch: pixels along an edge of a patch.
        mean, std: with which the three channels are normalized.
    """
    return {
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "LlavaProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": side},
            "resample": 3,
            "do_center_crop": True,
            "crop_size": {"height": side, "width": side},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": mean,
            "image_std": std,
        },
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "image_token": IMAGE,
            "num_additional_image_tokens": 1,
            "patch_size": patch,
            "vision_feature_select_strategy": "default",
        },
    }


def write(folder: Path, config: dict, weights: dict[str, Tensor], tokenizer: Tokenizer, chat_template: str) -> None:
    """Write a checkpoint.

    Args:
        folder: made if it is missing.
        config: of the model; its `dtype` is that of the weights in the file.
        weights: by the model's names.
        tokenizer: with the tokens in `SPECIAL`.
        chat_template: in Jinja.
    """
    folder.mkdir(parents=True, exist_ok=True)
    side, patch = (config["vision_config"][name] for name in ("image_size", "patch_size"))
    dtype = getattr(torch, config["dtype"])
    stored = {published_name(name): weight.to(dtype).contiguous() for name, weight in weights.items()}
    (folder / "model.safetensors").write_bytes(save(stored, metadata={"format": "pt"}))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    files = {
        "config.json": config,
        "generation_config.json": {
            name: config["text_config"][name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        },
        **processor_files(side, patch, MEAN, STD),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": "LlavaProcessor",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "unk_token": UNK,
            "clean_up_tokenization_spaces": False,
            "model_max_length": config["text_config"]["max_position_embeddings"],
            "padding_side": "left",
        },
    }
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
