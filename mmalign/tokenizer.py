"""Tokenizer: text to ids and back, from sentencepiece's tokenizer.model or from tokenizer.json.

The class knows text and ids only. Templates place the special tokens, so nothing in a text is ever
parsed as one: "</s>" in an answer stays three pieces.
"""

import hashlib
import logging
import shutil
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import sentencepiece
import tokenizers

from mmalign.errors import UserError
from mmalign.files import read_json, write_json

log = logging.getLogger("mmalign")
IMAGE_TOKENS = ("<im_patch>", "<im_start>", "<im_end>")
_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
Offsets = list[tuple[int, int]]


class Tokenizer:
    """Ids and offsets of plain text, and the ids of the special tokens.

    The three image tokens of LLaVA keep their ids if the tokenizer has them; otherwise they follow
    the vocabulary: <im_patch> vocab_size, <im_start> vocab_size + 1, <im_end> vocab_size + 2. pad
    is unk, as in the released models, or eos in a tokenizer without unk.
    """

    def __init__(self, path: Path):
        self.path = path  # the vocabulary; settings are read from the files next to it
        self._backend = _SentencePiece(path) if path.suffix == ".model" else _HuggingFace(path)
        settings = _read_settings(path.parent)
        added = {**_read_added_tokens(path.parent, settings), **self._backend.added_tokens}
        image_ids = {name: added.get(name, self._backend.find(name)) for name in IMAGE_TOKENS}
        others = [i for name, i in added.items() if name not in IMAGE_TOKENS]
        known = {i for i in image_ids.values() if i is not None}
        vocab_size = max([self._backend.vocab_size, *(i + 1 for i in others)])
        while vocab_size - 1 in known:  # image tokens at the end are not in the base vocabulary
            vocab_size -= 1
        self.vocab_size = vocab_size
        self.image_token_id, self.im_start_id, self.im_end_id = (
            vocab_size + i if (known_id := image_ids[name]) is None else known_id
            for i, name in enumerate(IMAGE_TOKENS)
        )
        self._image_names = {
            self.image_token_id: "<im_patch>",
            self.im_start_id: "<im_start>",
            self.im_end_id: "<im_end>",
        }
        self.bos_token_id = self._special("bos", "<s>", settings)
        self.eos_token_id = self._special("eos", "</s>", settings)
        self.unk_token_id = self._special("unk", "<unk>", settings, default=self.eos_token_id)
        self.pad_token_id = self.unk_token_id

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Tokenizer":
        """Read a folder (tokenizer.model before tokenizer.json) or one of these files."""
        path = Path(path)
        candidates = [path / name for name in _FILES[:2]] if path.is_dir() else [path]
        for file in candidates:
            if file.is_file() and file.suffix in (".model", ".json"):
                return cls(file)
        looked_for = " and ".join(str(file) for file in candidates)
        raise UserError(
            f"no tokenizer: looked for {looked_for}. Set --model.tokenizer to a folder with "
            "tokenizer.model or tokenizer.json, or to one of these files"
        )

    def num_image_tokens_added(self, use_im_start_end: bool) -> int:
        """Rows of a multimodal decoder beyond vocab_size: 3 with im_start/im_end, otherwise 1."""
        names = (self.image_token_id, self.im_start_id, self.im_end_id)
        return max(0, max(names if use_im_start_end else names[:1]) + 1 - self.vocab_size)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: no BOS, nothing parsed as special."""
        return self._backend.encode(text)

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        """Ids and, for each, the characters [begin, end) of `text` that it represents.

        An id without characters (the blank that the tokenizer prepends, all but the last byte of a
        character in byte fallback) has begin == end.
        """
        return self._backend.encode_with_offsets(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; bos, eos and unk decode to nothing, image tokens to their names."""
        runs = groupby((int(i) for i in ids), key=self._image_names.get)
        return "".join(
            name * len(list(run)) if name else self._backend.decode(list(run)) for name, run in runs
        )

    def token(self, token_id: int) -> str:
        """The piece of one id as spelled in the vocabulary (U+2581 is a blank)."""
        return self._image_names.get(token_id) or self._backend.token(int(token_id))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's file and of the special ids, which settings may change."""
        ids = (self.vocab_size, self.bos_token_id, self.eos_token_id, self.unk_token_id)
        ids += (self.image_token_id, self.im_start_id, self.im_end_id)
        return hashlib.sha256(self.path.read_bytes() + repr(ids).encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Copy the tokenizer's files and write those that transformers needs to load the folder.

        transformers 5 orders the merges of a bare tokenizer.model wrongly (runs of blanks get
        other ids), so an equivalent tokenizer.json is written next to it.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        sources = {name: self.path.parent / name for name in _FILES}
        sources[f"tokenizer{self.path.suffix}"] = self.path  # whatever its name was
        for name, source in sources.items():
            if source.is_file() and source.resolve() != (folder / name).resolve():
                shutil.copyfile(source, folder / name)
        path = folder / "tokenizer.json"
        if isinstance(self._backend, _SentencePiece) and not path.is_file():
            self._save_json(self._backend.model, path)
        config = folder / "tokenizer_config.json"
        if not config.is_file():
            write_json(config, self._transformers_config())

    def save_image_tokens(self, folder: str | Path, vocab_size: int) -> None:
        """Add the image tokens of a decoder with vocab_size rows to a saved tokenizer.json.

        transformers' LlavaProcessor then writes one <im_patch> per patch, at image_token_id.
        """
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():  # save() has logged the reason
            return
        saved = tokenizers.Tokenizer.from_file(str(path))
        for token_id, name in self._image_names.items():
            if token_id < vocab_size:
                saved.add_special_tokens([tokenizers.AddedToken(name, normalized=False)])
                assert saved.token_to_id(name) == token_id, (name, token_id)
        saved.save(str(path))

    def _save_json(self, model: sentencepiece.SentencePieceProcessor, path: Path) -> None:
        converted = _to_tokenizers(self, model)
        probe = "  Two  blanks,\ttab\n\n\u00e9\u2603 (12.5%) at the end "
        if converted.encode(probe, add_special_tokens=False).ids == self.encode(probe):
            converted.save(str(path))
        else:
            log.warning("%s is not a plain BPE model, so %s is not written", self.path, path)

    def _transformers_config(self) -> dict:
        roles = {"bos": self.bos_token_id, "eos": self.eos_token_id}
        roles |= {"unk": self.unk_token_id, "pad": self.pad_token_id}
        tokens = {f"{role}_token": self.token(token_id) for role, token_id in roles.items()}
        # this class uses tokenizer.json unchanged; LlamaTokenizer changes leading blanks
        return {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "right", **tokens}

    def _special(self, role: str, usual: str, settings: dict, default: int | None = None) -> int:
        name = settings.get(f"{role}_token") or usual
        name = name["content"] if isinstance(name, dict) else name
        token_id = self._backend.special(role, name)
        token_id = default if token_id is None else token_id
        if token_id is None:
            raise UserError(
                f"{self.path}: no {role} token ({name!r} is not in the vocabulary). "
                f"Set {role}_token in tokenizer_config.json next to this file"
            )
        return token_id


class _SentencePiece:
    """sentencepiece's own tokenisation, with which LLaMA was trained."""

    added_tokens: dict[str, int] = {}

    def __init__(self, path: Path):
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except RuntimeError as error:
            raise UserError(f"{path} is not a sentencepiece model ({error})") from error
        self.vocab_size = self.model.vocab_size()

    def find(self, token: str) -> int | None:
        token_id = self.model.piece_to_id(token)
        return token_id if self.model.id_to_piece(token_id) == token else None

    def special(self, role: str, name: str) -> int | None:
        token_id = getattr(self.model, f"{role}_id")()
        return self.find(name) if token_id < 0 else token_id

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text)

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        mapping = self.model.encode(text, return_type="offset_mapping")
        return mapping["ids"], mapping["offsets"]

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids)

    def token(self, token_id: int) -> str:
        return self.model.id_to_piece(token_id)


class _HuggingFace:
    """A tokenizer.json through the tokenizers library."""

    def __init__(self, path: Path):
        try:
            self._model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exceptions
            raise UserError(f"{path} is not a tokenizer.json ({error})") from error
        self._model.encode_special_tokens = True  # special tokens in a text are text
        self._model.no_truncation()
        self._model.no_padding()
        self.added_tokens = {
            token.content: i for i, token in self._model.get_added_tokens_decoder().items()
        }
        self.vocab_size = max(self._model.get_vocab().values()) + 1

    def find(self, token: str) -> int | None:
        return self._model.token_to_id(token)

    def special(self, role: str, name: str) -> int | None:
        return self.find(name)

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        encoding = self._model.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)

    def token(self, token_id: int) -> str:
        piece = self._model.id_to_token(token_id)
        assert piece is not None, f"the vocabulary has no id {token_id}"
        return piece


def _to_tokenizers(
    tokenizer: Tokenizer, model: sentencepiece.SentencePieceProcessor
) -> tokenizers.Tokenizer:
    """A sentencepiece BPE model, such as LLaMA's, for the tokenizers library."""
    pieces = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    special = [i for i in pieces.values() if model.is_control(i) or model.is_unknown(i)]
    merges = []  # (score, halves): sentencepiece joins the halves with the highest score first
    for piece, i in pieces.items():
        if i not in special and not model.is_byte(i):
            halves = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
            known = [pair for pair in halves if pair[0] in pieces and pair[1] in pieces]
            known.sort(key=lambda pair: (pieces[pair[0]], pieces[pair[1]]))
            merges += [(model.get_score(i), pair) for pair in known]
    merges.sort(key=lambda merge: -merge[0])
    unk, bos = tokenizer.token(tokenizer.unk_token_id), tokenizer.token(tokenizer.bos_token_id)
    result = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            pieces, [pair for _, pair in merges], unk_token=unk, fuse_unk=True, byte_fallback=True
        )
    )
    blank = "\u2581"
    prepend, replace = tokenizers.normalizers.Prepend, tokenizers.normalizers.Replace
    result.normalizer = tokenizers.normalizers.Sequence([prepend(blank), replace(" ", blank)])
    decoders = tokenizers.decoders
    result.decoder = decoders.Sequence(
        [decoders.Replace(blank, " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(" ", 1, 0)]
    )
    result.add_special_tokens(
        [tokenizers.AddedToken(model.id_to_piece(i), normalized=False) for i in special]
    )
    result.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    return result


def _read_settings(folder: Path) -> dict:
    """special_tokens_map.json, overridden by tokenizer_config.json; either may be missing."""
    settings = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            settings |= read_json(folder / name)
    return settings


def _read_added_tokens(folder: Path, settings: dict) -> dict[str, int]:
    """Tokens added to a sentencepiece model, from the two files that published folders use."""
    added = {}
    if (folder / "added_tokens.json").is_file():
        added |= read_json(folder / "added_tokens.json")
    for token_id, token in settings.get("added_tokens_decoder", {}).items():
        added[token["content"]] = int(token_id)
    return added
