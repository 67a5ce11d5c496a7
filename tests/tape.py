"""A stand-in for a CUDA graph that runs on a CPU: a tape of PyTorch's own operators and of the tensors they ran on.

As with a graph, recording changes no tensor that was there before, a replay runs no Python of the model and knows
addresses alone, and what would wait for the device, or copy to it, fails while recording.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
_WAITS = {
    aten._local_scalar_dense, aten.equal, aten.is_nonzero, aten.nonzero, aten.masked_select, aten.bincount,
    aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.lift_fresh, aten.repeat_interleave.Tensor,
    aten.repeat_interleave.self_Tensor,
}  # fmt: skip
_INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


def _tensors(*nested: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(nested) if isinstance(leaf, Tensor)]


def _place(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, tuple, dict, list[Tensor]]] = []
        self.made: set[int] = set()  # storages
        self.saved: dict[int, tuple[Tensor, Tensor]] = {}
        self.outer: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = func.overloadpacket
        indices = _tensors(args[1]) if packet in _INDEXED else []
        if packet in _WAITS or func in _WAITS or any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        given = _tensors(args, kwargs)
        written = [
            x
            for argument, values in zip(func._schema.arguments, args)
            if argument.alias_info is not None and argument.alias_info.is_write
            for x in _tensors(values)
        ]
        for x in given:
            if _place(x) not in self.made:
                self.outer.setdefault(_place(x), x)
        for x in written:
            if _place(x) not in self.made and _place(x) not in self.saved:
                whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
                self.saved[_place(x)] = whole, whole.clone()
        before = {_place(x) for x in given}
        out = func(*args, **kwargs)
        fresh = [x for x in _tensors(out) if _place(x) not in before]
        self.made |= {_place(x) for x in fresh}
        if fresh or written:
            self.steps.append((func, args, kwargs, _tensors(out) if fresh else []))
        return out


class Tape:
    """Takes the place of `hf_gdn.cuda_graphs.CudaCapture`."""

    recording = False
    recorded = 0
    replayed = 0
    free = 1 << 40
    raises: BaseException | None = None  # at the end of the next recording
    waits = 0  # warm-up steps to come that wait for the device

    def __init__(self, function, device) -> None:
        recorder = _Recorder()
        tolist, capturing = Tensor.tolist, torch.cuda.is_current_stream_capturing
        Tape.recording = True
        Tensor.tolist = None  # would wait, and goes past the recorder
        torch.cuda.is_current_stream_capturing = lambda: True  # transformers asks
        try:
            with recorder:
                self.outputs = function()
            if Tape.raises is not None:
                raise Tape.raises
        finally:
            Tape.recording = False
            Tensor.tolist, torch.cuda.is_current_stream_capturing = tolist, capturing
            for whole, before in recorder.saved.values():
                whole.copy_(before)
        self.steps, self.outer = recorder.steps, recorder.outer
        for _, _, _, made in self.steps:
            for x in made:
                if x.is_floating_point():
                    x.fill_(torch.nan)
        Tape.recorded += 1

    def replay(self) -> None:
        for func, args, kwargs, made in self.steps:
            new = _tensors(func(*args, **kwargs))
            for x, value in zip(made, new):
                x.copy_(value)
        Tape.replayed += 1

    @staticmethod
    @contextlib.contextmanager
    def watch(device):
        waits = []
        yield waits
        if Tape.waits:
            Tape.waits -= 1
            waits.append("model.py:7")

    @staticmethod
    def room(device) -> int:
        return Tape.free
