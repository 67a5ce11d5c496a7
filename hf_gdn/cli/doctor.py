"""hf-gdn doctor: every kernel, checked on this machine."""

from __future__ import annotations

import json
import shlex
import sys
import time
from typing import Annotated

import typer

from ..loading.options import DeviceOptions
from .app import USE, command


@command(
    panel=USE,
    needs=("psutil", "rich"),
    examples=["hf-gdn doctor", "hf-gdn doctor --dtype bfloat16 --json", "hf-gdn doctor --model ./my-model"],
)
def doctor(
    device: DeviceOptions,
    model: Annotated[
        list[str] | None, typer.Option(help="Model whose layers are checked, repeatable; all families by default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes at once.")] = 4,
) -> None:
    """Check every kernel on this machine, each in a process of its own, and say which backend serves what.

    Exits 1 when a kernel is wrong, raises or does not compile here. Verdicts are kept, as those of a model's first run.
    """
    import torch

    from ..doctor import children, report
    from ..doctor.rows import rows
    from ..eval import terminal
    from ..eval.progress import bars
    from ..loading.models import DTYPES, Source, pick_device, pick_dtype

    start, where = time.perf_counter(), pick_device(device.device)
    torch.set_num_threads(device.threads or torch.get_num_threads())
    dtypes = [pick_dtype(device.dtype, Source(""), where)] if device.dtype else DTYPES.values()
    wanted = rows(model or (), [str(dtype).removeprefix("torch.") for dtype in dtypes], str(where))
    about = report.head(shlex.join(["hf-gdn", *sys.argv[1:]]), where)
    with bars(not as_json) as progress:
        advance = progress.add("kernels", len(wanted), "calls")
        findings = children.examine_all(wanted, workers if where.type == "cuda" else 1, lambda found: advance(1))
    seconds = time.perf_counter() - start
    if as_json:
        print(json.dumps(report.as_json(findings, about, seconds), indent=1))
    else:
        report.show(findings, about, seconds, terminal.console())
    if not report.passed(findings):
        raise typer.Exit(1)
