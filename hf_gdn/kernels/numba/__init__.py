"""The ops on CPUs, compiled by numba: decoding at the speed of memory, without a C compiler."""
