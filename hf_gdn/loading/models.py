"""Loading what is evaluated: models from a folder, the hub or a bare config, and devices. Failures are `UserError`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError

from ..errors import HfGdnError, UserError, named, reason
from ..patches import all_families, families_in
from ..upstream.configs import has_causal_model
from .quantization import quantize
from .shapes import ASSETS, CONFIGS, embedded

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
T = TypeVar("T")
# Errors of transformers, and of the libraries below it, that explain themselves; the others are named in the message.
_EXPLAINED = (OSError, ValueError, ImportError, StrictDataclassError)


@dataclass(frozen=True)
class Source:
    """Which model, and how it is to be loaded.

    Args:
        name: folder, hub name, or the name of an embedded model; for a model with random weights, a config: a name of
            `CONFIGS`, of an embedded model, a folder, a config file or a hub name.
        random: random weights at that config.
        layers: keep only so many layers (random weights).
        settings: config fields to change, like ``"num_experts=16"`` (random weights).
        revision: of a hub model.
        attention: attention implementation, transformers' choice by default.
        device_map: accelerate's, e.g. ``"auto"``.
        quantize: what the weights are quantized to, of `quantization.KINDS`; None leaves them.
        tensor_parallel: split over the processes after transformers' own plan.
    """

    name: str
    random: bool = False
    layers: int | None = None
    settings: tuple[str, ...] = ()
    revision: str | None = None
    attention: str | None = None
    device_map: str | None = None
    quantize: str | None = None
    tensor_parallel: bool = False

    @property
    def label(self) -> str:
        """Short name for tables: the folder's last part for a path."""
        label = Path(self.name).name if Path(self.name).exists() else self.name
        layers = f", {self.layers} layers" if self.layers else ""
        label = f"{label} (random{layers})" if self.random else label
        return f"{label}, {self.quantize}" if self.quantize else label


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode with its tokenizer, None for random weights."""

    source: Source
    model: Any
    tokenizer: Any
    dtype: str

    @property
    def config(self) -> Any:
        """The language model's config."""
        return self.model.config.get_text_config()

    @property
    def families(self) -> list[str]:
        """Names of the families of its layers."""
        return families_in(self.model)


def _path(name: str) -> str:
    return str(ASSETS / name) if name in embedded() and not Path(name).exists() else name


# -------------------------------------------------------------------------------------------------------------- devices


def pick_device(name: str | None, given: torch.device | None = None) -> torch.device:
    """The device asked for, or the best there is; with several processes the one `given` by accelerate to this one."""
    if given is not None:
        if name is not None and _device(name).index is not None:
            raise UserError(f"--device {name} names one device; with several processes give cpu, cuda or nothing")
        return given
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return _device(name)


def _device(name: str) -> torch.device:
    """A device that computes here: torch knows others, such as meta, and parses names of those that are not there."""
    try:
        device = torch.device(name)
        if float(torch.ones(2, device=device).sum()) == 2:
            return device
        why = "it computes 1 + 1 wrongly"
    except (RuntimeError, AssertionError, ImportError, AttributeError, TypeError, ValueError) as error:
        why = reason(error)
    available = ["cpu"]
    available += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    available += ["mps"] if torch.backends.mps.is_available() else []
    raise UserError(f"--device {name} cannot be used here: {why}; devices here: {', '.join(available)}")


def pick_dtype(name: str | None, source: Source, device: torch.device) -> torch.dtype:
    """The dtype asked for, else a checkpoint's own.

    The embedded models are float32. Random weights, and checkpoints whose config names no dtype, are float32 on a CPU
    and bfloat16 on an accelerator.
    """
    if name is not None:
        if name not in DTYPES:
            raise UserError(f"--dtype {name} is not known; dtypes: {', '.join(DTYPES)}")
        return DTYPES[name]
    if source.name in embedded():
        return torch.float32
    if not source.random:
        config = read_config(source)
        for part in (config, config.get_text_config()):
            found = str(getattr(part, "dtype", None)).removeprefix("torch.")
            if found in DTYPES:
                return DTYPES[found]
    return torch.float32 if device.type == "cpu" else torch.bfloat16


# --------------------------------------------------------------------------------------------------------------- models


def load(source: Source, device: torch.device, dtype: torch.dtype) -> Loaded:
    """Load, or make, a model; with its tokenizer unless its weights are random."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

    config = read_config(source)
    types = {config.model_type, config.get_text_config().model_type.removesuffix("_text")}
    if not types & set(all_families()):
        raise UserError(
            f"model {source.name!r} is of type {config.model_type!r}, which hf_gdn does not patch; "
            f"types: {', '.join(all_families())}"
        )
    if source.random and (source.tensor_parallel or source.device_map is not None):
        raise UserError("--tp and --device-map load a checkpoint; a --config has none")
    if source.quantize is not None and (source.tensor_parallel or source.device_map is not None):
        raise UserError("--quantize works on a model on one device; --tp and --device-map spread it over several")
    if source.tensor_parallel and source.device_map is not None:
        raise UserError("--tp and --device-map were both given; expected one of them")
    name = str(dtype).removeprefix("torch.")
    auto: Any = (
        AutoModelForCausalLM if has_causal_model(config) else AutoModelForImageTextToText
    )  # which has the multimodal ones
    options: dict[str, Any] = {} if source.attention is None else {"attn_implementation": source.attention}
    if source.random:

        def make() -> Any:
            torch.manual_seed(0)
            with torch.device(device):
                return auto.from_config(config, dtype=dtype, **options)

        made = _tried(source, "made", make).eval()
        quantize(made, source.quantize)
        return Loaded(source, made, None, name)
    if source.device_map is not None:
        options["device_map"] = source.device_map
    if source.tensor_parallel:
        from transformers.distributed import DistributedConfig

        options["distributed_config"] = DistributedConfig(tp_plan="auto")
    where = _path(source.name)
    hub = {} if source.revision is None else {"revision": source.revision}
    tokenizer = _tried(source, "loaded", lambda: AutoTokenizer.from_pretrained(where, **hub), " (tokenizer)")
    if not _tried(source, "loaded", lambda: tokenizer("text").input_ids):
        raise UserError(f"model {source.name!r} cannot be loaded: it has no tokenizer that reads text")
    options |= dict(output_loading_info=True, ignore_mismatched_sizes=True)  # `_check_weights` refuses them by name
    model, found = _tried(source, "loaded", lambda: auto.from_pretrained(where, dtype=dtype, **hub, **options))
    _check_weights(source, found)
    if source.device_map is None and not source.tensor_parallel:
        _tried(source, f"moved to {device}", lambda: model.to(device))
    quantize(model, source.quantize)
    return Loaded(source, model.eval(), tokenizer, name)


def read_config(source: Source) -> Any:
    """The model's config, cut and changed as `source` says."""
    from transformers import AutoConfig

    hub = {} if source.revision is None else {"revision": source.revision}

    def read() -> Any:
        if source.random and source.name in CONFIGS:
            model_type, values = CONFIGS[source.name]
            return AutoConfig.for_model(model_type, **values)
        return AutoConfig.from_pretrained(_path(source.name), **hub)

    known = f"; known to --config: {', '.join([*CONFIGS, *embedded()])}" if source.random else ""
    config = _tried(source, "read", read, known)
    changes = dict(_setting(config, text) for text in source.settings)
    if source.layers is not None:
        if not 1 <= source.layers <= config.num_hidden_layers:
            raise UserError(f"--layers must be between 1 and {config.num_hidden_layers}, got {source.layers}")
        changes["num_hidden_layers"] = source.layers
        for name in ("layer_types", "mlp_layer_types"):
            if getattr(config, name, None) is not None:
                changes[name] = list(getattr(config, name))[: source.layers]
    if changes:
        config = _tried(source, "changed", lambda: type(config)(**{**config.to_dict(), **changes}))
    return config


def _setting(config: Any, text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    if not hasattr(config, name):
        raise UserError(f"--set {text}: {config.model_type} configs have no field {name!r}")
    try:
        return name, json.loads(value)
    except ValueError as error:
        raise UserError(f"--set {text}: expected FIELD=VALUE with VALUE as JSON, e.g. num_experts=16") from error


def _tried(source: Source, verb: str, work: Callable[[], T], hint: str = "") -> T:
    try:
        return work()
    except HfGdnError:
        raise
    except Exception as error:  # of any type: a file can be damaged in any way, and tokenizers raises Exception itself
        why = reason(error) if isinstance(error, _EXPLAINED) or type(error) is Exception else named(error)
        raise UserError(f"model {source.name!r} cannot be {verb}: {why}{hint}") from error


def _check_weights(source: Source, found: dict[str, Any]) -> None:
    """Raise UserError for a checkpoint without some of its model's weights, which transformers would make up."""
    for name, held, wanted in sorted(found["mismatched_keys"], key=str):
        raise UserError(
            f"model {source.name!r} cannot be loaded: its file has {name} of {list(held)}, its config makes it "
            f"{list(wanted)}"
        )
    missing = sorted(found["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"model {source.name!r} cannot be loaded: its files lack the weight {missing[0]}{more}")


def check_length(loaded: Loaded, tokens: int, what: str) -> None:
    """Raise UserError when the model's positions do not reach that far."""
    limit = getattr(loaded.config, "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise UserError(f"{what} is {tokens} tokens; {loaded.source.label} takes {limit} at most")
