"""The versions that this library runs with."""

from __future__ import annotations

import re
import warnings
from functools import cache
from typing import NamedTuple


class Versions(NamedTuple):
    """A range of versions.

    Attributes:
        oldest: below it nothing works.
        tested: the newest that the tests have run with; None if newer ones are not told apart.
    """

    oldest: str
    tested: str | None = None

    def __str__(self) -> str:
        return f"{self.oldest} or later" if self.tested is None else f"{self.oldest} to {self.tested}"

    def is_older(self, version: str) -> bool:
        """Whether a version lies below the range."""
        return _numbers(version) < _numbers(self.oldest)

    def is_newer(self, version: str) -> bool:
        """Whether a version lies above the tested ones; a bug-fix release of the newest does not."""
        return self.tested is not None and _numbers(version) > _numbers(self.tested)


SUPPORTED = {
    "python": Versions("3.10"),
    "torch": Versions("2.10"),
    "triton": Versions("3.6", "3.9"),
    "transformers": Versions("5.4", "5.24"),
}
"""Supported versions; tests hold pyproject.toml, requirements/ and README.md to the same."""


def check_transformers() -> None:
    """Whether the adapters know the installed transformers.

    A newer one is warned of, once in a process.

    Raises:
        NotImplementedError: it is older than all supported ones.
    """
    import transformers

    supported, found = SUPPORTED["transformers"], transformers.__version__
    if supported.is_older(found):
        raise NotImplementedError(f"transformers must be {supported.oldest} or later, got {found}")
    if supported.is_newer(found):
        _warn_of(found, str(supported))


@cache
def _warn_of(found: str, supported: str) -> None:
    warnings.warn(
        f"transformers {found} is newer than what reroute-kernels was tested with: transformers {supported}",
        stacklevel=4,  # of `apply`
    )


def _numbers(version: str) -> tuple[int, ...]:
    """The first two numbers, which all ranges are given in."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


_DISTRIBUTIONS = {"PIL": "Pillow", "sklearn": "scikit-learn"}


def install_command(error: ModuleNotFoundError) -> str:
    """The command that installs a package that an import did not find."""
    module = (error.name or "").partition(".")[0]
    return f"pip install {_DISTRIBUTIONS.get(module, module)}"
