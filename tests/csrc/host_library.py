"""The functions of csrc/host/host_arithmetic.cpp on NumPy arrays."""

import ctypes
from pathlib import Path

import numpy as np

_SCALARS = {
    "u64": ctypes.c_uint64,
    "u32": ctypes.c_uint32,
    "i64": ctypes.c_int64,
    "i32": ctypes.c_int,
    "f32": ctypes.c_float,
    "f64": ctypes.c_double,
    "array": ctypes.c_void_p,
}
_SIGNATURES = {
    "philox": "u64 array i64 array",
    "round_randomly": "array array i64 array",
    "split_master": "array i64 array array",
    "join_master": "array array i64 array",
    "quantize_first": "array array i64 array array array",
    "quantize_second": "array array i64 array array array",
    "adamw": "array array array array array array i64 f32 i64 f64 f64 f64 f64 f64 u64 u32",
    "order_tiles": "array i32 i32 i32 i32 array",
    "assign_items": "i64 i32 array",
    "packed_rows": "array i64 i64 array array",
    "projector_plan": "i32 array",
    "projector_first_column": "i32 i32 i32 i32",
    "projector_regions": "i32 i32 i32 i32 array",
    "projector_stage": "i32 i32 i32 i32 u32 array array",
    "projector_rows": "array i32 array",
    "project": "array array array array array array i32 i32 i32 i32 array f32 u32"
    " array array array",
    "accumulators": "i32 array",
    "dealt_row": "i64 i64 i64",
    "rms_norm_backward": "i64 i32 i32 i32 i32 array",
    "attention_items": "array i32 i32 i32 i32 i32 array",
    "attention": "array array array array array i32 i32 i32 i32 i32 i32 i32 u32 array array",
    "attention_backward": "array array array array array array array array"
    " i32 i32 i32 i32 i32 i32 i32 u32 array",
}


class HostLibrary:
    """library.philox(key, counters, num, words): arrays are passed by address."""

    def __init__(self, file: Path):
        library = ctypes.CDLL(str(file))
        for name, signature in _SIGNATURES.items():
            function = getattr(library, f"host_{name}")
            function.argtypes = [_SCALARS[x] for x in signature.split()]
            setattr(self, name, self._wrapped(function))

    @staticmethod
    def _wrapped(function):
        def call(*args):
            for x in args:
                assert not isinstance(x, np.ndarray) or x.flags.c_contiguous
            return function(*(x.ctypes.data if isinstance(x, np.ndarray) else x for x in args))

        return call
