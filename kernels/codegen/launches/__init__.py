"""What to launch for each family, at the shapes of LLaMA2-7B, OpenLLaMA-3B and CLIP ViT-L/14.

LAUNCHES      {"what for": a function that calls launchers on tensors of `meta(...)`}
MEMORY_BOUND  names of kernels whose rows must move 128 bits at a time
READERS       the same for their loads alone: what they write is little or scattered
WRITERS       the same for their stores alone: much of what they read are addresses and narrow types
PERSISTENT    names of kernels that launch 16 warps per multiprocessor, all resident at once
MATRIX        names of kernels whose products must run on tensor cores, HGMMA on sm_90
"""
