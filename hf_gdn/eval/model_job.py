"""Jobs about whole models: are they the same when patched, how fast do they generate, how do they read long
streams, do they train the same?"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .. import registry
from ..errors import PatchError, UserError
from ..loading import models, texts
from ..loading.models import Loaded, Source
from ..loading.options import ModelOptions, TextOptions
from ..patches import layer_kernels, patched
from ..upstream import configs
from . import long_stream, machine, parity, progress, speed, training
from .distributed import Processes
from .job import Job, Plan, pick_device
from .options import ParityOptions, SpeedOptions, StreamOptions, TrainOptions
from .results import ModelResult, Report
from .resume import Work


@dataclass(frozen=True, kw_only=True)
class EvalJob(Job):
    """What to run on models.

    Args:
        kind: what report.json calls it.
        models, text: which models, and the text that they read.
        parity, speed, stream, train: the parts to run; None leaves one out.
    """

    kind: str = "report"
    models: ModelOptions = ModelOptions()
    text: TextOptions = TextOptions()
    parity: ParityOptions | None = None
    speed: SpeedOptions | None = None
    stream: StreamOptions | None = None
    train: TrainOptions | None = None

    @property
    def tensor_parallel(self) -> bool:
        return self.models.tensor_parallel

    def plan(self, processes: Processes, bars: progress.Bars) -> Plan:
        sources = sources_of(self.models)
        _check(self)
        device = pick_device(self, processes)
        if self.speed is not None:
            speed.plan(self.speed, device)
        with bars.busy("reading the text"):
            text = processes.each(lambda: _read_text(self.text))
        groups = (self.models, self.text, self.device, self.parity, self.speed, self.stream, self.train)
        identity = {name: value for group in groups if group is not None for name, value in asdict(group).items()}
        identity |= {"models": [source.name for source in sources], "text": _sha256(text.text)}

        def measure(work: Work) -> Report:
            found = [
                evaluate(self, source, text, device, work.of_part(f"{number}-"))
                for number, source in enumerate(sources)
            ]
            results = [result for result in found if result is not None]
            return Report(backend=self.models.backend, results=results, passed=all(result.passed for result in results))

        return Plan(device, identity, measure)


def sources_of(options: ModelOptions) -> tuple[Source, ...]:
    """The models that options ask for, the embedded ones where they name none."""
    if options.config is not None and options.models:
        raise UserError("--model and --config were both given; expected one of them")
    if options.config is None and (options.layers is not None or options.settings):
        raise UserError("--layers and --set change a --config, and none was given")
    where: dict[str, Any] = {
        "revision": options.revision,
        "attention": options.attention,
        "device_map": options.device_map,
        "quantize": options.quantize,
        "tensor_parallel": options.tensor_parallel,
    }
    if options.config is not None:
        random = Source(options.config, random=True, layers=options.layers, settings=options.settings, **where)
        return (random,)
    return tuple(Source(name, **where) for name in options.models or models.embedded())


def _check(job: EvalJob) -> None:
    """Raise UserError for what can be seen to be wrong before anything is loaded."""
    try:
        registry.check_backend(job.models.backend)
    except ValueError as error:
        raise UserError(str(error)) from error
    if job.text.files and job.text.dataset is not None:
        raise UserError("--text and --dataset were both given; expected one of them")
    if job.parity is not None:
        parity.check(job.parity)
    if job.stream is not None:
        long_stream.check(job.stream)
    if job.train is not None:
        training.check(job.train)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read_text(options: TextOptions) -> texts.Text:
    if options.dataset is not None:
        return texts.read_dataset(options.dataset, options.split, options.field)
    return texts.read_files(options.files, options.field) if options.files else texts.embedded()


def _tokens(job: EvalJob, loaded: Loaded, text: texts.Text) -> tuple[Tensor, str]:
    """Tokens ``[L]`` to be read, and where they are from; random ones for a model without tokenizer."""
    if loaded.tokenizer is not None:
        return texts.tokenize(loaded.tokenizer, text), text.source
    random = torch.Generator().manual_seed(0)
    lengths = [1]
    if job.parity is not None:
        lengths.append((job.parity.windows or ParityOptions().windows) * job.parity.context)
    if job.stream is not None:
        lengths.append(job.stream.tokens + 1)
    if job.train is not None:
        lengths.append(2 * job.train.steps * job.train.batch * job.train.context)
    return torch.randint(0, loaded.config.vocab_size, (max(lengths),), generator=random), "random tokens"


def evaluate(job: EvalJob, source: Source, text: texts.Text, device: torch.device, work: Work) -> ModelResult | None:
    """Evaluate one model: its entry in the report, in the main process; None in the others."""
    dtype = models.pick_dtype(job.device.dtype, source, device)
    processes, backend = work.processes, job.models.backend
    with work.bars.busy(f"loading {source.label}"):
        loaded = processes.each(lambda: models.load(source, device, dtype))
        ids, origin = _tokens(job, loaded, text)
    result = describe(loaded)
    try:
        # A backend that cannot serve raises here, before any work.
        result.kernels = processes.each(lambda: _kernels(loaded, backend, job.train is not None))
        result.baseline = machine.baseline(loaded.families)
        if job.parity is not None:
            options = job.parity
            windows = texts.windows(ids, options.context, options.stride, options.windows or None, origin)
            result.parity = parity.measure(loaded, windows, origin, options, backend, work)
        if job.speed is not None:
            prompts = None if loaded.tokenizer is None else ids
            result.speed = speed.measure(loaded, prompts, job.speed, backend, work)
        if job.stream is not None:
            result.stream = long_stream.measure(loaded, ids, origin, job.stream, backend, work)
        if job.train is not None:  # last, for it changes the model
            result.training = training.measure(loaded, ids, origin, job.train, backend, work)
    except PatchError as error:  # the same in all processes, which have the same transformers
        result = describe(loaded)
        result.not_patched = str(error)
    if not processes.main:
        return None
    parts = [part.passed for part in (result.parity, result.speed, result.stream, result.training) if part is not None]
    result.passed = result.not_patched is None and all(parts)
    return result


def _kernels(loaded: Loaded, backend: str, needs_grad: bool) -> dict[str, str]:
    """Kernels by layer, with gradients or without. Raises PatchError where the model's family cannot be patched."""
    with patched(loaded.families, backend=backend, strict=True):
        return layer_kernels(loaded.model, needs_grad=needs_grad)


def describe(loaded: Loaded) -> ModelResult:
    """What a model is, with no part measured."""
    config, source = loaded.model.config, loaded.source
    places = (getattr(loaded.model, "hf_device_map", None) or {}).items()
    return ModelResult(
        model=source.label,
        name=source.name,
        revision=configs.commit(config) or source.revision,
        model_type=config.model_type,
        random_weights=source.random,
        settings=list(source.settings),
        parameters=sum(p.numel() for p in loaded.model.parameters()),
        dtype=loaded.dtype,
        quantize=source.quantize,
        attention=configs.attention_implementation(loaded.config),
        device_map={name: str(place) for name, place in places},
        tensor_parallel=source.tensor_parallel,
        baseline={},
        kernels={},
    )
