"""The tokenizer against sentencepiece, transformers and its own offsets."""

import csv
import json
import pickle
import shutil

import pytest
import sentencepiece
import tokenizers
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
    assert tokenizer.encode_batch(texts) == [reference.encode(text) for text in texts]


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
    assert from_json.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
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


# ---- added tokens and roles beside the vocabulary ----


@pytest.fixture
def beside(folder, tmp_path):
    """A folder with tokenizer.model alone, and a writer for the JSON files beside it."""
    shutil.copy(folder / "tokenizer.model", tmp_path)

    def write(name: str, value) -> Tokenizer:
        text = value if isinstance(value, str) else json.dumps(value)
        (tmp_path / name).write_text(text)
        return Tokenizer.from_pretrained(tmp_path)

    return write


def decoder_of(token_id, content="<loc>", **flags) -> dict:
    return {"added_tokens_decoder": {str(token_id): {"content": content, **flags}}}


@pytest.mark.parametrize("name", ["added_tokens.json", "tokenizer_config.json", "tokenizer.json"])
def test_added_tokens_count_wherever_they_stand(folder, beside, tmp_path, name):
    if name == "tokenizer.json":
        Tokenizer.from_pretrained(folder).save(tmp_path)
        library = tokenizers.Tokenizer.from_file(str(tmp_path / name))
        library.add_tokens([tokenizers.AddedToken("<loc>", normalized=False)])
        library.save(str(tmp_path / name))
        tokenizer = Tokenizer.from_pretrained(tmp_path)
    else:
        value = {"<loc>": 32000} if name == "added_tokens.json" else decoder_of(32000)
        tokenizer = beside(name, value)
    assert (tokenizer.vocab_size, tokenizer.image_token_id) == (32001, 32001)
    ids = tokenizer.encode("look at <loc> there")
    assert ids.count(32000) == 1 and "<loc>" in tokenizer.decode(ids)
    tokenizer.save(tmp_path / "out", num_rows=32004)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs("look at <loc> there", add_special_tokens=False)["input_ids"] == ids
    assert theirs.convert_tokens_to_ids(["<im_patch>", "<im_end>"]) == [32001, 32003]
    again = Tokenizer.from_pretrained(tmp_path / "out")
    assert again.encode("look at <loc> there") == ids
    assert (again.vocab_size, again.im_end_id) == (32001, 32003)


def test_configured_roles_are_honoured(beside, tmp_path):
    end = decoder_of(32000, "<|im_end|>", special=True)
    settings = {"eos_token": "<|im_end|>", "pad_token": {"content": "</s>"}, "bos_token": ""}
    tokenizer = beside("tokenizer_config.json", settings | end)
    roles = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert roles == (1, 32000, 2)
    assert 32000 not in tokenizer.encode("<|im_end|>")  # special: never parsed in a text
    assert tokenizer.decode([7251, 32000]) == "hi" and tokenizer.token(32000) == "<|im_end|>"
    tokenizer.save(tmp_path / "out", num_rows=32004)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == roles


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("tokenizer_config.json", "", r"tokenizer_config\.json, line 1: empty"),
        ("tokenizer_config.json", {"eos_token": "<x>"}, "eos_token is '<x>', which is not in"),
        ("tokenizer_config.json", {"eos_token": {}}, r"eos_token is {}; expected a token"),
        ("tokenizer_config.json", {"eos_token": 5}, r"eos_token is 5; expected a token"),
        ("tokenizer_config.json", decoder_of(10**9), r"tokenizer_config\.json: .*1000000000"),
        ("tokenizer_config.json", decoder_of(5), r"'<loc>' has the id 5, but in .* that is"),
        ("tokenizer_config.json", decoder_of("x"), "added_tokens_decoder.x: expected an id"),
        ("tokenizer_config.json", decoder_of(32000, 7), "content is 7; expected the token's text"),
        ("tokenizer_config.json", decoder_of(32005), "leave a gap .*'<loc>' 32005"),
        ("added_tokens.json", ["<pad>"], r"added_tokens\.json: expected a JSON object, found list"),
        ("added_tokens.json", {"<pad>": "32000"}, "<pad> is '32000'; expected an integer"),
        ("added_tokens.json", {"</s>": 32000}, r"'</s>' has the id 32000, but in .* it is 2"),
        ("added_tokens.json", {"<a>": 32000, "<b>": 32000}, "the id 32000 is '<b>', but '<a>'"),
        ("added_tokens.json", "version https://git-lfs.github.com", r"json, line 1: a git-LFS"),
        ("tokenizer.json", "{}", r"tokenizer\.json is not a tokenizer\.json"),
        ("tokenizer.model", "", r"tokenizer\.model is not a sentencepiece model \(it is empty\)"),
    ],
)
def test_files_that_are_refused_by_name(beside, name, value, message):
    with pytest.raises(UserError, match=message):
        beside(name, value)


def test_tiktoken_gives_way_to_tokenizer_json(folder, tmp_path):
    Tokenizer.from_pretrained(folder).save(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.path.name == "tokenizer.json" and tokenizer.encode("x") == [921]
    tokenizer.save(tmp_path / "out", num_rows=32003)
    assert Tokenizer.from_pretrained(tmp_path / "out").image_token_id == 32000
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tiktoken vocabulary\. Set --model\.tokenizer"):
        Tokenizer.from_pretrained(tmp_path)


def test_two_vocabularies_in_one_folder_have_to_agree(folder, tmp_path):
    Tokenizer.from_pretrained(folder).save(tmp_path)
    value = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary, a, b = value["model"]["vocab"], "\u2581the", "\u2581of"
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match=r"tokenizer\.json beside it disagree: id \d+ is"):
        Tokenizer.from_pretrained(tmp_path)


def test_a_tokenizer_json_that_divides_otherwise_is_told(folder, tmp_path, caplog):
    Tokenizer.from_pretrained(folder).save(tmp_path)
    Tokenizer.from_pretrained(tmp_path)
    assert not caplog.text
    value = json.loads((tmp_path / "tokenizer.json").read_text())
    del value["model"]["merges"][100:]
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    Tokenizer.from_pretrained(tmp_path)
    assert "tokenizer.model is read; the tokenizer.json beside it" in caplog.text


def test_every_token_needs_a_row(beside):
    tokenizer = beside("added_tokens.json", {"<pad>": 32000, "<loc>": 32001})
    tokenizer.check_rows(32002, "decoder", 3)
    with pytest.raises(UserError, match=r"32002 tokens.*rows for 32000\. Remove '<loc>' \(added_"):
        tokenizer.check_rows(32000, "decoder", 3)
    with pytest.raises(UserError, match=r"32002 tokens.*rows for 32001\. Remove '<loc>' \(added_"):
        tokenizer.check_rows(32001, "decoder", 3)
    gap = beside("added_tokens.json", {"<im_patch>": 32090})
    with pytest.raises(UserError, match=r"leave a gap .*'<im_patch>' 32090 \(added_tokens\.json\)"):
        gap.check_rows(32000, "decoder", 91)


def test_a_padding_token_needs_no_row(beside, folder, tmp_path):
    """The early Llama-2-hf folders: added_tokens.json, with and without pad_token in a role."""
    assert Tokenizer.from_pretrained(folder).padding == {}
    for roles in ({}, {"pad_token": "<pad>"}):
        beside("special_tokens_map.json", roles)
        tokenizer = beside("added_tokens.json", {"<pad>": 32000})
        tokenizer.check_rows(32000, "decoder")
        assert tokenizer.padding == {32000: "<pad>"}
        assert (tokenizer.image_token_id, tokenizer.num_image_tokens_added(True)) == (32001, 3)
        assert (32000 in tokenizer.encode("a <pad>")) == (
            not roles
        )  # as slow LlamaTokenizer has it
        tokenizer.save(tmp_path / "out", num_rows=32000)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
        assert theirs.convert_tokens_to_ids("<pad>") == 32000 and len(theirs) == 32001
    other = beside("tokenizer_config.json", {"eos_token": "<pad>"})
    assert other.padding == {}
    with pytest.raises(UserError, match="32001 tokens.*rows for 32000"):
        other.check_rows(32000, "decoder")


def test_half_a_surrogate_pair_is_not_text(folder, tmp_path):
    Tokenizer.from_pretrained(folder).save(tmp_path)
    for path in (tmp_path / "tokenizer.model", tmp_path / "tokenizer.json"):
        with pytest.raises(UserError, match=r"'\\ud83d', at character 3"):
            Tokenizer.from_pretrained(path).encode("hi \ud83d")


def test_a_worker_process_gets_the_same_ids(folder, tmp_path):
    """A pickle of the tokenizers library forgets that special tokens in a text are text."""
    Tokenizer.from_pretrained(folder).save(tmp_path)
    for path in (tmp_path / "tokenizer.model", tmp_path / "tokenizer.json"):
        tokenizer = Tokenizer.from_pretrained(path)
        copied = pickle.loads(pickle.dumps(tokenizer))
        assert copied.encode("a</s> b") == tokenizer.encode("a</s> b")
        assert tokenizer.eos_token_id not in copied.encode("a</s> b")
