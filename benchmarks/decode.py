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

import functools
from collections.abc import Iterator

import torch
from common import LAYER, LAYERS, OP, Row, arguments, double, error, in_turns, make_layer, report, target, time
from transformers import DynamicCache

from hf_gdn import registry
from hf_gdn.kernels import STEP_GDN, STEP_KDA, reference
from hf_gdn.upstream import cache_names

TURNS = 7
# Milliseconds on an H200 in bf16, by (row, rule or family, how, batch).
WANTED = {
    **{("recurrence", "gdn", "graph", B): us / 1e3 for B, us in ((1, 3), (8, 11), (32, 38), (128, 136), (256, 268))},
    **{("between", "gdn", "graph", B): us / 1e3 for B, us in ((1, 8), (32, 48), (256, 300))},
    ("layer", "qwen3_next", "eager", 1): 0.15,
    ("layer", "qwen3_next", "graph", 1): 0.03, ("layer", "qwen3_next", "graph", 32): 0.075,
    ("layer", "kimi_linear", "graph", 1): 0.04, ("layer", "kimi_linear", "graph", 32): 0.085,
}  # fmt: skip


def kernels(rule: str, batch: int, device: torch.device, dtype: torch.dtype) -> Iterator[Row]:
    """The recurrence alone and everything between the projections, on the triton backend."""
    heads = dict(HK=16 if rule == "gdn" else 32, HV=32, K=128, V=128, dtype=dtype, device=str(device))
    common = dict(what=rule, how="graph", batch=batch, budget=OP[dtype])
    op = registry.ops()[f"recurrent_{rule}"]
    inputs = op.make_inputs(B=batch, T=1, **heads)
    exact = {n: x.double() if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}
    fn, wanted = registry.get(op.name, "triton").fn, op.reference(**exact)[0]
    found = error(fn(**inputs)[0], wanted)
    yield dict(row="recurrence", ms=time(lambda: fn(**inputs, inplace=True), device, graph=True), error=found, **common)
    inputs = (STEP_GDN if rule == "gdn" else STEP_KDA).make_inputs(B=batch, **heads)
    projected, weights, made, window, state = inputs.values()
    wanted = reference.step(double(projected), double(weights), made, window.double(), state.double())[0]
    step = registry.get(f"step_{rule}", "triton").fn
    found = error(step(projected, weights, made, window.clone(), state.clone()), wanted)
    ms = time(lambda: step(projected, weights, made, window, state), device, graph=True)
    yield dict(row="between", ms=ms, error=found, **common)


def layers(name: str, batch: int, device: torch.device, dtype: torch.dtype) -> Iterator[Row]:
    """One layer, original and patched."""
    layer, config = make_layer(name, device, dtype)
    x = torch.randn(batch, 8, config.hidden_size, device=device).to(dtype)
    token = x[:, 0].flatten().clone().view(batch, 1, -1)  # with the strides of 8 tokens bf16 takes 30x as long on CPUs
    caches = DynamicCache(config=config), DynamicCache(config=config)

    def run(patched: bool):
        return functools.partial(layer, token, **cache_names.as_layer_argument(layer, caches[patched]))

    def first(patched: bool) -> torch.Tensor:
        layer(x, **cache_names.as_layer_argument(layer, caches[patched]))
        return torch.cat([run(patched)() for _ in range(4)], 1)

    hows = ("eager", "graph") if device.type == "cuda" else ("eager",)
    for row in in_turns(name, run, first, TURNS, hows, device):
        yield dict(row, batch=batch, budget=LAYER[dtype])


def measure(batches: list[int], device: torch.device, dtype: torch.dtype) -> Iterator[Row]:
    for batch in batches:
        for rule in ("gdn", "kda") if device.type == "cuda" else ():
            yield from kernels(rule, batch, device, dtype)
        for name in LAYERS:
            yield from layers(name, batch, device, dtype)


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--batch", help="batches, separated by commas")
    options = parser.parse_args()
    device, dtype = target(options)
    batches = [
        int(batch) for batch in (options.batch or ("1,8,32,128,256" if device.type == "cuda" else "1,4")).split(",")
    ]
    columns = ("how", "batch")

    def wanted(row: Row) -> float | None:
        return WANTED.get((row["row"], row["what"], row["how"], row["batch"]))

    return report("decode", measure(batches, device, dtype), columns, wanted, 1000, options)


if __name__ == "__main__":
    raise SystemExit(main())
