"""What is scored: texts from files, data sets or the standard library, cut into windows. Failures are `UserError`."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, reason
from . import stdlib_text

# Between documents, as it is usual for WikiText.
JOIN = "\n\n"


@dataclass(frozen=True)
class Text:
    """A text to be scored and where it is from."""

    source: str
    text: str


@dataclass(frozen=True)
class Windows:
    """Windows of a text.

    Attributes:
        ids: tokens ``[N, context]``.
        begin: ``[N]``, where in the text each window begins, in tokens.
        first: ``[N]``, the first position in each window that is scored; the others were, in an earlier window.
        text_tokens: tokens of the whole text.
    """

    ids: Tensor
    begin: Tensor
    first: Tensor
    text_tokens: int

    @property
    def scored(self) -> int:
        """How many tokens are scored."""
        return int((self.ids.shape[1] - self.first).sum())


# ---------------------------------------------------------------------------------------------------------------- texts


def embedded() -> Text:
    """The held-out modules of the Python standard library."""
    return Text("held-out modules of the Python standard library", stdlib_text.held_out_text())


def read_files(paths: Sequence[str], field: str = "text") -> Text:
    """The documents of files, in order.

    Args:
        paths: ``.jsonl`` (an object a line), ``.parquet``, or anything else as UTF-8 text, one document a file.
        field: the field or column that holds the text in the first two.
    """
    documents = [document for path in paths for document in _read_file(Path(path), field)]
    return _joined(", ".join(paths), documents)


def _read_file(path: Path, field: str) -> list[str]:
    try:
        if path.suffix == ".parquet":
            return _read_parquet(path, field)
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"text {str(path)!r} cannot be read as UTF-8: {reason(error)}") from error
    return _read_jsonl(path, text, field) if path.suffix == ".jsonl" else [text]


def _read_jsonl(path: Path, text: str, field: str) -> list[str]:
    documents = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"text {str(path)!r}, line {number} is no JSON: {reason(error)}") from error
        if not isinstance(row, dict):
            raise UserError(f"text {str(path)!r}, line {number}: expected a JSON object, got {type(row).__name__}")
        documents.append(_field(row, field, f"text {str(path)!r}, line {number}"))
    return documents


def _read_parquet(path: Path, field: str) -> list[str]:
    if not path.is_file():
        raise UserError(f"text {str(path)!r} cannot be read: No such file")
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("reading .parquet needs pyarrow: pip install 'hf-gdn[eval]'") from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
        _field(dict.fromkeys(file.schema_arrow.names, ""), field, f"text {str(path)!r}")
        column = file.read(columns=[field]).column(0).to_pylist()
    except (OSError, MemoryError, pyarrow.ArrowException) as error:
        raise UserError(f"text {str(path)!r} cannot be read as parquet: {reason(error)}") from error
    return [_field({field: value}, field, f"text {str(path)!r}, row {row}") for row, value in enumerate(column)]


def read_dataset(name: str, split: str, field: str = "text") -> Text:
    """The documents of a data set of the `datasets` library.

    Args:
        name: ``NAME`` or ``NAME:CONFIG``; a path works as well.
        split: ``"test"``, ``"train[:100]"``, ...
        field: the column that holds the text.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError("--dataset needs the datasets library: pip install 'hf-gdn[eval]'") from error
    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # its errors are raised, too
    path, _, config = name.partition(":")
    try:
        found = datasets.load_dataset(path, config or None, split=split)
    except (
        OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, MemoryError, EOFError,
        datasets.exceptions.DatasetsError,
    ) as error:  # fmt: skip
        raise UserError(f"data set {name!r}, split {split!r}, cannot be loaded: {reason(error)}") from error
    _field(dict.fromkeys(found.column_names, ""), field, f"data set {name!r}")
    documents = [
        _field({field: value}, field, f"data set {name!r}, row {row}") for row, value in enumerate(found[field])
    ]
    return _joined(f"{name}, split {split}", documents)


def _field(row: dict[str, Any], field: str, where: str) -> str:
    if field not in row:
        raise UserError(f"{where} has no field {field!r}; fields: {', '.join(map(str, row))} (--field)")
    if not isinstance(row[field], str):
        raise UserError(f"{where}: field {field!r} must be text, got {type(row[field]).__name__}")
    return row[field]


def _joined(source: str, documents: Sequence[str]) -> Text:
    text = JOIN.join(document for document in documents if document.strip())
    if not text:
        raise UserError(f"text {source!r} is empty")
    return Text(source, text)


# -------------------------------------------------------------------------------------------------------------- windows


def tokenize(tokenizer: Any, text: Text) -> Tensor:
    """Tokens of a text, ``[L]``, without special tokens."""
    return tokenizer(text.text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]


def windows(
    ids: Tensor, context: int, stride: int | None = None, limit: int | None = None, source: str = ""
) -> Windows:
    """Sliding windows over tokens ``[L]``.

    A window begins every `stride` tokens and scores those that no earlier one has scored, the first window all but its
    first token. A last window, moved back so that it is full, takes the rest.

    Args:
        ids: ``[L]``.
        context: tokens a window.
        stride: tokens between the beginnings of two windows, `context` by default: windows do not overlap.
        limit: take only so many windows, evenly spread.
        source: name of the text, for errors.

    Raises:
        UserError: the text is shorter than a window, or `stride` is not in 1 to `context`.
    """
    stride = context if stride is None else stride
    if not 1 <= stride <= context:
        raise UserError(f"--stride must be between 1 and --context {context}, got {stride}")
    if len(ids) < context:
        raise UserError(f"text {source!r} has {len(ids)} tokens, a window takes {context}; give a shorter --context")
    begin = torch.arange(0, len(ids) - context + 1, stride)
    first = torch.full_like(begin, max(1, context - stride))
    first[0] = 1
    end = int(begin[-1]) + context
    if limit is not None and limit < len(begin):
        chosen = torch.linspace(0, len(begin) - 1, limit).round().long()
        begin, first = begin[chosen], first[chosen]
    elif end < len(ids):
        begin = torch.cat((begin, torch.tensor([len(ids) - context])))
        first = torch.cat((first, torch.tensor([max(1, end - len(ids) + context)])))
    return Windows(ids[begin[:, None] + torch.arange(context)], begin, first, len(ids))
