"""Text to ids and back, from sentencepiece's tokenizer.model or from a tokenizer.json.

tokenizer.py       the class that everything else uses
backends.py        sentencepiece and the tokenizers library
added_tokens.py    tokens and roles (bos, eos ...) in the files beside the vocabulary
tokenizer_json.py  the tokenizer.json that transformers needs
chat_template.py   the folder's own chat template, span by span
bounded_jinja.py   the sandbox that it runs in
"""

from mmalign.tokenizer.tokenizer import IMAGE_TOKENS, Tokenizer

__all__ = ["IMAGE_TOKENS", "Tokenizer"]
