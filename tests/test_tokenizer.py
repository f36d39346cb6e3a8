"""The tokenizer against sentencepiece, transformers and its own offsets."""

import csv
import json
import shutil

import pytest
import sentencepiece
import transformers

from mmalign.errors import UserError
from mmalign.tokenizer import Tokenizer

ODD_TEXTS = (
    *("", " ", "  two  leading", "trailing  ", "\n", "\nline", "tab\tcr\r", "a" * 50, "\u2581"),
    *(
        "h\u00e9llo \u4f60\u597d \u2603\U0001d11ex",
        "\U0001d11e first",
        "e\u0301 \ufb01",
        "12345.678",
    ),
    *("</s>", "<s>a</s><unk>", "<im_patch><im_start>", "<0x0A>", "\u00a0nbsp\u3000wide"),
)


@pytest.fixture(scope="module")
def folder(shared_data):
    return shared_data / "llama_tokenizer"


@pytest.fixture(scope="module")
def texts(shared_data) -> list[str]:
    with (shared_data / "ethics/commonsense/cm_test.csv").open(newline="") as file:
        rows = [row[1] for row in csv.reader(file)]
    gold = json.loads((shared_data / "formats/conversations.json").read_text())
    return [*ODD_TEXTS, *rows[:300], *rows[-30:], *(s["prompt"] for s in gold["samples"])]


def test_ids_equal_sentencepiece(folder, texts):
    reference = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    tokenizer = Tokenizer.from_pretrained(folder)
    for text in texts:
        assert tokenizer.encode(text) == reference.encode(text)
        assert tokenizer.encode_with_offsets(text)[0] == reference.encode(text)
        assert tokenizer.decode(reference.encode(text)) == reference.decode(reference.encode(text))


def test_offsets_give_every_character_to_exactly_one_id(folder, texts):
    reference = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    tokenizer = Tokenizer.from_pretrained(folder)
    for text in texts:
        _, offsets = tokenizer.encode_with_offsets(text)
        surfaces = [piece.surface for piece in reference.encode(text, return_type="proto").pieces]
        assert [text[begin:end] for begin, end in offsets] == surfaces
        assert "".join(surfaces) == text


def test_numbers_of_the_llama_tokenizer(folder):
    tokenizer = Tokenizer.from_pretrained(folder)
    special = (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert (tokenizer.vocab_size, *special, tokenizer.pad_token_id) == (32000, 0, 1, 2, 0)
    image = (tokenizer.image_token_id, tokenizer.im_start_id, tokenizer.im_end_id)
    assert image == (32000, 32001, 32002)
    assert tokenizer.num_image_tokens_added(True) == 3  # the released vocabulary of 32003
    assert tokenizer.num_image_tokens_added(False) == 1
    assert tokenizer.decode([1, 7251, *image, image[0], 2]) == (
        "hi<im_patch><im_start><im_end><im_patch>"
    )


def test_saved_folder_loads_in_transformers_with_the_same_ids(folder, texts, tmp_path):
    tokenizer = Tokenizer.from_pretrained(folder)
    tokenizer.save(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    # transformers parses special tokens in a text, we do not
    for text in (text for text in texts if "<" not in text):
        assert loaded(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
        assert loaded(text)["input_ids"] == [1, *tokenizer.encode(text)]
        assert loaded.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    special = (loaded.bos_token_id, loaded.eos_token_id, loaded.unk_token_id, loaded.pad_token_id)
    assert special == (1, 2, 0, 0)
    again = Tokenizer.from_pretrained(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint


def test_tokenizer_json_gives_what_sentencepiece_gives(folder, texts, tmp_path):
    tokenizer = Tokenizer.from_pretrained(folder)
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    from_json = Tokenizer.from_pretrained(tmp_path)
    assert from_json.vocab_size == 32000
    assert (from_json.image_token_id, from_json.im_end_id) == (32000, 32002)
    for text in texts:
        assert from_json.encode(text) == tokenizer.encode(text)
    assert Tokenizer.from_pretrained(tmp_path / "tokenizer.json").encode("x") == [921]


def test_image_tokens_keep_the_ids_that_a_checkpoint_gave_them(folder, tmp_path):
    shutil.copy(folder / "tokenizer.model", tmp_path)
    added = {"[PAD]": 32000, "<im_patch>": 32001, "<im_start>": 32002, "<im_end>": 32003}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.vocab_size == 32001
    assert tokenizer.image_token_id == 32001
    assert (tokenizer.im_start_id, tokenizer.im_end_id) == (32002, 32003)
    assert tokenizer.num_image_tokens_added(True) == 3


def test_missing_or_broken_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"looked for .*tokenizer\.model and .*tokenizer\.json"):
        Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="looked for .*absent"):
        Tokenizer.from_pretrained(tmp_path / "absent")
    for name in ("tokenizer.json", "tokenizer.model"):
        (tmp_path / name).write_bytes(b"not a tokenizer")
        with pytest.raises(UserError, match=f"{name} is not a"):
            Tokenizer.from_pretrained(tmp_path)
