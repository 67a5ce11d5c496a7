"""What the chunk ops allocate beside their results, counted without launching anything."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_gdn import kernels

pytest.importorskip("triton")
from hf_gdn.kernels.triton import chunk_gdn, chunk_kda

BYTES_PER_TOKEN_AND_HEAD = 6 * 1024


class _Allocations(TorchDispatchMode):
    """Bytes of every storage that comes to be, whether or not it lives on: more than the most held at one time."""

    def __init__(self, *known: torch.Tensor):
        super().__init__()
        self.storages = {x.untyped_storage()._cdata: 0 for x in known}
        self.alive: list[torch.Tensor] = []  # so that no storage takes the place of another

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.alive.append(x)
                self.storages.setdefault(x.untyped_storage()._cdata, x.untyped_storage().nbytes())
        return result

    @property
    def bytes(self) -> int:
        return sum(self.storages.values())


class _NotLaunched:
    def __getitem__(self, grid):
        return lambda **kwargs: None


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize(("op", "module"), [(kernels.CHUNK_GDN, chunk_gdn), (kernels.CHUNK_KDA, chunk_kda)])
def test_memory_per_token_and_head(op, module, packed, monkeypatch):
    T, heads = 512, 4
    for name, value in vars(module).items():
        if name.endswith("_kernel") and hasattr(value, "arg_names"):
            monkeypatch.setattr(module, name, _NotLaunched())
    call = op.make_inputs(T=T, HK=2, HV=heads, K=128, V=128, dtype=torch.bfloat16)
    if packed:
        call |= dict(cu_seqlens=torch.tensor([0, 100, T]), initial_state=None)
    with _Allocations(*(x for x in call.values() if isinstance(x, torch.Tensor))) as allocations:
        results = getattr(module, op.name)(**call)
    extra = allocations.bytes - sum(x.untyped_storage().nbytes() for x in results)
    assert 0 < extra <= BYTES_PER_TOKEN_AND_HEAD * T * heads, f"{extra / T / heads:.0f} bytes per token and head"
