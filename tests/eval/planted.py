"""Kernels that tests plant in the registry, and the shapes they are small at."""

import contextlib
import dataclasses

from hf_gdn import registry

TINY = {"gdn": "qwen3_next-tiny", "kda": "kimi_linear-tiny"}
OPS = ("chunk_gdn", "recurrent_gdn", "chunk_kda", "recurrent_kda")


@contextlib.contextmanager
def backend(name, make, ops=OPS, **changes):
    """Register kernels of a backend, made of the eager ones."""
    for op in ops:
        eager = registry.get(op, "eager")
        registry.register(dataclasses.replace(eager, backend=name, fn=make(eager.fn), **changes))
    try:
        yield
    finally:
        for op in ops:
            registry.unregister(op, name)
