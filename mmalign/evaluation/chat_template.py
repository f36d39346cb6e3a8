"""The chat template of a model's folder, written as transformers writes it."""

from collections.abc import Sequence
from pathlib import Path

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mmalign.errors import UserError
from mmalign.files import read_json, read_text
from mmalign.tokenizer import Tokenizer


class ChatTemplate:
    """chat_template.jinja, or chat_template in tokenizer_config.json, as older folders have it."""

    def __init__(self, folder: Path, tokenizer: Tokenizer):
        jinja, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
        self.path = jinja if jinja.exists() else config
        text = read_text(jinja) if jinja.exists() else read_json(config).get("chat_template")
        if not isinstance(text, str):
            raise UserError(
                f"{folder} has no chat template: expected {jinja.name}, which every exported run "
                "has. Run without --apply_chat_template, or add the file"
            )
        self.text, self._names = text, {}
        for role in ("bos", "eos"):
            token_id = getattr(tokenizer, f"{role}_token_id")
            self._names[f"{role}_token"] = tokenizer.token(token_id)

    def render(self, messages: Sequence[dict], add_generation_prompt: bool) -> str:
        """The text; without a generation prompt it ends with the last message, to be continued."""
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise
        names = self._names | {"add_generation_prompt": add_generation_prompt}
        try:
            text = environment.from_string(self.text).render(messages=messages, **names)
            if not add_generation_prompt:
                last = messages[-1]["content"].strip()
                text = text[: text.rindex(last) + len(last)]
        except Exception as error:  # a template can raise anything
            raise UserError(f"{self.path}: {error}") from error
        return text


def _raise(message: str) -> None:
    raise TemplateError(message)
