"""Numbers that cannot be, commands that differ, and what an export carries."""

import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from mmalign.data.samples import Turn
from mmalign.data.templates import IMAGE_SENTINEL, TEMPLATES, encode_prompt
from mmalign.tokenizer import Tokenizer
from tests.faults.conftest import options

# case -> options that are refused one by one
OUT_OF_RANGE = {
    "42-no-steps": [{"num_steps": 0}, {"num_steps": -3}],
    "43-learning-rate-nan": [
        {"optimizer__learning_rate": "nan", "num_steps": 3},
        {"optimizer__learning_rate": "nan", "num_steps": 1},
    ],
    "44-settings-out-of-range-accepted": [
        {"optimizer__learning_rate": -1},
        {"optimizer__warmup_ratio": 2},
        {"optimizer__beta1": -1},
        {"optimizer__weight_decay": -1},
        {"optimizer__max_grad_norm": -1},
        {"checkpoint__every": -1},
        {"parallel__timeout_minutes": 0},
    ],
    "45-settings-out-of-range-tracebacks": [
        {"seed": -1},
        {"lora__rank": -1},
        {"data__num_workers": -1},
        {"optimizer__warmup_ratio": "nan"},
        {"lora__dropout": 2, "lora__rank": 4},
        {"evaluation__limit": 0, "evaluation__every": 1},
    ],
    "46-beta2-of-one": [{"optimizer__beta2": 1, "num_steps": 3}],
    "62-batch-of-a-billion": [{"global_batch_size": 10**9}],
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_a_setting_out_of_range_is_refused(case, name):
    for changes in OUT_OF_RANGE[name]:
        flag = options(changes)[0]
        case.train(**changes).refused(flag, "expected")
        assert not case.run.exists()


def test_47_fewer_samples_than_a_batch(case):
    ended = case.train(num_steps=None, num_epochs=1, global_batch_size=16)
    ended.succeeded("learning rate 0", "nothing is learned", "more than the 8 usable samples")


def test_37_a_prompt_with_image_marks_in_transformers(case):
    case.train(num_steps=1).succeeded()
    folder = case.run / "export/llava"
    tokenizer, processor = Tokenizer.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    turns = [Turn("human", "<image>\nWhat is in the picture?")]
    ids, expected = encode_prompt(turns, TEMPLATES["v1"], tokenizer, True), []
    for i in ids:
        expected += [tokenizer.image_token_id] * 4 if i == IMAGE_SENTINEL else [i]
    text = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. USER: "
        "<im_start><im_patch><im_end>\nWhat is in the picture? ASSISTANT:"
    )
    found = processor(text=text, images=Image.new("RGB", (28, 28)), return_tensors="pt")
    assert found["input_ids"][0].tolist() == expected


def test_38_every_export_has_a_chat_template(case):
    case.train(num_steps=1).succeeded()
    tokenizer = AutoTokenizer.from_pretrained(case.run / "export/llama")
    messages = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<s>A chat between") and text.endswith("questions. USER: hi ASSISTANT:")


def test_56_the_projector_of_the_decoders_folder(case):
    case.train(run_dir=case.scratch / "first").succeeded()
    ended = case.train(model__decoder=case.scratch / "first/export/llava")
    ended.succeeded("the projector is that of")
    assert "untrained" not in ended.text


def test_57_chat_with_two_pictures(case):
    case.train().succeeded()
    images = ["--image", "absent.jpg", "--image", str(case.base / "images/a1.jpg")]
    ended = case.call("chat", "--model", str(case.run), *images, "--prompt", "Compare")
    ended.refused("absent.jpg")


def test_58_lora_with_tied_embeddings_in_peft(case):
    base = case.folder / "decoder"
    lora = {"lora__rank": 4, "lora__train_embeddings": True, "lora__dropout": 0}
    case.train(model__decoder=base, num_steps=4, **lora).succeeded()

    def load(folder):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    merged, adapted = load(case.run / "export/llama"), load(base)
    adapted.resize_token_embeddings(merged.config.vocab_size, mean_resizing=False)
    adapted = PeftModel.from_pretrained(adapted, case.run / "export/adapter").eval()
    ids = torch.arange(3, 63)[None]
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, atol=1e-4, rtol=0)


def test_53_a_run_dir_that_is_a_file(case):
    (case.scratch / "file").write_text("precious")
    for path in (case.scratch / "file", case.scratch / "file/run", "/dev/null"):
        case.train(run_dir=path).refused(f"--run-dir {path}")
    assert (case.scratch / "file").read_text() == "precious"


def test_all_cases_are_here(built):
    """Every folder of inputs has its number in the name or in a parameter of a test."""
    sources = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    tested = {a or b for a, b in re.findall(r'def test_(\d\d)_|"(\d\d)-', sources)}
    assert tested == {path.name[:2] for path in built.iterdir() if path.name[0].isdigit()}
