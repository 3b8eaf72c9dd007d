"""Compile the kernels of the GPU report's prefills ahead: `python -m bench.speed.precompile PART/PARTS`.

Several processes at once fill Triton's cache, while the report makes its models; a kernel takes up to seconds.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from bench.source_tree import make_importable

make_importable()

import reroute_kernels as rk  # noqa: E402
from bench.speed.decoders import HEADLINES, Case  # noqa: E402
from bench.speed.prefill import Decoder, Prefill, make_inputs, make_model  # noqa: E402


def shallow(decoder: Decoder, policy: rk.Policy) -> tuple[Decoder, rk.Policy]:
    """A decoder of few narrow layers, and the policy's decisions one after the other: the same kernels."""
    stages = [replace(stage, layer=layer) for layer, stage in enumerate(policy.schedule, start=1)]
    return replace(decoder, layers=len(stages) + 1, intermediate=256), replace(policy, schedule=stages)


def compile_for(decoder: Decoder, case: Case, device: torch.device, dtype: torch.dtype) -> None:
    """Run the prefills of a case once."""
    for policy in decoder.policies(case.tier).values():
        small, decisions = shallow(decoder, policy)
        model = make_model(small, case.visual_tokens, device, dtype)
        Prefill(model, make_inputs(model, case.visual_tokens, case.batch)).routed(decisions)()


def main(part: int, parts: int) -> None:
    cases = [(decoder, case) for decoder, of_decoder in HEADLINES.items() for case in of_decoder]
    for decoder, case in cases[part::parts]:
        compile_for(decoder, case, torch.device("cuda"), torch.bfloat16)


if __name__ == "__main__":
    main(*map(int, sys.argv[1].split("/")))
