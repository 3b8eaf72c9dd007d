"""The values of a calibration, sample by sample, and the file of JSON lines that keeps them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from reprlib import repr as shortened

from .policy_file import FilePath, checked_path

VERSION = 1
"""Version of the format; a file of another one is refused."""


@dataclass(frozen=True)
class SampleRecord:
    """Values of one sample; lists have an entry for each row, and those of values may have one for all rows."""

    inputs: str
    """Digest of the sample's arguments."""
    visual_tokens: list[int]
    text_tokens: list[int]
    unrouted: list[float]
    """Values with all tokens."""
    layers: list[list[float]]
    """Values for each measured layer."""


class Log:
    """Records of samples in order, and the file that keeps them, if there is one.

    The first line of the file tells what is measured, and each other one is a record. A last line that was cut off by a
    failure is dropped.

    Args:
        path: of the file; None for none.
        header: tells what is measured: plain values by name.

    Raises:
        TypeError: the path is none.
        ValueError: the file holds something else, or another measurement.
        OSError: the file cannot be read or written.
    """

    def __init__(self, path: FilePath | None, header: Mapping[str, object]):
        self.records: list[SampleRecord] = []
        self._path = None if path is None else checked_path(path, "resume")
        if self._path is None:
            return
        whole = b""
        if os.path.exists(self._path):
            with open(self._path, "rb") as file:
                whole = file.read()
        kept = whole[: whole.rfind(b"\n") + 1]
        first, *lines = kept.decode("utf-8", "replace").splitlines() or [""]
        if first:
            self._check(first, header)
            self.records = [self._record(line, number) for number, line in enumerate(lines, start=2)]
        elif not b'{"version"'.startswith(whole[:10]):
            raise self._no_log(shortened(whole))
        if len(kept) < len(whole):
            os.truncate(self._path, len(kept))
        if not first:
            self._append({"version": VERSION, **header})

    def add(self, record: SampleRecord) -> None:
        """Append a record."""
        self.records.append(record)
        if self._path is not None:
            self._append(asdict(record))

    def found(self, number: int, inputs: str) -> bool:
        """Whether a sample was measured already.

        Args:
            number: of the sample, from 0.
            inputs: digest of its arguments.

        Raises:
            ValueError: the file holds another sample at its place.
        """
        if number >= len(self.records):
            return False
        if self.records[number].inputs != inputs:
            raise ValueError(
                f"resume must hold the measurements of the same samples in the same order, got another sample "
                f"{number} in {self._path!r}"
            )
        return True

    def _append(self, values: Mapping[str, object]) -> None:
        assert self._path is not None
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(values, allow_nan=False) + "\n")

    def _check(self, line: str, header: Mapping[str, object]) -> None:
        """Refuse a file of another measurement, by the name of what differs."""
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict) or "version" not in found:
            raise self._no_log(shortened(line))
        expected = json.loads(json.dumps({"version": VERSION, **header}))
        for name, value in expected.items():
            if found.get(name) != value:
                raise ValueError(
                    f"resume must hold measurements with {name} {value!r}, got {found.get(name)!r} in {self._path!r}"
                )

    def _record(self, line: str, number: int) -> SampleRecord:
        try:
            values = json.loads(line)
            record = SampleRecord(**values)
            lists: Sequence[list] = (record.visual_tokens, record.text_tokens, record.unrouted, *record.layers)
            if all(isinstance(each, list) for each in lists):
                return record
        except (ValueError, TypeError):
            pass
        raise ValueError(
            f"resume must hold a record of a sample in each line behind the first, got {shortened(line)} in line "
            f"{number} of {self._path!r}"
        )

    def _no_log(self, got: str) -> ValueError:
        return ValueError(f"resume must be a file of measurements, or none yet, got {got} in {self._path!r}")
