"""Writes docs/models.md, the table of README and that of docs/serving.md: what each family can do, on which backend,
and what a request takes.

python scripts/models_table.py          write all
python scripts/models_table.py --check  exit 1 when one is not what would be written
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_gdn import patches, registry
from hf_gdn.gradients import has_backward
from hf_gdn.kernels.triton.runtime import MAX_HEAD_DIM
from hf_gdn.loading.shapes import CONFIGS, LARGE, SHAPES
from hf_gdn.patches import batching
from hf_gdn.patches.families.base import FEATURES
from hf_gdn.upstream import paged, versions

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- written by scripts/models_table.py -->", "<!-- end -->"
SHAPE = SHAPES[LARGE[0]]
# Of the table in docs/serving.md: models, memory of cards in GB, and tokens of a request.
SERVED = {
    "Qwen3.5-9B": ("qwen3_5_text", {}),
    "Qwen3-Next-80B": CONFIGS["qwen3_next-80b"],
    "Kimi-Linear-48B": CONFIGS["kimi_linear-48b"],
}
CARDS, CONTEXT = (24, 80, 141), 4096
VARIANTS = {"gdn": "Gated DeltaNet", "kda": "Kimi Delta Attention"}


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def backends(op: str, device: str, gradients: bool = False) -> str:
    """Backends that serve an op in bf16, the one that "auto" takes first; those with a missing package too."""
    served = []
    for kernel in registry.kernels(op):
        refusal = kernel.why_not(SHAPE.request(op, torch.device(device), torch.bfloat16))
        trains = kernel.differentiable or has_backward(kernel)
        if (refusal is None or "not installed" in refusal) and (trains or not gradients):
            served.append(kernel.backend)
    return ", ".join(served) or "none"


def features() -> str:
    rows, notes = [], []
    for name, family in patches.all_families().items():
        marks = []
        for feature in FEATURES:
            reason = dict(family.cannot).get(feature)
            if reason is not None:
                notes.append(f"`{name}`, {feature}: {reason}.")
            marks.append("yes" if reason is None else f"no ({len(notes)})")
        rows.append([f"`{name}`", VARIANTS[family.variant], family.about, f"{versions.since(name)} on", *marks])
    header = ["model type", "rule", "particular", "transformers", *FEATURES]
    return "\n".join([table(header, rows), "", *(f"{n}. {note}" for n, note in enumerate(notes, 1))])


def served() -> str:
    rows = []
    for name, family in patches.all_families().items():
        ops = f"chunk_{family.variant}", f"recurrent_{family.variant}"
        rows.append(
            [f"`{name}`", f"`{family.class_name}`"]
            + [backends(op, device) for device in ("cuda", "cpu") for op in ops]
            + [backends(ops[0], "cuda", gradients=True)]
        )
    return table(
        ["model type", "layer", "prefill, GPU", "decode, GPU", "prefill, CPU", "decode, CPU", "gradients"], rows
    )


def page() -> str:
    tests = table(["feature", "shown by"], ([name, f"`{test}`"] for name, test in FEATURES.items()))
    return f"""# Which model can do what on which backend

Written by `make docs` from the registries of `hf_gdn.patches` and `hf_gdn.registry`; `make lint` fails when it is not
what they say.

## Features

{features()}

Multimodal models are served in their text towers. A feature holds for every backend that serves the layer; tests that
walk all families show it:

{tests}

hf_gdn is tested with transformers {versions.OLDEST} to {versions.NEWEST}. A family that a later version no longer fits
stays original and is named with the reason by a warning and by `hf_gdn.status()`; all others are patched.

## Backends

In the order in which `"auto"` tries them, for bf16. `triton` and `fla` serve fp16, bf16 and fp32, head dimensions up to
{MAX_HEAD_DIM}; `fla` needs `pip install hf-gdn[fla]`; `numba` serves CPUs with the same head dimensions and needs
`pip install hf-gdn[cpu]`; `eager` serves any device and float dtype. Calls that need gradients
go to the first backend of the last column that serves them ([training.md](training.md)). Around the delta rule
`triton`, `numba` and `eager` have kernels of their own: a prologue before it and a gated norm behind it in prefill, a
step that is all of a layer between its projections in decoding. `fla` has the delta rule alone and takes prologue and
norm from `eager`.

{served()}
"""


def summary() -> str:
    """A short table: what a family cannot do, rather than all it can."""
    rows = []
    for name, family in patches.all_families().items():
        missing = ", ".join(feature for feature, _ in family.cannot) or "nothing"
        rows.append([f"`{name}`", VARIANTS[family.variant], f"{versions.since(name)} on", missing])
    return table(["model type", "layer", "transformers", "not supported"], rows)


def between(text: str, table: str) -> str:
    """A page with a new table between its marks."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END, 1)[1]}"


def requests_that_fit() -> str:
    """What a request takes, and how many requests of `CONTEXT` tokens fit on a card beside the weights."""
    rows = []
    for name, (model_type, values) in SERVED.items():
        config = AutoConfig.for_model(model_type, **values)
        with torch.device("meta"):
            weights = sum(x.numel() for x in AutoModelForCausalLM.from_config(config).parameters())
        kinds, dtype = config.layer_types, torch.bfloat16
        states = kinds.count(paged.LINEAR) * sum(batching.states_of(config).bytes(dtype))
        latent = getattr(config, "kv_lora_rank", None)  # latent attention caches one vector for all heads
        numbers = latent + config.qk_rope_head_dim if latent else 2 * config.num_key_value_heads * config.head_dim
        token = (len(kinds) - kinds.count(paged.LINEAR)) * numbers * dtype.itemsize
        fits = []
        for memory in CARDS:
            counts = [0.9 * (1e9 * memory - bytes_ * weights) // (states + CONTEXT * token) for bytes_ in (2, 0.5)]
            fits.append(" / ".join(f"{max(0, int(count)):,}" for count in counts))
        cells = [
            f"{2e-9 * weights:.0f} / {0.5e-9 * weights:.0f} GB",
            f"{states / 2**20:.1f} MiB",
            f"{token / 1024:.1f} KiB",
        ]
        rows.append([name, *cells, *fits])
    heads = ["model", "weights, bf16 / 4 bits", "states of a request", "keys and values of a token"]
    return table([*heads, *(f"{memory} GB" for memory in CARDS)], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 when something is out of date")
    check = parser.parse_args().check
    stale = []
    for path, make in (
        (ROOT / "docs" / "models.md", lambda _: page()),
        (ROOT / "README.md", lambda text: between(text, summary())),
        (ROOT / "docs" / "serving.md", lambda text: between(text, requests_that_fit())),
    ):
        here = path.read_text("utf-8") if path.exists() else ""
        wanted = make(here)
        if here != wanted:
            stale.append(path.relative_to(ROOT))
            if not check:
                path.write_text(wanted, "utf-8")
    if stale and check:
        print(f"out of date: {', '.join(map(str, stale))}; `make docs` writes them", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
