"""How every measurement runs: in one process or several, resumed, with tables, files, a verdict and an exit code.

A `Job` says what it is and measures; `run` does the rest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..loading import models
from ..loading.options import DeviceOptions
from . import machine, progress, terminal, writers
from .distributed import Processes
from .options import OutputOptions
from .results import SCHEMA, Report
from .resume import Journal, Work, prepare


@dataclass(frozen=True)
class Plan:
    """What a job found out before it measures.

    Args:
        device: where it runs.
        identity: what it runs, JSON: finished rows serve a resumed run only if this is the same.
        measure: does the work. Returns a report without its head in the main process; what it returns in the others is
            ignored.
    """

    device: torch.device
    identity: dict[str, Any]
    measure: Callable[[Work], Report]


@dataclass(frozen=True, kw_only=True)
class Job(ABC):
    """What is to be measured.

    Args:
        device, output: where it runs and where results go.
    """

    device: DeviceOptions = DeviceOptions()
    output: OutputOptions = OutputOptions()

    kind: str
    """What report.json calls it."""

    @property
    def tensor_parallel(self) -> bool:
        """Whether all processes hold one model together."""
        return False

    @abstractmethod
    def plan(self, processes: Processes, bars: progress.Bars) -> Plan:
        """Check everything that can be checked before work begins. Raises UserError for what cannot be used."""


def measure(job: Job, processes: Processes, command: str) -> Report | None:
    """Run a job, and write its report's files.

    Returns:
        The report in the main process, None in the others.

    Raises:
        UserError: something given cannot be used; nothing is overwritten then.
    """
    output = job.output
    with progress.bars(processes.main and not output.quiet) as bars:
        plan = job.plan(processes, bars)
        identity = {
            "kind": job.kind,
            **plan.identity,
            "schema": SCHEMA,
            "machine": machine.machine(plan.device),
            "versions": machine.versions(),
        }
        journal = processes.main_only(lambda: Journal(prepare(output.output), identity, output.resume))
        found = plan.measure(Work(processes, journal, bars))
    if journal is None:
        return None
    report = replace(found, processes=processes.count, **machine.made_with(job.kind, command, plan.device))
    writers.write(report, prepare(output.output))
    journal.remove()
    return report


def exit_code(report: Report) -> int:
    """2 where a model could not be patched at all, 1 where something else did not pass, else 0."""
    if any(result.not_patched is not None for result in report.results):
        return 2
    return 0 if report.passed else 1


def run(job: Job, command: str) -> int:
    """Run a job, write its report and show it. Returns the exit code (docs/report.md), in all processes."""
    if job.device.threads is not None:
        torch.set_num_threads(job.device.threads)
    processes = Processes(job.device.device, job.tensor_parallel)
    try:
        report = measure(job, processes, command)
        if report is not None:
            terminal.show(report, job.output.output, writers.files_of(report), job.output.quiet)
        return processes.from_main(lambda: 0 if report is None else exit_code(report))
    finally:
        processes.close()


def pick_device(job: Job, processes: Processes) -> torch.device:
    """The device that a job asks for, or that accelerate gave to this process."""
    return models.pick_device(job.device.device, processes.device)
