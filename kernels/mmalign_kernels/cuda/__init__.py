"""The operations in CUDA C++ (csrc/), where the library is built. Experimental: runs only if named.

library.py loads libmmalign_cuda.so, which CMake builds into this folder.
"""
