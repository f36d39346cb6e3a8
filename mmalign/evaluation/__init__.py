"""Text-only alignment evaluation: TruthfulQA and ETHICS, scored by log-likelihood."""
