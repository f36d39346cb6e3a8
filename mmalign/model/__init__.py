"""Vision tower, projector and decoder: CLIP or SigLIP, and the LLaMA family, on packed tokens.

The path of a PackedBatch (mmalign/batch.py) through the files:

    Llava.forward       llava.py          what each stage trains; loss of the supervised rows
      pixel_values      vision_tower.py   (num_images * num_patches, vision_hidden_size)
      image features    projector.py      into the rows of the image tokens, with the first norm
      input_ids         decoder.py        embeddings, positions of every layer, the layers
      hidden states     layers.py         one layer: attention and MLP;  lora.py adapts its products
      attention         positions.py      of packed samples, after a prefix, with a KV cache
      activations       recompute.py      what the backward pass computes again

config/ has the shapes, kinds.py what distinguishes the models, rope.py rotary frequencies,
preprocessing.py what images go through, tiles.py the tiles of LLaVA 1.6; hf_config.py and hf/ read
and write folders, shards.py sees through FSDP2's shards, meta.py builds a model without weights.
generate.py -> generation_batches.py -> generation_cache.py -> decoder.py -> sampling.py continues
prompts.
"""
