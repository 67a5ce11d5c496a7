"""Examine compiled kernels in child processes, one for each kernel, so that a crash costs one row and not the rest."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

import torch

from .. import registry
from ..verification import verdicts
from ..verification.trial import Verdict
from .examine import REFUSED, Finding, examine
from .rows import Row

SECONDS = 180.0  # for one row, compilation included
COMMAND = (sys.executable, "-m", "hf_gdn.doctor.examine")


def examine_all(
    rows: Sequence[Row],
    workers: int,
    done: Callable[[Finding], None],
    command: Sequence[str] = COMMAND,
    seconds: float = SECONDS,
) -> list[Finding]:
    """The findings, in the order of `rows`.

    Args:
        rows: what to examine; neighbours of one kernel share a process.
        workers: how many processes run at once.
        done: called with each finding, from any thread.
        command: starts a child.
        seconds: how long a row may take before its process is killed.
    """
    groups = [list(group) for _, group in groupby(rows, key=lambda row: (row.op, row.backend))]

    def findings(group: list[Row]) -> list[Finding]:
        kernel = registry.get(group[0].op, group[0].backend)
        if kernel.checked and any(kernel.why_not(row.request) is None for row in group):
            return list(_group(group, done, command, seconds))
        found = [examine(row) for row in group]  # PyTorch's own operators, or nothing that can run
        for finding in found:
            done(finding)
        return found

    with ThreadPoolExecutor(workers) as pool:
        return [finding for group in pool.map(findings, groups) for finding in group]


def _group(
    rows: list[Row], done: Callable[[Finding], None], command: Sequence[str], seconds: float
) -> Iterator[Finding]:
    while rows:
        for found in _child(rows, command, seconds):
            rows = rows[1:]
            done(found)
            yield found


def _child(rows: list[Row], command: Sequence[str], seconds: float) -> Iterator[Finding]:
    """Findings of one child process; the last is about the row it died of, if it did not examine them all."""
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )
    assert child.stdin is not None and child.stdout is not None and child.stderr is not None
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    errors: list[str] = []

    def read() -> None:
        for line in child.stdout:  # type: ignore[union-attr]
            lines.put(line)
        lines.put("")

    readers = [threading.Thread(target=read), threading.Thread(target=lambda: errors.extend(child.stderr or ()))]
    for reader in readers:
        reader.start()
    try:
        child.stdin.write("".join(json.dumps(row.as_json()) + "\n" for row in rows))
        child.stdin.close()
    except BrokenPipeError:
        pass
    try:
        for row in rows:
            try:
                line = lines.get(timeout=seconds)
            except queue.Empty:
                child.kill()
                yield _died(row, f"did not end within {seconds:.0f} s")
                return
            if not line:
                yield _died(row, _last_words(child.wait(), errors, readers[1]))
                return
            yield Finding.of_json(json.loads(line))
    finally:
        child.wait()
        for reader in readers:
            reader.join()


def _last_words(code: int, errors: list[str], reader: threading.Thread) -> str:
    reader.join()
    last = next((line.strip() for line in reversed(errors) if line.strip()), "")
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    return f"ended its process {how}" + (f": {last}" if last else "")


def _died(row: Row, sentence: str) -> Finding:
    """The finding about a row that ended its process; the kernel is refused for such calls from now on."""
    kernel = registry.get(row.op, row.backend)
    if kernel.checked:
        verdicts.save(verdicts.key(kernel, row.request, torch.device(row.device)), Verdict(sentence))
    return Finding(row, REFUSED, sentence)
