"""Conversations with a model: one question after the other, about a picture or without one."""

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from mmalign.data.images import load_image
from mmalign.data.templates import IMAGE, IMAGE_SENTINEL, TEMPLATES, Turn, encode_prompt
from mmalign.errors import UserError
from mmalign.evaluation.evaluation import find_weights
from mmalign.model.config import DecoderConfig, VisionConfig
from mmalign.model.generate import Generation, GenerationOptions, Prompt, generate
from mmalign.model.hf import is_llava, load_llava
from mmalign.system import DTYPES, choose_device
from mmalign.tokenizer import Tokenizer

CHAT_TEMPLATES = tuple(name for name in TEMPLATES if name != "plain")  # plain drops the question
_STOP = {"v0": ("###",)}  # the others end an answer with the end-of-text token
_COMMANDS = "/image PATH: ask about a picture    /new: start anew    /quit or Ctrl-D: end"


class Conversation:
    """Remembers what was said; an answer that failed or was interrupted leaves no trace.

    model: a finetune run, its export/llava or export/llama, or another Hugging Face folder of these
    two kinds. template: left out, that of the run; other folders need one. Without a run <im_start>
    and <im_end> are written where the model's vocabulary has them.
    """

    def __init__(
        self,
        model: str | Path,
        image: Path | None = None,
        template: str | None = None,
        precision: str = "fp32",
        device: str = "auto",
    ):
        self.weights = weights = find_chat_weights(model)
        settings, target = _run_settings(weights), choose_device(device)
        self.template = _choose_template(weights, template, settings)
        config, sees = DecoderConfig.from_hf(weights), is_llava(weights)
        self.max_length = config.max_position_embeddings
        self.vision = VisionConfig.from_hf(weights) if sees else None
        self.start(image)  # before the weights: what is wrong with the picture is told at once
        self.tokenizer = Tokenizer.from_pretrained(weights)
        has_marks = self.tokenizer.im_end_id < config.vocab_size
        self.use_im_start_end = settings.get("use_im_start_end", has_marks)
        self.llava = load_llava(weights, self.tokenizer, DTYPES[precision]).to(target)

    def start(self, image: Path | None = None) -> None:
        """Forgets all turns; the next question is about this picture."""
        if image is None:
            pixels = None
        elif self.vision is None:
            raise UserError(
                f"{self.weights} is a language model without a vision tower, so it takes no "
                "picture; name a run that was finetuned on pictures, or leave the picture out"
            )
        else:
            pixels = load_image(image, self.vision.image_size)[None]
        self.pixels = pixels  # (1, 3, image_size, image_size) uint8
        self.turns: list[Turn] = []

    def ask(
        self, question: str, options: GenerationOptions, write: Callable[[str], None]
    ) -> Generation:
        """The answer; write gets it piece by piece, without blanks at its ends.

        options.max_new_tokens: less where the model's context ends before. Its stop strings are
        those of the template. UserError for a question that cannot be put.
        """
        turns = [*self.turns, self._turn(question)]
        input_ids = self._encode(turns)
        options = replace(
            options,
            max_new_tokens=min(options.max_new_tokens, self.max_length - len(input_ids)),
            seed=options.seed + len(self.turns),  # other draws for every question
            stop=_STOP.get(self.template, ()),
        )
        prompt, on_text = Prompt(input_ids, self.pixels), _without_outer_blanks(write)
        (answer,) = generate(self.llava, self.tokenizer, [prompt], options, on_text=on_text)
        self.turns = [*turns, Turn("gpt", answer.text.strip())]
        return answer

    def _turn(self, question: str) -> Turn:
        question = question.strip()
        try:
            question.encode()
        except UnicodeEncodeError:
            raise UserError("the question is not UTF-8 text") from None
        if not question:
            raise UserError("the question is empty")
        if IMAGE in question:
            raise UserError(f"leave {IMAGE} out of the question: the picture is put in front of it")
        shows = self.pixels is not None and not self.turns
        return Turn("human", f"{IMAGE}\n{question}" if shows else question)

    def _encode(self, turns: list[Turn]) -> list[int]:
        tokenizer = self.tokenizer
        ids = encode_prompt(turns, self.template, tokenizer, self.use_im_start_end)
        if tokenizer.image_token_id in ids:
            name = tokenizer.token(tokenizer.image_token_id)
            raise UserError(f"leave {name} out of the question: it marks the places of a picture")
        num_patches = 0 if self.pixels is None else self.vision.num_patches
        patches = [tokenizer.image_token_id] * num_patches
        ids = [x for i in ids for x in (patches if i == IMAGE_SENTINEL else [i])]
        if len(ids) >= self.max_length:
            picture = f" ({num_patches} of them the picture)" if num_patches else ""
            remedy = "start anew or ask" if self.turns else "ask"
            raise UserError(
                f"the conversation has {len(ids)} tokens{picture}, which leaves no room for an "
                f"answer in the model's context of {self.max_length}; {remedy} something shorter"
            )
        return ids


def find_chat_weights(model: str | Path) -> Path:
    """export/llava of a run that saw pictures, else what find_weights finds."""
    seeing = Path(model) / "export" / "llava"
    return seeing if seeing.is_dir() else find_weights(model)


def _run_settings(weights: Path) -> dict:
    """`data` in config.json of the run that exported this folder; empty for other folders."""
    path = weights.absolute().parent.parent / "config.json"
    if weights.absolute().parent.name != "export" or not path.is_file():
        return {}
    return json.loads(path.read_text())["data"]


def _choose_template(weights: Path, given: str | None, settings: dict) -> str:
    template, known = given or settings.get("template"), ", ".join(CHAT_TEMPLATES)
    if template is None:
        raise UserError(
            f"{weights} is not of a run, so nothing says how its conversations are written; "
            f"give --template with one of {known}"
        )
    if template not in CHAT_TEMPLATES:
        raise UserError(
            f"template {template} has no place for a question; give --template with one of {known}"
        )
    return template


def _without_outer_blanks(write: Callable[[str], None]) -> Callable[[int, str], None]:
    begun, blanks = False, ""

    def take(_: int, text: str) -> None:
        nonlocal begun, blanks
        text = blanks + text if begun else text.lstrip()
        kept = text.rstrip()
        blanks, begun = text[len(kept) :], begun or bool(kept)
        if kept:
            write(kept)

    return take


# ---- at the terminal ----


def answer_once(conversation: Conversation, question: str, options: GenerationOptions) -> None:
    """Writes the answer to standard output as it comes, remarks to standard error."""
    answer = conversation.ask(question, options, lambda text: print(text, end="", flush=True))
    print(flush=True)
    if not answer.text.strip():
        _remark("[the model ended its answer at once]")
    elif answer.reason == "length":
        num_tokens = len(answer.token_ids)
        limit = "--max-new-tokens" if num_tokens == options.max_new_tokens else "the context's end"
        _remark(f"[cut after {num_tokens} tokens: {limit}]")


def talk(conversation: Conversation, options: GenerationOptions) -> None:
    """Questions from standard input, line by line, until it ends; Ctrl-C stops an answer.

    Where the input is no terminal, nothing but answers is written, and the first error ends it.
    """
    interactive = sys.stdin.isatty()
    if interactive:
        with suppress(ImportError):  # where there is one it edits lines and remembers them
            import readline  # noqa: F401
        print(f"{conversation.weights}, template {conversation.template}\n{_COMMANDS}")
    while (line := _read_line("> " if interactive else "")) is not None:
        try:
            if not _obey(conversation, line, options):
                return
        except UserError as error:
            if not interactive:
                raise
            _remark(f"error: {error}")
        except KeyboardInterrupt:
            if not interactive:
                raise
            _remark("\n[stopped; question and answer are forgotten]")


def _read_line(sign: str) -> str | None:
    """None at the end of the input, and for Ctrl-C."""
    try:
        return input(sign).strip()
    except (EOFError, KeyboardInterrupt):
        if sign:
            print()
        return None


def _obey(conversation: Conversation, line: str, options: GenerationOptions) -> bool:
    """Whether to go on."""
    command, _, rest = line.partition(" ")
    if command == "/quit":
        return False
    if command == "/new":
        conversation.start()
    elif command == "/image":
        path = rest.strip().strip("'\"")
        if not path:
            raise UserError("/image needs the path of a picture")
        conversation.start(Path(path).expanduser())
    elif command.startswith("/"):
        raise UserError(f"unknown command {command}. {_COMMANDS}")
    elif line:
        answer_once(conversation, line, options)
    return True


def _remark(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
