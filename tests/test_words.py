"""Docstrings and comments begin with the thing or the verb, never with "What"."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("reroute_kernels", "models", "bench", "tests", "examples")
    for path in (ROOT / folder).rglob("*.py")
)


def strings_alone(source):
    """Lines and texts of docstrings, those of attributes included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def comments(source):
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lstrip("# ")


def riddles(source):
    return [line for line, text in (*strings_alone(source), *comments(source)) if re.match(r"\s*What\b", text)]


@pytest.mark.parametrize("path", FILES)
def test_first_word_is_not_what(path):
    assert riddles((ROOT / path).read_text()) == []


def test_riddles_are_found():
    source = '"""What this is."""\nx = 1\n"""What x is."""\n\n\ndef f():\n    """\n    What f does."""  # What for\n'
    assert riddles(source) == [1, 3, 7, 8]
    assert riddles('"""Whatever."""\nx = "What"  # Somewhat\n') == []
