"""The delta rule by flash-linear-attention where it is installed, on CUDA devices only; never imported when absent."""
