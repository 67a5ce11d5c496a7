"""Which models, texts and devices; commands combine these groups. The command line prints these texts as help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..options import option


@dataclass(frozen=True)
class ModelOptions:
    """Which models, and how they are loaded and patched."""

    PANEL: ClassVar[str] = "Model"
    models: tuple[str, ...] = option(
        (), "Folder or hub name, repeatable; the two embedded models by default.", name="model", repeat=True
    )
    config: str | None = option(
        None, "Random weights at this config: qwen3_next-80b, kimi_linear-48b, an embedded model's, or a path."
    )
    layers: int | None = option(None, "Keep only the first N layers of --config.", minimum=1)
    settings: tuple[str, ...] = option(
        (), "Change a field of --config, repeatable, e.g. num_experts=16.", name="set", repeat=True
    )
    revision: str | None = option(None, "Revision of a hub model.")
    attention: str | None = option(None, "Attention implementation; transformers' choice by default.", name="attn")
    device_map: str | None = option(None, "Spread a model over devices: auto, balanced, ...")
    quantize: str | None = option(None, "Quantize the weights of Linear layers: int8 (weight-only, by torchao).")
    tensor_parallel: bool = option(False, "Split a model over the processes by its tensor-parallel plan.", name="tp")
    backend: str = option("auto", "Backend: auto, or a name; a named backend serves every call or raises.")


@dataclass(frozen=True)
class TextOptions:
    """Which text is read; with neither files nor a data set, held-out modules of the standard library."""

    PANEL: ClassVar[str] = "Text"
    files: tuple[str, ...] = option(
        (),
        ".txt, .jsonl or .parquet, repeatable; held-out standard library modules by default.",
        name="text",
        repeat=True,
    )
    field: str = option("text", "Name of the text field in .jsonl and .parquet files and data sets.")
    dataset: str | None = option(None, "Data set to read: NAME or NAME:CONFIG.")
    split: str = option("test", "Split of --dataset.")


@dataclass(frozen=True)
class DeviceOptions:
    """Where it runs."""

    PANEL: ClassVar[str] = "Device"
    device: str | None = option(None, "cpu, cuda, cuda:1, ...; the first GPU if there is one by default.")
    dtype: str | None = option(
        None,
        "float32, bfloat16 or float16; a checkpoint's own by default, float32 for the embedded models and for random "
        "weights on a CPU.",
    )
    threads: int | None = option(None, "Number of CPU threads; torch's choice by default.", minimum=1)
