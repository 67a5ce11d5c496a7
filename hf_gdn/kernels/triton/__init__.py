"""The ops as Triton kernels, without gradients. They run on CUDA devices and, in Triton's interpreter, on CPUs."""
