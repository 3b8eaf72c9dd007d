"""How far a routed model agrees with itself without routing: next tokens and greedy answers, prompt by prompt.

Nothing needs a label: the unrouted model is the truth. That tells what routing changes, and not whether the answers
were right before.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .calibration import decoder_or_none
from .calibration_run import divergence, evaluating, name_of, progress_bar
from .cost import Cost, average_visual_tokens, cost, text_config
from .intervals import Interval, bootstrap_intervals
from .policy import Policy

_BUDGET = re.compile(r"/\d+$| at [\d.e-]+$")

MEASURES = ("divergence", "same_token", "same_answer")
"""The measures of `Agreement`."""


class Agreement(NamedTuple):
    """How far one prompt's routed run agrees with the unrouted one."""

    divergence: float
    """KL(unrouted || routed) of the distributions of the token after the prompt, in nats."""
    same_token: float
    """1 if the likeliest token after the prompt is the same, else 0."""
    same_answer: float
    """1 if the greedy answer is the same, token by token, else 0."""


class Outcome(NamedTuple):
    """The log-probabilities (V,) float64 of the token after a prompt, and the tokens of the greedy answer."""

    log_probabilities: Tensor
    answer: tuple[int, ...]

    def agreement(self, routed: Outcome) -> Agreement:
        """How far a routed outcome agrees with this one, which is unrouted."""
        apart = divergence(self.log_probabilities[None], routed.log_probabilities[None]).item()
        same_token = self.log_probabilities.argmax() == routed.log_probabilities.argmax()
        return Agreement(apart, float(same_token), float(self.answer == routed.answer))


@dataclass(frozen=True)
class PolicyLoyalty:
    """Agreement with the unrouted model under one policy, and what the policy costs."""

    name: str
    policy: Policy
    agreements: Sequence[Agreement]
    """One for each prompt."""
    average_visual_tokens: float
    """Visual tokens that run in a layer, mean over the layers, at the median prompt."""
    cost: Cost | None
    """At the median prompt; None if the decoder cannot be costed, for layers without full attention."""
    intervals: Mapping[str, Interval]
    """For each of `MEASURES` the mean over the prompts, and its 95% bootstrap interval."""

    @property
    def method(self) -> str:
        """The name without a budget that ends it, such as `/192` or ` at 0.25`."""
        return _BUDGET.sub("", self.name)

    def to_dict(self, unrouted: Cost | None) -> dict[str, object]:
        """The values of this policy, as JSON has them.

        Args:
            unrouted: the cost without routing, None if it cannot be counted.

        Raises:
            TypeError: the policy has a ranking or reducer of the user's own.
        """
        shares = None
        if self.cost is not None and unrouted is not None:
            shares = {
                "prefill_flops": self.cost.prefill_flops,
                "prefill_flops_share": self.cost.prefill_flops / unrouted.prefill_flops,
                "kv_bytes": self.cost.kv_bytes,
                "kv_bytes_share": self.cost.kv_bytes / unrouted.kv_bytes,
            }
        return {
            "name": self.name,
            "policy": self.policy.to_dict(),
            "average_visual_tokens": self.average_visual_tokens,
            "cost": shares,
            **{name: found._asdict() for name, found in self.intervals.items()},
            "prompts": [each._asdict() for each in self.agreements],
        }


@dataclass(frozen=True)
class Loyalty:
    """Agreements of a model with itself, policy by policy; made by `measure_loyalty`."""

    model: str
    prompts: int
    visual_tokens: int
    """Visual tokens of a prompt: the median."""
    text_tokens: int
    """Other tokens of a prompt: the median."""
    max_new_tokens: int
    """Length of the greedy answers at most."""
    seed: int
    """Seed of the intervals."""
    unrouted: Cost | None
    """Cost without routing at the median prompt; None if it cannot be counted."""
    policies: Sequence[PolicyLoyalty]

    def to_dict(self) -> dict[str, object]:
        """All values, as JSON has them.

        Raises:
            TypeError: a policy has a ranking or reducer of the user's own.
        """
        told = {name: value for name, value in vars(self).items() if name not in ("unrouted", "policies")}
        unrouted = None
        if self.unrouted is not None:
            unrouted = {"prefill_flops": self.unrouted.prefill_flops, "kv_bytes": self.unrouted.kv_bytes}
        return {**told, "unrouted": unrouted, "policies": [each.to_dict(self.unrouted) for each in self.policies]}


def measure_loyalty(
    model: nn.Module,
    prompts: Iterable[Mapping[str, Any]],
    policies: Mapping[str, Policy],
    *,
    max_new_tokens: int = 16,
    seed: int = 0,
    dtype: str | torch.dtype = "float16",
    progress: bool | None = None,
) -> Loyalty:
    """Compare a model under policies with itself without routing, on prompts that need no answers.

    Each prompt is answered once without routing and once under every policy. The model is in evaluation mode meanwhile
    and afterwards as it was, also after a failure.

    Args:
        model: as `apply` takes it, not routed.
        prompts: keyword arguments of the model, one mapping for each call: one prompt with an image or a video.
        policies: by name.
        max_new_tokens: length of the greedy answers at most.
        seed: of the intervals.
        dtype: of keys and values in the cache, to be costed.
        progress: whether a bar is shown on standard error, which needs rich. None: if it is installed.

    Raises:
        TypeError, ValueError, NotImplementedError: as in `apply`; there are no policies or no prompts; or a prompt has
            no visual tokens, or is a batch.
        ModuleNotFoundError: `progress` is True and rich is missing.

    >>> found = measure_loyalty(model, [inputs], {"half": Policy.parse("2:0.5")}, max_new_tokens=2)  # a LLaVA, a prompt
    >>> found.prompts, 0 <= found.policies[0].intervals["divergence"].mean
    (1, True)
    """
    from .models import apply

    if not policies:
        raise ValueError("policies must hold at least one, got none")
    for policy in policies.values():
        apply(model, policy).remove()  # refused before any prompt is asked for
    sizes, agreements = [], []
    with evaluating(model), progress_bar(progress, prompts, "loyalty") as advance, torch.no_grad():
        for number, inputs in enumerate(prompts):
            size, found = _measured(model, inputs, policies.values(), max_new_tokens, number)
            sizes.append(size)
            agreements.append(found)
            advance()
    if not sizes:
        raise ValueError("prompts must hold at least one, got none")
    visual, text = (median_low(each) for each in zip(*sizes, strict=True))
    decoder, layers = decoder_or_none(model), text_config(model).num_hidden_layers

    def counted(policy: Policy | None) -> Cost | None:
        return None if decoder is None else cost(decoder, policy, text, visual, dtype=dtype)

    return Loyalty(
        model=name_of(model),
        prompts=len(sizes),
        visual_tokens=visual,
        text_tokens=text,
        max_new_tokens=max_new_tokens,
        seed=seed,
        unrouted=counted(None),
        policies=[
            PolicyLoyalty(
                name,
                policy,
                found,
                average_visual_tokens(policy, layers, visual),
                counted(policy),
                _intervals(found, seed),
            )
            for (name, policy), found in zip(policies.items(), zip(*agreements, strict=True), strict=True)
        ],
    )


def _measured(
    model: nn.Module, inputs: Mapping[str, Any], policies: Iterable[Policy], max_new_tokens: int, number: int
) -> tuple[tuple[int, int], list[Agreement]]:
    """Visual and other tokens of a prompt, and its agreement under each policy."""
    from .models import apply

    unrouted = _outcome(model, inputs, max_new_tokens)
    size, found = (0, 0), []
    for policy in policies:
        with apply(model, policy) as routing:
            outcome = _outcome(model, inputs, max_new_tokens)
            trace = routing.trace
        counts = () if trace is None else trace.visual_counts
        if trace is None or len(counts) != 1 or not counts[0]:
            raise ValueError(f"prompts must be single ones with visual tokens, got {list(counts)} in prompt {number}")
        size = counts[0], trace.length - counts[0]
        found.append(unrouted.agreement(outcome))
    return size, found


def _outcome(model: nn.Module, inputs: Mapping[str, Any], max_new_tokens: int) -> Outcome:
    """The next token's distribution and the greedy answer."""
    output = model.generate(  # type: ignore[operator]
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        return_dict_in_generate=True,
        output_logits=True,
    )
    answer = output.sequences[0, -len(output.logits) :]
    return Outcome(output.logits[0][0].cpu().double().log_softmax(dim=-1), tuple(answer.tolist()))


def _intervals(agreements: Sequence[Agreement], seed: int) -> dict[str, Interval]:
    values = torch.tensor(agreements, dtype=torch.float64, device="cpu").T
    return dict(zip(MEASURES, bootstrap_intervals(values, seed), strict=True))
