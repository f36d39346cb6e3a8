"""A model that sees, with the template it was tuned with: questions to prompts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mmalign.data.samples import Turn
from mmalign.data.templates import (
    IMAGE,
    IMAGE_SENTINEL,
    TEMPLATES,
    Template,
    encode_conversation,
    encode_prompt,
)
from mmalign.errors import UserError
from mmalign.evaluation.tasks.vision_task import VisualDocument
from mmalign.evaluation.warm_up import compiled_kernels
from mmalign.files import Settings, read_json
from mmalign.model.config import DecoderConfig, VisionConfig
from mmalign.model.generate import Prompt
from mmalign.model.hf import is_llava, load_llava
from mmalign.model.llava import Llava
from mmalign.model.tiles import Pixels, num_image_tokens
from mmalign.tokenizer import Tokenizer

CHAT_TEMPLATES = tuple(name for name, template in TEMPLATES.items() if not template.single_turn)
YES, NO = ("Yes", "yes"), ("No", "no")  # as the first word of an answer


def find_llava(model: str | Path) -> Path:
    """The folder with vision tower, projector and language model: `model`, or a run's export."""
    path = Path(model)
    exported = path / "export" / "llava"
    if exported.is_dir():
        return exported
    if path.is_dir() and (path / "config.json").is_file() and is_llava(path):
        return path
    raise UserError(
        f"{path} has no vision tower, which questions about pictures need. Name a run that was "
        "finetuned on images, or a folder of LlavaForConditionalGeneration"
    )


@dataclass(frozen=True)
class VisionModel:
    llava: Llava
    tokenizer: Tokenizer
    decoder: DecoderConfig
    vision: VisionConfig
    template_name: str
    use_im_start_end: bool

    @classmethod
    def load(
        cls, weights: Path, template: str | None, dtype: torch.dtype, device: torch.device
    ) -> "VisionModel":
        """template: None takes that of the run; other folders need one."""
        settings = run_settings(weights)
        name = choose_template(weights, template, settings)
        tokenizer, decoder = Tokenizer.from_pretrained(weights), DecoderConfig.from_hf(weights)
        with compiled_kernels(weights, dtype, device, answers=True, pictures=True):
            llava = load_llava(weights, tokenizer, dtype).to(device)
        return cls(
            llava,
            tokenizer,
            decoder,
            VisionConfig.from_hf(weights),
            name,
            settings.flag("use_im_start_end", tokenizer.has_im_start_end),
        )

    @property
    def template(self) -> Template:
        return TEMPLATES[self.template_name]

    def prompt(self, document: VisualDocument, pixels: Pixels | None, template: Template) -> Prompt:
        """pixels: of one picture; None: the question alone."""
        image = "" if pixels is None else f"{IMAGE}\n"
        turns = [
            Turn(speaker, text)
            for pair in document.demonstrations
            for speaker, text in zip(("human", "gpt"), pair, strict=True)
        ]
        turns.append(Turn("human", image + document.question))
        ids = encode_prompt(turns, template, self.tokenizer, self.use_im_start_end)
        num_tokens = 0 if pixels is None else num_image_tokens(pixels, self.vision.num_patches)
        patches = [self.tokenizer.image_token_id] * num_tokens
        ids = [x for i in ids for x in (patches if i == IMAGE_SENTINEL else [i])]
        return Prompt(ids, pixels, draws=document.doc_id)

    def yes_no_ids(self, template: Template) -> tuple[list[int], list[int]] | None:
        """First tokens of answers that begin with yes, and with no; None where these are alike."""
        turns = [Turn("human", "Is it?")]
        prompt = encode_prompt(turns, template, self.tokenizer, self.use_im_start_end)
        firsts = []
        for words in (YES, NO):
            found = set()
            for word in words:
                conversation = [*turns, Turn("gpt", word)]
                ids, _ = encode_conversation(
                    conversation, template, self.tokenizer, self.use_im_start_end
                )
                if ids[: len(prompt)] != prompt:
                    return None
                found.add(ids[len(prompt)])
            firsts.append(sorted(found))
        return None if set(firsts[0]) & set(firsts[1]) else (firsts[0], firsts[1])


def log_odds(first_logprobs: Sequence[float], num_yes: int) -> float:
    """Of yes against no; the first num_yes log-probabilities are those of yes."""
    yes, no = (
        math.log(sum(math.exp(x) for x in part) or 5e-324)
        for part in (first_logprobs[:num_yes], first_logprobs[num_yes:])
    )
    return yes - no


def run_settings(weights: Path) -> Settings:
    """`data` in config.json of the run that exported this folder; empty for other folders."""
    path = weights.absolute().parent.parent / "config.json"
    if weights.absolute().parent.name != "export" or not path.is_file():
        return Settings({}, path)
    return Settings(read_json(path), path).section("data")


def choose_template(weights: Path, given: str | None, settings: Settings) -> str:
    template, known = given or settings.get("template"), ", ".join(CHAT_TEMPLATES)
    if template is None:
        raise UserError(
            f"{weights} is not from a run, so its conversation template is unknown. "
            f"Set --template to one of {known}"
        )
    if not isinstance(template, str) or template not in CHAT_TEMPLATES:
        raise UserError(
            f"template {template} is not for conversations. Set --template to one of {known}"
        )
    return template
