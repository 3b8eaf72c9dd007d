"""A step of the engine in which prompts with visual tokens start, beside other requests of the batch; no vLLM here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..prompt import Prompt
from ..rankings import Projection
from ..routing import Combine, RoutedForward
from ..trace import Trace
from .plan import Plan, Share


class RoutedStep:
    """The state of one step.

    Args:
        plan: the policy on this model.
        shares: of the requests, in their order in the batch.
        visual: for each request the first and last position of every stretch of visual tokens in its prompt.
        device: of the hidden states.
    """

    def __init__(
        self, plan: Plan, shares: Sequence[Share], visual: Sequence[Sequence[tuple[int, int]]], device: torch.device
    ):
        self._plan = plan
        self._scheduled = [share.scheduled for share in shares]
        self._tokens = self._scheduled  # of each request in this stage
        self._prompts: dict[int, Prompt] = {}
        self._positions: dict[int, tuple[Tensor, ...]] = {}  # of the full sequences
        self._forwards: dict[int, RoutedForward] = {}
        for number, (share, stretches) in enumerate(zip(shares, visual, strict=True)):
            if share.starts and share.is_routed:
                mask = torch.zeros(1, share.scheduled, dtype=torch.bool, device="cpu")
                for first, last in stretches:
                    mask[0, first : last + 1] = True
                # Tokens generated before a preemption run again and do not rank, like draft tokens.
                self._prompts[number] = Prompt(mask.to(device), None, draft_tokens=share.scheduled - share.prompt)

    @property
    def tokens(self) -> int:
        """T, of the step as it begins; of a stage once it has."""
        return sum(self._tokens)

    @property
    def decision_layers(self) -> tuple[int, ...]:
        return self._plan.policy.stage_layers

    def decide(
        self, hidden: Tensor, positions: Tensor, projection: Projection, combine: Combine | None
    ) -> tuple[Tensor, Tensor]:
        """Start the next stage for every prompt of the step; all other tokens go on as they are.

        Args:
            hidden: (T, d), as the last stage left it.
            positions: (T, ...), rotary positions.
            projection, combine: as in `RoutedForward`.

        Returns:
            Both, of the tokens that run in this stage; never the tensors that came.
        """
        hiddens, rows = list(hidden.split(self._tokens)), list(positions.split(self._tokens))
        for number, prompt in self._prompts.items():
            if number not in self._forwards:
                self._forwards[number] = RoutedForward(self._plan.policy, prompt, combine=combine)
                self._positions[number] = (rows[number][None],)
            forward = self._forwards[number]
            hiddens[number] = forward.decide(hiddens[number][None], self._positions[number], projection)[0]
            rows[number] = forward.rotary[0][0]
        self._tokens = [len(each) for each in hiddens]
        return torch.cat(hiddens), torch.cat(rows)

    def add(self, hidden: Tensor, addition: Tensor) -> Tensor:
        """Add to the tokens of the step between two layers, to deferred ones too.

        Args:
            hidden: (T, d) of the stage; what the layer holds back as its residual may be left out.
            addition: (T, d) of all tokens of the step.

        Returns:
            The sum, of the shape of `hidden`.
        """
        hiddens, additions = list(hidden.split(self._tokens)), addition.split(self._scheduled)
        for number, each in enumerate(additions):
            forward = self._forwards.get(number)
            if forward is None:
                hiddens[number] = hiddens[number] + each
            else:
                hiddens[number] = forward.add(hiddens[number][None], each[None])[0]
        return torch.cat(hiddens)

    def finish(self, hidden: Tensor) -> Tensor:
        """(T, d) of all tokens of the step behind the last layer."""
        hiddens = list(hidden.split(self._tokens))
        for number, forward in self._forwards.items():
            hiddens[number] = forward.finish(hiddens[number][None])[0]
        return torch.cat(hiddens)

    def traces(self) -> dict[int, Trace]:
        """Selected positions, by the index of the request in the batch."""
        return {number: Trace.of(forward) for number, forward in self._forwards.items()}
