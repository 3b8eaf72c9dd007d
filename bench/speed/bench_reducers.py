"""Cost of stage 1 of Nüwa beside a vision tower of the published size."""

import pytest
import torch
import transformers

import reroute_kernels as rk
from bench.speed.device import Clock, Timing

ROUNDS = 3
TEXT = {"num_hidden_layers": 1, "intermediate_size": 16, "vocab_size": 16, "max_position_embeddings": 16}

# Blocks of the tower of Qwen2.5-VL that run on a CPU, with the same share of full attention; all 32 run on a GPU.
CPU_BLOCKS = 8


def llava(device):
    """CLIP ViT-L/14 at 336 pixels before a projector of LLaVA-1.5-7B: 576 tokens."""
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
            projection_dim=768,
        ),
        text_config=transformers.LlamaConfig(**TEXT, hidden_size=4096, num_attention_heads=32),
        image_token_index=3,
    )
    inputs = {"pixel_values": torch.randn(1, 3, 336, 336, device=device)}
    return transformers.LlavaForConditionalGeneration, config, inputs, 1


def qwen(device):
    """The tower of Qwen2.5-VL-7B on an image of 672 x 672 pixels: 2,304 patches, 576 tokens."""
    blocks = 32 if device.type == "cuda" else CPU_BLOCKS
    step = blocks // 4
    config = transformers.Qwen2_5_VLConfig(
        vision_config={
            "depth": blocks,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "fullatt_block_indexes": list(range(step - 1, blocks, step)),
        },
        text_config={
            **TEXT,
            "hidden_size": 3584,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24]},
        },
        image_token_id=3,
    )
    inputs = {
        "pixel_values": torch.randn(2304, 1176, device=device),
        "image_grid_thw": torch.tensor([[1, 48, 48]], device=device),
    }
    return transformers.Qwen2_5_VLForConditionalGeneration, config, inputs, 32 // blocks


TOWERS = {"llava-1.5-7b": (llava, 64), "qwen2.5-vl-7b": (qwen, 144)}


@pytest.mark.parametrize("name", TOWERS)
def bench_encoding(benchmark, name, device, dtype):
    make, tier = TOWERS[name]
    kind, config, inputs, share = make(device)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with device:
        model = kind._from_config(config, dtype=dtype).eval()
    reducer = rk.preset(name, "nuwa", tier).reducer
    clock, times = Clock(device), {"tower": [], "stage 1": []}

    class Timed:
        """The reducer, with the saliency and the features that it needs from the tower."""

        def reduce(self, image):
            made = []
            times["stage 1"].append(clock.once(lambda: made.append(reducer.reduce(image))))
            return made[0]

    def in_turn():
        times["tower"].append(clock.once(lambda: model.model.get_image_features(**inputs)))
        with rk.apply(model, rk.Policy((), reducer=Timed())):
            model.model.get_image_features(**inputs)

    benchmark.group = "reducers"
    benchmark.pedantic(in_turn, rounds=ROUNDS, warmup_rounds=1)
    tower = Timing.of([share * seconds for seconds in times["tower"][1:]])
    stage = Timing.of(times["stage 1"][1:])
    benchmark.extra_info["tower"] = name
    benchmark.extra_info["description"] = make.__doc__.rstrip(".")
    benchmark.extra_info["measured"] = "all blocks" if share == 1 else f"1 of {share} blocks, times {share}"
    benchmark.extra_info["dtype"] = str(dtype)
    benchmark.extra_info["tower_milliseconds"] = tower.milliseconds()
    benchmark.extra_info["stage_1_milliseconds"] = stage.milliseconds()
    benchmark.extra_info["stage_1_over_tower"] = stage.median / tower.median
