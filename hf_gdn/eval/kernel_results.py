"""What `hf-gdn kernels` finds: a row an op and backend, or a row a layer and side (docs/report.md)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ceilings:
    """What the machine reaches: GB/s in a copy, TFLOP/s in a matrix product."""

    copy_gb_s: float
    matmul_tflop_s: float


@dataclass(frozen=True)
class KernelRow:
    """A call of an op on one backend, as docs/report.md explains it; no time without a right result."""

    op: str
    shape: str
    batch: int
    tokens: int
    direction: str
    backend: str
    k_heads: int | None = None
    v_heads: int | None = None
    head_k_dim: int | None = None
    head_v_dim: int | None = None
    dtype: str = ""
    gpu_graph: bool = False
    ms: float | None = None
    low: float | None = None
    high: float | None = None
    runs: int | None = None
    first_ms: float | None = None
    tflop_s: float | None = None
    gb_s: float | None = None
    share_compute: float | None = None
    share_bandwidth: float | None = None
    speedup: float | None = None
    memory_ratio: float | None = None
    extra_mib: float | None = None
    goal_ms: float | None = None
    error: float | None = None
    worst: str | None = None
    budget: float | None = None
    oracle: str | None = None
    passed: bool | None = None
    note: str | None = None

    @property
    def name(self) -> str:
        """In short."""
        backward = " + backward" if self.direction == "backward" else ""
        return f"{self.op}{backward}, {self.shape}, {self.batch} × {self.tokens}, {self.backend}"


@dataclass(frozen=True)
class LayerRow:
    """A whole layer's prefill or decode step: original, patched on a backend, or its projections alone."""

    shape: str
    phase: str
    batch: int
    tokens: int
    side: str
    dtype: str = ""
    quantize: str | None = None
    gpu_graph: bool = False
    ms: float | None = None
    low: float | None = None
    high: float | None = None
    runs: int | None = None
    first_ms: float | None = None
    speedup: float | None = None
    share_projections: float | None = None
    beside_ms: float | None = None
    moved_bytes: int | None = None
    flops: int | None = None
    floor_ms: float | None = None
    goal_ms: float | None = None
    error: float | None = None
    budget: float | None = None
    passed: bool | None = None
    note: str | None = None

    @property
    def name(self) -> str:
        """In short."""
        return f"layer {self.phase}, {self.shape}, {self.batch} × {self.tokens}, {self.side}"
