"""Engines under vLLM's model runner V2, for a process that `interpreted.start` has prepared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest.mock import patch

from tests.vllm.requests import SHAPES, STEPS, Answer, requests


@dataclass
class Run:
    """Answers of an engine, and what was seen of it.

    Args:
        answers: to the requests at once.
        alone: to each request without the others, if asked for.
        runner: the module of the model runner.
        steps: whether a routed prompt started in it; addresses of the slots; the most tokens that a request had behind
            its prompt.
        preempted: names of requests that were thrown out of the cache.
        leaked: blocks that were not given back.
    """

    answers: list[Answer]
    alone: list[Answer]
    runner: str
    steps: list[tuple[bool, frozenset[int], int]] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)
    leaked: int = 0


def run(
    family: str,
    folder: Path,
    reroute: dict | None,
    names: Sequence[str] = tuple(SHAPES),
    steps: int = STEPS,
    alone: bool = False,
    out: Sequence[int] = (),
    change: Callable[[], AbstractContextManager] = nullcontext,
    **options,
) -> Run:
    """Answers to requests by name, of an engine of this process.

    Args:
        out: places of the requests that ask not to be routed.
        change: a context in which the engine runs.
        options: of `vllm.LLM`.
    """
    from tests.vllm.engines import answers, engine, model_runner, preemptions, scheduler

    asked = [request for name, request in zip(SHAPES, requests(family), strict=True) if name in names]
    with change(), recorded() as seen, engine(family, folder, reroute, **options) as llm:
        preempted = preemptions(llm)
        made = answers(llm, asked, steps, out)
        made_alone = [answers(llm, [request], steps)[0] for request in asked] if alone else []
        pool = scheduler(llm).kv_cache_manager.block_pool
        leaked = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        return Run(made, made_alone, type(model_runner(llm)).__module__, seen, preempted, leaked)


@contextmanager
def recorded() -> Iterator[list[tuple[bool, frozenset[int], int]]]:
    """Steps of a routed engine in the block, as in `Run`."""
    from reroute_kernels.vllm.model_state import RoutedModelState

    seen, prepare = [], RoutedModelState.prepare_attn

    def prepare_attn(state, batch, *args, **kwargs):
        metadata = prepare(state, batch, *args, **kwargs)
        if state._next is not None and batch.prefill_len_np.any():
            counts = zip(batch.num_scheduled_tokens, batch.num_computed_tokens_np, strict=True)
            widths = [int(scheduled) for scheduled, computed in counts if computed]
            addresses = frozenset(slots.data_ptr() for slots in state._next.slots.values())
            seen.append((state._next.step is not None, addresses, max(widths, default=0)))
        return metadata

    with patch.object(RoutedModelState, "prepare_attn", prepare_attn):
        yield seen


@contextmanager
def off_by_one() -> Iterator[None]:
    """Lengths of routed requests that decode are wrong by one."""
    from reroute_kernels.vllm import model_state
    from reroute_kernels.vllm.plan import stage_layout

    def wrong(shares, stage):
        layout = stage_layout(shares, stage)
        decodes = [not share.starts and share.is_routed for share in shares]
        layout.seq_lens[decodes] += 1
        return layout

    with patch.object(model_state, "stage_layout", wrong):
        yield


@contextmanager
def not_added() -> Iterator[None]:
    """Features that a model adds between layers reach the tokens that run, and no others."""
    from reroute_kernels.routing import TokenSequence

    def add(tokens, addition):
        tokens.hidden, tokens.owned = tokens.hidden + tokens._of_own(addition), True

    with patch.object(TokenSequence, "add", add):
        yield


@contextmanager
def halved() -> Iterator[None]:
    """As if chunked prefill were on nevertheless."""
    from reroute_kernels.vllm.model_state import RoutedModelState

    shares_of = RoutedModelState._shares

    def shares(batch, requests):
        of_step = shares_of(batch, requests)
        return [replace(share, scheduled=share.prompt // 2) if share.starts else share for share in of_step]

    with patch.object(RoutedModelState, "_shares", staticmethod(shares)):
        yield
