"""All use of names in other packages that are private or depend on the version.

- `versions`: supported and tested versions, and the version in which a model type first appeared.
- `cache_names`: the name of the cache argument of models, layers and ``generate``, and of the cache in outputs.
- `seams`: the classes, arguments and attributes that hf_gdn swaps or relies on. `hf_gdn.patch` looks them up and checks
  them; a missing or changed one raises a `PatchError` that names it.
- `indexer_positions`: a fix that only the oldest supported version needs.
- `modules`, `tensors`, `configs`: private attributes of torch, accelerate and transformers; `python`: of Python.

These modules import nothing else of the package but `hf_gdn.errors`. No other file contains an argument name that
changed, a version number or a private name of another package (tests/test_upstream.py checks this).
"""
