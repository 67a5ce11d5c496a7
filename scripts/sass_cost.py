"""What chunk kernels and all gradients cost on an H100 or H200, counted in their machine code; no GPU is needed.

    python scripts/sass_cost.py [--batch 1] [--tokens 8192]

Compiles every kernel of the chunk ops, and of the gradients of what surrounds them, for sm_90 as it is launched (bf16,
K = V = 128, 16 key heads, 32 value heads) and counts the instructions that its warps issue, those of loops as often as
the loops run: by program, by kind, and of all programs together. Beside it stands how many warps of a multiprocessor
the registers and the shared memory allow, and the time below which no such card can issue all of it (132
multiprocessors that issue four instructions a cycle, at 1.755 GHz).

What it cannot know: latencies (of memory, of barriers, of one product that waits for another), how well the resident
warps hide them, pipes narrower than the issue (tensor cores, shared memory, exponentials), branches not taken, caches
and bandwidth. It ranks variants of one kernel; it predicts no time.
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import triton

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hf_gdn import registry  # noqa: E402
from hf_gdn.kernels.triton import (  # noqa: E402
    backward_gated_norm,
    backward_gdn,
    backward_kda,
    backward_prologue,
    chunk_gdn_prepare,
    chunk_kda_prepare,
    chunk_kda_strong_decay,
    chunks,
    gate_gradients,
    partial_sums,
    prologue,
)
from hf_gdn.testing.compiled import SHARED_LIMIT, Compiled, launches  # noqa: E402

NVDISASM = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
KINDS = {
    "tensor": r"\w*MMA",
    "shared": r"LDS|STS|LDSM|STSM",
    "shuffle": r"SHFL",
    "exp": r"MUFU",
    "float": r"F(FMA|MUL|ADD|SEL|SETP|MNMX)|H(FMA2|MUL2|ADD2)",
    "double": r"D(FMA|MUL|ADD|SETP)",
    "convert": r"F2F|F2FP|I2F|F2I|I2FP",
    "global": r"LDG|STG|LDGSTS",
    "spill": r"LDL|STL",
    "barrier": r"BAR|WARPSYNC",
}
PROCESSORS, SCHEDULERS, HERTZ = 132, 4, 1.755e9
REGISTERS, SHARED, WARPS = 65536, 233472, 64  # of a multiprocessor
HK, HV, K, V, CHUNK = 16, 32, 128, 128, chunks.CHUNK


class Work(NamedTuple):
    """Programs of a launch, and how often its loops run, in the order in which they begin."""

    programs: int
    trips: tuple[int, ...] = ()


def work(batch: int, tokens: int) -> dict[str, Work]:
    """By name of the launch. The way that KDA's scores take depends on the gate: they are not counted."""
    count = math.ceil(tokens / CHUNK)
    prepare = HK * batch * count
    steps = K // chunk_gdn_prepare.PREPARE_CONFIGS[torch.bfloat16].BK
    columns, _, _ = chunks.scan_config(batch * HV, V, K, 2, SHARED_LIMIT["sm_90"], 2)
    scan = Work(math.ceil(V / columns) * HV * batch, (count,))
    by_head, keys, channels = HV * batch * count, backward_gdn.KEYS_CONFIG, backward_kda.CHANNELS_CONFIG
    return {
        "gdn prepare": Work(prepare, (steps, HV // HK)),
        "gdn prepare l2norm": Work(prepare, (steps, steps, steps, HV // HK)),
        "gdn scan": scan,
        "kda prepare": Work(HV * batch * count, (K // chunk_kda_prepare.PREPARE_CONFIG.BK,) * 2),
        "kda inverse": Work(HV * batch * count, (K // chunk_kda_strong_decay.INVERSE_CONFIG.BK,)),
        "kda scan": scan,
        "gdn backward states": scan,
        "gdn backward reverse": scan,
        "gdn backward score gradients": Work(by_head, (V // backward_gdn.SCORES_CONFIG.BV,)),
        "gdn backward key gradients": Work(prepare * (K // keys.BK), (HV // HK, V // keys.BV)),
        "kda backward states": scan,
        "kda backward reverse": scan,
        "kda backward score gradients": Work(by_head, (V // backward_kda.SCORES_CONFIG.BV,)),
        # The columns of a block; with one value head a key head and few steps over V, other loops are unrolled.
        "kda backward channel gradients": Work(by_head * (K // channels.BK), (16,)),
        **_work_around("gdn", HK, HV, batch * count),
        **_work_around("kda", HV, K, batch * count),
        **_work_of_norm(batch * tokens * HV),
    }


def _work_around(variant: str, k_heads: int, gates: int, count: int) -> dict[str, Work]:
    """Of a prologue's gradients over `count` chunks; a program of the first kernel serves q and k, or v."""
    parts, name = math.ceil(count / backward_prologue.CHUNKS), f"{variant} backward"
    tile = prologue.prologue_config(backward_prologue.BACKWARD_PROLOGUE_CONFIGS, K, V).BT
    steps = backward_prologue.CHUNKS * CHUNK // tile
    gate_steps = backward_prologue.CHUNKS * CHUNK // min(CHUNK, gate_gradients.GATES_CONFIG.elements // gates)
    transposed, channels = backward_prologue.TRANSPOSED_CONFIG, 2 * k_heads * K + HV * V
    columns = 4 * channels + HV + (HV * K if variant == "kda" else HV)
    sums = partial_sums.SUM_CONFIG
    return {
        f"{name} convolution gradients of q, k": Work(parts * 2 * k_heads, (steps, 0)),
        f"{name} convolution gradients of v": Work(parts * HV, (0, steps)),
        f"{name} gate gradients": Work(parts * (HV if variant == "kda" else 1), (gate_steps,)),
        f"{name} transposed convolution": Work(count * CHUNK // transposed.BT * math.ceil(channels / transposed.BC)),
        f"{name} weight gradients": Work(math.ceil(columns / sums.BN), (math.ceil(parts / sums.BP),)),
    }


def _work_of_norm(rows: int) -> dict[str, Work]:
    config, sums = backward_gated_norm.BACKWARD_NORM_CONFIG, partial_sums.SUM_CONFIG
    programs = math.ceil(rows / (config.elements // V * config.steps))
    return {
        "norm backward gated norm gradients": Work(programs, (config.steps,)),
        "norm backward sum": Work(math.ceil(V / sums.BN), (math.ceil(programs / sums.BP),)),
    }


def compiled(batch: int) -> dict[str, Compiled]:
    """Every launch of the chunk ops with a cache, in sequences too short to be cut into segments, by name."""
    found = {}
    for kind, variant, l2norm in (
        ("chunk", "gdn", False),
        ("chunk", "gdn", True),
        ("chunk", "kda", True),
        ("backward", "gdn", False),
        ("backward", "kda", False),
        ("backward_prologue", "gdn", False),
        ("backward_prologue", "kda", False),
        ("backward_gated", "norm", False),
    ):
        op = registry.ops()[f"{kind}_{variant}"]
        k_heads = HV if kind != "chunk" and variant == "kda" else HK
        call = op.make_inputs(B=batch, T=1000, HK=k_heads, HV=HV, K=K, V=V, dtype=torch.bfloat16, device="meta")
        if "qk_l2norm" in call:
            call["qk_l2norm"] = l2norm
        for launch in launches(registry.get(op.name, "triton").fn, call, "sm_90"):
            name = launch.name.removesuffix("_kernel").replace("_", " ")
            if op.name.startswith("backward"):
                if name in ("prepare", "scores", "inverse"):  # those of the forward
                    continue
                name = f"backward {name}"
            name = f"{variant} {name}{' l2norm' if l2norm and (variant, name) == ('gdn', 'prepare') else ''}"
            if name not in found:
                found[name] = launch.compile()
    return found


def instructions(cubin: bytes) -> tuple[list[str], list[tuple[int, int]]]:
    """Opcodes of a kernel in their order, and (first, last) of every loop."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([str(NVDISASM), "-c", file.name], check=True, capture_output=True, text=True).stdout
    codes: list[str] = []
    labels: dict[str, int] = {}
    loops: dict[int, int] = {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(codes)
        elif code := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)(.*?);", line):
            target = re.search(r"\.L_\w+", code[2]) if code[1] == "BRA" else None
            # Backwards; a branch to itself ends the code.
            if target and labels.get(target[0], len(codes)) < len(codes):
                loops[labels[target[0]]] = len(codes)
            codes.append(code[1])
    return codes, sorted(loops.items())


def count(codes: list[str], loops: list[tuple[int, int]], trips: tuple[int, ...]) -> Counter[str]:
    """Instructions of one warp by kind."""
    kinds: Counter[str] = Counter()
    for i, code in enumerate(codes):
        times = math.prod(n for (first, last), n in zip(loops, trips) if first <= i <= last)
        kind = next((kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, code)), "other")
        kinds[kind] += times if code != "NOP" else 0
    return kinds


def resident(registers: int, shared: int, warps: int) -> int:
    """Warps of a multiprocessor that such blocks may occupy."""
    by_registers = REGISTERS // (math.ceil(registers / 8) * 8 * 32 * warps)
    return warps * min(by_registers, SHARED // (shared + 1024), WARPS // warps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=8192)
    arguments = parser.parse_args()
    shape = f"{HK}/{HV} heads, {arguments.batch} x {arguments.tokens} tokens"
    print(f"sm_90, bf16, K = V = 128, {shape}, Triton {triton.__version__}; instructions of a program by kind")
    columns = ["registers", "warps/SM", "programs", "a program", *KINDS, "other", "all, 1e6", "floor, us"]
    print(f"{'':40}" + "".join(f"{name:>10}" for name in columns))
    works = work(arguments.batch, arguments.tokens)
    for name, result in compiled(arguments.batch).items():
        codes, loops = instructions(result.binary)
        rows = [title for title in works if title == name or title.startswith(f"{name} of ")]
        if not rows:
            print(f"{name:40}  not counted: work() does not say how often its loops run")
        for title in rows:
            programs, trips = works[title]
            if len(loops) != len(trips):
                print(f"{title:40}  not counted: {len(loops)} loops, and work() knows of {len(trips)}")
                continue
            kinds = count(codes, loops, trips)
            slots = result.warps * kinds.total()
            cells = [result.registers, resident(result.registers, result.shared, result.warps), programs, slots]
            cells += [result.warps * kinds[kind] for kind in (*KINDS, "other")]
            floor = slots * programs / (PROCESSORS * SCHEDULERS * HERTZ)
            line = "".join(f"{x:10}" for x in cells) + f"{slots * programs / 1e6:10.1f}{1e6 * floor:10.1f}"
            print(f"{title:40}" + line)


if __name__ == "__main__":
    main()
