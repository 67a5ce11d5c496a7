"""What benchmarks of kernels and layers share: a layer at full width, original and patched in turns, a table, JSON."""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.table import Table
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

import hf_gdn
from hf_gdn.eval import kernel_oracle
from hf_gdn.eval.machine import console, made_with
from hf_gdn.eval.timing import captured, timer

Row = dict[str, Any]
Run = Callable[[], Any]

SECONDS = 0.3  # of one measurement
OP = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1.6e-2}  # an operator's own bar
LAYER = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3.2e-2}  # twice that, and of its projections
LAYERS = {
    "qwen3_next": (Qwen3NextGatedDeltaNet, transformers.Qwen3NextConfig),
    "kimi_linear": (KimiLinearDeltaAttention, transformers.KimiLinearConfig),
}


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative Frobenius error; infinite when `got` is not finite."""
    return kernel_oracle.error({"y": got}, {"y": wanted})[0]


def time(run: Run, device: torch.device, graph: bool) -> float:
    """Milliseconds of a call, or of a replay."""
    run = captured(run, device) if graph else run
    return statistics.median(timer(device, graph)(run, SECONDS, device))


def double(tensors: Any) -> Any:
    """A named tuple's tensors in float64."""
    return type(tensors)(*(x.double() if isinstance(x, torch.Tensor) else x for x in tensors))


def make_layer(name: str, device: torch.device, dtype: torch.dtype) -> tuple[torch.nn.Module, Any]:
    """A family's layer at full width with random weights, and its config."""
    cls, config = LAYERS[name][0], LAYERS[name][1]()
    torch.manual_seed(0)
    layer = cls(config, config.layer_types.index("linear_attention"))
    for key, parameter in layer.named_parameters():  # the model around it would do this
        if key.endswith("A_log"):
            parameter.data.uniform_(1, 16).log_()
        elif key.endswith("dt_bias"):
            parameter.data.fill_(1.0)
    return layer.to(device, dtype).eval(), config


def in_turns(
    family: str, run: Callable[[bool], Run], first: Callable[[bool], torch.Tensor], turns: int, hows: tuple[str, ...],
    device: torch.device,
) -> Iterator[Row]:  # fmt: skip
    """Original and patched, one after the other.

    Args:
        family: what is patched.
        run: given whether patched, what is timed.
        first: given whether patched, run once before: what is compared.
        turns: how often each is timed; medians count.
        hows: ``"eager"``, ``"graph"``.
        device: where.
    """
    outputs: dict[bool, torch.Tensor] = {}
    times: dict[str, tuple[list[float], list[float]]] = {how: ([], []) for how in hows}
    for turn, patched in itertools.product(range(turns), (False, True)):
        with hf_gdn.patched(family, strict=True) if patched else hf_gdn.unpatched():
            if turn == 0:
                outputs[patched] = first(patched)
            for how in hows:
                times[how][patched].append(time(run(patched), device, how == "graph"))
    for how in hows:
        before, ms = map(statistics.median, times[how])
        yield dict(
            row="layer", what=family, how=how, ms=ms, original_ms=before, error=error(outputs[True], outputs[False])
        )


def arguments(doc: str) -> argparse.ArgumentParser:
    """Options that every benchmark has."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    return parser


def target(options: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a run."""
    device = torch.device(options.device)
    return device, getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))


def figure(x: float | None) -> str:
    """Four digits, no exponent."""
    return "" if x is None else f"{x:.0f}" if abs(x) >= 1000 else f"{x:.4g}"


def publish(kind: str, table: Table, device: torch.device, output: Path | None, **found: Any) -> int:
    """Print the table, then `found` as JSON, which also goes to `output`; 1 when one of its rows did not pass."""
    console().print(table)
    result = dict(**made_with(kind, shlex.join(["python", *sys.argv]), device), **found)
    if output:
        output.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(json.dumps(result))
    return 0 if all(row["passed"] for row in found["rows"]) else 1


def report(
    kind: str, rows: Iterable[Row], columns: tuple[str, ...], wanted: Callable[[Row], float | None], scale: float,
    options: argparse.Namespace,
) -> int:  # fmt: skip
    """Take rows as they come, show them, print the JSON last.

    Args:
        kind: the benchmark's name.
        rows: each with ``row``, `columns`, ``ms`` (None where it is not a time: then ``value``), ``original_ms`` where
            there is one, ``error`` and ``budget`` where something was computed.
        columns: what tells rows apart.
        wanted: the project's goal for a row, in milliseconds or what ``value`` is in, or None.
        scale: of the times that are shown: 1 for ms, 1000 for µs.
        options: as `arguments` gives them.

    Returns:
        Exit code: 1 when a result was wrong.
    """
    device, dtype = target(options)
    unit = {1: "ms", 1000: "µs"}[int(scale)]
    table = Table("what", *columns, f"original, {unit}", f"hf_gdn, {unit}", "speed-up", "wanted", "error", title=kind)
    found = []
    with torch.inference_mode():
        for row in rows:
            row["wanted"] = wanted(row) if device.type == "cuda" else None
            off, before = row.get("error"), row.get("original_ms")
            row["passed"] = off is None or off <= row["budget"]
            found.append(row)
            value = row["value"] if row["ms"] is None else row["ms"] * scale
            goal = None if row["wanted"] is None else row["wanted"] * (1 if row["ms"] is None else scale)
            table.add_row(
                f"{row['row']} {row['what']}", *(str(row[name]) for name in columns),
                figure(None if before is None else before * scale),
                figure(value) if row["passed"] else "wrong result",
                "" if before is None or not row["passed"] else f"{before / row['ms']:.2f}x",
                figure(goal),
                "" if off is None else f"{off:.1e}",
            )  # fmt: skip
    return publish(kind, table, device, options.output, dtype=str(dtype).removeprefix("torch."), rows=found)
