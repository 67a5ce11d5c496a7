"""Compile a Triton kernel for a card that is not there, and read what the compiler made of it.

No GPU is needed: Triton brings ptxas and the AMDGPU backend along. It has to be a process without TRITON_INTERPRET,
since a kernel decorated by the interpreter cannot be compiled.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),  # A100
    "sm_90": GPUTarget("cuda", 90, 32),  # H100, H200
    "sm_100": GPUTarget("cuda", 100, 32),  # B200
    "gfx942": GPUTarget("hip", "gfx942", 64),  # MI300
}
# Bytes of shared memory that one block may have.
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Compiled:
    """What a kernel takes on a target.

    Args:
        target: a key of `TARGETS`.
        shared: bytes of shared memory per block.
        registers: vector registers per thread; on gfx942 accumulation registers are counted in.
        spills: bytes per thread that did not fit into registers; 0 is what one wants.
        kind: ``"cubin"`` or ``"hsaco"``.
        warps: warps per block.
        binary: the cubin; empty for other targets.
    """

    target: str
    shared: int
    registers: int
    spills: int
    kind: str
    warps: int
    binary: bytes = field(default=b"", repr=False)


def compile_for(
    fn: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    target: str,
    num_warps: int = 4,
    num_stages: int = 2,
    divisible: Iterable[str] = (),
    **options: Any,
) -> Compiled:
    """Compile `fn` as a launch with such arguments would.

    Args:
        fn: the ``@triton.jit`` function.
        signature: Triton type of every run-time argument: ``{"p_q": "*bf16", "T": "i32", "scale": "fp32"}``. Pointers
            are taken to be 16-byte aligned, as torch's are.
        constexprs: values of the constexpr arguments, and None for pointers that are not given.
        target: a key of `TARGETS`.
        num_warps, num_stages: launch options.
        divisible: integer arguments known to be multiples of 16 (Triton looks at the values when it launches).
        options: more launch options, such as ``maxnreg`` or ``enable_fp_fusion``.

    Raises:
        ValueError: an argument of `fn` is missing, or one is named that it does not have.
    """
    given = {**signature, **dict.fromkeys(constexprs, "constexpr")}
    if set(given) != set(fn.arg_names):
        missing, unknown = set(fn.arg_names) - set(given), set(given) - set(fn.arg_names)
        raise ValueError(f"{fn.__name__}: missing arguments {sorted(missing)}, unknown arguments {sorted(unknown)}")
    divisible = set(divisible)
    source = ASTSource(
        fn=fn,
        signature={name: given[name] for name in fn.arg_names},
        constexprs=dict(constexprs),
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(fn.arg_names)
            if given[name].startswith("*") or name in divisible
        },
    )
    options = {"num_warps": num_warps, "num_stages": num_stages, **options}
    binary = triton.compile(source, target=TARGETS[target], options=options)
    if target.startswith("sm_"):
        registers, spills = _cuda_usage(binary.asm["cubin"])
        return Compiled(target, binary.metadata.shared, registers, spills, "cubin", num_warps, binary.asm["cubin"])
    registers, spills = _amd_usage(binary.asm["amdgcn"])
    return Compiled(target, binary.metadata.shared, registers, spills, "hsaco", num_warps)


def check(*results: Compiled) -> None:
    """Nothing spilled, and no more shared memory than the target has."""
    for result in results:
        assert result.shared <= SHARED_LIMIT[result.target], result
        assert result.spills == 0, result


def _cuda_usage(cubin: bytes) -> tuple[int, int]:
    # A Triton kernel has no arrays of its own in local memory: whatever is on its stack was spilled there.
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_CUOBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def _amd_usage(assembly: str) -> tuple[int, int]:
    def field(name: str) -> int:
        return int(re.search(rf"^\s*\.{name}:\s+(\d+)", assembly, re.MULTILINE)[1])

    # Registers spilled to other registers leave no scratch memory behind, but count as spilled.
    spilled = 4 * (field("vgpr_spill_count") + field("sgpr_spill_count"))
    return field("vgpr_count"), max(spilled, field("private_segment_fixed_size"))
