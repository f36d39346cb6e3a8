"""Multi-turn conversations with a model, about images or without any."""

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mmalign.data.images import load_picture
from mmalign.data.samples import Turn
from mmalign.data.segments import IMAGE, IMAGE_SENTINEL
from mmalign.data.templates import TEMPLATES, encode_prompt, end_ids
from mmalign.errors import UserError
from mmalign.evaluation.evaluation import find_weights
from mmalign.evaluation.vision_model import CHAT_TEMPLATES, choose_template, run_settings
from mmalign.evaluation.warm_up import compiled_kernels
from mmalign.model.config import DecoderConfig, VisionConfig
from mmalign.model.generate import Generation, GenerationOptions, Prompt, generate
from mmalign.model.hf import is_llava, load_llava
from mmalign.model.tiles import Pixels, join_pixels, num_image_tokens
from mmalign.system import DTYPES, choose_device, choose_precision
from mmalign.tokenizer import Tokenizer

if TYPE_CHECKING:
    ChatTemplate = str
else:  # tyro lists the choices of --template and refuses others
    ChatTemplate = Literal[CHAT_TEMPLATES]
_COMMANDS = "/image PATH: show an image with the next question    /new: start over    /quit: end"


class Conversation:
    """The turns so far; an answer that failed or was interrupted is not one of them.

    model: a finetune run, its export/llava or export/llama, or another Hugging Face folder of these
    two kinds. template: None takes the run's; other folders need one. Without a run, <im_start> and
    <im_end> are written if the tokenizer has them: rows alone, as LLaVA 1.5's, are padding.
    """

    def __init__(
        self,
        model: str | Path,
        images: Sequence[Path] = (),
        template: str | None = None,
        precision: str = "auto",
        device: str = "auto",
    ):
        llava = Path(model) / "export" / "llava"  # of a run that has a vision tower
        self.weights = weights = llava if llava.is_dir() else find_weights(model)
        settings, target = run_settings(weights), choose_device(device)
        self.template_name = choose_template(weights, template, settings)
        self.template = TEMPLATES[self.template_name]
        config = DecoderConfig.from_hf(weights)
        self.max_length = config.context_length
        self.vision = VisionConfig.from_hf(weights) if is_llava(weights) else None
        self.start()
        for image in images:  # before loading the weights: a bad image fails at once
            self.show(image)
        self.tokenizer = Tokenizer.from_pretrained(weights)
        self.use_im_start_end = settings.flag("use_im_start_end", self.tokenizer.has_im_start_end)
        dtype = DTYPES[choose_precision(precision, target)]
        sees = self.vision is not None
        with compiled_kernels(weights, dtype, target, answers=True, pictures=sees):
            self.llava = load_llava(weights, self.tokenizer, dtype).to(target)

    def start(self) -> None:
        """Removes all turns and images."""
        self.turns: list[Turn] = []
        self.images: list[Pixels] = []  # of one image each

    def show(self, image: Path) -> None:
        """The next question is about this image, beside others shown since the last question."""
        if self.vision is None:
            raise UserError(
                f"{self.weights} is a language model without a vision tower, so it takes no image. "
                "Name a run that was finetuned on images, or ask without --image"
            )
        self.images.append(load_picture(image, self.vision))

    def ask(
        self, question: str, options: GenerationOptions, write: Callable[[str], None]
    ) -> Generation:
        """The answer; `write` receives it in pieces, stripped of white space at both ends.

        options: max_new_tokens is limited by the model's context; the stop strings are replaced by
        the template's. Images stand where the question has <image>, or else before it. UserError
        for an unusable question.
        """
        turns = [*self.turns, self._turn(question)]
        input_ids = self._encode(turns)
        options = replace(
            options,
            max_new_tokens=min(options.max_new_tokens, self.max_length - len(input_ids)),
            seed=options.seed + len(self.turns),  # different samples for every question
            stop=self.template.stop,
            end_ids=end_ids(self.template, self.tokenizer),
        )
        pixels = join_pixels(self.images) if self.images else None
        prompt, on_text = Prompt(input_ids, pixels), _stripped(write)
        (answer,) = generate(self.llava, self.tokenizer, [prompt], options, on_text=on_text)
        self.turns = [*turns, Turn("gpt", answer.text.strip())]
        return answer

    @property
    def _num_patches(self) -> int:
        return self.vision.num_patches if self.vision else 0

    def _turn(self, question: str) -> Turn:
        question = question.strip()
        try:
            question.encode()
        except UnicodeEncodeError:
            raise UserError("the question is not UTF-8 text") from None
        if not question:
            raise UserError("the question is empty")
        num_new = len(self.images) - sum(turn.text.count(IMAGE) for turn in self.turns)
        num_places = question.count(IMAGE)
        if num_places not in (0, num_new):
            raise UserError(
                f"the question has {num_places} {IMAGE}, but {num_new} images are shown with it. "
                f"Write {IMAGE} once for each, or remove it: images then come before the question"
            )
        return Turn("human", question if num_places else f"{IMAGE}\n" * num_new + question)

    def _encode(self, turns: list[Turn]) -> list[int]:
        tokenizer = self.tokenizer
        ids = encode_prompt(turns, self.template, tokenizer, self.use_im_start_end)
        if tokenizer.image_token_id in ids:
            name = tokenizer.token(tokenizer.image_token_id)
            raise UserError(f"remove {name} from the question: it marks image positions")
        patches = (
            [tokenizer.image_token_id] * num_image_tokens(x, self._num_patches) for x in self.images
        )
        ids = [x for i in ids for x in (next(patches) if i == IMAGE_SENTINEL else [i])]
        if len(ids) >= self.max_length:
            num_patches = ids.count(tokenizer.image_token_id)
            image = f" ({num_patches} of them of images)" if num_patches else ""
            remedy = "start over or ask" if self.turns else "ask"
            raise UserError(
                f"the conversation has {len(ids)} tokens{image}, which leaves no space for an "
                f"answer in the model's context of {self.max_length}; {remedy} something shorter"
            )
        return ids


def _stripped(write: Callable[[str], None]) -> Callable[[int, str], None]:
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
    """Streams the answer to standard output, notes about it to standard error."""
    answer = conversation.ask(question, options, lambda text: print(text, end="", flush=True))
    print(flush=True)
    if not answer.text.strip():
        _note("[the model's answer is empty]")
    elif answer.reason == "length":
        num_tokens = len(answer.token_ids)
        limit = "--max-new-tokens" if num_tokens == options.max_new_tokens else "end of the context"
        _note(f"[cut off after {num_tokens} tokens: {limit}]")


def talk(conversation: Conversation, options: GenerationOptions) -> None:
    """Answers the lines of standard input until it ends; Ctrl-C stops an answer.

    If the input is not a terminal, only answers are written, and the first error ends it.
    """
    interactive = sys.stdin.isatty()
    if interactive:
        with suppress(ImportError):  # gives input() line editing and a history
            import readline  # noqa: F401
        print(f"{conversation.weights}, template {conversation.template_name}\n{_COMMANDS}")
    while (line := _read_line("> " if interactive else "")) is not None:
        try:
            if not _run_line(conversation, line, options):
                return
        except UserError as error:
            if not interactive:
                raise
            _note(f"error: {error}")
        except KeyboardInterrupt:
            if not interactive:
                raise
            _note("\n[stopped; question and answer are discarded]")


def _read_line(prompt: str) -> str | None:
    """None at the end of the input and on Ctrl-C."""
    try:
        return input(prompt).strip()
    except UnicodeDecodeError as error:
        raise UserError("the question is not UTF-8 text") from error
    except (EOFError, KeyboardInterrupt):
        if prompt:
            print()
        return None


def _run_line(conversation: Conversation, line: str, options: GenerationOptions) -> bool:
    """Runs one line; False for /quit."""
    command, _, rest = line.partition(" ")
    if command == "/quit":
        return False
    if command == "/new":
        conversation.start()
    elif command == "/image":
        path = rest.strip().strip("'\"")
        if not path:
            raise UserError("/image needs the path of an image")
        conversation.show(Path(path).expanduser())
    elif command.startswith("/"):
        raise UserError(f"unknown command {command}. {_COMMANDS}")
    elif line:
        answer_once(conversation, line, options)
    return True


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
