"""What numba compiles. Importing these modules imports numba; `hf_gdn.kernels.numba.runtime` does so when needed."""
