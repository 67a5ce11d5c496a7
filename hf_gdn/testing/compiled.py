"""Compile the launches of a Triton kernel for a card that is not there, and read what the compiler made of them.

No GPU is needed: Triton brings ptxas and the AMDGPU backend along. It has to be a process without TRITON_INTERPRET,
since a kernel decorated by the interpreter cannot be compiled.

    from hf_gdn.testing.compiled import check, launches

    call = registry.ops()["chunk_kda"].make_inputs(T=1000, HK=32, HV=32, K=128, V=128, device="meta")
    for launch in launches(registry.get("chunk_kda", "triton").fn, call, "sm_90"):
        check(launch.compile())
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

from ..kernels.triton import backward_scans, prepared, segmented_scan, step

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
        ir: Triton's GPU representation, before it becomes instructions.
    """

    target: str
    shared: int
    registers: int
    spills: int
    kind: str
    warps: int
    binary: bytes = field(default=b"", repr=False)
    ir: str = field(default="", repr=False)


@dataclass(frozen=True)
class Launch:
    """A kernel as it would be launched on `target`, a key of `TARGETS`: arguments by name, and launch options."""

    kernel: Any
    target: str
    arguments: Mapping[str, Any]
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Name of the kernel's function, without the leading underscore."""
        return self.kernel.__name__.removeprefix("_")

    def compile(self) -> Compiled:
        """Compile it as Triton does at such a launch: an argument that is 1 or None is a constant, an integer may be
        known to be a multiple of 16, and pointers are 16-byte aligned, as torch's are.
        """
        constants, signature, divisible = {}, {}, {}
        for i, parameter in enumerate(self.kernel.params):
            name, value = parameter.name, self.arguments[parameter.name]
            is_constant = parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1)
            signature[name] = "constexpr" if is_constant else mangle_type(value)
            if is_constant:
                constants[name] = value
            elif isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
                divisible[i,] = [["tt.divisibility", 16]]
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=divisible)
        binary = triton.compile(source, target=TARGETS[self.target], options=dict(self.options))
        shared, warps = binary.metadata.shared, binary.metadata.num_warps
        if self.target.startswith("sm_"):
            registers, spills = _cuda_usage(binary.asm["cubin"])
            cubin, ir = binary.asm["cubin"], binary.asm["ttgir"]
            return Compiled(self.target, shared, registers, spills, "cubin", warps, cubin, ir)
        registers, spills = _amd_usage(binary.asm["amdgcn"])
        return Compiled(self.target, shared, registers, spills, "hsaco", warps)


def launches(fn: Callable[..., Any], call: Mapping[str, Any], target: str, segments: int | None = None) -> list[Launch]:
    """What a call of `fn` launches on `target`, in order; nothing runs.

    Args:
        fn: the function of a Triton kernel.
        call: its arguments. Their device does not matter: tensors on ``"meta"`` take no memory.
        target: a key of `TARGETS`.
        segments: into how many segments the chunk kernels cut a long sequence; by default as on an H200.
    """
    found: list[Launch] = []

    class Unlaunched:
        """Stands for a kernel that was compiled to be launched later."""

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *args: None

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **given: Any) -> Unlaunched:
        arguments = {**dict(zip(kernel.arg_names, args)), **given}
        options = {name: arguments.pop(name) for name in set(arguments) - set(kernel.arg_names)}
        found.append(Launch(kernel, target, arguments, options))
        return Unlaunched()

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", record))
        for kept in (step._launchers, prepared._compiled):
            stack.enter_context(mock.patch.dict(kept, clear=True))
        for module in (segmented_scan, backward_scans):
            stack.enter_context(mock.patch.object(module, "shared_memory", lambda device: SHARED_LIMIT[target]))
        stack.enter_context(mock.patch.object(torch.version, "hip", "6.0" if target.startswith("gfx") else None))
        if segments is not None:
            stack.enter_context(mock.patch.object(segmented_scan, "segment_count", lambda *_: segments))
        fn(**call)
    return found


def check(result: Compiled, spills: int = 0) -> Compiled:
    """Check that a block needs no more shared memory than it may have, and that at most `spills` bytes are spilled."""
    assert result.shared <= SHARED_LIMIT[result.target], result
    assert result.spills <= spills, result
    return result


# Operations that hand a value on in another place, layout or precision.
_HANDED_ON = re.compile(
    r"(ttg\.(local_alloc|local_load|convert_layout|memdesc_\w+)|arith\.\w+|math\.\w+|tt\.(trans|reshape))$"
)


def transposed_products(ir: str) -> list[str]:
    """Products on Hopper's wgmma of which an operand is the transposed result of another product.

    Triton 3.4 to 3.7.0 makes wrong code of these for sm_90 (flash-linear-attention, issues 640 and 984).

    Args:
        ir: of a kernel that was compiled for sm_90.

    Returns:
        Names of the products in `ir`.
    """
    made: dict[str, tuple[str, list[str]]] = {}
    for line in ir.splitlines():
        found = re.match(r"\s*%([\w.$-]+)(?::\d+)? = \"?([\w.]+)\"?(.*)", line)
        if found:
            operands = re.findall(r"%([\w.$-]+)", found[3].partition(" : ")[0])
            made[found[1]] = found[2], operands

    def is_product(name: str) -> bool:
        return made.get(name, ("",))[0] in ("ttng.warp_group_dot", "ttng.warp_group_dot_wait", "tt.dot")

    def reaches(name: str, transposed: bool) -> bool:
        if is_product(name):
            return transposed
        operation, operands = made.get(name, ("", []))
        turned = transposed or operation in ("tt.trans", "ttg.memdesc_trans")
        return bool(_HANDED_ON.match(operation)) and any(reaches(operand, turned) for operand in operands)

    products = [name for name, (operation, _) in made.items() if operation == "ttng.warp_group_dot"]
    return [name for name in products if any(reaches(operand, False) for operand in made[name][1][:2])]


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
        return int(re.findall(rf"^\s*\.{name}:\s+(\d+)", assembly, re.MULTILINE)[0])

    # Registers spilled to other registers leave no scratch memory behind, but count as spilled.
    spilled = 4 * (field("vgpr_spill_count") + field("sgpr_spill_count"))
    return field("vgpr_count"), max(spilled, field("private_segment_fixed_size"))
