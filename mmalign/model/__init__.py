"""Vision tower, projector and decoder: a minimal CLIP / LLaMA2 on packed tokens."""
