"""A whole decision, planned as one: its launches follow each other, and its memory is taken at once."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..attention import NUM_TENSORS, Attention
from ..checks import check_candidates, check_memory, check_ranking, check_rows
from ..decision import in_steps, route_tokens_by
from .gather import add_gather, gather_tokens
from .launch import MAX_PROGRAMS
from .plan import Plan, find_plan, keep_plan, layout
from .rank import add_ranking, rank_tokens
from .select import add_selection, select_tokens

_in_steps = in_steps(rank_tokens, select_tokens, gather_tokens)


def _decide(attention: Attention, *given: Any) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    pool, pinned, keep, length, tensors, memory = given
    remembered, decay = ((), None) if memory is None else (memory.operands(), memory.decay)
    inputs = *attention.operands(), pool, pinned, keep, *remembered, *tensors
    key = "route", attention.options(), length, decay, layout(inputs)
    plan = find_plan(key)
    if plan is None:
        batch, total = attention.key.shape[:2]
        if total == 0 or batch > MAX_PROGRAMS:
            return _in_steps(attention, *given)
        check_ranking(attention)
        check_candidates(pool, pinned, keep, length, attention.key.shape[:2], attention.key.device)
        check_memory(memory, attention.key.shape[:2], attention.key.device)
        check_rows(tensors, batch, total, attention.key.device)
        plan = Plan(inputs)
        ranked = add_ranking(plan, attention, is_result=memory is None)
        kept = add_selection(plan, ranked, (total, 1), NUM_TENSORS, length, decay)
        add_gather(plan, kept, (batch, length), NUM_TENSORS + 3 + len(remembered))
        keep_plan(key, plan)
    results = plan.run(inputs)
    if memory is None:
        scores, index, *compact = results
    else:
        index, scores, *compact = results
    return index, tuple(compact), scores


route_tokens = route_tokens_by(_decide)
