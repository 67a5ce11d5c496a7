"""Prefill, from the chunk kernels to the whole layer: what a prompt costs, original against patched.

    python benchmarks/prefill.py [--device cuda] [--dtype bfloat16] [--only op,layer] [--output FILE]

Rows, each after its result has been checked in this run:

- ``op``: the chunk kernels alone at the shapes of Qwen3-Next (gdn) and Kimi-Linear (kda), and at an eighth of their
  heads (tensor parallelism), final state returned; on CUDA as a CUDA graph. The original is transformers' function;
- ``memory``: KiB that a call of the op takes beyond its inputs, per token and head;
- ``growth``: time at 131072 tokens over that at 4096;
- ``around``: the prologue and the gated norm alone, as a share of the device's copy bandwidth;
- ``layer``: one layer at full width with its projections, no cache, as the original and patched, called from Python;
- ``first``: seconds of a patched layer's first prefill and first token in a new process, with an empty Triton cache and
  with that filled;
- ``even``: the recurrent kernel against the chunk kernels (the "original" here) at few tokens: where they break even.

Times are medians; a layer's are taken in turns. "wanted" is the project's own goal on an H200 in bf16. On a CPU
``growth``, ``around`` and ``first`` are left out. The last line of the output is JSON.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import torch
from common import LAYER, LAYERS, OP, Row, arguments, double, error, in_turns, make_layer, report, target, time

from hf_gdn import kernels, registry
from hf_gdn.eval import candidates, kernel_oracle
from hf_gdn.eval.kernel_cases import SHAPES, Case
from hf_gdn.eval.timing import ceilings, peak_bytes
from hf_gdn.kernels.eager.gated_norm import gated_norm
from hf_gdn.kernels.eager.prologue import prologue

TURNS = 3
MODELS = {"gdn": "qwen3_next-80b", "kda": "kimi_linear-48b"}
PARTS = ("op", "memory", "growth", "around", "layer", "first", "even")
ALL = ((1, 512), (1, 2048), (1, 8192), (1, 32768), (8, 2048), (16, 4096))
SIZES = {
    "cuda": {
        "op": dict.fromkeys(MODELS.values(), ALL)
        | {f"{name}-tp8": ((1, 8192), (1, 32768)) for name in MODELS.values()},
        "layer": ((1, 512), (1, 2048), (8, 2048), (1, 16384)),
    },
    "cpu": {"op": {"qwen3_next-80b": ((1, 2048),), "kimi_linear-48b": ((1, 512),)}, "layer": ((1, 512),)},
}
# Milliseconds on an H200 in bf16, by (row, what, batch, tokens); of memory KiB, of growth a ratio, of first seconds.
WANTED = {
    **{("op", "qwen3_next-80b", B, T): ms for B, T, ms in (
        (1, 2048, 0.085), (1, 8192, 0.27), (1, 32768, 0.80), (8, 2048, 0.38), (16, 4096, 1.45)
    )},
    **{("op", "kimi_linear-48b", B, T): ms for B, T, ms in (
        (1, 2048, 0.14), (1, 8192, 0.45), (1, 32768, 1.5), (8, 2048, 0.80)
    )},
    ("layer", "qwen3_next", 8, 2048): 2.5, ("layer", "qwen3_next", 1, 512): 0.35,
    ("layer", "kimi_linear", 8, 2048): 3.2,
    **{("memory", name, 1, 8192): 6.0 for name in MODELS.values()},
    **{("growth", name, 1, 131072): 34.0 for name in MODELS.values()},
    **{("first", f"{name}, {disk}", 1, 512): s for name in LAYERS for disk, s in (("cold", 8.0), ("warm", 0.5))},
}  # fmt: skip


def prepared(
    rule: str, name: str, batch: int, tokens: int, device: torch.device, dtype: torch.dtype
) -> kernel_oracle.OracleCase:
    """Inputs, q and k normalised already as the prologue leaves them, and what is right."""
    return kernel_oracle.prepare(Case(f"chunk_{rule}", name, batch, tokens, "forward", ""), device, dtype)


def chunk(rule: str, device: torch.device, dtype: torch.dtype) -> registry.Kernel:
    """The kernel that a patched model's prefill runs on."""
    return registry.resolve(SHAPES[MODELS[rule]].request(f"chunk_{rule}", device, dtype))


def ops(parts: set[str], device: torch.device, dtype: torch.dtype) -> Iterator[Row]:
    graph = device.type == "cuda"
    for name, sizes in SIZES[device.type]["op"].items():
        rule = SHAPES[name].mixer
        fn = chunk(rule, device, dtype).fn
        for batch, tokens in sizes:
            job = prepared(rule, name, batch, tokens, device, dtype)
            run = functools.partial(fn, **{**job.inputs, "qk_l2norm": False})
            found = kernel_oracle.error(dict(zip(("o", "final_state"), run())), job.wanted)[0]
            common = dict(what=name, batch=batch, tokens=tokens, error=found, budget=OP[dtype])
            if "op" in parts:
                ms, before = time(run, device, graph), None
                if batch == 1 and tokens <= 2048:  # it takes 64 GB for 8 x 2048 of KDA
                    theirs = candidates.candidates(f"chunk_{rule}", SHAPES[name].model_type)[0].fn
                    before = time(functools.partial(theirs, **{**job.inputs, "qk_l2norm": False}), device, graph=False)
                yield dict(row="op", ms=ms, original_ms=before, **common)
            if "memory" in parts and (batch, tokens) == ((1, 8192) if graph else sizes[0]):
                held = peak_bytes(run, device) / 1024 / (batch * tokens * SHAPES[name].v_heads)
                yield dict(row="memory", ms=None, value=held, **common)
        if "growth" in parts and graph and name in MODELS.values():
            times = []
            for tokens in (4096, 131072):
                job = prepared(rule, name, 1, tokens, device, dtype)
                run = functools.partial(fn, **{**job.inputs, "qk_l2norm": False})
                found = kernel_oracle.error(dict(zip(("o", "final_state"), run())), job.wanted)[0]
                times.append(time(run, device, graph))
            common = dict(what=name, batch=1, tokens=131072, error=found, budget=OP[dtype])
            yield dict(row="growth", ms=None, value=times[1] / times[0], **common)


def around(device: torch.device, dtype: torch.dtype) -> Iterator[Row]:
    """Prologue and norm: time, and bytes that have to move by the copy bandwidth's time as ``share_bandwidth``."""
    bandwidth = ceilings(device, dtype)["copy_gb_s"]
    for rule, name in MODELS.items():
        shape = SHAPES[name]
        heads = dict(HK=shape.k_heads, HV=shape.v_heads, K=shape.k_dim, V=shape.v_dim, dtype=dtype, device=str(device))
        for batch, tokens in ((1, 8192), (8, 2048)):
            op = kernels.PROLOGUE_GDN if rule == "gdn" else kernels.PROLOGUE_KDA
            call = op.make_inputs(B=batch, T=tokens, **heads)
            exact = dict(call, raw=double(call["raw"]), weights=double(call["weights"]), window=call["window"].double())
            wanted, fn = prologue(**exact), registry.get(op.name, "triton").fn
            made = fn(**call)
            found = max(error(got, want) for got, want in zip(made, wanted))
            ms = time(functools.partial(fn, **call), device, graph=True)
            raw = call["raw"]
            moved = sum(x.nbytes for x in (raw.q, raw.k, raw.v, raw.a, raw.b, *made[:5]))
            common = dict(batch=batch, tokens=tokens, budget=OP[dtype])
            share = moved / ms / 1e6 / bandwidth
            yield dict(row="around", what=f"prologue, {rule}", ms=ms, error=found, share_bandwidth=share, **common)
            if rule == "kda":
                continue
            call = kernels.GATED_NORM.make_inputs(B=batch, T=tokens, **heads)
            wanted = gated_norm(call["o"].double(), call["z"].double(), call["weight"].double(), call["rule"])
            fn = registry.get("gated_norm", "triton").fn
            found = error(fn(**call), wanted)
            ms = time(functools.partial(fn, **call), device, graph=True)
            share = 3 * call["o"].nbytes / ms / 1e6 / bandwidth
            yield dict(row="around", what="gated norm", ms=ms, error=found, share_bandwidth=share, **common)


def layers(device: torch.device, dtype: torch.dtype) -> Iterator[Row]:
    for name in LAYERS:
        layer, config = make_layer(name, device, dtype)
        for batch, tokens in SIZES[device.type]["layer"]:
            x = torch.randn(batch, tokens, config.hidden_size, device=device).to(dtype)
            run = functools.partial(layer, x)
            rows = in_turns(name, lambda _, run=run: run, lambda _, run=run: run(), TURNS, ("eager",), device)
            for row in rows:
                yield dict(row, batch=batch, tokens=tokens, budget=LAYER[dtype])


FIRST = """
import sys, time, torch, hf_gdn
from transformers import DynamicCache
sys.path.insert(0, {folder!r})
from common import make_layer
device = torch.device("cuda")
layer, config = make_layer({name!r}, device, torch.{dtype})
x = torch.randn(1, 512, config.hidden_size, device=device, dtype=torch.{dtype})
hf_gdn.patch(strict=True)
import triton  # noqa: what importing costs is not counted
with torch.inference_mode():
    cache = DynamicCache(config=config)
    x.sum().item()
    start = time.perf_counter()
    layer(x, **cache_names.as_layer_argument(layer, cache))
    layer(x[:, :1], **cache_names.as_layer_argument(layer, cache))
    torch.cuda.synchronize()
print(time.perf_counter() - start)
"""


def first_calls(dtype: torch.dtype) -> Iterator[Row]:
    for name in LAYERS:
        with tempfile.TemporaryDirectory() as folder:
            for disk in ("cold", "warm"):
                here = os.path.dirname(os.path.abspath(__file__))
                code = FIRST.format(folder=here, name=name, dtype=str(dtype).removeprefix("torch."))
                env = {**os.environ, "TRITON_CACHE_DIR": folder}
                ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
                seconds = float(ran.stdout.split()[-1])
                yield dict(row="first", what=f"{name}, {disk}", batch=1, tokens=512, ms=None, value=seconds)


def even(device: torch.device, dtype: torch.dtype) -> Iterator[Row]:
    graph = device.type == "cuda"
    for rule, name in MODELS.items():
        kernel = chunk(rule, device, dtype)
        recurrent = registry.get(f"recurrent_{rule}", kernel.backend).fn
        for tokens in (1, 2, 4, 8, 16, 32, 64):
            job = prepared(rule, name, 1, tokens, device, dtype)
            inputs = {**job.inputs, "qk_l2norm": False}
            runs = [functools.partial(fn, **inputs) for fn in (recurrent, kernel.fn)]
            found = max(kernel_oracle.error(dict(zip(("o", "final_state"), run())), job.wanted)[0] for run in runs)
            ms, chunked = (time(run, device, graph) for run in runs)
            common = dict(what=f"{rule}, {kernel.backend}", batch=1, tokens=tokens, error=found, budget=OP[dtype])
            yield dict(row="even", ms=ms, original_ms=chunked, **common)


def measure(parts: set[str], device: torch.device, dtype: torch.dtype) -> Iterator[Row]:
    on_gpu = device.type == "cuda"
    if parts & {"op", "memory", "growth"}:
        yield from ops(parts, device, dtype)
    if "around" in parts and on_gpu:
        yield from around(device, dtype)
    if "layer" in parts:
        yield from layers(device, dtype)
    if "first" in parts and on_gpu:
        yield from first_calls(dtype)
    if "even" in parts:
        yield from even(device, dtype)


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}, separated by commas")
    options = parser.parse_args()
    parts = set(options.only.split(","))
    if unknown := parts - set(PARTS):
        parser.error(f"--only {', '.join(sorted(unknown))}: the parts are {', '.join(PARTS)}")
    device, dtype = target(options)

    def wanted(row: Row) -> float | None:
        return WANTED.get((row["row"], row["what"], row["batch"], row["tokens"]))

    return report("prefill", measure(parts, device, dtype), ("batch", "tokens"), wanted, 1, options)


if __name__ == "__main__":
    raise SystemExit(main())
