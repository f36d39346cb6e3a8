"""Kernels for the CPU in C++ (csrc/cpu): fp32; everything else is computed in plain PyTorch."""
