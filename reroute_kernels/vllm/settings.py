"""Settings in `additional_config={"reroute": ...}`, and vLLM's arguments that go with them; no vLLM here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..notation import parse_preset, parse_schedule
from ..policy import Policy
from ..presets import preset
from ..rankings import LastQuery, Mixed, RankingLike, Remembered, part_of

ARCHITECTURES = {
    "LlavaForConditionalGeneration": "RerouteLlavaForConditionalGeneration",
    "Qwen2VLForConditionalGeneration": "RerouteQwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration": "RerouteQwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration": "RerouteQwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration": "RerouteQwen3VLMoeForConditionalGeneration",
}
"""vLLM's architectures that have a routed one, by name."""

WORKER = "reroute_kernels.vllm.worker.RoutedWorker"
SCHEDULER = "reroute_kernels.vllm.scheduler.RoutedScheduler"

_FLAGS = ("own_groups", "trace", "untested_runner")
_RANKING = ("queries", "query_reduction", "head_reduction", "rotary")
_AROUND = {"decay": Remembered, "uniform": Mixed}
_BESIDE = ("action", *_RANKING, *_AROUND)
_POLICIES = ("policy", "preset", "schedule")
_KEYS = (*_POLICIES, *_BESIDE, *_FLAGS)


@dataclass(frozen=True)
class Settings:
    """Policy of an engine, and how its stages are cached.

    Args:
        policy: the policy.
        own_groups: whether the layers of each stage have their own groups of the KV cache, which take blocks for the
            tokens that run there only; else every layer takes blocks for all tokens.
        trace: whether the workers keep the selections of the latest prefills, for `RoutedWorker.routing_traces`.
        untested_runner: whether vLLM's model runner V2 may be used on a GPU; it is tested on a CPU only, where it may
            always be used.

    Raises:
        NotImplementedError: vLLM cannot run such a policy.
    """

    policy: Policy
    own_groups: bool = False
    trace: bool = False
    untested_runner: bool = False

    def __post_init__(self):
        policy = self.policy
        others = [ranking for ranking in policy.rankings if part_of(ranking, LastQuery) is None]
        ahead = [ranking for ranking in policy.rankings if getattr(ranking, "layer", "this") != "this"]
        for refused, name, got, accepted in (
            (policy.reducer is not None, "reducer", policy.reducer, "None"),
            (policy.positions != "original", "positions", policy.positions, "'original'"),
            (policy.action == "freeze", "action", policy.action, "'reroute' or 'remove'"),
            (policy.align is not None, "align", policy.align, "None"),
            (policy.recycle, "recycle", policy.recycle, "0"),
            (ahead, "ranking", next(iter(ahead), None), "one of the decision layer, layer='this'"),
            (others, "ranking", next(iter(others), None), "LastQuery, in Remembered, Mixed or alone,"),
        ):
            if refused:
                raise NotImplementedError(f"{name} must be {accepted} inside vLLM, got {got!r}")

    @classmethod
    def of(cls, given: object) -> Settings:
        """Settings from the mapping under `"reroute"` in vLLM's `additional_config`.

        Args:
            given: a mapping with one of `policy` (a text as `Policy.parse` takes it, such as the path of a file that
                every worker reads, or what `Policy.to_dict` gives), `preset` (`"llava-1.5-7b/reroute-fastv/192"`) and
                `schedule` (`"3:0.25,7:0.25"`). Beside a schedule it may hold `action`, `queries`, `query_reduction`,
                `head_reduction` and `rotary` as in `Policy` and `LastQuery`, `decay` as in `Remembered`, `uniform`
                as in `Mixed`; and always `own_groups`, `trace` and `untested_runner`.

        Raises:
            TypeError, ValueError, NotImplementedError: it is no such mapping.
            OSError: the file of a policy cannot be read.
        """
        if not isinstance(given, Mapping):
            raise TypeError(f'additional_config["reroute"] must be a mapping, got {given!r}')
        unknown = sorted(set(given) - set(_KEYS))
        if unknown:
            raise ValueError(f"reroute must hold {', '.join(_KEYS)} only, got {', '.join(map(repr, unknown))}")
        if sum(name in given for name in _POLICIES) != 1:
            raise ValueError(f"reroute must hold one of {', '.join(_POLICIES)}, got {dict(given)!r}")
        for name in _FLAGS:
            if not isinstance(given.get(name, False), bool):
                raise TypeError(f"{name} must be true or false, got {given[name]!r}")
        return cls(_policy_of(given), **{name: given[name] for name in _FLAGS if name in given})

    def as_dict(self) -> dict[str, object]:
        """Inverse of `of`."""
        plain, used = LastQuery(), self.policy.rankings[0]
        ranking = part_of(used, LastQuery)
        schedule = ",".join(f"{stage.layer}:{stage.keep!r}" for stage in self.policy.schedule)
        options = {name: getattr(ranking, name) for name in _RANKING}
        unusual = {name: value for name, value in options.items() if value != getattr(plain, name)}
        for name, around in _AROUND.items():
            if (found := part_of(used, around)) is not None:
                unusual[name] = getattr(found, name)
        written = {"schedule": schedule, "action": self.policy.action, **unusual}
        if _policy_of(written) != self.policy:  # a schedule does not say everything
            written = {"policy": self.policy.to_dict()}
        return {**written, **{name: True for name in _FLAGS if getattr(self, name)}}


def _policy_of(given: Mapping[str, Any]) -> Policy:
    """The policy of a mapping with one of `_POLICIES`, and with what may stand beside it."""
    beside = [name for name in _BESIDE if name in given]
    if beside and "schedule" not in given:
        name = "preset" if "preset" in given else "policy"
        raise ValueError(f"{beside[0]} must stand beside schedule, got it beside {name} {given[name]!r}")
    if "policy" in given:
        policy = given["policy"]
        if not isinstance(policy, str | Mapping):
            raise TypeError(f"policy must be a text or a mapping, got {policy!r}")
        return Policy.parse(policy) if isinstance(policy, str) else Policy.from_dict(policy)
    if "preset" in given:
        try:
            return preset(*parse_preset(given["preset"]))
        except (AttributeError, ValueError) as error:
            raise ValueError(
                f"preset must be one like 'llava-1.5-7b/reroute-fastv/192', got {given['preset']!r}: {error}"
            ) from None
    try:
        stages = parse_schedule(given["schedule"])
    except (AttributeError, ValueError) as error:
        raise ValueError(f"schedule must be one like '3:0.25,7:0.25', got {given['schedule']!r}: {error}") from None
    return Policy(stages, given.get("action", "reroute"), _ranking(given))


def _ranking(given: Mapping) -> RankingLike:
    """The ranking that stands beside a schedule."""
    ranking: RankingLike = LastQuery(**{name: given[name] for name in _RANKING if name in given})
    for name, around in _AROUND.items():
        if name in given:
            ranking = around(ranking, given[name])
    return ranking


def engine_arguments(architecture: str, settings: Settings, max_model_len: int = 4096) -> dict[str, object]:
    """The arguments that `vllm.LLM(MODEL, ...)` needs to route.

    Args:
        architecture: of the checkpoint, one of `ARCHITECTURES`.
        settings: the settings of the engine.
        max_model_len: tokens that a request may have, those of its images included; a step is made as large.

    Raises:
        ValueError: no such architecture, or `max_model_len` is not positive.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}, got {architecture!r}")
    if max_model_len < 1:
        raise ValueError(f"max_model_len must be 1 or more, got {max_model_len}")
    return {
        "hf_overrides": {"architectures": [ARCHITECTURES[architecture]]},
        "worker_cls": WORKER,
        **({"scheduler_cls": SCHEDULER} if settings.own_groups else {}),
        "additional_config": {"reroute": settings.as_dict()},
        "max_model_len": max_model_len,
        "max_num_batched_tokens": max_model_len,
        "enable_chunked_prefill": False,
        "enable_prefix_caching": False,
        "async_scheduling": False,
        "compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY" if settings.untested_runner else "PIECEWISE"},
    }


def serve_arguments(architecture: str, settings: Settings, max_model_len: int = 4096) -> list[str]:
    """The same as arguments of `vllm serve MODEL`."""
    given: list[str] = []
    for name, value in engine_arguments(architecture, settings, max_model_len).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            given.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            given += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return given
