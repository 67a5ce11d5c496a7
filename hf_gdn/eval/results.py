"""What measurements find, from the row that is computed to report.json: dataclasses (docs/report.md)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .. import __version__
from .kernel_results import Ceilings, KernelRow, LayerRow
from .parity_results import Comparison, Parity
from .records import absent
from .spreads import Spread, TailSpread
from .training_results import Training

# Version of the layout of report.json (docs/report.md).
SCHEMA = 2


# --------------------------------------------------------------------------------------------------------------- speed


@dataclass(frozen=True)
class SideFigures:
    """Figures of one side of a speed cell."""

    ttft_ms: Spread
    tpot_ms: TailSpread
    prefill_tokens_s: Spread
    decode_tokens_s: Spread
    generate_tokens_s: Spread
    peak_mib: float | None
    first_call_s: float


@dataclass(frozen=True)
class Speedup:
    """Original time over patched time, turn by turn."""

    prefill: Spread
    decode: Spread
    generate: Spread


@dataclass(frozen=True)
class TokenMatch:
    """Did both sides generate the same tokens?

    ``verdict``: "same", "tie" (they part where the original's own logits for the two tokens are closer than its dtype's
    rounding) or "other"; for the latter two ``row`` and ``token``, where they part first, and ``gap`` of the logits.
    """

    verdict: str
    row: int | None = absent()
    token: int | None = absent()
    gap: float | None = absent()


@dataclass(frozen=True)
class Drafts:
    """Of the calls that draft, all rounds together: drafts, their tokens, and those of them that were accepted."""

    count: int
    drafted: int
    accepted: int


@dataclass(frozen=True)
class SpeedCell:
    """One combination of batch size, prompt length and variant; without figures where it failed."""

    batch: int
    prompt: int
    new_tokens: int
    variant: str
    counts: bool
    failed: str | None = absent()
    rounds: int | None = absent()
    original: SideFigures | None = absent()
    patched: SideFigures | None = absent()
    speedup: Speedup | None = absent()
    tokens: TokenMatch | None = absent()
    drafts: Drafts | None = absent()
    repeatable: bool | None = absent()

    @property
    def name(self) -> str:
        """In short: variant, batch and prompt."""
        return f"{self.variant}, {self.batch} × {self.prompt}"

    def sides(self) -> dict[str, SideFigures]:
        """Original and patched; empty where it failed."""
        both = {"original": self.original, "patched": self.patched}
        return {name: side for name, side in both.items() if side is not None}

    def speedups(self) -> dict[str, Spread]:
        """By measure; empty where it failed."""
        return {} if self.speedup is None else dict(vars(self.speedup))


@dataclass(frozen=True)
class Speed:
    """The part of a report that says how fast it is."""

    cells: list[SpeedCell]
    passed: bool


# ------------------------------------------------------------------------------------------------------------- streams


# Ways of reading a stream.
STREAM_WAYS = {
    "fresh": "windows at the training length",
    "sinks": "attention sinks",
    "window": "window without sinks",
    "dense": "everything kept",
    "re-read": "window read anew for every token",
}


@dataclass(frozen=True)
class StreamWay:
    """A stream read in one way.

    ``stretches``: perplexity of each stretch; ``ratio`` to ``fresh`` on the same tokens, and of the stretch farthest
    from it, ``worst``; ``bytes`` held by the cache at the end; ``tokens_s``: one at a time, at the end.
    """

    perplexity: float
    scored: int
    ratio: float
    stretches: list[float | None]
    worst: float | None
    bytes: int | None
    tokens_s: float | None


@dataclass(frozen=True)
class Stream:
    """The part of a report on one long stream; ``ends``: of the stretches that perplexities are of."""

    text: str
    tokens: int
    context: int
    sinks: int
    ends: list[int]
    ways: dict[str, StreamWay]
    passed: bool


# -------------------------------------------------------------------------------------------------------------- models


@dataclass
class ModelResult:
    """A model: what it is, on which code it runs, and the parts that were asked for."""

    model: str
    name: str
    revision: str | None
    model_type: str
    random_weights: bool
    settings: list[str]
    parameters: int
    dtype: str
    quantize: str | None
    attention: str | None
    device_map: dict[str, str]
    tensor_parallel: bool
    baseline: dict[str, str]
    kernels: dict[str, str]
    parity: Parity | None = absent()
    speed: Speed | None = absent()
    stream: Stream | None = absent()
    training: Training | None = absent()
    not_patched: str | None = absent()
    passed: bool = False

    def cells(self) -> list[SpeedCell]:
        """Of the speed part, none where there is none."""
        return [] if self.speed is None else self.speed.cells

    def comparisons(self) -> list[Comparison]:
        """Of the parity part, none where there is none."""
        return [] if self.parity is None else self.parity.comparisons


# ------------------------------------------------------------------------------------------------------------- reports


@dataclass
class Report:
    """Everything that report.json holds."""

    schema: int = SCHEMA
    hf_gdn: str = __version__
    processes: int = 1
    kind: str = ""
    date: str = ""
    command: str = ""
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    backend: str | None = absent()
    ceilings: Ceilings | None = absent()
    left_out: list[str] | None = absent()
    results: list[ModelResult] = field(default_factory=list)
    kernels: list[KernelRow] | None = absent()
    layers: list[LayerRow] | None = absent()
    passed: bool = False

    def timed(self) -> list[KernelRow | LayerRow]:
        """Rows of kernels and layers."""
        return [*(self.kernels or []), *(self.layers or [])]
