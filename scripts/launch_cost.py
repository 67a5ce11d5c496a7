"""What layers cost on the host: compilations of a first prefill and decode, and time per launch. No GPU is needed.

    PYTHONPATH=. TRITON_CACHE_DIR=$(mktemp -d) python scripts/launch_cost.py

Triton compiles for an H100 that is not there, and a driver that does nothing takes the launches
(`hf_gdn.testing.absent_driver`), so host times are those of Python alone. An empty TRITON_CACHE_DIR makes the
compilations those of a machine that has never run the kernels.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from hf_gdn import registry
from hf_gdn.loading.shapes import LARGE, SHAPES
from hf_gdn.operators import call_delta_rule, call_norm, call_prologue, call_step
from hf_gdn.testing.absent_driver import Log, absent_card
from hf_gdn.testing.case import FAMILIES
from hf_gdn.testing.compiled import TARGETS

BATCHES = (1, 2, 3, 4, 5, 8, 16, 17, 33, 64)
LENGTHS = (1, 2, 7, 16, 17, 63, 64, 65, 100, 512, 1000, 2047, 2048, 4095, 8191, 8192)


def layer(name: str, batch: int, tokens: int, decode: bool) -> Callable[[], Any]:
    """Everything between a layer's projections: one step, or prologue, delta rule and gated norm."""
    shape = SHAPES[name]
    sizes = dict(B=batch, T=tokens, **shape.sizes, dtype=torch.bfloat16, **FAMILIES[shape.model_type][1])

    def kernel(op: str) -> registry.Kernel:
        return registry.get(op, "triton")

    if decode:
        call, step = registry.ops()[f"step_{shape.variant}"].make_inputs(**sizes), kernel(f"step_{shape.variant}")
        return lambda: call_step(step, **call)
    call = registry.ops()[f"prologue_{shape.variant}"].make_inputs(**sizes)
    projected, weights, spec = call["projected"], call["weights"], call["spec"]
    prologue, chunk, norm = (kernel(op) for op in (f"prologue_{shape.variant}", f"chunk_{shape.variant}", "gated_norm"))

    def prefill() -> None:
        cache = dict(conv_state=None, keep=4, cu_seqlens=None, lengths=None)
        *inputs, _ = call_prologue(prologue, projected, weights, spec, **cache)
        options = dict(scale=shape.k_dim**-0.5, initial_state=None, cu_seqlens=None, qk_l2norm=False)
        o, _ = call_delta_rule(chunk, *inputs, **options)
        call_norm(norm, o, projected.z, weights.norm, spec)

    return prefill


def microseconds(run: Callable[[], Any], calls: int, rounds: int) -> float:
    """Median time of a call over rounds."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            run()
        times.append(1e6 * (time.perf_counter() - start) / calls)
    return statistics.median(times)


def fresh(log: Log) -> list[tuple[str, float]]:
    """Compilations since the last call."""
    found = log.compilations.copy()
    log.compilations.clear()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="sm_90", choices=list(TARGETS))
    parser.add_argument("--shape", nargs="*", default=list(LARGE), choices=list(SHAPES))
    parser.add_argument("--session", action="store_true", help="also many batch sizes and lengths; takes minutes")
    given = parser.parse_args()
    for name in given.shape:
        with absent_card(given.target) as log:
            for phase, tokens, decode in (("prefill of 512", 512, False), ("decode", 1, True)):
                run = layer(name, 1, tokens, decode)
                run()
                compiled = fresh(log)
                log.launches.clear()
                run()
                launches = len(log.launches)
                host = microseconds(run, 50, 9)
                print(
                    f"{name}, {phase}: {len(compiled)} compilations, {sum(s for _, s in compiled):.1f} s; "
                    f"{launches} launches, {host:.0f} us of host time, {host / launches:.0f} us a launch"
                )
                for function, seconds in compiled:
                    print(f"    {function}: {seconds:.2f} s")
            if given.session:
                for tokens in LENGTHS:
                    layer(name, 1, tokens, False)()
                for batch in BATCHES:
                    layer(name, batch, 100, False)()
                    layer(name, batch, 1, True)()
                further = fresh(log)
                counted = ", ".join(f"{n} of {function}" for function, n in Counter(f for f, _ in further).items())
                print(
                    f"{name}, other batch sizes and lengths: {len(further)} further compilations: {counted or 'none'}"
                )


if __name__ == "__main__":
    main()
