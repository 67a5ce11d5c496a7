"""The delta rule from flash-linear-attention, on CUDA devices, if the package is installed. Imported on first use."""
