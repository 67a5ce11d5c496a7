"""``hf-gdn doctor``: every kernel that models have here, checked in processes of their own.

- `rows`: which kernels, for which dtypes, heads and dimensions.
- `examine`: what is found out about one of them; runs in a child process.
- `children`: the child processes. One that dies costs one row.
- `report`: the table, and JSON.
"""
