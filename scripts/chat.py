"""Chat with a finetuned model, about images or without any.

python scripts/chat.py --model RUN --image PATH --prompt TEXT   (one answer)
python scripts/chat.py --model RUN                              (a conversation)
"""

from pathlib import Path
from typing import Literal

import tyro

from mmalign.chat import ChatTemplate, Conversation, answer_once, talk
from mmalign.command import command_line
from mmalign.errors import UserError
from mmalign.model.generate import GenerationOptions


def main(
    model: Path,
    prompt: str | None = None,
    image: tyro.conf.UseAppendAction[tuple[Path, ...]] = (),
    template: ChatTemplate | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Chat with a finetuned model, about images or without any.

    Args:
        model: Finetune run, or a Hugging Face folder (LlavaForConditionalGeneration or
            LlamaForCausalLM) together with --template.
        prompt: A single question; unset: questions are read from the terminal or a pipe.
        image: An image that the first question is about; several as --image A --image B. They
            stand where the question has <image>, or else before it.
        template: Conversation template; unset: that of the run.
        max_new_tokens: Longest answer in tokens.
        temperature: 0 is greedy decoding, 1 samples from the model's distribution.
        top_p: Nucleus sampling: sample from the most likely tokens with this total probability.
        seed: Seed of the sampling.
        precision: Of weights and activations. auto: bf16 on a GPU, fp32 on a CPU.
        device: auto takes a GPU if there is one.
    """
    if top_p != 1 and temperature == 0:
        raise UserError("--top-p has no effect at --temperature 0. Leave it out, or raise that")
    options = GenerationOptions(max_new_tokens, temperature, top_p=top_p, seed=seed)
    conversation = Conversation(model, image, template, precision, device)
    if prompt is None:
        talk(conversation, options)
    else:
        answer_once(conversation, prompt, options)


if __name__ == "__main__":
    with command_line():
        tyro.cli(main, description=__doc__)
