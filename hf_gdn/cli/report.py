"""hf-gdn report, ppl and speed: is the patched model still the same, and how much faster does it generate?"""

from __future__ import annotations

from ..eval.options import OutputOptions, ParityOptions, SpeedOptions
from ..loading.options import DeviceOptions, ModelOptions, TextOptions
from .app import COMPARE, command, run

ONE_FORWARD = ParityOptions(modes=("prefill",))
WITH_MTP = SpeedOptions(variants=("eager", "mtp"))
PPL_OUTPUT, SPEED_OUTPUT = OutputOptions("hf-gdn-ppl"), OutputOptions("hf-gdn-speed")


@command(
    panel=COMPARE,
    examples=[
        "hf-gdn report",
        "hf-gdn report --model ./my-model --text notes.txt --output out",
        "hf-gdn report --config qwen3_next-80b --layers 4 --set num_experts=16",
        "hf-gdn report --output out --resume",
    ],
)
def report(
    models: ModelOptions,
    text: TextOptions,
    parity: ParityOptions,
    device: DeviceOptions,
    output: OutputOptions,
    speed: SpeedOptions = WITH_MTP,
) -> None:
    """Is the patched model still the same, and how much faster does it generate? Exits 1 when it is not the same."""
    from ..eval.model_job import EvalJob

    run(EvalJob(models=models, text=text, parity=parity, speed=speed, device=device, output=output))


@command(
    panel=COMPARE,
    examples=[
        "hf-gdn ppl --model ./my-model --windows 0 --mode prefill,decode",
        "hf-gdn ppl --dataset Salesforce/wikitext:wikitext-2-raw-v1",
        "hf-gdn ppl --dtype bfloat16 --tolerance kl_mean=1e-3",
    ],
)
def ppl(
    models: ModelOptions,
    text: TextOptions,
    device: DeviceOptions,
    parity: ParityOptions = ONE_FORWARD,
    output: OutputOptions = PPL_OUTPUT,
) -> None:
    """Perplexity, KL divergence and other distances of the patched model from the original. Exits 1 when too large."""
    from ..eval.model_job import EvalJob

    run(EvalJob(kind="ppl", models=models, text=text, parity=parity, device=device, output=output))


@command(
    panel=COMPARE,
    examples=[
        "hf-gdn speed --batch 1,8 --prompt 512,4096 --variant eager,static",
        "hf-gdn speed --config qwen3_next-80b --layers 8 --variant graph",
        "hf-gdn speed --variant lookup --prompt 96,384 --new-tokens 256",
    ],
)
def speed(
    models: ModelOptions,
    text: TextOptions,
    speed: SpeedOptions,
    device: DeviceOptions,
    output: OutputOptions = SPEED_OUTPUT,
) -> None:
    """Time to first token, time per token and memory of generate, original and patched in turns."""
    from ..eval.model_job import EvalJob

    run(EvalJob(kind="speed", models=models, text=text, speed=speed, device=device, output=output))
