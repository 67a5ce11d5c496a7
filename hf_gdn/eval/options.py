"""What can be asked of a measurement, in groups; commands combine them. The command line prints these texts as help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..options import option


@dataclass(frozen=True)
class OutputOptions:
    """Where results go."""

    PANEL: ClassVar[str] = "Output"
    output: str = option("hf-gdn-report", "Folder for report.json, .md, .csv and .html.")
    resume: bool = option(False, "Continue the interrupted run in the output folder.")
    quiet: bool = option(False, "Print only the verdict: no progress bars, no tables.")


@dataclass(frozen=True)
class ParityOptions:
    """How windows of a text are read by original and patched; `hf_gdn.eval.parity`."""

    PANEL: ClassVar[str] = "Parity"
    context: int = option(512, "Tokens per window.", minimum=2)
    stride: int | None = option(None, "Tokens from one window's start to the next; --context by default.", minimum=1)
    windows: int = option(16, "Number of windows to score, evenly spread over the text; 0 for all.", minimum=0)
    batch_size: int | None = option(
        None, "Windows per forward; chosen by the size of the logits by default.", minimum=1
    )
    modes: tuple[str, ...] = option(
        ("prefill", "decode", "mixed"),
        "How the text is processed: prefill, decode, mixed; separate several with commas.",
        name="mode",
    )
    tolerance: tuple[str, ...] = option(
        (),
        "Change a bound of the verdict, repeatable: ppl_ratio=VALUE, kl_mean=VALUE, same_top=VALUE.",
        repeat=True,
    )


@dataclass(frozen=True)
class SpeedOptions:
    """Which calls of `generate` are timed: every combination of batch size, prompt length and variant."""

    PANEL: ClassVar[str] = "Speed"
    batch: tuple[int, ...] = option((), "Batch sizes, separated by commas; 1,8 on a GPU, 1,4 elsewhere by default.")
    prompt: tuple[int, ...] = option(
        (), "Prompt lengths, separated by commas; 512,4096 on a GPU, 128,512 elsewhere by default."
    )
    new_tokens: int | None = option(
        None, "Tokens to generate, past any end of sequence; 128, or 64 on a CPU, by default.", minimum=2
    )
    rounds: int = option(5, "Number of timed calls of each side, after the warm-up.", minimum=1)
    variants: tuple[str, ...] = option(
        ("eager",),
        "How generate runs: eager, static, compile, graph (a CUDA graph), lookup (prompt lookup), "
        "mtp (multi-token prediction; left out where a checkpoint has no head for it); separate several with commas.",
        name="variant",
    )
    draft_tokens: int | None = option(None, "Longest draft; 10 for lookup, 6 for mtp, by default.", minimum=1)


@dataclass(frozen=True)
class StreamOptions:
    """What of a long stream is read and kept; `samples` windows are read anew, `timed` tokens one at a time."""

    PANEL: ClassVar[str] = "Stream"
    tokens: int = option(50_000, "Maximum number of tokens of the stream.", minimum=2)
    context: int = option(512, "Number of tokens kept; use the length the model was trained on.", minimum=2)
    sinks: int = option(4, "How many of them are the first tokens (attention sinks).", minimum=1)
    samples: int = 200
    timed: int = 200


@dataclass(frozen=True)
class KernelBenchOptions:
    """Which kernels or layers are timed; empty means the defaults."""

    PANEL: ClassVar[str] = "Kernels"
    level: str = option("op", "op: kernels alone; layer: whole layers, original, patched, and their projections alone.")
    shapes: tuple[str, ...] = option(
        (), "Named shapes, separated by commas: qwen3_next-80b, kimi_linear-48b, ...", name="shape"
    )
    ops: tuple[str, ...] = option(
        (), "Ops, separated by commas; the chunked and recurrent ops of the shapes by default.", name="op"
    )
    backends: tuple[str, ...] = option(
        (), "Backends, separated by commas; every backend that serves by default.", name="backend"
    )
    batch: tuple[int, ...] = option((), "Batch sizes, separated by commas.")
    tokens: tuple[int, ...] = option(
        (), "Sequence lengths, separated by commas; recurrent ops take them where --op names them."
    )
    directions: tuple[str, ...] = option(
        ("forward",), "Of ops: forward, backward (the two together), or both.", name="direction"
    )
    phases: tuple[str, ...] = option(
        ("prefill", "decode"), "Of layers: prefill, decode (one token), or both.", name="phase"
    )
    normalized: bool = option(
        False, "Chunked and recurrent ops get q and k normalized, as a patched model's layers call them."
    )
    quantize: str | None = option(None, "Of layers: quantize the projections' weights: int8 (weight-only, by torchao).")
    gpu_graph: bool = option(False, "Time calls in a CUDA graph: the device's time without Python and launches.")
    first_call: bool = option(
        False, "Of layers: also a new process's first prefill and token, with Triton's cache empty and filled."
    )
    seconds: float = option(1.0, "Seconds to spend on one measurement.")
    rounds: int = option(5, "Of layers: number of turns that the sides take.", minimum=1)


@dataclass(frozen=True)
class TrainOptions:
    """How original and patched are trained, and compared; `hf_gdn.eval.training`."""

    PANEL: ClassVar[str] = "Training"
    steps: int = option(20, "Number of steps (AdamW, constant learning rate).", minimum=1)
    batch: int = option(4, "Windows per step, over all processes.", minimum=1)
    context: int = option(256, "Tokens per window.", minimum=16)
    lr: float = option(1e-4, "Learning rate.", minimum=0)
    lora: int | None = option(None, "Train LoRA adapters of this rank on all Linear layers, by PEFT.", minimum=1)
    packed: bool = option(
        False,
        "Cut windows into documents: the patched model reads them packed in one row, the original, which mixes packed "
        "documents, as padded rows.",
    )
    checkpointing: bool = option(False, "Recompute activations in the backward (gradient checkpointing).")
    seed: int = option(0, "Seed of the order of windows, of document lengths and of adapters.", minimum=0)
    tolerance: tuple[str, ...] = option(
        (),
        "Change a bound of the verdict, repeatable: gradient=VALUE, loss=VALUE, ppl_ratio=VALUE.",
        repeat=True,
    )
