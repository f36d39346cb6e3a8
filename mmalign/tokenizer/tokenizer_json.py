"""The tokenizer.json that transformers needs: converted from sentencepiece, with added tokens."""

import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers

from mmalign.errors import UserError
from mmalign.tokenizer.added_tokens import AddedToken
from mmalign.tokenizer.backends import SentencePiece

_PROBE = "  Two  blanks,\ttab\n\n\u00e9\u2603 (12.5%)" + " " * 9 + "many \U0001d11e at the end "


def with_tokens(
    model: tokenizers.Tokenizer, tokens: Iterable[AddedToken], path: Path
) -> tokenizers.Tokenizer:
    """A copy that also has these tokens, with their ids and flags; path: the vocabulary's file.

    Raises UserError for an id that the library cannot give: it numbers tokens without gaps.
    """
    tokens = sorted(tokens, key=lambda token: token.id)
    value = json.loads(model.to_str())
    names = {token.content for token in tokens}
    kept = [entry for entry in value["added_tokens"] if entry["content"] not in names]
    entries = kept + [token.to_json() for token in tokens]
    value["added_tokens"] = sorted(entries, key=lambda entry: entry["id"])
    try:
        result = tokenizers.Tokenizer.from_str(json.dumps(value))
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"{path}: a tokenizer.json cannot be made of it ({error})") from error
    wrong = [token for token in tokens if result.token_to_id(token.content) != token.id]
    if wrong:
        named = ", ".join(f"{x.content!r} {x.id} ({x.source.name})" for x in wrong[:5])
        raise UserError(
            f"{path.parent}: the ids of added tokens leave a gap behind the vocabulary, "
            f"which a tokenizer.json cannot have: {named}. Number them without a gap"
        )
    return result


def of_sentencepiece(
    backend: SentencePiece, beside: tokenizers.Tokenizer | None, bos: tuple[str, int]
) -> tokenizers.Tokenizer | None:
    """A tokenizer.json with the ids of a sentencepiece model: the one beside it, or converted.

    None where both give other ids, as for models that are not plain BPE. transformers 5 orders
    the merges of a bare tokenizer.model wrongly: runs of blanks get other ids.
    """
    expected = backend.encode(_PROBE)
    for make in (lambda: beside, lambda: _convert(backend, bos)):
        model = make()
        if model is not None and _ids(model, _PROBE) == expected:
            # text behind a special token begins anew, as in training
            parts = [*backend.encode("x"), bos[1], *backend.encode("two words")]
            if bos[0] not in model.get_vocab() or _ids(model, f"x{bos[0]}two words") == parts:
                return model
    return None


def check_same_tokens(backend: SentencePiece, path: Path, beside: tokenizers.Tokenizer) -> None:
    """UserError where the two vocabularies of a folder give one id to two tokens."""
    for token_id in range(backend.vocab_size):
        ours, theirs = backend.token(token_id), beside.id_to_token(token_id)
        if theirs != ours:
            raise UserError(
                f"{path} and the tokenizer.json beside it disagree: id {token_id} is {ours!r} and "
                f"{theirs!r}. Remove the one that does not belong to the model"
            )


def encodes_equally(backend: SentencePiece, beside: tokenizers.Tokenizer) -> bool:
    """Whether a tokenizer.json gives a text of many kinds of characters the ids of the other."""
    return _ids(beside, _PROBE) == backend.encode(_PROBE)


def _ids(model: tokenizers.Tokenizer, text: str) -> list[int]:
    return model.encode(text, add_special_tokens=False).ids


def _convert(backend: SentencePiece, bos: tuple[str, int]) -> tokenizers.Tokenizer:
    """A sentencepiece BPE model, such as LLaMA's, for the tokenizers library."""
    model = backend.model
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
    unk = model.id_to_piece(model.unk_id())
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
        single=f"{bos[0]} $A", special_tokens=[bos]
    )
    return result
