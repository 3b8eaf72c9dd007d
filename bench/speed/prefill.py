"""Decoders with random weights whose prefill is measured: unrouted, routed, and as the oracle that knows every index.

The vision tower gives way to constant features, so that time is the decoder's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor, nn

import reroute_kernels as rk
from reroute_kernels.models import ADAPTERS
from reroute_kernels.models.adapter import cache_name
from reroute_kernels.prompt import Prompt
from reroute_kernels.routing import RoutedForward

TEXT_BEFORE, TEXT_AFTER = 16, 48
IMAGE_TOKEN = 999


@dataclass(frozen=True)
class Decoder:
    """Layers, hidden size, query and key heads, width of the MLP; `preset` names the model whose policies fit it."""

    name: str
    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    preset: str | None = None

    def policies(self, tier: int) -> dict[str, rk.Policy]:
        """The same keep ratio as one decision that removes, and as four that defer."""
        if self.preset:
            return {
                "remove": rk.preset(self.preset, "fastv", avg_tokens=tier),
                "reroute": rk.preset(self.preset, "reroute-fastv", avg_tokens=tier),
            }
        stages = [rk.Stage(layer, tier / 576) for layer in range(1, self.layers, 2)]
        return {"remove": rk.Policy(stages[:1], "remove"), "reroute": rk.Policy(stages)}


LLAVA_7B = Decoder("LLaVA-1.5-7B", "llava", 32, 4096, 32, 32, 11008, "llava-1.5-7b")
QWEN_7B = Decoder("Qwen2.5-VL-7B", "qwen2_5_vl", 28, 3584, 28, 4, 18944, "qwen2.5-vl-7b")


def make_model(decoder: Decoder, visual_tokens: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The transformers model with random weights."""
    import transformers

    text = {
        "hidden_size": decoder.hidden,
        "intermediate_size": decoder.intermediate,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads,
        "vocab_size": IMAGE_TOKEN + 1,
        "max_position_embeddings": 2 * visual_tokens + 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if decoder.family == "llava":
        config = transformers.LlavaConfig(
            vision_config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
            | {"model_type": "clip_vision_model", "intermediate_size": 8, "image_size": 8, "patch_size": 4},
            text_config=transformers.LlamaConfig(**text),
            image_token_index=IMAGE_TOKEN,
            image_seq_length=visual_tokens,
        )
        kind = transformers.LlavaForConditionalGeneration
    else:
        pairs = decoder.hidden // decoder.heads // 2
        sections = [pairs - 2 * (3 * pairs // 8), 3 * pairs // 8, 3 * pairs // 8]
        config = transformers.Qwen2_5_VLConfig(
            vision_config={"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": 8},
            text_config={**text, "rope_parameters": {"rope_type": "default", "mrope_section": sections}},
            image_token_id=IMAGE_TOKEN,
        )
        kind = transformers.Qwen2_5_VLForConditionalGeneration
    torch.manual_seed(0)
    with device:
        model = kind._from_config(config, dtype=dtype).eval()
    set_visual_tokens(model, visual_tokens)
    return model


def set_visual_tokens(model: nn.Module, visual_tokens: int) -> None:
    """Replace the features of every image by a given number of constant ones."""
    import transformers

    embeddings = model.get_input_embeddings().weight
    size = (visual_tokens, embeddings.shape[1])
    features = torch.randn(size, dtype=embeddings.dtype, device=embeddings.device) * 0.1
    model.model.get_image_features = lambda pixel_values, *_, **__: (
        transformers.modeling_outputs.BaseModelOutputWithPooling(pooler_output=[features] * len(pixel_values))
    )


def make_inputs(model: nn.Module, visual_tokens: int, batch: int = 1) -> dict[str, object]:
    """Arguments of a call: text, an image and text, the same length for every sample."""
    device = model.get_input_embeddings().weight.device
    text = torch.randint(3, IMAGE_TOKEN, (batch, TEXT_BEFORE + TEXT_AFTER), device=device)
    image = torch.full((batch, visual_tokens), IMAGE_TOKEN, device=device)
    ids = torch.cat([text[:, :TEXT_BEFORE], image, text[:, TEXT_BEFORE:]], dim=1)
    positions = torch.arange(ids.shape[1], device=device).expand(batch, -1)
    if model.config.model_type == "qwen2_5_vl":
        positions = positions.expand(3, -1, -1)
    return {
        "input_ids": ids,
        "pixel_values": torch.zeros(batch, device=device, dtype=model.dtype),
        "position_ids": positions,
        "logits_to_keep": 1,
        "use_cache": True,
    }


class NoCopyCache:
    """Takes the keys and values of a layer as a cache does, and keeps the tensors as they are."""

    def __init__(self):
        self.layers: list[tuple[Tensor, Tensor]] = []

    def update(self, key: Tensor, value: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        self.layers.append((key, value))
        return key, value


class Prefill:
    """One batch through the layers of a decoder, from the embedded prompt to the last token's logits.

    Everything that depends on data in a way that the host must know (counts, and the oracle's indices) is found before
    a call starts, so that each call can be captured in a CUDA graph.

    Args:
        model: as `make_model` gives it.
        inputs: as `make_inputs` gives them.
        make_cache: makes the cache of the layers.
    """

    def __init__(self, model: nn.Module, inputs: dict, make_cache: Callable[[], object] = NoCopyCache):
        self.model, self.make_cache = model, make_cache
        self.adapter = ADAPTERS[model.config.model_type](model)
        self.layers = self.adapter.layers
        self.ids, self.positions = inputs["input_ids"], inputs["position_ids"]
        self.features = torch.stack(model.model.get_image_features(inputs["pixel_values"]).pooler_output)
        self.prompt = Prompt(self.ids == IMAGE_TOKEN, None)

    def begin(self) -> tuple[Tensor, tuple[Tensor, ...], object]:
        """Embedded prompt, rotary tables, and an empty cache."""
        hidden = self.model.get_input_embeddings()(self.ids)
        hidden[:, TEXT_BEFORE : TEXT_BEFORE + self.features.shape[1]] = self.features
        tables = self.adapter.rotary(self.layers[0], self.adapter.decoder.rotary_emb(hidden, self.positions))
        return hidden, tuple(table.expand(len(hidden), -1, -1) for table in tables), self.make_cache()

    @torch.no_grad()
    def unrouted(self) -> Tensor:
        hidden, tables, cache = self.begin()
        for layer in self.layers:
            hidden = self._run(layer, hidden, tables, cache)
        return self._logits(hidden)

    def routed(self, policy: rk.Policy) -> Callable[[], Tensor]:
        """The call, with the operations of the library; it leaves its kept indices in its attribute `kept`."""
        prepared = RoutedForward(policy, self.prompt)
        decision_layers = {stage.layer for stage in policy.schedule}

        @torch.no_grad()
        def call() -> Tensor:
            forward = copy.copy(prepared)  # its counts are on the device already
            forward.kept = []
            hidden, all_tables, cache = self.begin()
            tables = all_tables
            for number, layer in enumerate(self.layers):
                if number in decision_layers:
                    hidden = forward.decide(hidden, all_tables, self._projection(layer))
                    tables = forward.rotary
                hidden = self._run(layer, hidden, tables, cache)
            call.kept = forward.kept
            return self._logits(forward.finish(hidden))

        return call

    def oracle(self, policy: rk.Policy, kept: list[Tensor]) -> Callable[[], Tensor]:
        """The same compact layers with the indices (B, M) known, and one key projection of all tokens a decision."""
        batch, length = self.ids.shape
        first = torch.arange(batch, device=self.ids.device)[:, None] * length
        rows = [(index + first).flatten() for index in kept]
        decision_layers = [stage.layer for stage in policy.schedule]

        def compact(tensor: Tensor, row: Tensor) -> Tensor:
            return tensor.reshape(batch * length, -1).index_select(0, row).view(batch, -1, tensor.shape[2])

        def write(full: Tensor, row: Tensor, hidden: Tensor) -> None:
            full.view(batch * length, -1).index_copy_(0, row, hidden.reshape(len(row), -1))

        @torch.no_grad()
        def call() -> Tensor:
            hidden, all_tables, cache = self.begin()
            full, tables = None, all_tables
            for number, layer in enumerate(self.layers):
                if number in decision_layers:
                    stage = decision_layers.index(number)
                    if full is None:
                        full = hidden.clone()
                    else:
                        write(full, rows[stage - 1], hidden)
                    layer.self_attn.k_proj(layer.input_layernorm(full))
                    hidden = compact(full, rows[stage])
                    tables = tuple(compact(table, rows[stage]) for table in all_tables)
                hidden = self._run(layer, hidden, tables, cache)
            write(full, rows[-1], hidden)
            return self._logits(full)

        return call

    def decode_step(self, cache) -> Callable[[], Tensor]:
        """The call for one token behind the prompt, on a cache that takes its keys and values."""
        token, positions = self.ids[:, -1:], self.positions[..., -1:] + 1

        @torch.no_grad()
        def call() -> Tensor:
            hidden = self.model.get_input_embeddings()(token)
            tables = self.adapter.rotary(self.layers[0], self.adapter.decoder.rotary_emb(hidden, positions))
            tables = tuple(table.expand(len(hidden), -1, -1) for table in tables)
            for layer in self.layers:
                hidden = self._run(layer, hidden, tables, cache)
            return self._logits(hidden)

        return call

    def _projection(self, layer):
        def attention(hidden, rotary, key_mask, positions, states):
            return self.adapter.ranking(layer, hidden, *rotary, key_mask, positions, states)

        return SimpleNamespace(attention=attention, norm=partial(self.adapter.norm, layer))

    def _run(self, layer: nn.Module, hidden: Tensor, tables: tuple[Tensor, ...], cache) -> Tensor:
        output = layer(
            hidden,
            attention_mask=None,
            position_embeddings=self.adapter.position_embeddings(*tables),
            use_cache=True,
            **{cache_name(self.model): cache},
        )
        return output[0] if isinstance(output, tuple) else output

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.model.lm_head(self.adapter.decoder.norm(hidden[:, -1:]))
