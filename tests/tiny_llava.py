"""LLaVA-1.5's architecture in miniature, with random weights, as a checkpoint folder.

It loads like any other one, offline and without torchvision, through AutoProcessor.from_pretrained and
AutoModelForImageTextToText.from_pretrained. It has the 576 visual tokens of a 336-pixel image and the 32 decoder layers
of LLaVA-1.5-7B, so that a schedule published for that model applies to it unchanged. The widths are small and the
tokenizer is one token per byte. The text it generates means nothing.
"""

import string
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlavaConfig, LlavaForConditionalGeneration

from bench.grounding import llava_folder
from bench.grounding.llava_folder import BOS, EOS, IMAGE, PAD, UNK, add_special_tokens, make_config, published_name

IMAGE_SIZE = 336
PATCH_SIZE = 14
MAX_LENGTH = 4096

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCAB = [UNK, BOS, EOS, *ALPHABET, IMAGE, PAD]
TOKEN_ID = {token: i for i, token in enumerate(VOCAB)}

# The tokens that greedy decoding may choose; the byte-level alphabet spells the space as U+0120.
WRITABLE = set(string.ascii_letters + string.digits + "\u0120")

CONFIG = make_config(
    TOKEN_ID,
    MAX_LENGTH,
    {
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    },
    {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 32, "head_dim": 16}
    | dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 4),
    dtype="bfloat16",
    vision_feature_layer=-2,
)

CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message['role'] != 'system' -%}
        {{- message['role'].upper() + ': ' -}}
    {%- endif -%}
    {%- if message['content'] is string -%}
        {{- message['content'] + ' ' -}}
    {%- else -%}
        {%- for content in message['content'] | selectattr('type', 'equalto', 'image') -%}
            {{- '<image>\\n' -}}
        {%- endfor -%}
        {%- for content in message['content'] | selectattr('type', 'equalto', 'text') -%}
            {{- content['text'] + ' ' -}}
        {%- endfor -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'ASSISTANT:' -}}
{%- endif -%}
"""

# Standard deviations of the weights, by the end of their names. Queries and keys are wide enough
# to concentrate attention on some image tokens; the rest keeps every layer's update of the
# residual stream smaller than the stream itself.
STD = {
    "embeddings.patch_embedding.weight": 0.1,
    "embeddings.position_embedding.weight": 0.5,
    "embeddings.class_embedding": 0.5,
    "linear_1.weight": 0.2,
    "linear_2.weight": 0.2,
    "embed_tokens.weight": 1.0,
    "lm_head.weight": 0.5,
    "q_proj.weight": 0.2,
    "k_proj.weight": 0.2,
}
DEFAULT_STD = 0.1


def make_weights(seed):
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig(**CONFIG))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    random = np.random.RandomState(seed)
    weights = {}
    for name in sorted(shapes, key=published_name):  # the same order under every transformers
        shape = shapes[name]
        if name.endswith(".bias"):
            weight = np.zeros(shape)
        elif "norm" in name or "layrnorm" in name:
            weight = np.ones(shape)
        else:
            std = next((s for end, s in STD.items() if name.endswith(end)), DEFAULT_STD)
            weight = std * random.standard_normal(tuple(shape))
        if name.endswith("lm_head.weight"):
            # Zero logits for all other tokens: greedy text is readable and never ends early.
            weight[[token not in WRITABLE for token in VOCAB]] = 0
        weights[name] = torch.from_numpy(weight).to(torch.bfloat16)
    return weights


def make_tokenizer():
    vocab = {token: TOKEN_ID[token] for token in [UNK, BOS, EOS, *ALPHABET]}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    add_special_tokens(tokenizer)
    assert tokenizer.get_vocab() == TOKEN_ID
    return tokenizer


def write(folder: Path, seed: int = 2) -> None:
    """Write the checkpoint; the same seed gives the same bytes."""
    llava_folder.write(folder, CONFIG, make_weights(seed), make_tokenizer(), CHAT_TEMPLATE)
