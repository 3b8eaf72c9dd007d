"""Every supported family as a tiny model with random weights, and prompts for it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from tests.models.handed_features import HANDED, TOKENS, Handed
from tests.models.prompts import GOLDEN, IMAGE, VIDEO, VISION_END, VISION_START, Prompt, batch
from tests.models.slow_way import decoder_of, layer_types

CLIP = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
SMALL_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MISTRAL = {**TEXT, "model_type": "mistral", "sliding_window": None}


def tiny(kind: str, **config):
    """A model of `<kind>ForConditionalGeneration` from a configuration."""
    config = getattr(transformers, f"{kind}Config")(**config)
    return transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)


def llava():
    """The golden checkpoint's shape. Its own weights enlarge rounding: it alone differs by 1e-4 between paddings."""
    config = transformers.AutoConfig.from_pretrained(GOLDEN / "llava", dtype=torch.float32)
    config.text_config.initializer_range = 0.15
    return transformers.LlavaForConditionalGeneration(config)


def pixtral():
    return tiny(
        "Llava",
        vision_config=CLIP | {"model_type": "pixtral", "image_size": 112, "head_dim": 16},
        text_config=MISTRAL | {"head_dim": 16},
        image_token_index=IMAGE,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )


def llava_next():
    return tiny(
        "LlavaNext",
        vision_config={**CLIP, "model_type": "clip_vision_model"},
        text_config=MISTRAL,
        image_token_index=IMAGE,
        image_grid_pinpoints=[[56, 56], [56, 112]],
    )


def llava_onevision():
    return tiny(
        "LlavaOnevision",
        vision_config={**CLIP, "model_type": "siglip_vision_model"},
        text_config={**TEXT, "model_type": "qwen2"},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_grid_pinpoints=[[56, 56], [56, 112]],
    )


def qwen2_vl():
    return tiny(
        "Qwen2VL",
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2},
        text_config={**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
        **IDS,
    )


def qwen2_5_vl():
    """The golden checkpoint."""
    return transformers.AutoModelForImageTextToText.from_pretrained(GOLDEN / "qwen2_5_vl", dtype=torch.float32)


def qwen3_vl(kind="Qwen3VL", **text):
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    model = tiny(
        kind,
        vision_config={**VISION, "depth": 3, "deepstack_visual_indexes": [0, 1, 2]},
        text_config={**TEXT, "head_dim": 16, "rope_parameters": rope, **text},
        **IDS,
    )
    # Random features are small beside the states that they are added to: an addition left out must show.
    for merger in model.model.visual.deepstack_merger_list:
        merger.linear_fc2.weight.data *= 30
    return model


def qwen3_5(kind="Qwen3_5", **text):
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    model = tiny(
        kind,
        vision_config=VISION,
        text_config={
            **TEXT,
            **linear,
            "initializer_range": 0.1,  # with 0.2 the unrouted model alone differs by 1e-4 between paddings
            "head_dim": 16,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "rope_parameters": rope,
            "layer_types": ["linear_attention", "full_attention"] * 3,
            **text,
        },
        **IDS,
    )
    # Norm weights are stored as w in (1 + w): not zero here, so that leaving the one out shows.
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight") and "visual" not in name and "linear_attn" not in name:
            weight.data.normal_(0, 0.2)
    return model


def glm4v(kind="Glm4v", **text):
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
    return tiny(
        kind,
        vision_config={**VISION, "image_size": 112},
        text_config={**TEXT, "head_dim": 16, "rope_parameters": rope, **text},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=VISION_START,
        image_end_token_id=VISION_END,
    )


def internvl(text="qwen2"):
    return tiny(
        "InternVL",
        vision_config=CLIP | {"image_size": [168, 168], "patch_size": [14, 14]},
        text_config={**TEXT, "model_type": text, "head_dim": 16},
        image_token_id=IMAGE,
    )


def mistral3():
    return tiny(
        "Mistral3",
        vision_config=CLIP | {"model_type": "pixtral", "image_size": 168, "head_dim": 16},
        text_config=MISTRAL | {"head_dim": 16},
        image_token_index=IMAGE,
    )


def idefics3(kind="Idefics3"):
    return tiny(
        kind,
        vision_config=CLIP,
        text_config={**TEXT, "model_type": "llama"},
        image_token_id=IMAGE,
        pad_token_id=0,
        scale_factor=2,
    )


def aya_vision():
    """Three of four layers see a window, shorter than the prompts; the others do not rotate."""
    return tiny(
        "AyaVision",
        vision_config={**CLIP, "model_type": "siglip_vision_model", "image_size": 168, "vision_use_head": False},
        text_config={
            **TEXT,
            "model_type": "cohere2",
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "logit_scale": 1.0,
        },
        image_token_index=IMAGE,
    )


MODELS: dict[str, Callable] = {
    "aya_vision": aya_vision,
    "glm4v": glm4v,
    "glm4v_moe": lambda: glm4v(
        "Glm4vMoe", n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, first_k_dense_replace=1
    ),
    "idefics3": idefics3,
    "internvl": internvl,
    "internvl-llama": lambda: internvl("llama"),
    "internvl-qwen3": lambda: internvl("qwen3"),
    "llava": llava,
    "llava-pixtral": pixtral,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "mistral3": mistral3,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen2_vl": qwen2_vl,
    "qwen3_5": qwen3_5,
    "qwen3_5_moe": lambda: qwen3_5("Qwen3_5Moe", **SMALL_EXPERTS, shared_expert_intermediate_size=32),
    "qwen3_vl": qwen3_vl,
    "qwen3_vl_moe": lambda: qwen3_vl("Qwen3VLMoe", **SMALL_EXPERTS),
    "smolvlm": lambda: idefics3("SmolVLM"),
}
ALIKE: dict[str, tuple[str, str]] = {
    "cosmos3_omni": ("qwen3_vl", "Cosmos3Omni"),
    "glm46v": ("glm4v", "Glm46V"),
    "glmga": ("glm4v", "Glmga"),
}
"""Types that are built as a model above is: its name, and the beginning of the names of their classes."""

VIDEO_MODELS = (
    "glm4v",
    "glm4v_moe",
    "llava_onevision",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_vl",
    "qwen3_vl_moe",
)


def _patches(dim: int, height: int, generator) -> dict[str, Tensor]:
    grid = (1, height, 12)
    return {"pixel_values": torch.randn(height * 12, dim, generator=generator), "image_grid_thw": torch.tensor([grid])}


def _picture(name: str, number: int, generator) -> dict[str, Tensor]:
    """Inputs that the processor would make of one image; later ones have other sizes if the family allows."""

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if name.startswith(("qwen3_vl", "qwen3_5")):
        return _patches(1536, 8 * (number + 1), generator)
    if name.startswith(("qwen", "glm")):
        return _patches(1176, 8 * (number + 1), generator)
    if name in ("idefics3", "smolvlm"):
        return {"pixel_values": noise(1, 7 - number, 3, 56, 56)}  # as seven tiles
    if name in ("llava_next", "llava_onevision"):
        # One tile, or two beside each other, with the overview of both.
        size = torch.tensor([[56, 112] if number == 0 else [56, 100]])
        return {"pixel_values": noise(1, 3, 3, 56, 56), "image_sizes": size}
    if name in ("mistral3", "llava-pixtral"):
        side = 168 if name == "mistral3" else 112
        return {"pixel_values": noise(1, 3, side, side), "image_sizes": torch.tensor([[side, side - 28 * number]])}
    if name.startswith(("aya", "internvl")):
        return {"pixel_values": noise(1 + number, 3, 168, 168)}  # tiles
    return {"pixel_values": noise(1, 3, 112, 112)}


@dataclass(frozen=True)
class Family:
    """A tiny model and its prompts."""

    name: str
    model: torch.nn.Module

    @property
    def _like(self) -> str:
        """The model whose inputs it takes."""
        return ALIKE.get(self.name, (self.name,))[0]

    @property
    def has_video(self) -> bool:
        return self._like in VIDEO_MODELS

    @property
    def _shows_frames(self) -> bool:
        """Whether placeholders of images stand for the frames of a video."""
        return self.name.startswith("glm")

    def prompt(self, images: int, before: int, after: int, seed: int, video: bool = False) -> Prompt:
        """Text, each image followed by three text tokens, or one video, and text again."""
        generator = torch.Generator().manual_seed(seed)

        def text(count: int) -> Tensor:
            return torch.randint(3, 400, (count,), generator=generator)

        parts, features = [text(before)], []
        for number in range(images):
            features.append(self._picture(number, generator))
            parts += self._wrapped(IMAGE, self._count(features[-1]))
            parts.append(text(3))
        if video:
            segments, features = self._video(generator)
            for count in segments:
                parts += [*self._wrapped(IMAGE if self._shows_frames else VIDEO, count), text(2)]
        parts.append(text(after))
        return Prompt(torch.cat(parts), self._merged(features, dim=1))

    def _picture(self, number: int, generator) -> dict[str, Tensor]:
        return _picture(self._like, number, generator)

    def _wrapped(self, token: int, count: int) -> list[Tensor]:
        return [torch.tensor([VISION_START]), torch.full((count,), token), torch.tensor([VISION_END])]

    def _video(self, generator) -> tuple[list[int], list[dict[str, Tensor]]]:
        if self._like == "llava_onevision":
            # Four tokens a frame, and one at the end, which some versions add after the features are asked for.
            return [5 * 4 + 1], [{"pixel_values_videos": torch.randn(1, 5, 3, 56, 56, generator=generator)}]
        frames, height, width = 3, 8, 12
        dim = 1536 if self._like.startswith("qwen3") else 1176
        pixels = torch.randn(frames * height * width, dim, generator=generator)
        features = {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([[frames, height, width]])}
        tokens = height * width // 4
        # Some write the time of each frame in front of it.
        apart = self._shows_frames or self._like.startswith("qwen3")
        return [tokens] * frames if apart else [frames * tokens], [features]

    @torch.no_grad()
    def _count(self, features: dict[str, Tensor]) -> int:
        size = self.model.config.get_text_config().hidden_size
        output = self.model.model.get_image_features(**features).pooler_output
        return sum(each.reshape(-1, size).shape[0] for each in output)

    def _merged(self, features: list[dict[str, Tensor]], dim: int) -> dict[str, Tensor]:
        by_sample = self._like in ("idefics3", "smolvlm")  # (samples, tiles, ...), filled up with tiles of zeros
        if by_sample and dim == 0 and features:
            tiles = max((each["pixel_values"].shape[1] for each in features if each), default=0)
            empty = torch.zeros(1, tiles, 3, 56, 56)
            rows = []
            for each in features:
                row = empty.clone()
                if each:
                    row[:, : each["pixel_values"].shape[1]] = each["pixel_values"]
                rows.append(row)
            return {"pixel_values": torch.cat(rows)} if tiles else {}
        names = sorted({name for each in features for name in each})
        return {
            name: torch.cat([each[name] for each in features if name in each], dim=dim if by_sample else 0)
            for name in names
        }

    def batch(self, prompts: list[Prompt], side: str = "left") -> dict[str, Tensor]:
        """The model's arguments for prompts padded on one side."""
        inputs = batch([Prompt(prompt.ids, {}) for prompt in prompts], side)
        if self._like.startswith(("qwen", "glm")):
            ids = inputs["input_ids"]
            inputs["mm_token_type_ids"] = (ids == IMAGE) * 1 + (ids == VIDEO) * 2
            if self._shows_frames:
                videos = torch.tensor(["pixel_values_videos" in prompt.features for prompt in prompts])
                inputs["mm_token_type_ids"] *= 1 + videos[:, None].long()
        return inputs | self._merged([prompt.features for prompt in prompts], dim=0)


@dataclass(frozen=True)
class HandedFamily(Family):
    """A tiny model that is handed the features of its images as pixels."""

    handed: Handed

    @property
    def has_video(self) -> bool:
        return "pixel_values_videos" in inspect.signature(type(self.model).forward).parameters

    def _video(self, generator) -> tuple[list[int], list[dict[str, Tensor]]]:
        return [TOKENS], [{"pixel_values_videos": torch.randn(1, TOKENS, 64, generator=generator)}]

    def _picture(self, number: int, generator) -> dict[str, Tensor]:
        parameters = inspect.signature(type(self.model).forward).parameters
        name = next(name for name in ("pixel_values", "pixel_values_images") if name in parameters)
        return {name: torch.randn(1, TOKENS, 64, generator=generator), **self.handed.brings()}

    def _count(self, features: dict[str, Tensor]) -> int:
        return TOKENS

    def _merged(self, features: list[dict[str, Tensor]], dim: int) -> dict[str, Tensor]:
        names = sorted({name for each in features for name in each})
        packed = ("pixel_values",) if self.handed.packs_images else ()
        return {
            name: torch.cat([each[name] for each in features if name in each], dim=int(name in packed))
            for name in names
        }

    def batch(self, prompts: list[Prompt], side: str = "left") -> dict[str, Tensor]:
        inputs = batch([Prompt(prompt.ids, {}) for prompt in prompts], side)
        parameters = inspect.signature(type(self.model).forward).parameters
        for name in ("mm_token_type_ids", "moe_mm_token_type_ids", "token_type_ids"):
            if name in parameters:
                # PaliGemma's are 0 for the prefix, images among it, and 1 for an answer.
                inputs[name] = (inputs["input_ids"] == IMAGE) * int(self.name != "paligemma")
        return inputs | self._merged([prompt.features for prompt in prompts], dim=0)


OTHERS = tuple(
    name
    for name in (*ALIKE, *HANDED)
    if name.split("-")[0] in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    and (name in ALIKE or HANDED[name].can_be_called)
)
"""Names of the types that are not called in every way each time, of those that can be built here."""


@cache
def load(name: str) -> Family:
    """One model for all tests of a process; they leave it as it was."""
    if name in HANDED:
        torch.manual_seed(0)
        return HandedFamily(name, HANDED[name].build().eval(), HANDED[name])
    if name in ALIKE:
        like, kind = ALIKE[name]
        torch.manual_seed(0)
        return Family(name, {"qwen3_vl": qwen3_vl, "glm4v": glm4v}[like](kind).eval())
    # With seed 0 a token of qwen3_vl_moe ranks two experts within 1e-7, and any rounding decides between them.
    torch.manual_seed(1 if name == "qwen3_vl_moe" else 0)
    return Family(name, MODELS[name]().eval())


def first_layers(model: torch.nn.Module, layers: int) -> torch.nn.Module:
    """A copy with the first decoder layers alone, for compilers: they take seconds for each."""
    copied = copy.deepcopy(model)
    decoder = decoder_of(copied)
    decoder.layers = decoder.layers[:layers]
    decoder.config.num_hidden_layers = layers
    if getattr(decoder.config, "layer_types", None):
        decoder.config.layer_types = decoder.config.layer_types[:layers]
    return copied


@cache
def load_shallow(name: str) -> Family:
    """A family's model with the first decoder layers alone: three, or two pairs of different ones."""
    family = load(name)
    if getattr(decoder_of(family.model).config, "num_kv_shared_layers", None):
        return family  # its embeddings have a part for each layer
    kinds = set(layer_types(decoder_of(family.model)))
    return replace(family, model=first_layers(family.model, 3 if kinds == {"full_attention"} else 4))
