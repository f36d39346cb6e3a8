"""Talk with a finetuned model about a picture, or without one.

For example

    python scripts/chat.py --model RUN --image PATH --prompt TEXT   (one answer)
    python scripts/chat.py --model RUN                              (a conversation)
"""

import logging
import os
import sys
from pathlib import Path
from typing import Literal

import tyro

from mmalign.chat import CHAT_TEMPLATES, Conversation, answer_once, talk
from mmalign.errors import UserError
from mmalign.model.generate import GenerationOptions


def main(
    model: Path,
    prompt: str | None = None,
    image: Path | None = None,
    template: Literal[CHAT_TEMPLATES] | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    precision: Literal["fp32", "bf16"] = "fp32",
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Talk with a finetuned model about a picture, or without one.

    Args:
        model: Finetune run, or a Hugging Face folder (LlavaForConditionalGeneration or
            LlamaForCausalLM) together with --template.
        prompt: The one question; left out, questions are read from the terminal or a pipe.
        image: Picture that the first question is about.
        template: How conversations are written; left out, as in the run.
        max_new_tokens: Longest answer.
        temperature: 0 takes the most likely token, 1 draws from the model's distribution.
        top_p: Draw from the most likely tokens, which together have this probability.
        seed: Of the draws.
        precision: Of weights and activations.
        device: auto takes a GPU where there is one.
    """
    options = GenerationOptions(max_new_tokens, temperature, top_p=top_p, seed=seed)
    conversation = Conversation(model, image, template, precision, device)
    if prompt is None:
        talk(conversation, options)
    else:
        answer_once(conversation, prompt, options)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        tyro.cli(main, description=__doc__)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of the answers has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
