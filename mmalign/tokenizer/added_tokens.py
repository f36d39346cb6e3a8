"""Added tokens, and which tokens are bos, eos, unk and pad, from the files of a folder.

Published folders keep added tokens in up to three places: added_tokens in tokenizer.json,
added_tokens_decoder in tokenizer_config.json, and added_tokens.json. A token counts wherever it
stands; files that contradict each other are refused.
"""

from dataclasses import dataclass
from pathlib import Path

import tokenizers

from mmalign.errors import UserError
from mmalign.files import Settings, read_json
from mmalign.tokenizer.backends import MAX_VOCAB_SIZE, HuggingFace, SentencePiece

ROLES = ("bos", "eos", "unk", "pad")


@dataclass(frozen=True)
class AddedToken:
    """One token with the flags that tokenizer.json has of it."""

    content: str
    id: int
    source: Path
    special: bool = False  # never parsed in a text; other added tokens are
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False

    def to_json(self) -> dict:
        """Its entry among added_tokens of a tokenizer.json."""
        return {name: value for name, value in vars(self).items() if name != "source"}


class Roles:
    """Names of the special tokens from tokenizer_config.json and special_tokens_map.json."""

    def __init__(self, folder: Path):
        paths = (folder / "tokenizer_config.json", folder / "special_tokens_map.json")
        self.files = [Settings(read_json(path), path) for path in paths if path.exists()]

    def name(self, role: str) -> tuple[str, Path] | None:
        """The configured token and the file that says so; empty strings count as not given."""
        for settings in self.files:
            key = f"{role}_token"
            name = settings.get(key)
            name = name.get("content", False) if isinstance(name, dict) else name
            if isinstance(name, str | None):
                if name:
                    return name, settings.path
                continue
            raise settings.error(key, "a token")
        return None

    def is_null(self, role: str) -> bool:
        """Whether a file says that there is no token of this role, as Qwen's do of bos."""
        key = f"{role}_token"
        return self.name(role) is None and any(key in x and x.get(key) is None for x in self.files)

    def special_names(self) -> set[str]:
        named = {found[0] for role in ROLES if (found := self.name(role))}
        for settings in self.files:
            for key in ("additional_special_tokens", "extra_special_tokens"):
                listed = settings.get(key)
                for token in listed if isinstance(listed, list) else []:
                    name = token.get("content") if isinstance(token, dict) else token
                    if isinstance(name, str):
                        named.add(name)
        return named


def read_added_tokens(
    folder: Path, roles: Roles, beside: tokenizers.Tokenizer | None
) -> dict[str, AddedToken]:
    """All added tokens by their text; beside: the folder's tokenizer.json."""
    found: dict[str, AddedToken] = {}
    special, by_id = roles.special_names(), {}
    for token in _all(folder, roles, beside, special):
        other = found.setdefault(token.content, token)
        if other.id != token.id:
            raise UserError(
                f"{token.source}: {token.content!r} has the id {token.id}, but {other.id} in "
                f"{other.source}. Correct the wrong one"
            )
        other = by_id.setdefault(token.id, token)
        if other.content != token.content:
            raise UserError(
                f"{token.source}: the id {token.id} is {token.content!r}, but {other.content!r} "
                f"in {other.source}. Correct the wrong one"
            )
    return found


def check_free(token: AddedToken, backend: SentencePiece | HuggingFace, path: Path) -> None:
    """UserError where the vocabulary has another id for the token, or another token at its id."""
    known = backend.find(token.content)
    other = backend.token(token.id) if token.id < backend.vocab_size else None
    if (known is not None and known != token.id) or other not in (None, token.content):
        raise UserError(
            f"{token.source}: {token.content!r} has the id {token.id}, but in {path} "
            f"{f'that is {other!r}' if other != token.content and other else f'it is {known}'}. "
            "Correct the wrong one"
        )


def _all(folder: Path, roles: Roles, beside: tokenizers.Tokenizer | None, special: set[str]):
    if beside is not None:
        for token_id, token in beside.get_added_tokens_decoder().items():
            flags = {name: getattr(token, name) for name in _FLAGS}
            yield AddedToken(token.content, token_id, folder / "tokenizer.json", **flags)
    for settings in roles.files:
        decoder = settings.section("added_tokens_decoder")
        for key in decoder.values:
            token, token_id = decoder.section(key), _id(decoder, key, key)
            if not isinstance(token.get("content"), str):
                raise token.error("content", "the token's text")
            flags = {name: token.flag(name, False) for name in _FLAGS}
            yield AddedToken(token.get("content"), token_id, settings.path, **flags)
    path = folder / "added_tokens.json"
    if path.exists():
        added = Settings(read_json(path), path)
        for name in added.values:
            token_id = added.integer(name, 0, MAX_VOCAB_SIZE - 1, 0)
            yield AddedToken(name, token_id, path, special=name in special)


_FLAGS = ("special", "single_word", "lstrip", "rstrip", "normalized")


def _id(decoder: Settings, key: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 12 and int(text) < MAX_VOCAB_SIZE):
        raise UserError(
            f"{decoder.path}: {decoder.within}{key[:40]}: expected an id from 0 to "
            f"{MAX_VOCAB_SIZE - 1}"
        )
    return int(text)
