"""Decode steps of ``generate`` as CUDA graphs, captured once per model, batch size and cache length.

With a static cache, ``generate`` calls a model's ``get_compiled_call`` to get the function that runs its decode steps;
with ``hf_gdn.patch(cuda_graphs=True)``, this is a `DecodeSession`. The first decode step of each shape runs eagerly as
a warm-up, which loads and compiles kernels. The second is captured: its inputs are copied into static buffers, and it
reads and writes the cache's own tensors. Each later step copies the inputs, replays the graph and clones the outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from ..log import warn_once
from ..upstream import cache_names
from ..upstream.tensors import tree_flatten
from . import cache_state
from .capture import CAPTURES, NotCapturable
from .captured_step import ModelGraphCache, graph_cache_of, known_graphs
from .model_state import model_state

MAX_UNSTABLE_STEPS = 4  # steps of one generate() without a matching graph, after which no more are prepared or captured


class DecodeSession:
    """Runs a model for one ``generate``: replays steps of one token with a static cache, runs all other calls eagerly.

    Call it with the model's keyword arguments; it returns the model's outputs.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.known: ModelGraphCache | None = None  # set at the first step
        self.unstable_steps, self.unstable_reason = 0, "inputs"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        ids = kwargs.get("input_ids")
        if args or ids is None or ids.shape[-1] != 1 or torch.compiler.is_compiling():
            return self.model(*args, **kwargs)
        try:
            return self._step(kwargs)
        except NotCapturable as reason:
            warn_once(f"{type(self.model).__name__}: decode steps run without a CUDA graph: {reason}")
            return self.model(**kwargs)

    def _step(self, kwargs: dict[str, Any]) -> Any:
        """Replay, capture or warm up one step. If NotCapturable is raised, the step has not run."""
        if self.known is None:
            self.known = graph_cache_of(self.model)
        arguments = dict(kwargs)
        known, cache = self.known, cache_names.take(arguments)
        if known.reason is not None:
            raise NotCapturable(known.reason)
        if not isinstance(cache, Cache):
            raise NotCapturable("it has no cache")
        autocast = torch.is_autocast_enabled(kwargs["input_ids"].device.type)
        tensors, inputs = _inputs(arguments)
        inputs += torch.is_inference_mode_enabled(), torch.is_grad_enabled(), autocast
        graph = known.find(inputs, cache)
        if graph is None:
            _check(cache, kwargs, autocast)
            whole = inputs, cache_state.layout(cache)
            if whole in known.refused:
                raise NotCapturable(known.refused[whole])
            if self.unstable_steps == MAX_UNSTABLE_STEPS:
                raise NotCapturable(f"its {self.unstable_reason} change from step to step")
            self.unstable_steps += 1
            if whole not in known.warm:
                return self._warm_up(known, cache, whole, kwargs)
            self.unstable_reason = "cache's tensors"
            with known.lock:
                graph = known.make(self.model, arguments, cache, whole)
        return graph.run(tensors, cache)

    def _warm_up(self, known: ModelGraphCache, cache: Cache, key: Any, kwargs: dict[str, Any]) -> Any:
        """Run the first step of each shape eagerly. It can be captured if it changes no Python state and does not wait
        for the device.

        A first step may wait where later ones do not, for example to read a value that is then remembered. So a step
        that waits gets one more warm-up. A capture that fails is worse than none: it may break PyTorch's allocator.
        """
        before = [dict(attributes) for attributes in cache_state.attributes(cache)]
        with CAPTURES[kwargs["input_ids"].device.type].watch(kwargs["input_ids"].device) as waits:
            outputs = self.model(**kwargs)
        name = cache_state.changed(cache_state.attributes(cache), before)
        if name is not None:
            self.unstable_reason = f"cache's {name!r}"
        elif model_state(self.model)[0] != known.state:
            known.refused[key] = "a step changes attributes of the model, which a replay would not do"
        elif waits and key in known.waited:
            known.refused[key] = f"a step waits for the device ({waits[0]})"
        elif waits:
            known.waited.add(key)
        else:
            self.unstable_reason = "inputs"
            known.warm.add(key)
        return outputs


def _inputs(arguments: dict[str, Any]) -> tuple[list[Tensor], tuple[Any, ...]]:
    """The tensors in nested arguments, and a key of everything else that a graph depends on, such as shapes."""
    leaves, nesting = tree_flatten(arguments)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    strange = [leaf for leaf in leaves if not isinstance(leaf, (Tensor, *cache_state.PLAIN))]
    if strange:
        raise NotCapturable(f"one of its arguments is a {type(strange[0]).__name__}")
    rest = [(x.shape, x.dtype, x.device) if isinstance(x, Tensor) else (type(x), x) for x in leaves]
    return tensors, (str(nesting), *rest)


def _check(cache: Cache, kwargs: dict[str, Any], autocast: bool) -> None:
    """Raise NotCapturable for calls that are never captured."""
    reasons = {
        f"the cache is a {type(cache).__name__}, not a static one": not cache.is_compileable,
        "the cache is offloaded": getattr(cache, "offloading", False),
        "output_attentions is set": kwargs.get("output_attentions"),
        "output_hidden_states is set": kwargs.get("output_hidden_states"),
        "gradients are on": torch.is_grad_enabled(),
        "autocast is on": autocast,
    }
    for reason, found in reasons.items():
        if found:
            raise NotCapturable(reason)


def make_get_compiled_call(
    original: Callable[..., Any], wanted: Callable[[nn.Module], bool]
) -> Callable[[Any, Any], Any]:
    """Make a replacement for ``get_compiled_call`` that returns a `DecodeSession` for models that are `wanted`."""

    @functools.wraps(original)
    def get_compiled_call(self: Any, compile_config: Any) -> Any:
        capture = CAPTURES.get(self.device.type)
        if capture is None or not wanted(self):
            return original(self, compile_config)
        known = known_graphs(self)
        if known is not None:
            known.evict(capture.room(self.device) / 8)
        return DecodeSession(self)

    return get_compiled_call
