"""The memory that a run needs, from shapes alone.

activations.py  what the forward pass saves for the backward pass
samples.py      the average sample of the data, or of LLaVA's
plan.py         all bytes on a device, and the micro-batch and recomputation that fit ("auto")
table.py        the plan in words, before a run and in scripts/plan_memory.py
"""
