"""Ids and offsets of plain text: sentencepiece, or a tokenizer.json through the tokenizers library.

Both raise UserError for a file that cannot be read and for a text that is not Unicode.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
import tokenizers

from mmalign.errors import UserError
from mmalign.files import known_kind, require_file

MAX_VOCAB_SIZE = 2**24
Offsets = list[tuple[int, int]]
_USUAL = {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")  # the first line of Llama 3's tokenizer.model


def is_tiktoken(path: Path) -> bool:
    """Whether a tokenizer.model is a list of base64 lines instead of a sentencepiece model."""
    require_file(path)
    with path.open("rb") as file:
        return bool(_TIKTOKEN.match(file.read(256)))


class SentencePiece:
    """sentencepiece's own tokenisation, with which LLaMA was trained."""

    def __init__(self, path: Path):
        require_file(path)
        if not path.stat().st_size:
            raise UserError(f"{path} is not a sentencepiece model (it is empty). Download it again")
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
            self.vocab_size = self.model.vocab_size()
            # a damaged piece is not Unicode
            self.pieces = [self.model.id_to_piece(i) for i in range(self.vocab_size)]
        except (RuntimeError, IndexError, ValueError) as error:
            kind = known_kind(path) or f"not a sentencepiece model ({error})"
            if is_tiktoken(path):
                kind = "a tiktoken vocabulary. Set --model.tokenizer to a tokenizer.json"
            raise UserError(f"{path} is {kind}") from error

    def find(self, token: str) -> int | None:
        token_id = self.model.piece_to_id(token)
        return token_id if self.model.id_to_piece(token_id) == token else None

    def special(self, role: str) -> int | None:
        """The model's own token of this role, else the one of the usual name."""
        token_id = getattr(self.model, f"{role}_id")()
        return token_id if token_id >= 0 else self.find(_USUAL.get(role, ""))

    def encode(self, text: str) -> list[int]:
        return self.model.encode(_checked(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self.model.encode([_checked(text) for text in texts])

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        mapping = self.model.encode(_checked(text), return_type="offset_mapping")
        return mapping["ids"], mapping["offsets"]

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids)

    def token(self, token_id: int) -> str:
        return self.pieces[token_id]


class HuggingFace:
    """A tokenizer.json through the tokenizers library."""

    def __init__(self, model: tokenizers.Tokenizer, path: Path):
        self.model = model
        self.model.encode_special_tokens = True  # special tokens in a text are text
        self.model.no_truncation()
        self.model.no_padding()
        self.vocab_size = max(self.model.get_vocab().values(), default=-1) + 1
        if not 0 < self.vocab_size <= MAX_VOCAB_SIZE:
            raise UserError(
                f"{path}: ids up to {self.vocab_size - 1}; expected 0 to {MAX_VOCAB_SIZE - 1}"
            )

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.model.encode_special_tokens = True  # which a pickle, as for a worker, leaves out

    def find(self, token: str) -> int | None:
        return self.model.token_to_id(token)

    def special(self, role: str) -> int | None:
        return self.find(_USUAL.get(role, ""))

    def encode(self, text: str) -> list[int]:
        return self.model.encode(_checked(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        checked = [_checked(text) for text in texts]
        return [x.ids for x in self.model.encode_batch_fast(checked, add_special_tokens=False)]

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        encoding = self.model.encode(_checked(text), add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids)

    def token(self, token_id: int) -> str:
        piece = self.model.id_to_token(token_id)
        assert piece is not None, f"the vocabulary has no id {token_id}"
        return piece


def load_json(path: Path) -> tokenizers.Tokenizer:
    """The library's tokenizer; UserError with the path for a file that is not one."""
    require_file(path)
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except BaseException as error:  # bare Exceptions, and panics that are not even that
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        kind = known_kind(path) or f"not a tokenizer.json ({error})"
        raise UserError(f"{path} is {kind}") from error


def _checked(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text is not Unicode: half of a surrogate pair, {text[error.start]!r}, at "
            f"character {error.start}"
        ) from error
    return text
