"""From LLaVA's JSON to packed batches.

    json + jpg -> Sample -> EncodedSample -> PackedBatch
    dataset.py    conversation.py + images.py    packing.py, planned by loader.py

check.py reads everything once before the first step, so that bad input stops a run early.
"""
