"""What an exported run answers in transformers, against scripts/chat.py's own functions."""

import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from mmalign.chat import Conversation
from mmalign.model.generate import GenerationOptions
from mmalign.training.loop import train
from tests.training.conftest import WORDS, train_tokenizer
from tests.training.helpers import small_config

NUM_QUESTIONS = {"v0": 14, "v1": 13, "llava_llama_2": 13}  # 40 in all


@pytest.mark.parametrize("template", NUM_QUESTIONS)
def test_greedy_answers_are_those_of_chat(small_world, tmp_path, template):
    """Prompts by the exported chat template, with <im_start> and <im_end> around the image."""
    decoder, draw = tmp_path / "decoder", random.Random(template)
    shutil.copytree(small_world.decoder, decoder)
    weights = load_file(decoder / "model.safetensors")  # larger ones: answers that differ
    weights = {name: weight * (4 if weight.ndim == 2 else 1) for name, weight in weights.items()}
    save_file(weights, decoder / "model.safetensors", metadata={"format": "pt"})
    train_tokenizer(decoder, normalization_rule_name="identity", remove_extra_whitespaces=False)
    run_dir, model = tmp_path / "run", {"decoder": str(decoder)}
    changes = {"model": model, "data": {"template": template}}
    train(small_config(small_world, run_dir, optimizer={"learning_rate": 1e-4}, **changes))
    processor = AutoProcessor.from_pretrained(run_dir / "export/llava")
    llava = LlavaForConditionalGeneration.from_pretrained(run_dir / "export/llava")
    ours, options = Conversation(run_dir, device="cpu"), GenerationOptions(max_new_tokens=8)
    assert ours.use_im_start_end
    answers = set()
    for number in range(NUM_QUESTIONS[template]):
        image = small_world.images / f"{number}.png"
        question = " ".join(draw.choices(WORDS, k=draw.randint(1, 9))) + "?"
        content = [{"type": "image", "url": str(image)}, {"type": "text", "text": question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            found = llava.generate(**inputs, do_sample=False, max_new_tokens=8)
        theirs = found[0, inputs["input_ids"].shape[1] :].tolist()
        ours.start()
        ours.show(image)
        answer = ours.ask(question, options, lambda text: None)
        assert answer.token_ids == theirs[: len(answer.token_ids)], question
        behind = theirs[len(answer.token_ids) :]
        at_the_end = behind[:1] == [llava.config.text_config.eos_token_id] or template == "v0"
        assert not behind if answer.reason == "length" else at_the_end
        answers.add(answer.text)
    assert len(answers) > 5  # they depend on question and image
