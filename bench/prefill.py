"""A LLaVA of 16 layers whose decoder alone is measured, and the oracle that knows every index in advance."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, DynamicCache, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import reroute_kernels as rk

LAYERS, HIDDEN, HEADS, INTERMEDIATE = 16, 512, 8, 1376
DECISION_LAYERS, KEEP = (3, 7, 11, 14), 0.0835
TEXT_BEFORE, TEXT_AFTER = 16, 48
IMAGE_TOKEN = 999

POLICY = rk.Policy([rk.Stage(layer, KEEP) for layer in DECISION_LAYERS])


def make_model(visual_tokens: int, device: torch.device, dtype: torch.dtype) -> LlavaForConditionalGeneration:
    """Random weights, d = 512; the vision tower gives way to constant features, so that time is the decoder's."""
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=4
        ),
        text_config=LlamaConfig(
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            vocab_size=IMAGE_TOKEN + 1,
            max_position_embeddings=2 * visual_tokens + 256,
        ),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=visual_tokens,
    )
    model = LlavaForConditionalGeneration(config).to(device, dtype).eval()
    features = SimpleNamespace(pooler_output=[torch.randn(visual_tokens, HIDDEN, device=device, dtype=dtype) * 0.1])
    model.model.get_image_features = lambda **_: features
    return model


def make_inputs(visual_tokens: int, device: torch.device) -> dict[str, Tensor]:
    text = torch.randint(3, IMAGE_TOKEN, (TEXT_BEFORE + TEXT_AFTER,))
    ids = torch.cat([text[:TEXT_BEFORE], torch.full((visual_tokens,), IMAGE_TOKEN), text[TEXT_BEFORE:]])[None]
    return {"input_ids": ids.to(device), "pixel_values": torch.zeros(1, device=device), "logits_to_keep": 1}


def oracle(model: LlavaForConditionalGeneration, input_ids: Tensor, kept: list[Tensor]) -> Tensor:
    """Last logits of the same compact layers with the indices known, and one key projection of all tokens a decision.

    Args:
        model: as `make_model` gives it.
        input_ids: (1, L).
        kept: (M,) positions of the tokens that run, for each decision layer.
    """
    decoder = model.model.language_model
    hidden = model.get_input_embeddings()(input_ids)
    features = model.model.get_image_features().pooler_output[0]
    hidden[0, TEXT_BEFORE : TEXT_BEFORE + len(features)] = features
    tables = decoder.rotary_emb(hidden, torch.arange(hidden.shape[1], device=hidden.device)[None])
    cache = DynamicCache(config=decoder.config)
    full, running, compact_tables = hidden, None, tables
    for number, layer in enumerate(decoder.layers):
        if number in DECISION_LAYERS:
            full = hidden.clone() if running is None else full.index_copy_(1, running, hidden)
            layer.self_attn.k_proj(layer.input_layernorm(full))
            running = kept[DECISION_LAYERS.index(number)]
            hidden = full.index_select(1, running)
            compact_tables = tuple(table.index_select(1, running) for table in tables)
        hidden = layer(
            hidden, attention_mask=None, position_embeddings=compact_tables, past_key_values=cache, use_cache=True
        )
    full.index_copy_(1, running, hidden)
    return model.lm_head(decoder.norm(full)[:, -1:])
