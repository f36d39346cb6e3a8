"""Kernels for the CPU in C++ (csrc/cpu): fp32, and bf16 state of AdamW; the rest: plain PyTorch."""
