"""The job of `hf-gdn kernels`: ops or whole layers, timed and checked."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from . import kernel_bench, kernel_cases, layer_bench, layer_cases, progress, roofline
from .distributed import Processes
from .job import Job, Plan
from .kernel_results import KernelRow, LayerRow
from .options import KernelBenchOptions
from .records import as_dict, read
from .results import Report
from .resume import Row, Work

LEVELS = ("op", "layer")


@dataclass(frozen=True, kw_only=True)
class KernelJob(Job):
    """Which kernels or layers to time."""

    kind: str = "kernels"
    options: KernelBenchOptions = KernelBenchOptions()

    def plan(self, processes: Processes, bars: progress.Bars) -> Plan:
        kernel_cases.known("level", [self.options.level], LEVELS)
        device, dtype = kernel_cases.target(self.options, self.device)
        make = self._ops if self.options.level == "op" else self._layers
        identity = {**asdict(self.options), **asdict(self.device)}
        return processes.each(lambda: make(device, dtype, identity))

    def _ops(self, device: torch.device, dtype: torch.dtype, identity: dict) -> Plan:
        options = self.options
        cases = {kernel_cases.key(case): case for case in kernel_cases.plan(options, self.device)}

        def measure(work: Work) -> Report:
            on_progress = work.bars.add("kernels", len(work.todo(cases)), "rows")

            def compute(key: str) -> Row:
                row = as_dict(kernel_bench.measure(cases[key], options, device, dtype))
                on_progress(1)
                return row

            rows = [read(KernelRow, row) for row in work.fill(cases, compute, spread=False)]
            if not work.processes.main:
                return Report()
            with work.bars.busy("this machine's ceilings"):
                limits = roofline.ceilings(device, dtype)
            return Report(
                ceilings=limits,
                left_out=kernel_cases.left_out(options, self.device),
                kernels=kernel_bench.with_shares(kernel_bench.with_ratios(rows), limits),
                passed=all(row.passed is not False for row in rows),
            )

        return Plan(device, identity, measure)

    def _layers(self, device: torch.device, dtype: torch.dtype, identity: dict) -> Plan:
        options = self.options
        found, left_out = layer_cases.plan(options, device, dtype)
        cases = {case.key: case for case in found}
        first = {f"first.{case.shape}": case.shape for case in found if options.first_call}

        def measure(work: Work) -> Report:
            on_progress = work.bars.add("layers", len(work.todo([*cases, *first])), "cases")

            def compute(key: str) -> Row:
                if key in first:
                    rows = layer_bench.first_calls(first[key], device, dtype)
                else:
                    rows = layer_bench.measure(cases[key], options, device, dtype)
                on_progress(1)
                return {"rows": as_dict(rows)}

            done = work.fill([*cases, *first], compute, spread=False)
            rows = [read(LayerRow, row) for case in done for row in case["rows"]]
            if not work.processes.main:
                return Report()
            with work.bars.busy("this machine's ceilings"):
                limits = roofline.ceilings(device, dtype)
            return Report(
                ceilings=limits,
                left_out=left_out,
                layers=layer_bench.with_floors(rows, limits),
                passed=all(row.passed is not False for row in rows),
            )

        return Plan(device, identity, measure)
