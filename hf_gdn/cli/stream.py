"""hf-gdn stream: perplexity along one long stream."""

from __future__ import annotations

from ..eval.options import OutputOptions, StreamOptions
from ..loading.options import DeviceOptions, ModelOptions, TextOptions
from .app import MEASURE, command, run

OUTPUT = OutputOptions("hf-gdn-stream")


@command(
    panel=MEASURE,
    examples=[
        "hf-gdn stream --text book.txt",
        "hf-gdn stream --model ./my-model --tokens 200000 --context 4096 --sinks 4",
    ],
)
def stream(
    models: ModelOptions,
    text: TextOptions,
    stream: StreamOptions,
    device: DeviceOptions,
    output: OutputOptions = OUTPUT,
) -> None:
    """Perplexity along one long stream: attention sinks, a plain window, everything kept, the window read anew."""
    from ..eval.model_job import EvalJob

    run(EvalJob(kind="stream", models=models, text=text, stream=stream, device=device, output=output))
