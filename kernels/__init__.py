"""Triton kernels. They run on CUDA and other accelerators, and on the CPU under TRITON_INTERPRET=1."""
