"""Decode steps of ``generate`` as CUDA graphs, captured once for a model, a batch size and a cache length.

``generate`` asks a model's ``get_compiled_call`` for what runs its decode steps when the cache is static; with
``hf_gdn.patch(cuda_graphs=True)`` it gets a `Decoder`. The first step of a kind runs as ever, which loads and compiles
kernels; at the second the model's kernels are recorded, in a graph that reads its inputs from buffers of its own and
reads and writes the cache's own tensors. From then on a step is: copy the inputs, replay, clone the outputs.

A graph knows addresses, not objects, and Python does not run in a replay. Hence what may change is compared: every step
the cache (the same tensors, the same flags), and once a ``generate`` the model (weights, forwards, flags, configs).

No graph keeps a cache alive. When a cache that ``generate`` made dies, the last graph's tensors wait for the next cache
of the same layout, which is moved into them, unless they would take more than an eighth of the free memory.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig

from .caches import static
from .registry import warn_once
from .upstream import cache_names, modules
from .upstream.tensors import free_cublas_workspaces, is_wrapper, tree_flatten, tree_map, tree_map_only

_INTERNAL = modules.internal_attributes()
_PATIENCE = 4  # steps of one generate() that run as ever because they are unlike those before; then they always are


class Ungraphable(Exception):
    """A decode step cannot be a graph; the text says why."""


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    """The stream of all captures on a device: libraries keep workspaces by stream."""
    return torch.cuda.Stream(device)


class CudaCapture:
    """A CUDA graph. Recording executes nothing on the device.

    Attributes:
        outputs: what the recorded function returned; every replay writes to the same tensors.
    """

    def __init__(self, function: Callable[[], Any], device: torch.device) -> None:
        self.device, self.graph = device, torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # a graph's memory is taken from what the allocator does not hold
            # Not torch.cuda.graph(): it leaves its stream the current one when a capture fails.
            with torch.cuda.stream(_stream(torch.cuda.current_device())):
                self.graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self.outputs = function()
                except BaseException:
                    with contextlib.suppress(RuntimeError):  # the capture is not valid, as we know
                        self.graph.capture_end()
                    raise
                self.graph.capture_end()
            free_cublas_workspaces()  # the graph's own is freed with it, and no other graph writes there

    def replay(self) -> None:
        """Run what was recorded, on the current stream."""
        with torch.cuda.device(self.device):
            self.graph.replay()

    @staticmethod
    def room(device: torch.device) -> int:
        """Bytes that are free, the allocator's own included."""
        free = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


captures: dict[str, Any] = {"cuda": CudaCapture}  # by device type


# --------------------------------------------------------------------------------------------------------------- a step


class _Graph:
    """A captured decode step, with the tensors that it reads and writes."""

    def __init__(self, model: nn.Module, arguments: dict[str, Any], cache: Cache, key: Any, died: Any) -> None:
        self.key, self.died = key, died
        self.own = not modules.is_users_cache(cache)  # generate() made it
        self.inputs: list[Tensor] = []

        def buffer(given: Tensor) -> Tensor:
            self.inputs.append(given.clone(memory_format=torch.contiguous_format))
            return self.inputs[-1]

        buffers = tree_map_only(Tensor, buffer, arguments)

        def step() -> Any:
            outputs = model(**buffers, **cache_names.as_argument(cache))
            return tree_map(lambda value: Cache if value is cache else value, outputs)  # a graph keeps no cache

        self._hold(cache)
        device = self.inputs[0].device
        try:
            self.capture = captures[device.type](step, device)
            name = static.changed(self.live, self.held)
            if name is not None:
                raise Ungraphable(f"a step gives the cache another {name!r}, which a replay would not")
        finally:  # recording has run Python, though nothing on the device
            static.put_back(self.live, self.held)

    def _hold(self, cache: Cache) -> None:
        self.live = static.attributes(cache)
        self.held = [dict(attributes) for attributes in self.live]
        self.cache = weakref.ref(cache, self.died)
        self.layers = [weakref.ref(layer) for layer in cache.layers]

    @property
    def free(self) -> bool:
        """Whether nobody has its cache any more."""
        return self.cache() is None and all(layer() is None for layer in self.layers)

    @property
    def bytes(self) -> int:
        """What its cache's tensors take."""
        return sum(value.nbytes for part in self.held for value in part.values() if isinstance(value, Tensor))

    def holds(self, cache: Cache) -> bool:
        """Whether the cache is its own, as it was when the step was recorded."""
        return (
            self.cache() is cache
            and len(cache.layers) == len(self.layers)
            and all(layer is own() for layer, own in zip(cache.layers, self.layers))
            and static.changed(self.live, self.held) is None
        )

    def adopt(self, cache: Cache) -> None:
        """Move another cache of the same layout into its tensors."""
        for attributes, before in zip(static.attributes(cache), self.held):
            for name, own in before.items():
                if isinstance(own, Tensor):
                    own.copy_(attributes[name])
                    attributes[name] = own
        self._hold(cache)

    def run(self, tensors: list[Tensor], cache: Cache) -> Any:
        """One decode step. The outputs are the caller's to keep."""
        for own, given in zip(self.inputs, tensors):
            own.copy_(given)
        self.capture.replay()

        def given_away(value: Any) -> Any:
            return value.clone() if isinstance(value, Tensor) else cache if value is Cache else value

        return tree_map(given_away, self.capture.outputs)


# -------------------------------------------------------------------------------------------------------------- models


def _look(model: nn.Module) -> tuple[tuple[Any, ...], str | None]:
    """All of a model that a graph depends on, to compare, and why it cannot have graphs, or None."""
    configs: set[int] = set()

    def describe(value: Any) -> Any:
        if isinstance(value, Tensor):
            return id(value) if is_wrapper(value) else value.data_ptr()
        if isinstance(value, dict):
            return tuple(
                (name if isinstance(name, static.PLAIN) else None, describe(part)) for name, part in value.items()
            )
        if isinstance(value, (list, tuple, set)):
            return tuple(map(describe, value))
        if isinstance(value, PreTrainedConfig) and id(value) not in configs:
            configs.add(id(value))
            return describe(vars(value))
        return value if isinstance(value, static.PLAIN) else type(value)

    found: list[Any] = []
    reason, devices = None, set()
    for name, module in model.named_modules():
        hooks = modules.forward_hooks(module)
        if modules.accelerate_hook(module) is not None:
            reason = f"{name or 'the model'} has one of accelerate's hooks, which moves weights or inputs"
        elif any(not (getattr(hook, "__module__", None) or "").startswith("transformers.") for hook in hooks):
            reason = f"{name or 'the model'} has a forward hook, which would run once and never again"
        found.append(type(module).forward)
        found += [describe(value) for name, value in vars(module).items() if name not in _INTERNAL]
        devices |= {x.device for x in modules.own_tensors(module)}
    if any(hasattr(parameter, "placements") for parameter in model.parameters()):
        reason = "its weights are split over processes"
    elif len(devices) > 1:
        reason = f"its weights are on several devices: {', '.join(sorted(map(str, devices)))}"
    elif modules.has_hooks_of_all_modules():
        reason = "there are forward hooks for all modules"
    elif model.training:
        reason = "it is in training mode"
    return tuple(found), reason


class _Graphs:
    """The graphs of a model as `look` describes it, the last one used at the end."""

    def __init__(self, look: tuple[Any, ...], reason: str | None) -> None:
        self.look, self.reason = look, reason
        self.lock = threading.RLock()
        self.warm: set[Any] = set()
        self.refused: dict[Any, str] = {}
        self.graphs: list[_Graph] = []

    def drop(self, spare: float) -> None:
        """Free the graphs whose cache is gone, but for the last one if its tensors take up to `spare` bytes."""
        gone = [graph for graph in self.graphs if graph.cache() is None]
        kept = next((graph for graph in gone[-1:] if graph.own and graph.bytes <= spare), None)
        self.graphs = [graph for graph in self.graphs if graph not in gone or graph is kept]

    def find(self, inputs: tuple[Any, ...], cache: Cache) -> _Graph | None:
        """The cache's own graph of these inputs."""
        graph = next((graph for graph in self.graphs if graph.key[0] == inputs and graph.holds(cache)), None)
        if graph is not None and graph is not self.graphs[-1]:
            self.graphs = [*(other for other in self.graphs if other is not graph), graph]
        return graph

    def make(self, model: nn.Module, arguments: dict[str, Any], cache: Cache, key: Any) -> _Graph:
        """A graph for a cache that has none: that of one that is gone, or a new one."""
        graph = next((graph for graph in self.graphs if graph.key == key and graph.own and graph.free), None)
        if graph is not None and not modules.is_users_cache(cache):
            graph.adopt(cache)
            return graph
        self.graphs = [graph for graph in self.graphs if graph.cache() is not cache or graph.holds(cache)]
        self.drop(0)
        mine = weakref.ref(self)

        def died(_: Any) -> None:
            graphs = mine()
            if graphs is not None:
                graphs.drop(float("inf"))

        try:
            graph = _Graph(model, arguments, cache, key, died)
        except (Ungraphable, RuntimeError) as error:  # what CUDA and PyTorch raise in a capture
            self.refused[key] = str(error).partition("\n")[0] or type(error).__name__
            raise Ungraphable(self.refused[key]) from error
        self.graphs = [*self.graphs, graph]
        return graph


_models: weakref.WeakKeyDictionary[nn.Module, _Graphs] = weakref.WeakKeyDictionary()


def release() -> None:
    """Free all graphs and their memory. Models capture anew when they need to."""
    _models.clear()


def _graphs_of(model: nn.Module) -> _Graphs:
    """A model's graphs; none are left of what it was before it changed."""
    look, reason = _look(model)
    graphs = _models.get(model)
    if graphs is None or graphs.look != look:
        graphs = _models[model] = _Graphs(look, reason)
    graphs.reason = reason
    return graphs


# ------------------------------------------------------------------------------------------------------------ generate


class Decoder:
    """A model as one ``generate`` calls it: steps of one token with a static cache are replayed, all else runs as ever.

    Called with the model's arguments by keyword; gives what the model gives.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.graphs: _Graphs | None = None  # the model is looked at when the first step comes
        self.unlike, self.differs = 0, "inputs"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        ids = kwargs.get("input_ids")
        if args or ids is None or ids.shape[-1] != 1 or torch.compiler.is_compiling():
            return self.model(*args, **kwargs)
        try:
            return self._step(kwargs)
        except Ungraphable as reason:
            warn_once(f"{type(self.model).__name__}: decode steps run without a CUDA graph: {reason}")
            return self.model(**kwargs)

    def _step(self, kwargs: dict[str, Any]) -> Any:
        """A step in a graph, or one that prepares it. Whatever raises Ungraphable has run nothing."""
        if self.graphs is None:
            self.graphs = _graphs_of(self.model)
        arguments = dict(kwargs)
        graphs, cache = self.graphs, cache_names.take(arguments)
        if graphs.reason is not None:
            raise Ungraphable(graphs.reason)
        if not isinstance(cache, Cache):
            raise Ungraphable("it has no cache")
        autocast = torch.is_autocast_enabled(kwargs["input_ids"].device.type)
        tensors, inputs = _inputs(arguments)
        inputs += torch.is_inference_mode_enabled(), torch.is_grad_enabled(), autocast
        graph = graphs.find(inputs, cache)
        if graph is None:
            _check(cache, kwargs, autocast)
            whole = inputs, static.layout(cache)
            if whole in graphs.refused:
                raise Ungraphable(graphs.refused[whole])
            if self.unlike == _PATIENCE:
                raise Ungraphable(f"its {self.differs} change from step to step")
            self.unlike += 1
            if whole not in graphs.warm:
                return self._warm_up(graphs, cache, whole, kwargs)
            self.differs = "cache's tensors"
            with graphs.lock:
                graph = graphs.make(self.model, arguments, cache, whole)
        return graph.run(tensors, cache)

    def _warm_up(self, graphs: _Graphs, cache: Cache, key: Any, kwargs: dict[str, Any]) -> Any:
        """The first step of a kind, as ever. A recorded one does the same if it leaves Python's state alone."""
        before = [dict(attributes) for attributes in static.attributes(cache)]
        outputs = self.model(**kwargs)
        name = static.changed(static.attributes(cache), before)
        if name is not None:
            self.differs = f"cache's {name!r}"
        elif _look(self.model)[0] != graphs.look:
            graphs.refused[key] = "a step changes attributes of the model, which a replay would not"
        else:
            self.differs = "inputs"
            graphs.warm.add(key)
        return outputs


def _inputs(arguments: dict[str, Any]) -> tuple[list[Tensor], tuple[Any, ...]]:
    """The tensors of nested arguments, and all else of them that makes a graph another one."""
    leaves, nesting = tree_flatten(arguments)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    strange = [leaf for leaf in leaves if not isinstance(leaf, (Tensor, *static.PLAIN))]
    if strange:
        raise Ungraphable(f"one of its arguments is a {type(strange[0]).__name__}")
    rest = [(x.shape, x.dtype, x.device) if isinstance(x, Tensor) else (type(x), x) for x in leaves]
    return tensors, (str(nesting), *rest)


def _check(cache: Cache, kwargs: dict[str, Any], autocast: bool) -> None:
    """Raise Ungraphable for calls that no graph is made of."""
    reasons = {
        f"the cache is a {type(cache).__name__}, not a static one": not cache.is_compileable,
        "the cache is offloaded": getattr(cache, "offloading", False),
        "output_attentions is asked for": kwargs.get("output_attentions"),
        "output_hidden_states is asked for": kwargs.get("output_hidden_states"),
        "gradients are on": torch.is_grad_enabled(),
        "autocast is on": autocast,
    }
    for reason, found in reasons.items():
        if found:
            raise Ungraphable(reason)


def make_get_compiled_call(
    original: Callable[..., Any], wanted: Callable[[nn.Module], bool]
) -> Callable[[Any, Any], Any]:
    """The method that stands in for transformers' ``get_compiled_call``: a `Decoder` for models that are `wanted`."""

    @functools.wraps(original)
    def get_compiled_call(self: Any, compile_config: Any) -> Any:
        capture = captures.get(self.device.type)
        if capture is None or not wanted(self):
            return original(self, compile_config)
        graphs = _models.get(self)
        if graphs is not None:
            graphs.drop(capture.room(self.device) / 8)
        return Decoder(self)

    return get_compiled_call
