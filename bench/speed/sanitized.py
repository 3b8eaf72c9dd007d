"""One small run of every kernel, for compute-sanitizer: `compute-sanitizer python -m bench.speed.sanitized`."""

from __future__ import annotations

import torch

import reroute_kernels as rk
from bench.speed.decisions import Decision, Shape

SMALL = Shape("one program", 4, 2, 32, 48, 200)
LARGE = Shape("a program per tile", 1, 1, 16, 24, 66_000, 0.01)


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with rk.backend("triton"), torch.no_grad():
        for shape in (SMALL, LARGE) if device.type == "cuda" else (SMALL,):  # the interpreter takes minutes for it
            decision = Decision(shape, 2 if device.type == "cuda" else 1, device, torch.float32)
            for call in decision.calls().values():
                call()
            past = decision.ranking["key"][:, :70]
            rk.ops.rank_tokens(**decision.ranking, past_key=past, rotary_style="interleaved")
            hidden, index = decision.hidden.clone(), decision.index
            rk.ops.align_tokens_(hidden, index, rk.ops.gather_tokens(index, hidden)[0] + 1, decision.selection["pool"])
            states = decision.ranking["key"][:, :200]
            rk.ops.column_saliency(states, states)
            rk.ops.column_saliency(states, states, torch.tensor([0, 70, 200], device=device))
            rk.ops.merge_tokens(hidden, torch.arange(hidden.shape[1], device=device).expand(len(hidden), -1) % 9 - 1, 8)
            scores, selection = decision.scores.abs(), decision.selection
            _, ranked = rk.ops.select_tokens(scores, **selection, memory=rk.Memory(0.3))
            places = torch.arange(ranked.shape[1], device=device).expand(len(ranked), -1) - 1
            rk.ops.select_tokens(scores, **selection, memory=rk.Memory(0.3, ranked[:, 5:].contiguous(), places))
        for total, width in ((70, 96), (70, 48)):  # with cosines kept, and made anew
            features, values = torch.randn(2, total, width, device=device), torch.rand(2, total, device=device)
            rk.ops.select_diverse(features, values, keep=9)
            rk.ops.select_dpp(features, values, keep=9)
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
