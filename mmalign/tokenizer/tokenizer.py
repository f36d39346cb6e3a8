"""Tokenizer: text to ids and back, from sentencepiece's tokenizer.model or from tokenizer.json.

The class knows text and ids only. Templates place the special tokens, so no special token is ever
parsed in a text: "</s>" in an answer stays three pieces.
"""

import hashlib
import logging
import shutil
from collections.abc import Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path

import tokenizers

from mmalign.errors import UserError
from mmalign.files import write_json, write_text
from mmalign.tokenizer.added_tokens import AddedToken, Roles, check_free, read_added_tokens
from mmalign.tokenizer.backends import HuggingFace, Offsets, SentencePiece, is_tiktoken, load_json
from mmalign.tokenizer.tokenizer_json import (
    check_same_tokens,
    encodes_equally,
    of_sentencepiece,
    with_tokens,
)

log = logging.getLogger("mmalign")
IMAGE_TOKENS = ("<im_patch>", "<im_start>", "<im_end>")
VOCABULARIES = ("tokenizer.model", "tokenizer.json")
_PADDING = ("<pad>", "[PAD]")  # of folders that do not name their padding token


class Tokenizer:
    """Ids and offsets of plain text, and the ids of the special tokens.

    The three image tokens of LLaVA keep their ids if the tokenizer has them; otherwise they follow
    the vocabulary: <im_patch> vocab_size, <im_start> vocab_size + 1, <im_end> vocab_size + 2. bos,
    eos, unk and pad are those that the folder configures; else unk is eos in a vocabulary without
    one, and pad is unk, as in the released models. bos_token_id is None where the folder says null.
    """

    def __init__(self, path: Path):
        self.path = path  # the vocabulary; settings are read from the files next to it
        folder, self._beside = path.parent, None
        if path.suffix == ".model":
            backend = SentencePiece(path)
            if (folder / "tokenizer.json").exists():
                self._beside = load_json(folder / "tokenizer.json")
                check_same_tokens(backend, path, self._beside)
                if not encodes_equally(backend, self._beside):
                    log.warning(
                        "%s is read; the tokenizer.json beside it, which transformers reads, "
                        "divides some texts otherwise",
                        path,
                    )
        else:
            self._beside = load_json(path)
            backend = HuggingFace(self._beside, path)
        self._backend: SentencePiece | HuggingFace = backend
        roles = Roles(folder)
        self._added = read_added_tokens(folder, roles, self._beside)
        for token in self._added.values():
            check_free(token, backend, path)
        self._number_image_tokens()
        no_bos = roles.is_null("bos")
        self.bos_token_id: int | None = None if no_bos else self._special("bos", roles)
        self.eos_token_id = self._special("eos", roles)
        unk = self._special("unk", roles, self.eos_token_id)
        self.unk_token_id, self.pad_token_id = unk, self._special("pad", roles, unk)
        self._take_added_tokens()

    def _number_image_tokens(self) -> None:
        ids = {name: self._find(name) for name in IMAGE_TOKENS}
        others = [token.id for name, token in self._added.items() if name not in IMAGE_TOKENS]
        vocab_size = max([self._backend.vocab_size, *(i + 1 for i in others)])
        while vocab_size - 1 in ids.values():  # image tokens at the end are not in the vocabulary
            vocab_size -= 1
        self.vocab_size = vocab_size
        self.image_token_id, self.im_start_id, self.im_end_id = (
            vocab_size + i if (known := ids[name]) is None else known
            for i, name in enumerate(IMAGE_TOKENS)
        )
        self._image_names = {
            self.image_token_id: "<im_patch>",
            self.im_start_id: "<im_start>",
            self.im_end_id: "<im_end>",
        }

    def _take_added_tokens(self) -> None:
        """Tokens that the backend lacks: special ones get a name, others are parsed in a text."""
        new = [token for name, token in self._added.items() if name not in IMAGE_TOKENS]
        new = [token for token in new if self._backend.find(token.content) is None]
        self._names = {token.id: token.content for token in new if token.special}
        if len(self._names) < len(new):
            model = self._json
            if model is None:
                raise UserError(
                    f"{self.path} cannot be written as a tokenizer.json, which {new[0].content!r} "
                    f"({new[0].source}) needs. Save the folder with transformers, or remove the "
                    "token"
                )
            self._backend, self._names = (
                HuggingFace(with_tokens(model, new, self.path), self.path),
                {},
            )

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Tokenizer":
        """Read a folder (tokenizer.model before tokenizer.json) or one of these files.

        A tokenizer.model in tiktoken's format, as Llama 3 has it, gives way to tokenizer.json.
        """
        path = Path(path)
        candidates = [path / name for name in VOCABULARIES] if path.is_dir() else [path]
        found = [file for file in candidates if file.exists()]
        if len(found) == 2 and is_tiktoken(found[0]):
            found.pop(0)
        if found and found[0].suffix in (".model", ".json"):
            return cls(found[0])
        looked_for = " and ".join(str(file) for file in candidates)
        raise UserError(
            f"no tokenizer: looked for {looked_for}. Set --model.tokenizer to a folder with "
            "tokenizer.model or tokenizer.json, or to one of these files"
        )

    def check_rows(self, num_rows: int, decoder: str | Path, num_added: int = 0) -> None:
        """UserError unless the decoder has a row for every token, and an export is possible.

        A padding token needs no row: early Llama-2-hf folders have <pad> 32000, and 32000 rows.
        num_added: rows that it and the image tokens get beyond num_rows.
        """
        if set(range(num_rows, self.vocab_size)) - self.padding.keys():
            extra = [
                f"{x.content!r} ({x.source.name})"
                for x in self._added.values()
                if num_rows <= x.id < self.vocab_size and x.id not in self.padding
            ]
            remedy = f"Remove {', '.join(extra[:5])}" if extra else "Set another --model.tokenizer"
            raise UserError(
                f"the tokenizer {self.path} has {self.vocab_size} tokens, but the decoder "
                f"{decoder} has rows for {num_rows}. {remedy}, or give a decoder with these rows"
            )
        self._complete_json(num_rows + num_added)

    @cached_property
    def padding(self) -> dict[int, str]:
        """Added tokens that are for padding alone, by id: no text of a sample may hold them."""
        used = (self.bos_token_id, self.eos_token_id, self.unk_token_id)
        added = {x.id: name for name, x in self._added.items() if x.id not in used}
        return {i: x for i, x in added.items() if i == self.pad_token_id or x in _PADDING}

    @property
    def has_im_start_end(self) -> bool:
        """Whether the folder's own vocabulary has <im_start> and <im_end>."""
        return None not in (self._find("<im_start>"), self._find("<im_end>"))

    def num_image_tokens_added(self, use_im_start_end: bool) -> int:
        """Rows of a multimodal decoder beyond vocab_size: 3 with im_start/im_end, otherwise 1."""
        names = (self.image_token_id, self.im_start_id, self.im_end_id)
        return max(0, max(names if use_im_start_end else names[:1]) + 1 - self.vocab_size)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: no BOS, nothing parsed as special."""
        return self._backend.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        return self._backend.encode_batch(texts)

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        """Ids and, for each, the characters [begin, end) of `text` that it represents.

        An id without characters (the blank that the tokenizer prepends, all but the last byte of a
        character in byte fallback) has begin == end.
        """
        return self._backend.encode_with_offsets(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; bos, eos and unk decode to nothing, image tokens to their names."""
        runs = groupby((int(i) for i in ids), key=self._written)
        return "".join(
            self._backend.decode(list(run)) if name is None else name * len(list(run))
            for name, run in runs
        )

    def _written(self, token_id: int) -> str | None:
        """What decode writes for an id that the backend does not know."""
        return "" if token_id in self._names else self._image_names.get(token_id)

    def token(self, token_id: int) -> str:
        """The piece of one id as spelled in the vocabulary (U+2581 is a blank)."""
        names = self._image_names | self._names
        return names.get(token_id) or self._backend.token(int(token_id))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's file and of the special ids, which settings may change."""
        ids = (self.vocab_size, self.bos_token_id, self.eos_token_id, self.unk_token_id)
        ids += (self.image_token_id, self.im_start_id, self.im_end_id)
        parsed = [
            (name, x.id)
            for name, x in self._added.items()
            if not x.special and name not in IMAGE_TOKENS
        ]
        settings = repr(ids)
        if parsed and self._json is not None:  # then the file beside it encodes, too
            settings += repr(sorted(parsed)) + self._json.to_str()
        return hashlib.sha256(self.path.read_bytes() + settings.encode()).hexdigest()

    def save(self, folder: str | Path, num_rows: int = 0, chat_template: str = "") -> None:
        """Write what transformers and from_pretrained need to give exactly these ids.

        Added tokens stand in tokenizer.json alone. num_rows: of the decoder; the image tokens among
        them are added with the stripping that training depends on: LlavaProcessor writes one
        <im_patch> per patch. chat_template: in Jinja, as transformers reads it.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        model = self._complete_json(num_rows)
        if isinstance(self._backend, SentencePiece):
            target = folder / "tokenizer.model"
            if self.path.resolve() != target.resolve():
                shutil.copyfile(self.path, target)
        if model is not None:
            model.save(str(folder / "tokenizer.json"))
        else:
            log.warning("%s is not a plain BPE model, so no tokenizer.json is written", self.path)
            added = {token.content: token.id for token in self._export_tokens(num_rows)}
            write_json(folder / "added_tokens.json", added)
        write_json(folder / "tokenizer_config.json", self._transformers_config())
        if chat_template:
            write_text(folder / "chat_template.jinja", chat_template)

    @cached_property  # converting takes a second, and is tried before an export needs it
    def _json(self) -> tokenizers.Tokenizer | None:
        if isinstance(self._backend, HuggingFace):
            return self._backend.model
        bos = self._special("bos", Roles(self.path.parent))
        bos = self.token(bos), bos
        return of_sentencepiece(self._backend, self._beside, bos)

    def _complete_json(self, num_rows: int) -> tokenizers.Tokenizer | None:
        model = self._json
        return (
            None if model is None else with_tokens(model, self._export_tokens(num_rows), self.path)
        )

    def _export_tokens(self, num_rows: int) -> list[AddedToken]:
        """Added tokens, the roles', and the image tokens that have a row."""
        tokens = {name: x for name, x in self._added.items() if name not in IMAGE_TOKENS}
        for token_id in self._role_ids:
            name = self.token(token_id)
            source = tokens[name].source if name in tokens else self.path
            tokens[name] = AddedToken(name, token_id, source, special=True)
        for token_id, name in self._image_names.items():
            if token_id < num_rows:
                source = self._added[name].source if name in self._added else self.path
                strips = dict(lstrip=name == "<im_start>", rstrip=name == "<im_end>")
                tokens[name] = AddedToken(name, token_id, source, special=True, **strips)
        return list(tokens.values())

    def _transformers_config(self) -> dict:
        roles = {"bos": self.bos_token_id, "eos": self.eos_token_id}
        roles |= {"unk": self.unk_token_id, "pad": self.pad_token_id}
        tokens = {
            f"{role}_token": None if token_id is None else self.token(token_id)
            for role, token_id in roles.items()
        }
        # this class uses tokenizer.json unchanged; LlamaTokenizer changes leading blanks
        return {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "right", **tokens}

    def special_id(self, name: str) -> int | None:
        """Id of a token that is never parsed in a text, an added one or bos, eos or unk."""
        if (token := self._added.get(name)) is not None and token.special:
            return token.id
        return next((i for i in self._role_ids if self.token(i) == name), None)

    @property
    def _role_ids(self) -> set[int]:
        ids = (self.bos_token_id, self.eos_token_id, self.unk_token_id)
        return {i for i in ids if i is not None}

    def special_names(self) -> list[str]:
        """Of the tokens that special_id finds, without the image tokens; longest first."""
        names = {self.token(i) for i in self._role_ids}
        names |= {name for name, token in self._added.items() if token.special}
        return sorted(names - set(IMAGE_TOKENS), key=len, reverse=True)

    def _find(self, name: str) -> int | None:
        added = self._added.get(name)
        return self._backend.find(name) if added is None else added.id

    def _special(self, role: str, roles: Roles, default: int | None = None) -> int:
        """The configured token of a role, or the vocabulary's own, or `default`."""
        named = roles.name(role)
        if named is not None:
            name, source = named
            if (token_id := self._find(name)) is None:
                raise UserError(
                    f"{source}: {role}_token is {name!r}, which is not in the vocabulary of "
                    f"{self.path}. Name one of its tokens"
                )
            return token_id
        if (token_id := self._backend.special(role)) is not None:
            return token_id
        if default is None:
            or_none = ", to null if the model has none" if role == "bos" else ""
            raise UserError(
                f"{self.path}: no {role} token. Set {role}_token in tokenizer_config.json next to "
                f"this file{or_none}"
            )
        return default
