"""The tables of refusals: every reason is listed, raised somewhere and written as the others are."""

import re
from pathlib import Path

import pytest

from reroute_kernels.models import refusals
from reroute_kernels.models.refusals import Refusal, refuse

SOURCES = {path.name: path.read_text() for path in Path(refusals.__file__).parent.glob("*.py")}
ALONE = {name: value for name, value in vars(refusals).items() if isinstance(value, Refusal)}
TABLES = {name: value for name, value in vars(refusals).items() if name.endswith("_RULES")}
LISTED = [rule for rules in refusals.PAGE.values() for rule in rules]


def test_every_refusal_is_listed_once():
    assert len(LISTED) == len(set(LISTED))
    assert set(LISTED) == set(ALONE.values()).union(*TABLES.values())


@pytest.mark.parametrize("rule", LISTED, ids=lambda rule: rule.summary[:50])
def test_message_names_what_is_accepted_and_what_came(rule):
    assert re.search(r"\b(got|was called)\b", rule.message)
    assert re.search(r"must|needs|can be|called on its own", rule.message)
    assert not rule.summary.endswith(".")


@pytest.mark.parametrize("name", [*ALONE, *TABLES])
def test_every_refusal_is_raised_somewhere(name):
    others = "\n".join(text for file, text in SOURCES.items() if file != "refusals.py")
    in_table = any(ALONE.get(name) in rules for rules in TABLES.values())
    assert in_table or re.search(rf"\b{name}\b(\.because|\))", others)


def test_conditions_belong_to_rules_of_tables():
    for name, rule in ALONE.items():
        assert (rule.applies is not None) == any(rule in rules for rules in TABLES.values()), name
    assert all(rule.applies is not None for rules in TABLES.values() for rule in rules)


def test_first_rule_that_applies_is_raised():
    rules = (
        Refusal("never", "never {c}", lambda c: c > 2),
        Refusal("second", "must be 0, got {c}", lambda c: c > 0, ValueError),
        Refusal("third", "not reached {c}", lambda c: c > 0),
    )
    refuse(0, rules)
    with pytest.raises(ValueError, match=r"^must be 0, got 1$"):
        refuse(1, rules)
