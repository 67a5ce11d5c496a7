"""The fence around other packages: names that change from version to version, and private ones.

- `versions`: which versions are supported and tested, and in which one a model type first appeared.
- `cache_names`: what a cache is called as an argument of a model, of a layer and of ``generate``, and in outputs.
- `seams`: the classes, arguments and attributes that hf_gdn swaps or relies on, each looked up and checked when
  `hf_gdn.patch` runs. A seam that is not as expected is a `PatchError` that names it.
- `indexer_positions`: a repair that only the oldest supported version needs.
- `modules`, `tensors`, `configs`: private attributes of torch, accelerate and transformers.

Nothing here imports the rest of the package but `hf_gdn.errors`. No other file spells an argument name that changed, a
version number or a private name of another package (tests/test_upstream.py).
"""
