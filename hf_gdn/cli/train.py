"""hf-gdn train: does a patched model train the same, how fast, and in how much memory?"""

from __future__ import annotations

from ..eval.options import OutputOptions, TrainOptions
from ..loading.options import DeviceOptions, ModelOptions, TextOptions
from .app import COMPARE, command, run

OUTPUT = OutputOptions("hf-gdn-train")


@command(
    panel=COMPARE,
    examples=[
        "hf-gdn train --steps 50 --batch 8",
        "hf-gdn train --model ./my-model --text notes.txt --dtype bfloat16 --lora 16",
        "hf-gdn train --packed --checkpointing",
    ],
)
def train(
    models: ModelOptions,
    text: TextOptions,
    train: TrainOptions,
    device: DeviceOptions,
    output: OutputOptions = OUTPUT,
) -> None:
    """Does the patched model train the same, how fast, and in how much memory? Exits 1 when it does not."""
    from ..eval.model_job import EvalJob

    run(EvalJob(kind="train", models=models, text=text, train=train, device=device, output=output))
