"""mmalign: what visual instruction tuning does to a language model's truthfulness and ethics."""

__version__ = "0.1.0"
