"""Examine compiled kernels in child processes, one for each kernel, so that a crash costs one row and not the rest."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from itertools import groupby

import torch

from .. import registry
from ..upstream.device_errors import names_sticky
from ..verification import verdicts
from ..verification.trial import Verdict
from .examine import REFUSED, Finding, examine
from .rows import Row

SECONDS = 180.0  # for one row, compilation included
COMMAND = (sys.executable, "-m", "hf_gdn.doctor.examine")
# Signals by which a kernel, or its compiler, ends a process. Others come from users and from systems short of memory.
_CRASHES = ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGILL")


class Processes:
    """The child processes that run; `stop` kills them, and no other one starts afterwards.

    Each is in a session of its own, so that Ctrl-C does not end one in the middle of a check.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()

    def start(self, command: Sequence[str]) -> subprocess.Popen[str]:
        """Start a child. Raises CancelledError after `stop`."""
        with self._lock:
            if self.stopped:
                raise CancelledError
            child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                start_new_session=True,
            )
            self._running.add(child)
        return child

    def end(self, child: subprocess.Popen[str]) -> None:
        """Wait for a child that was started here."""
        child.wait()
        with self._lock:
            self._running.discard(child)

    def stop(self) -> None:
        """Kill all children."""
        with self._lock:
            self.stopped = True
            for child in self._running:
                kill(child)


def kill(child: subprocess.Popen[str]) -> None:
    """Kill a child and, where sessions exist, the compilers it has started."""
    if os.name != "posix":
        child.kill()
    elif child.poll() is None:
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.killpg(child.pid, signal.SIGKILL)


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
    processes = Processes()
    groups = [list(group) for _, group in groupby(rows, key=lambda row: (row.op, row.backend))]

    def findings(group: list[Row]) -> list[Finding]:
        kernel = registry.get(group[0].op, group[0].backend)
        if kernel.checked and any(kernel.why_not(row.request) is None for row in group):
            return list(_group(group, done, command, seconds, processes))
        found = []
        for row in group:  # PyTorch's own operators, or nothing that can run
            if processes.stopped:
                raise CancelledError
            found.append(examine(row))
            done(found[-1])
        return found

    with ThreadPoolExecutor(workers) as pool:
        try:
            return [finding for group in pool.map(findings, groups) for finding in group]
        finally:  # nothing is left, unless after an error or Ctrl-C
            processes.stop()


def _group(
    rows: list[Row],
    done: Callable[[Finding], None],
    command: Sequence[str],
    seconds: float,
    processes: Processes,
) -> Iterator[Finding]:
    while rows:
        for found in _child(rows, command, seconds, processes):
            rows = rows[1:]
            done(found)
            yield found


def _child(rows: list[Row], command: Sequence[str], seconds: float, processes: Processes) -> Iterator[Finding]:
    """Findings of one child process; the last is about the row it died of, if it did not examine them all."""
    child = processes.start(command)
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
                kill(child)
                yield Finding(row, REFUSED, f"did not end within {seconds:.0f} s")
                return
            if not line:
                code = child.wait()
                if processes.stopped:
                    raise CancelledError
                yield _died(row, code, _last_words(code, errors, readers[1]))
                return
            yield Finding.of_json(json.loads(line))
    finally:
        processes.end(child)
        for reader in readers:
            reader.join()


def _last_words(code: int, errors: list[str], reader: threading.Thread) -> str:
    reader.join()
    last = next((line.strip() for line in reversed(errors) if line.strip()), "")
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    return f"ended its process {how}" + (f": {last}" if last else "")


def _died(row: Row, code: int, sentence: str) -> Finding:
    """The finding about a row that ended its process; a kernel that crashed is refused for such calls from now on."""
    kernel = registry.get(row.op, row.backend)
    crashed = names_sticky(sentence) or (code < 0 and signal.Signals(-code).name in _CRASHES)
    if kernel.checked and crashed:
        verdicts.save(verdicts.key(kernel, row.request, torch.device(row.device)), Verdict(sentence))
    return Finding(row, REFUSED, sentence)
