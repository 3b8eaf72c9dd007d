"""Tiny checkpoints that vLLM's CPU attention can run (heads of 32 channels), with processors, made here."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeForConditionalGeneration,
)

from bench.grounding.llava_folder import MEAN, STD
from tests.models.prompts import IMAGE, VIDEO, VISION_END, VISION_START

ROOT = Path(__file__).parents[2]
LLAVA = ROOT / "models" / "tiny_grounding"
LAYERS = 12
SPECIAL = {
    "<|image_pad|>": IMAGE,
    "<|video_pad|>": VIDEO,
    "<|vision_start|>": VISION_START,
    "<|vision_end|>": VISION_END,
}
KINDS = {
    "qwen2_vl": Qwen2VLForConditionalGeneration,
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    "qwen3_vl": Qwen3VLForConditionalGeneration,
    "qwen3_vl_moe": Qwen3VLMoeForConditionalGeneration,
}
PROCESSORS = {
    "qwen2_vl": ("Qwen2VLProcessor", "Qwen2VLVideoProcessor"),
    "qwen2_5_vl": ("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor"),
    "qwen3_vl": ("Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
    "qwen3_vl_moe": ("Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
}
VISION = {
    "qwen2_vl": {"depth": 2, "embed_dim": 64, "hidden_size": 128, "num_heads": 2},
    "qwen2_5_vl": {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 128,
        "fullatt_block_indexes": [1],
        "window_size": 56,
    },
    "qwen3_vl": {
        "depth": 4,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 128,
        "patch_size": 14,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1, 2],
    },
}
VISION["qwen3_vl_moe"] = VISION["qwen3_vl"]
ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
SECTIONS = {"rope_parameters": ROTARY | {"mrope_section": [4, 6, 6]}}
INTERLEAVED = {"rope_parameters": ROTARY | {"mrope_section": [6, 5, 5], "mrope_interleaved": True}}
TEXT = {"qwen2_vl": SECTIONS, "qwen2_5_vl": SECTIONS, "qwen3_vl": INTERLEAVED | {"head_dim": 32}}
TEXT["qwen3_vl_moe"] = TEXT["qwen3_vl"] | {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "norm_topk_prob": True,
}


def write_qwen(folder: Path, kind: str, seed: int = 0) -> Path:
    """A checkpoint of a kind with random weights, 12 layers, 4 query and 2 key heads."""
    model_class = KINDS[kind]
    config = model_class.config_class(
        architectures=[model_class.__name__],
        dtype="float32",
        vision_config=VISION[kind],
        text_config={
            "hidden_size": 128,
            "intermediate_size": 192,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 512,
            "max_position_embeddings": 1024,
            "initializer_range": 0.1,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **TEXT[kind],
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = model_class(config)
    if kind.startswith("qwen3_vl"):  # an addition left out must show
        for merger in model.model.visual.deepstack_merger_list:
            merger.linear_fc2.weight.data *= 4
    model.save_pretrained(folder)
    if kind == "qwen3_vl_moe":
        _transpose_experts(folder / "model.safetensors")
    words = {f"w{number}": number for number in range(500)} | SPECIAL
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    sizes = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 64}
    pixels = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, "size": sizes}
    pixels |= {"image_mean": MEAN, "image_std": STD}
    name, of_videos = PROCESSORS[kind]
    processor = {"processor_class": name}
    files = {
        "preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessor", **pixels, **processor},
        "video_preprocessor_config.json": {"video_processor_type": of_videos, **pixels, **processor},
        "processor_config.json": processor,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "w0",
            "pad_token": "w0",
            "eos_token": "w2",
            **processor,
        },
    }
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value, indent=1))
    return folder


def _transpose_experts(file: Path) -> None:
    """As published checkpoints have the experts' weights; transformers reads both."""
    weights = load_file(file)
    turned = {name: weights[name].transpose(1, 2).contiguous() for name in weights if ".mlp.experts." in name}
    assert turned
    save_file(weights | turned, file, {"format": "pt"})
