"""The one room that knows which names of transformers change from version to version.

- `versions`: which versions are supported and tested, and in which one a model type first appeared.
- `cache_names`: what a cache is called as an argument of a model, of a layer and of ``generate``, and in outputs.
- `seams`: the classes, arguments and attributes that hf_gdn swaps or relies on, each looked up and checked when
  `hf_gdn.patch` runs. A seam that is not as expected is a `PatchError` that names it.
- `indexer_positions`: a repair that only the oldest supported version needs.

Nothing here imports the rest of the package but `hf_gdn.errors`. No other file spells an argument name that changed
or a version number (tests/test_upstream.py).
"""
