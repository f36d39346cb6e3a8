"""Compiles every Triton kernel for sm_80 and sm_90 without a GPU, and reads the machine code.

compiler.py compiles the launches of a family, launches/<family>.py says what to launch, render.py
writes the tables of kernels/CODEGEN.md. Import it with kernels/ on sys.path (pytest's pythonpath).
"""
