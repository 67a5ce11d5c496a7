"""hf-gdn kernels: ops and whole layers, timed and checked."""

from __future__ import annotations

from ..eval.options import KernelBenchOptions, OutputOptions
from ..loading.options import DeviceOptions
from .app import MEASURE, command, run

OUTPUT = OutputOptions("hf-gdn-kernels")


@command(
    panel=MEASURE,
    examples=[
        "hf-gdn kernels --tokens 512,8192 --direction forward,backward",
        "hf-gdn kernels --op recurrent_gdn,step_gdn --gpu-graph",
        "hf-gdn kernels --level layer --phase decode --batch 1,4,8",
        "hf-gdn kernels --level layer --phase prefill --tokens 512 --dtype bfloat16",
    ],
)
def kernels(kernels: KernelBenchOptions, device: DeviceOptions, output: OutputOptions = OUTPUT) -> None:
    """Time ops, or whole layers, on every backend that serves them, each result checked before it is timed.

    Ops are compared with transformers' functions and with this machine's own ceilings; a layer with the original and
    with its projections alone. Exits 1 when a result is wrong.
    """
    from ..eval.kernel_job import KernelJob

    run(KernelJob(options=kernels, device=device, output=output))
