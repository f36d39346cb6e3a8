"""Every operation in plain PyTorch: defines what the others compute, and the fast path on a CPU.

Half precision is upcast to fp32 where a sum runs over a row. On a CPU a training step is bound by
memory, so these functions make few passes, write results in place and materialise nothing that a
pass can avoid. On a GPU, attention, AdamW's stochastic rounding and the selection of supervised
rows synchronise with the device; the other backends do not.
"""
