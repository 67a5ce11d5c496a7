"""Loading what is evaluated: models, tokenizers, texts, devices. Every failure is a `UserError`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..patches import all_families
from . import data

ASSETS = Path(__file__).parent / "assets"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Text:
    """A text to be scored and where it is from."""

    source: str
    text: str


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode with its tokenizer."""

    name: str
    model: Any
    tokenizer: Any


def embedded() -> list[str]:
    """Paths of the two tiny trained models that come with the package."""
    return [str(path) for path in sorted(ASSETS.iterdir()) if (path / "config.json").is_file()]


def pick_device(name: str | None) -> torch.device:
    """The device asked for, or the best there is."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        available = ["cpu"]
        available += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        available += ["mps"] if torch.backends.mps.is_available() else []
        raise UserError(f"--device {name} cannot be used; devices here: {', '.join(available)}") from error
    return device


def pick_dtype(name: str | None, model: str, device: torch.device) -> torch.dtype:
    """The dtype asked for; else float32, or bfloat16 for other models than the embedded ones on an accelerator."""
    if name is None:
        return torch.float32 if device.type == "cpu" or model in embedded() else torch.bfloat16
    if name not in DTYPES:
        raise UserError(f"--dtype {name} is not known; dtypes: {', '.join(DTYPES)}")
    return DTYPES[name]


def load(name: str, device: torch.device, dtype: torch.dtype) -> Loaded:
    """Load a model and its tokenizer from a folder or the hub."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"model {name!r} cannot be read: {_first_line(error)}") from error
    if config.model_type not in all_families():
        raise UserError(
            f"model {name!r} is of type {config.model_type!r}, which hf_gdn does not patch; "
            f"types: {', '.join(all_families())}"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError) as error:
        raise UserError(f"model {name!r} cannot be loaded: {_first_line(error)}") from error
    if not tokenizer("text").input_ids:
        raise UserError(f"model {name!r} cannot be loaded: it has no tokenizer that reads text")
    label = Path(name).name if name in embedded() else name
    model.to(device)  # type: ignore[arg-type]
    return Loaded(label, model.eval(), tokenizer)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_text(path: str | None) -> Text:
    """The text of a UTF-8 file; None takes the held-out modules of the Python standard library."""
    if path is None:
        return Text("held-out modules of the Python standard library", data.held_out_text())
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"text {path!r} cannot be read as UTF-8: {_first_line(error)}") from error
    if not text.strip():
        raise UserError(f"text {path!r} is empty")
    return Text(path, text)


def windows(tokenizer: Any, text: Text, context: int, limit: int) -> Tensor:
    """Windows of tokens spread evenly over a text, ``[N, context]`` with N at most `limit`.

    A text shorter than a window makes one shorter window. Raises UserError when it has fewer than 16 tokens.
    """
    ids = tokenizer(text.text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]
    if len(ids) < 16:
        raise UserError(f"text {text.source!r} has {len(ids)} tokens; at least 16 are needed")
    context = min(context, len(ids))
    whole = ids[: len(ids) // context * context].view(-1, context)
    return whole[torch.linspace(0, len(whole) - 1, min(limit, len(whole))).round().long()]
