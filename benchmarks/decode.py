"""Decoding, from the recurrence to the whole layer: what a token costs, original against patched.

    python benchmarks/decode.py [--device cuda] [--dtype bfloat16] [--batch 1,8,32,128,256] [--output FILE]

Rows, each after its result has been checked in this run:

- ``recurrence``: the recurrent kernel alone, state in place, 32 heads of 128 x 128 (CUDA graph, device time);
- ``between``: everything between a layer's projections, both states in place (CUDA graph, device time);
- ``layer``: one layer of Qwen3-Next or Kimi-Linear at full width with its projections, one token after a prefill of 8,
  as the original and patched: called from Python (eager), and on CUDA as a CUDA graph too.

Times are medians; a layer's are taken in turns. "wanted" is the project's own goal on an H200. On a CPU the first two
are left out: `hf-gdn kernels` times the recurrence there. `generate` as a whole: ``hf-gdn speed --config
qwen3_next-80b --layers 8``.
The last line of the output is JSON.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.table import Table
from transformers import DynamicCache
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

import hf_gdn
from hf_gdn import registry
from hf_gdn.eval.ceilings import captured, timer
from hf_gdn.eval.machine import console, made_with
from hf_gdn.kernels import STEP_GDN, STEP_KDA, reference

Row = dict[str, Any]

SECONDS, TURNS = 0.3, 7
BUDGET = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3.2e-2}  # a layer: twice an operator's own bar
LAYERS = {
    "qwen3_next": (Qwen3NextGatedDeltaNet, transformers.Qwen3NextConfig),
    "kimi_linear": (KimiLinearDeltaAttention, transformers.KimiLinearConfig),
}
# Microseconds on an H200 in bf16, by (row, rule or family, how, batch).
WANTED = {
    **{("recurrence", "gdn", "graph", B): us for B, us in ((1, 3), (8, 11), (32, 38), (128, 136), (256, 268))},
    **{("between", "gdn", "graph", B): us for B, us in ((1, 8), (32, 48), (256, 300))},
    ("layer", "qwen3_next", "eager", 1): 150,
    ("layer", "qwen3_next", "graph", 1): 30, ("layer", "qwen3_next", "graph", 32): 75,
    ("layer", "kimi_linear", "graph", 1): 40, ("layer", "kimi_linear", "graph", 32): 85,
}  # fmt: skip


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative Frobenius error; infinite when `got` is not finite."""
    if not torch.isfinite(got).all():
        return float("inf")
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


def time(run: Callable[[], Any], device: torch.device, graph: bool) -> float:
    """Microseconds of a call, or of a replay."""
    run = captured(run, device) if graph else run
    return 1e3 * statistics.median(timer(device, graph)(run, SECONDS, device))


def double(tensors: Any) -> Any:
    return type(tensors)(*(x.double() if isinstance(x, torch.Tensor) else x for x in tensors))


def kernels(rule: str, batch: int, device: torch.device, dtype: torch.dtype) -> Iterator[Row]:
    """The recurrence alone and everything between the projections, on the triton backend."""
    heads = dict(HK=16 if rule == "gdn" else 32, HV=32, K=128, V=128, dtype=dtype, device=str(device))
    op = registry.ops()[f"recurrent_{rule}"]
    inputs = op.make_inputs(B=batch, T=1, **heads)
    exact = {n: x.double() if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}
    fn, wanted = registry.get(op.name, "triton").fn, op.reference(**exact)[0]
    found = error(fn(**inputs)[0], wanted)
    us = time(lambda: fn(**inputs, inplace=True), device, graph=True)
    yield dict(row="recurrence", what=rule, how="graph", batch=batch, us=us, error=found)
    inputs = (STEP_GDN if rule == "gdn" else STEP_KDA).make_inputs(B=batch, **heads)
    raw, weights, made, window, state = inputs.values()
    wanted = reference.step(double(raw), double(weights), made, window.double(), state.double())[0]
    step = registry.get(f"step_{rule}", "triton").fn
    found = error(step(raw, weights, made, window.clone(), state.clone()), wanted)
    us = time(lambda: step(raw, weights, made, window, state), device, graph=True)
    yield dict(row="between", what=rule, how="graph", batch=batch, us=us, error=found)


def layers(name: str, batch: int, device: torch.device, dtype: torch.dtype) -> Iterator[Row]:
    """One layer, original and patched."""
    cls, config = LAYERS[name][0], LAYERS[name][1]()
    torch.manual_seed(0)
    layer = cls(config, config.layer_types.index("linear_attention"))
    for key, parameter in layer.named_parameters():  # the model around it would do this
        if key.endswith("A_log"):
            parameter.data.uniform_(1, 16).log_()
        elif key.endswith("dt_bias"):
            parameter.data.fill_(1.0)
    layer = layer.to(device, dtype).eval()
    x = torch.randn(batch, 8, config.hidden_size, device=device).to(dtype)
    token = x[:, 0].flatten().clone().view(batch, 1, -1)  # with the strides of 8 tokens bf16 takes 30x as long on CPUs
    caches = DynamicCache(config=config), DynamicCache(config=config)
    outputs, hows = {}, ("eager", "graph") if device.type == "cuda" else ("eager",)
    times: dict[str, tuple[list[float], list[float]]] = {how: ([], []) for how in hows}
    for turn, patched in itertools.product(range(TURNS), (False, True)):
        with hf_gdn.patched(name, strict=True) if patched else hf_gdn.unpatched():
            run = functools.partial(layer, token, cache_params=caches[patched])
            if turn == 0:
                layer(x, cache_params=caches[patched])
                outputs[patched] = torch.cat([run() for _ in range(4)], 1)
            for how in hows:
                times[how][patched].append(time(run, device, how == "graph"))
    for how in hows:
        before, us = map(statistics.median, times[how])
        found = error(outputs[True], outputs[False])
        yield dict(row="layer", what=name, how=how, batch=batch, us=us, original_us=before, error=found)


def measure(batches: list[int], device: torch.device, dtype: torch.dtype) -> Iterator[Row]:
    for batch in batches:
        for rule in ("gdn", "kda") if device.type == "cuda" else ():
            yield from kernels(rule, batch, device, dtype)
        for name in LAYERS:
            yield from layers(name, batch, device, dtype)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--batch", help="batches, separated by commas")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    dtype = getattr(torch, options.dtype or ("bfloat16" if on_gpu else "float32"))
    batches = [int(batch) for batch in (options.batch or ("1,8,32,128,256" if on_gpu else "1,4")).split(",")]
    table = Table(
        "what", "how", "batch", "original, µs", "hf_gdn, µs", "speed-up", "wanted, µs", "error", title="decode"
    )
    rows, out = [], console()
    with torch.inference_mode():
        for row in measure(batches, device, dtype):
            row["wanted_us"] = WANTED.get((row["row"], row["what"], row["how"], row["batch"])) if on_gpu else None
            row["passed"] = row["error"] <= BUDGET[dtype]
            rows.append(row)
            before = row.get("original_us")
            figures = (
                "" if before is None else f"{before:.1f}",
                f"{row['us']:.1f}" if row["passed"] else "wrong result",
                "" if before is None or not row["passed"] else f"{before / row['us']:.2f}x",
                "" if row["wanted_us"] is None else f"{row['wanted_us']}",
            )
            table.add_row(f"{row['row']} {row['what']}", row["how"], str(row["batch"]), *figures, f"{row['error']:.1e}")
    out.print(table)
    head = made_with("decode", shlex.join(["python", *sys.argv]), device)
    found = dict(**head, dtype=str(dtype).removeprefix("torch."), rows=rows)
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(json.dumps(found))
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
