"""From files to packed batches.

    json file           read_samples         samples.py       compact, parsed when asked for
      Sample            encode               dataset.py       checks; templates in conversation.py
      EncodedSample     load_pixels          images.py        uint8, resized as CLIP does
        |               look_up              feature_cache.py or what the tower made of it before
        |               check_samples        check.py         all of this once, before training
        v
      PackedBatch       pack_samples         packing.py       one row of tokens, no padding
      Step              StepLoader           loader.py        exactly one global batch, loaded ahead

preview.py shows people what comes out; toy_world.py makes a small world of data.
"""
