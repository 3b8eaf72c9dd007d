"""Policies as plain values, and as files of JSON that hold them.

    {"version": 1, "schedule": [{"layer": 3, "keep": 0.25}], "action": "reroute", "ranking": {"name": "LastQuery"}}

A ranking or reducer is written by the name of its class, with its arguments. An argument that is left out has its
default. Numbers come back exactly as they were.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import cache
from numbers import Integral, Real
from reprlib import repr as shortened
from types import ModuleType
from typing import Any, NoReturn, TypeAlias, TypeVar

from . import rankings, reducers
from .budget import KINDS
from .checks import expect_one_of
from .policy import Budget, Policy, Stage

VERSION = 1
"""Version of the format; a file of another one is refused."""

FilePath: TypeAlias = "str | os.PathLike[str]"
Made = TypeVar("Made")

_MODULES = {"ranking": (rankings, rankings.Ranking), "reducer": (reducers, reducers.Reducer)}


@cache
def _rules(kind: str) -> dict[str, type]:
    """The classes of `rankings` or `reducers` that can be written, by name."""
    module, base = _MODULES[kind]
    return {name: each for name, each in vars(module).items() if _is_rule(name, each, module, base)}


def _is_rule(name: str, found: object, module: ModuleType, base: type) -> bool:
    if not isinstance(found, type) or not issubclass(found, base) or inspect.isabstract(found):
        return False
    ships = f"{found.__module__}.".startswith(f"{module.__name__}.")
    return is_dataclass(found) and ships and not name.startswith("_")


# Written


def policy_to_dict(policy: Policy) -> dict[str, object]:
    """A policy as plain values, as JSON has them; see `Policy.to_dict`."""
    written: dict[str, object] = {"version": VERSION}
    for each in fields(policy):
        value = getattr(policy, each.name)
        if each.name == "schedule":
            written["schedule"] = [_stage_to_dict(stage, f"schedule[{i}]") for i, stage in enumerate(value)]
        elif each.name == "budget":
            written["budget"] = _budget_to_dict(value)
        else:
            written[each.name] = _to_plain(value, each.name, each.name)
    return written


def _stage_to_dict(stage: Stage, where: str) -> dict[str, object]:
    written = {
        each.name: _to_plain(getattr(stage, each.name), each.name, f"{where}.{each.name}") for each in fields(stage)
    }
    if stage.ranking is None:
        del written["ranking"]
    return written


def _budget_to_dict(budget: object) -> dict[str, object] | None:
    if budget is not None and not isinstance(budget, Budget):
        raise TypeError(f"budget must be a Budget or None to be written, got {budget!r}")
    if budget is None:
        return None
    written = {name: _to_plain(value, name, f"budget.{name}") for name, value in budget._asdict().items()}
    _budget_of(written)  # its class accepts anything, and what is written must be read
    return written


def _to_plain(value: Any, name: str, where: str) -> object:
    """A value of an argument: null, a string, a boolean or a number; or a mapping, if it is a rule."""
    kind = name if name in _MODULES else "ranking"
    is_rule = _rules(kind).get(type(value).__name__) is type(value)
    if is_rule:
        arguments = {each.name: getattr(value, each.name) for each in fields(value) if each.init}
        plain = {key: _to_plain(of, key, f"{where}.{key}") for key, of in arguments.items()}
        return {"name": type(value).__name__, **plain}
    if name in _MODULES and value is not None:
        accepted = ", ".join(_rules(kind))
        raise TypeError(f"{where} must be of reroute_kernels.{kind}s ({accepted}) to be written, got {value!r}")
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if not isinstance(value, Real):
        raise TypeError(f"{where} must be a number, string, boolean or None to be written, got {value!r}")
    number = float(value)
    if not math.isfinite(number) or number != value:
        raise ValueError(f"{where} must be finite and a float to be written, got {value!r}")
    return number


def ranking_to_dict(ranking: object) -> object:
    """A ranking as plain values, as in a policy's.

    Raises:
        TypeError: it is none of `reroute_kernels.rankings`.
    """
    return _to_plain(ranking, "ranking", "ranking")


def save_policy(policy: Policy, path: FilePath) -> None:
    """Write a policy to a file; see `Policy.save`."""
    write_json(policy_to_dict(policy), path)


def write_json(values: Mapping[str, object], path: FilePath) -> None:
    """Write plain values to a file, which is replaced once the new one is whole.

    Raises:
        TypeError, ValueError: `path` is no path, or a value cannot be written; nothing is written.
        OSError: the file cannot be written; one that was there is as it was.
    """
    name = os.path.realpath(checked_path(path))
    text = json.dumps(values, indent=2, allow_nan=False) + "\n"
    folder, own = os.path.split(name)
    beside = os.path.join(folder, f".{own}.{secrets.token_hex(4)}")
    try:
        with open(beside, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, name)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(beside)
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from None
        raise


# Read


def policy_from_dict(given: object) -> Policy:
    """The policy of plain values; see `Policy.from_dict`."""
    values = mapping_of(given, "policy")
    if "version" not in values:
        raise ValueError(f"policy must hold 'version', got {shortened(values)}")
    version = values.pop("version")
    if type(version) is not int or version != VERSION:
        raise ValueError(f"version must be {VERSION}, the one that this reroute_kernels reads, got {version!r}")
    check_keys(values, "policy", Policy)
    stages = values["schedule"]
    if not isinstance(stages, list | tuple):
        raise TypeError(f"schedule must be a list of stages, got {shortened(stages)}")
    arguments: dict[str, Any] = {
        "schedule": [_stage_of(stage, f"schedule[{number}]") for number, stage in enumerate(stages)]
    }
    for name, value in values.items():
        if name == "budget":
            arguments[name] = _budget_of(value)
        elif name != "schedule":
            arguments[name] = _from_plain(value, name, name)
    return Policy(**arguments)


def _stage_of(given: object, where: str) -> Stage:
    values = mapping_of(given, where)
    check_keys(values, where, Stage)
    return _made(Stage, {name: _from_plain(value, name, f"{where}.{name}") for name, value in values.items()}, where)


def _budget_of(given: object) -> Budget | None:
    if given is None:
        return None
    values = mapping_of(given, "budget")
    check_keys(values, "budget", Budget)
    expect_one_of(**{"budget.kind": (values["kind"], KINDS)})
    for name in ("limit", "reached"):
        value = _from_plain(values[name], name, f"budget.{name}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"budget.{name} must be a number, got {value!r}")
    return Budget(**values)


def _from_plain(given: Any, name: str, where: str) -> Any:
    """The value of an argument."""
    if isinstance(given, Mapping) or (name in _MODULES and given is not None):
        return _rule_of(given, name if name in _MODULES else "ranking", where)
    if isinstance(given, float) and not math.isfinite(given):
        raise ValueError(f"{where} must be finite, got {given!r}")
    if given is not None and not isinstance(given, bool | int | float | str):
        raise TypeError(f"{where} must be a number, string, boolean or None, got {shortened(given)}")
    return given


def _rule_of(given: object, kind: str, where: str) -> object:
    """The ranking or reducer of a mapping."""
    values, rules = mapping_of(given, where), _rules(kind)
    if "name" not in values:
        raise ValueError(f"{where} must hold 'name', one of {', '.join(rules)}, got {shortened(values)}")
    name = values.pop("name")
    if not isinstance(name, str) or name not in rules:
        raise ValueError(f"{where}.name must be one of {', '.join(map(repr, rules))}, got {shortened(name)}")
    check_keys(values, where, rules[name])
    return _made(rules[name], {key: _from_plain(value, key, f"{where}.{key}") for key, value in values.items()}, where)


def mapping_of(given: object, where: str) -> dict[str, Any]:
    """A copy of a mapping, or an error that tells where another thing came."""
    if not isinstance(given, Mapping):
        raise TypeError(f"{where} must be a mapping, got {shortened(given)}")
    return dict(given)


def check_keys(values: Mapping[str, Any], where: str, kind: type) -> None:
    """Refuse keys that are no arguments of a class, and arguments without a default that are missing."""
    accepted = inspect.signature(kind).parameters
    unknown = next((key for key in values if key not in accepted), None)
    if unknown is not None:
        raise ValueError(f"{where} must hold {', '.join(accepted) or 'no argument'} only, got {unknown!r}")
    required = [name for name, each in accepted.items() if each.default is each.empty]
    missing = next((name for name in required if name not in values), None)
    if missing is not None:
        raise ValueError(f"{where} must hold {missing!r}, got {shortened(dict(values))}")


def _made(kind: type, arguments: dict[str, Any], where: str) -> Any:
    """An object of a class, or its error with the place in front."""
    try:
        return kind(**arguments)
    except TypeError as error:
        raise TypeError(f"{where}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def ranking_from_dict(given: object) -> Any:
    """The ranking of plain values, as `ranking_to_dict` gives them.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a key or value is not accepted.
    """
    return _rule_of(given, "ranking", "ranking")


def load_policy(path: FilePath) -> Policy:
    """Read a policy from a file; see `Policy.load`."""
    return read_json(path, "policy", policy_from_dict)


def read_json(path: FilePath, kind: str, made_of: Callable[[object], Made]) -> Made:
    """Read an object from a file of JSON.

    Args:
        path: of the file.
        kind: what the file holds, for errors.
        made_of: makes the object of the plain values.

    Raises:
        TypeError: `path` is no path.
        ValueError: the file holds no JSON, or `made_of` refuses it.
        OSError: the file cannot be read.
    """
    name = checked_path(path)
    with open(name, "rb") as file:
        content = file.read()
    try:
        given = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_without_repeats, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name!r} must hold a {kind} as JSON: {error}") from None
    try:
        return made_of(given)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name!r} must hold a {kind}: {error}") from None


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"keys must differ, got {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"numbers must be finite, got {constant}")


def checked_path(path: FilePath, name: str = "path") -> str:
    """A path as a string, or an error with the name of its argument."""
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise TypeError(f"{name} must be a string or a path, got {path!r}")
    return os.fspath(path)


def names_file(text: str) -> bool:
    """Whether a text that stands for a policy is the path of a file: it ends with .json, or there is such a file."""
    return text.lower().endswith(".json") or os.path.isfile(text)
