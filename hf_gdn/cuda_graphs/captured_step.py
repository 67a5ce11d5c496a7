"""Captured decode steps, and the captured steps of each model.

A graph holds addresses, not objects, and a replay runs no Python. So everything that a graph depends on is compared:
the cache (the same tensors and flags) at every step, the model once per ``generate``.

Graphs do not keep caches alive. When a cache that ``generate`` made is freed, the tensors of the last graph are kept,
and the next cache of the same layout is copied into them, unless they take more than an eighth of the free memory.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from ..upstream import cache_names, modules
from ..upstream.tensors import tree_map, tree_map_only
from . import cache_state
from .capture import CAPTURES, NotCapturable
from .model_state import model_state


class CapturedStep:
    """A captured decode step and the tensors that it reads and writes."""

    def __init__(self, model: nn.Module, arguments: dict[str, Any], cache: Cache, key: Any, died: Any) -> None:
        self.key, self.died = key, died
        self.own = not modules.is_users_cache(cache)  # made by generate(), so its tensors can be reused
        self.inputs: list[Tensor] = []

        def buffer(given: Tensor) -> Tensor:
            self.inputs.append(given.clone(memory_format=torch.contiguous_format))
            return self.inputs[-1]

        buffers = tree_map_only(Tensor, buffer, arguments)

        def step() -> Any:
            outputs = model(**buffers, **cache_names.as_argument(cache))
            return tree_map(lambda value: Cache if value is cache else value, outputs)  # do not keep the cache alive

        self._bind_cache(cache)
        device = self.inputs[0].device
        try:
            self.capture = CAPTURES[device.type](step, device)
            name = cache_state.changed(self.live, self.held)
            if name is not None:
                raise NotCapturable(f"a step changes the cache's {name!r}, which a replay would not do")
        finally:  # capturing has run the Python code, which may have changed the cache's attributes
            cache_state.put_back(self.live, self.held)

    def _bind_cache(self, cache: Cache) -> None:
        self.live = cache_state.attributes(cache)
        self.held = [dict(attributes) for attributes in self.live]
        self.cache = weakref.ref(cache, self.died)
        self.layers = [weakref.ref(layer) for layer in cache.layers]

    @property
    def free(self) -> bool:
        """Whether its cache and the cache's layers have been freed."""
        return self.cache() is None and all(layer() is None for layer in self.layers)

    @property
    def bytes(self) -> int:
        """Size of its cache's tensors."""
        return sum(value.nbytes for part in self.held for value in part.values() if isinstance(value, Tensor))

    def holds(self, cache: Cache) -> bool:
        """Whether this is the cache it was captured with (or adopted), and its attributes are unchanged."""
        return (
            self.cache() is cache
            and len(cache.layers) == len(self.layers)
            and all(layer is own() for layer, own in zip(cache.layers, self.layers))
            and cache_state.changed(self.live, self.held) is None
        )

    def adopt(self, cache: Cache) -> None:
        """Take over another cache of the same layout: copy it into this step's tensors and bind them to it."""
        for attributes, before in zip(cache_state.attributes(cache), self.held):
            for name, own in before.items():
                if isinstance(own, Tensor):
                    own.copy_(attributes[name])
                    attributes[name] = own
        self._bind_cache(cache)

    def run(self, tensors: list[Tensor], cache: Cache) -> Any:
        """Replay one decode step. The outputs are clones, which later replays do not overwrite."""
        for own, given in zip(self.inputs, tensors):
            own.copy_(given)
        self.capture.replay()

        def copy_output(value: Any) -> Any:
            return value.clone() if isinstance(value, Tensor) else cache if value is Cache else value

        return tree_map(copy_output, self.capture.outputs)


class ModelGraphCache:
    """The captured steps of a model in one state.

    Attributes:
        state, reason: results of `model_state`.
        warm: keys of steps that have run eagerly and can be captured.
        waited: keys of steps whose first warm-up waited for the device.
        refused: keys of steps that cannot be captured, with the reason.
        steps: the captured steps, the most recently used last.
    """

    def __init__(self, state: tuple[Any, ...], reason: str | None) -> None:
        self.state, self.reason = state, reason
        self.lock = threading.RLock()
        self.warm: set[Any] = set()
        self.waited: set[Any] = set()
        self.refused: dict[Any, str] = {}
        self.steps: list[CapturedStep] = []

    def evict(self, spare: float) -> None:
        """Free the graphs whose cache was freed; keep the last of them if its tensors take at most `spare` bytes."""
        gone = [graph for graph in self.steps if graph.cache() is None]
        kept = next((graph for graph in gone[-1:] if graph.own and graph.bytes <= spare), None)
        self.steps = [graph for graph in self.steps if graph not in gone or graph is kept]

    def find(self, inputs: tuple[Any, ...], cache: Cache) -> CapturedStep | None:
        """The graph that was captured with this cache and such inputs; None if there is none."""
        graph = next((graph for graph in self.steps if graph.key[0] == inputs and graph.holds(cache)), None)
        if graph is not None and graph is not self.steps[-1]:
            self.steps = [*(other for other in self.steps if other is not graph), graph]
        return graph

    def make(self, model: nn.Module, arguments: dict[str, Any], cache: Cache, key: Any) -> CapturedStep:
        """Return a graph for a cache that has none: reuse the graph of a freed cache, or capture a new one."""
        graph = next((graph for graph in self.steps if graph.key == key and graph.own and graph.free), None)
        if graph is not None and not modules.is_users_cache(cache):
            graph.adopt(cache)
            return graph
        self.steps = [graph for graph in self.steps if graph.cache() is not cache or graph.holds(cache)]
        self.evict(0)
        mine = weakref.ref(self)

        def died(_: Any) -> None:
            owner = mine()
            if owner is not None:
                owner.evict(float("inf"))

        try:
            graph = CapturedStep(model, arguments, cache, key, died)
        except (NotCapturable, RuntimeError) as error:  # CUDA and PyTorch raise RuntimeError during a capture
            self.refused[key] = str(error).partition("\n")[0] or type(error).__name__
            raise NotCapturable(self.refused[key]) from error
        self.steps = [*self.steps, graph]
        return graph


_models: weakref.WeakKeyDictionary[nn.Module, ModelGraphCache] = weakref.WeakKeyDictionary()


def release() -> None:
    """Free all graphs and their memory. Models capture again when they need to."""
    _models.clear()


def graph_cache_of(model: nn.Module) -> ModelGraphCache:
    """A model's captured steps. They are discarded if the model's state has changed."""
    state, reason = model_state(model)
    found = _models.get(model)
    if found is None or found.state != state:
        found = _models[model] = ModelGraphCache(state, reason)
    found.reason = reason
    return found


def known_graphs(model: nn.Module) -> ModelGraphCache | None:
    """A model's captured steps, without comparing its state; None if it has none."""
    return _models.get(model)
