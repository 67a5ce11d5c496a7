"""Finished rows of a run on disk, so that an interrupted one can go on where it stopped.

The folder ``unfinished`` inside the output folder holds ``job.json``, what is being run, and a safetensors file for
each finished row: tensors as such, everything else as JSON in the file's header. Each file is whole or not there. When
the report is written the folder goes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError, reason
from ..files import write_whole
from ..log import logger
from .distributed import Processes
from .progress import Bars

Row = dict[str, Any]


def put(path: Path, writer: Callable[[Path], Any]) -> Path:
    """`hf_gdn.files.write_whole`, raising UserError where the file cannot be written."""
    try:
        return write_whole(path, writer)
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be written: {reason(error)}") from error


def prepare(output: str) -> Path:
    """Make an output folder and see that it can be written, before hours of work."""
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"output folder {output!r} cannot be written: {reason(error)}") from error
    return folder


class Journal:
    """Rows by key.

    Args:
        output: the output folder; it exists.
        job: what is being run, JSON; rows of one job never serve another.
        resume: go on with the rows that are there. Otherwise they are dropped when the first new one is added.

    Raises:
        UserError: the rows there belong to another job; the text says what differs.
    """

    def __init__(self, output: Path, job: dict[str, Any], resume: bool = False) -> None:
        self._folder = output / "unfinished"
        self._job = json.loads(json.dumps(job))
        self._rows: dict[str, Path] = {}
        self._fresh = True
        path = self._folder / "job.json"
        if resume and not path.is_file():
            logger.warning("--resume: nothing to resume in %r; the run starts from the beginning", str(output))
        if resume and path.is_file():
            try:
                before = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(
                    f"{str(path)!r} is no JSON: {reason(error)}; remove the folder to start anew"
                ) from error
            names = sorted({*before, *self._job})
            changes = [
                f"{name} was {json.dumps(before.get(name))}, is {json.dumps(self._job.get(name))}"
                for name in names
                if before.get(name) != self._job.get(name)
            ]
            if changes:
                raise UserError(f"--resume: {str(self._folder)!r} holds another run: {'; '.join(changes)}")
            self._rows = {file.stem: file for file in self._folder.glob("*.safetensors")}
            self._fresh = False

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def __getitem__(self, key: str) -> Row:
        with safe_open(self._rows[key], "pt") as file:
            names = list(file.keys())
            return {**json.loads(file.metadata()["row"]), **{name: file.get_tensor(name) for name in names}}

    def add(self, key: str, row: Row) -> None:
        """Keep a row; `key` has to be usable as a file name."""
        if self._fresh:
            self.remove()
            self._folder.mkdir()
            text = json.dumps(self._job, indent=2)
            put(self._folder / "job.json", lambda path: path.write_text(text, encoding="utf-8"))
            self._fresh = False
        tensors = {name: value.contiguous() for name, value in row.items() if isinstance(value, Tensor)}
        rest = {name: value for name, value in row.items() if name not in tensors}
        self._rows[key] = put(
            self._folder / f"{key}.safetensors", lambda path: save_file(tensors, path, {"row": json.dumps(rest)})
        )

    def remove(self) -> None:
        """Drop all rows: their report is written, or they are not wanted."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._rows = {}

    @property
    def folder(self) -> Path:
        """Where the rows are."""
        return self._folder


@dataclass(frozen=True)
class Work:
    """Where work is done and kept.

    Args:
        processes: the processes.
        journal: the main process's; None in the others.
        bars: where progress is shown.
        prefix: of the rows' keys, so that the rows of two models differ.
    """

    processes: Processes
    journal: Journal | None
    bars: Bars = field(default_factory=Bars)
    prefix: str = ""

    def of_part(self, prefix: str) -> Work:
        """The same for rows with another prefix."""
        return replace(self, prefix=prefix)

    def todo(self, keys: Iterable[str]) -> list[str]:
        """Those of `keys`, without the prefix, whose rows are still to be computed; the same in all processes."""
        return self.processes.from_main(lambda: [key for key in keys if self.prefix + key not in self._rows])

    def has(self, key: str) -> bool:
        """Whether a row is there; the same in all processes."""
        return not self.todo([key])

    def get(self, key: str) -> Row:
        """A row, in every process."""
        return self.processes.from_main(lambda: self._rows[self.prefix + key])

    def put(self, key: str, row: Row) -> None:
        """Keep a row that all processes computed together: the main process's."""
        self.processes.main_only(lambda: self._rows.add(self.prefix + key, row))

    def once(self, key: str, compute: Callable[[], Row]) -> Row:
        """A row that all processes compute together unless it is there; in every process."""
        if not self.has(key):
            self.put(key, compute())
        return self.get(key)

    def fill(self, keys: Iterable[str], compute: Callable[[str], Row], *, spread: bool = True) -> list[Row]:
        """Compute the rows that the journal lacks, keeping each as soon as it is there.

        Args:
            keys: of all rows wanted, without the prefix.
            compute: makes a row.
            spread: processes share the rows; otherwise the main process makes them all and the others wait (with tensor
                parallelism all take part in each row either way).

        Returns:
            All rows, in the order of `keys`, in the main process; nothing in the others.
        """
        processes, keys = self.processes, list(keys)
        todo = self.todo(keys)
        width = processes.shards if spread else 1
        for start in range(0, len(todo), width):
            part = todo[start : start + width]
            rows = processes.together(
                lambda part=part: compute(part[processes.shard]) if processes.shard < len(part) else None
            )
            processes.from_main(lambda part=part, rows=rows: self._keep(part, rows))
        return [self._rows[self.prefix + key] for key in keys] if processes.main else []

    def _keep(self, keys: list[str], rows: list[Row]) -> None:
        for key, row in zip(keys, rows):
            self._rows.add(self.prefix + key, row)

    @property
    def _rows(self) -> Journal:
        assert self.journal is not None, "the main process keeps the journal"
        return self.journal
