"""Look up and check the classes, arguments and attributes of transformers that hf_gdn swaps or relies on.

If a seam is missing or different, the functions raise PatchError with the seam, the installed version, what was found
and what was expected. `hf_gdn.patch` calls them before it changes anything.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from ..errors import PatchError
from . import cache_names, versions

# Arguments of a text model's forward, besides the cache, that packing and `SinkCache` read.
MODEL_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "inputs_embeds")
# Attributes of a linear-attention cache layer that patched forwards and rollback read and write.
_LAYER_ATTRIBUTES = (
    "conv_states",
    "recurrent_states",
    "has_previous_state",
    "is_conv_states_initialized",
    "is_recurrent_states_initialized",
    "conv_kernel_size",
    "number_of_states",
    "record_past",
)
STATEFUL = "_is_stateful"  # true if recurrent states cannot be rolled back; generate() then refuses assistants
CANDIDATES = "_get_candidate_generator"  # the method with which generate() makes the generator of draft tokens
ASSISTED = "_assisted_decoding"  # the method of generate() that checks draft tokens
PREPARE = "prepare_inputs_for_generation"  # the method that makes the inputs of each forward in generate()
_MASK_FUNCTION = "create_recurrent_attention_mask"


def has_module(module: str) -> bool:
    """Whether the installed transformers has the package that contains a modeling module."""
    return importlib.util.find_spec(module.rpartition(".")[0]) is not None


def class_of(module: str, name: str) -> Any:
    """A class or function from a module of transformers."""
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        raise PatchError(f"{versions.installed()} has no module {module}") from error
    if found is None:
        raise PatchError(f"{module} of {versions.installed()} has no {name}")
    return found


def _arguments(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def _misfit(what: str, found: Iterable[str], expected: Iterable[str]) -> PatchError:
    return PatchError(f"{what} of {versions.installed()} takes ({', '.join(found)}), expected ({', '.join(expected)})")


def force_accelerate_hooks(children: Iterable[str]) -> Callable[[Any], Any]:
    """Make a decorator for a forward that reads parameters of children without calling them.

    Accelerate's offloading loads a module's weights when the module is called, so the decorator triggers its hooks.
    transformers' own layers use the same decorator.
    """
    return class_of("transformers.integrations.accelerate", "force_accelerate_hooks")(list(children))


def layer_class(module: str, name: str) -> Any:
    """The class of a linear-attention layer; its forward takes hidden states, a cache and a mask, in that order."""
    cls = class_of(module, name)
    found = _arguments(cls.forward)
    expected = ["self", "hidden_states", cache_names.name_in(cls.forward) or cache_names.NAMES[0], "attention_mask"]
    if found[: len(expected)] != expected:
        raise _misfit(f"{name}.forward", found, [*expected, "..."])
    return cls


def text_model_class(module: str, name: str) -> Any:
    """The class of a text model; its forward takes a cache and `MODEL_ARGUMENTS`."""
    cls = class_of(module, name)
    found = _arguments(cls.forward)
    expected = [*MODEL_ARGUMENTS, cache_names.name_in(cls.forward) or cache_names.NAMES[0]]
    if not set(expected) <= set(found):
        raise _misfit(f"{name}.forward", found, [*expected, "..."])
    return cls


# --------------------------------------------------------------------------------------------------------------- caches


def cache_class(name: str) -> Any:
    """A class of ``transformers.cache_utils``."""
    return class_of("transformers.cache_utils", name)


def linear_cache_mixin() -> Any:
    """The base class of cache layers with convolution and recurrent states; `hf_gdn.patch` adds methods to it."""
    return cache_class("LinearAttentionCacheLayerMixin")


def check_linear_caches() -> None:
    """Raise PatchError unless caches store the states of linear-attention layers as patched layers expect."""
    name, cls, cache = "LinearAttentionLayer", cache_class("LinearAttentionLayer"), cache_class("Cache")
    if not issubclass(cls, linear_cache_mixin()):
        raise PatchError(f"{name} of {versions.installed()} is not a LinearAttentionCacheLayerMixin")
    layer = cls()
    missing = [attribute for attribute in _LAYER_ATTRIBUTES if not hasattr(layer, attribute)]
    missing += [method for method in ("reset", "reorder_cache", "lazy_initialization") if not hasattr(layer, method)]
    if missing:
        raise PatchError(f"{name} of {versions.installed()} has no {', '.join(missing)}")
    if layer.has_previous_state != {0: False}:
        raise PatchError(
            f"{name}.has_previous_state of {versions.installed()} is {layer.has_previous_state!r} in a new layer, "
            "expected {0: False}"
        )
    for method, first in (("update_conv_state", "conv_states"), ("update_recurrent_state", "recurrent_states")):
        found = _arguments(getattr(cache, method, lambda: None))
        if found[:3] != ["self", first, "layer_idx"]:
            raise _misfit(f"Cache.{method}", found, ["self", first, "layer_idx", "..."])


def check_masks() -> None:
    """Raise PatchError unless the function that makes the masks of linear-attention layers has the expected arguments.

    Patched layers rely on its results: None or ``[B, T]``, and None for a single token.
    """
    function = getattr(importlib.import_module("transformers.masking_utils"), _MASK_FUNCTION, None)
    if function is None:
        raise PatchError(f"transformers.masking_utils of {versions.installed()} has no {_MASK_FUNCTION}")
    found = _arguments(function)
    if found[:3] != ["config", "inputs_embeds", "attention_mask"]:
        raise _misfit(_MASK_FUNCTION, found, ["config", "inputs_embeds", "attention_mask", "..."])


# ----------------------------------------------------------------------------------------------------------- generation


def stateful_class(model_class: Any) -> Any:
    """The base of a model class that defines `STATEFUL`, by which ``generate`` refuses assistants."""
    found = next(base for base in model_class.__mro__ if STATEFUL in vars(base) or base is object)
    if found in (object, class_of("transformers", "PreTrainedModel")):
        raise PatchError(f"{model_class.__name__} of {versions.installed()} has no base with {STATEFUL} of its own")
    return found


def check_rollback() -> None:
    """Raise PatchError unless rollback can be added to caches and to ``generate`` (assistants, prompt lookup)."""
    mixin = linear_cache_mixin()
    for name in ("crop", "activate_past_recording"):
        if not hasattr(mixin, name):
            raise PatchError(f"LinearAttentionCacheLayerMixin of {versions.installed()} has no {name}")
    if _arguments(mixin.crop) != ["self", "tokens_to_remove"]:
        raise _misfit("LinearAttentionCacheLayerMixin.crop", _arguments(mixin.crop), ["self", "tokens_to_remove"])
    if not isinstance(getattr(mixin, "is_croppable", None), property):
        raise PatchError(f"LinearAttentionCacheLayerMixin of {versions.installed()} has no property is_croppable")
    for name in (CANDIDATES, ASSISTED, PREPARE):
        if not hasattr(generation_class(), name):
            raise PatchError(f"GenerationMixin of {versions.installed()} has no {name}")
    if not {"next_sequence_length", "is_first_iteration"} <= set(_arguments(getattr(generation_class(), PREPARE))):
        found = _arguments(getattr(generation_class(), PREPARE))
        raise _misfit(f"GenerationMixin.{PREPARE}", found, ["next_sequence_length", "is_first_iteration", "..."])
    lookup = prompt_lookup_class()
    for name in ("get_candidates", "update_candidate_strategy"):
        if not hasattr(lookup, name):
            raise PatchError(f"PromptLookupCandidateGenerator of {versions.installed()} has no {name}")
    if "num_output_tokens" not in _arguments(lookup.__init__):
        raise _misfit("PromptLookupCandidateGenerator", _arguments(lookup.__init__), ["num_output_tokens", "..."])


def generation_class() -> Any:
    """The class that defines ``generate``."""
    return class_of("transformers", "GenerationMixin")


def prompt_lookup_class() -> Any:
    """The class that drafts tokens by prompt lookup."""
    return class_of("transformers.generation.candidate_generator", "PromptLookupCandidateGenerator")


def guidance_class() -> Any:
    """The class of the processor that ``guidance_scale`` makes."""
    return class_of("transformers.generation.logits_process", "UnbatchedClassifierFreeGuidanceLogitsProcessor")


def compiled_call_class() -> Any:
    """The class that defines ``get_compiled_call(compile_config)``, which returns the decode step for ``generate``."""
    cls = class_of("transformers", "PreTrainedModel")
    found = vars(cls).get("get_compiled_call")
    if found is None:
        raise PatchError(f"cuda_graphs: PreTrainedModel of {versions.installed()} has no get_compiled_call")
    if len(_arguments(found)) != 2:  # generate() passes one argument, by position
        raise _misfit("cuda_graphs: PreTrainedModel.get_compiled_call", _arguments(found), ["self", "compile_config"])
    return cls
