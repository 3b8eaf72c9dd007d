"""Estimates of time by the roofline model: how long a prompt takes if nothing but arithmetic and memory counts.

An estimate is a lower bound, not a measurement: kernels reach a part of a GPU's peaks, and launches and the host take
time of their own. It says how far apart two policies can be at best.
"""

from __future__ import annotations

from typing import NamedTuple

from .checks import expect_one_of
from .cost import Cost, Decoder


class Gpu(NamedTuple):
    """Peaks of a GPU, from its data sheet."""

    flops: float
    """FLOP/s of dense matrix products in bfloat16 with float32 sums."""
    bandwidth: float
    """Bytes/s of its memory."""


GPUS = {
    "a100": Gpu(312e12, 2.039e12),  # SXM, 80 GB
    "h100": Gpu(989.4e12, 3.35e12),  # SXM
    "h200": Gpu(989.4e12, 4.8e12),  # SXM
    "l40s": Gpu(362.05e12, 0.864e12),
    "mi300x": Gpu(1307.4e12, 5.3e12),
    "rtx4090": Gpu(165.2e12, 1.008e12),
}
"""GPUs by name."""

_BYTES = 2  # of a weight in bfloat16


def prefill_seconds(cost: Cost, gpu: str) -> float:
    """Estimate of a prefill: each stage takes as long as its FLOPs or the weights that it reads, whichever is longer.

    Args:
        cost: result of `reroute_kernels.cost`.
        gpu: one of `GPUS`.

    Raises:
        ValueError: the GPU is unknown.

    >>> from reroute_kernels import cost
    >>> f"{prefill_seconds(cost('llava-1.5-7b', None), 'h100') * 1e3:.1f} ms"
    '8.6 ms'
    """
    peaks = _peaks(gpu)
    seconds = 0.0
    for stage in cost.stages:
        layers = range(stage.first_layer, stage.first_layer + stage.layers)
        read = sum(_weights(cost.decoder, layer) for layer in layers) * _BYTES + stage.kv_bytes
        seconds += max(stage.flops / peaks.flops, read / peaks.bandwidth)
    return seconds


def decode_seconds(cost: Cost, gpu: str) -> float:
    """Estimate of the first decode step after the prompt, which reads all weights and the cache.

    Args:
        cost, gpu: as in `prefill_seconds`.

    Raises:
        ValueError: the GPU is unknown.
    """
    peaks, decoder = _peaks(gpu), cost.decoder
    weights = sum(_weights(decoder, layer) for layer in range(decoder.layers))
    read = (weights + decoder.hidden_size * decoder.vocab_size) * _BYTES + cost.kv_bytes
    return max(cost.decode_flops(cost.text_tokens + cost.visual_tokens) / peaks.flops, read / peaks.bandwidth)


def _peaks(gpu: str) -> Gpu:
    expect_one_of(gpu=(gpu, tuple(GPUS)))
    return GPUS[gpu]


def _weights(decoder: Decoder, layer: int) -> int:
    """Entries of the matrices of a layer that a token is multiplied by."""
    return decoder.projection_weights + decoder.mlp_weights[layer]
