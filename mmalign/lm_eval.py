"""lm-evaluation-harness on our model: log-likelihoods by the prefix tree, generation by generate().

    python -m mmalign.lm_eval --model mmalign --model_args pretrained=DIR --tasks mmlu,gsm8k,boolq

takes lm_eval's own arguments and subcommands. In Python, `import mmalign.lm_eval` registers the
model for `lm_eval.simple_evaluate(model="mmalign", ...)`.

Tokens, BOS, truncation and stop strings are those of the harness's Hugging Face backend (HFLM), and
so are the results; evaluate.py differs: it never writes a BOS. Differences from HFLM: a special
token's name in a text ("</s>") stays text, except a BOS at its very beginning, and BOS and EOS with
--apply_chat_template; sampling considers all tokens unless top_k is set (transformers: 50).
"""

import json
import logging
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import lm_eval.models  # noqa: F401  fills the registry, which stays empty once ours is in it
import numpy as np
import tokenizers
import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from mmalign.command import command_line
from mmalign.errors import UserError
from mmalign.evaluation.evaluation import find_weights
from mmalign.evaluation.requests import EncodedRequest
from mmalign.evaluation.scoring import Score, make_plan, run_plan
from mmalign.evaluation.warm_up import compiled_kernels
from mmalign.files import read_json
from mmalign.model.config import DecoderConfig
from mmalign.model.generate import GenerationOptions, Prompt, generate
from mmalign.model.hf import load_decoder
from mmalign.model.llava import Llava
from mmalign.system import DTYPES, choose_device, choose_precision, versions
from mmalign.tokenizer import Tokenizer
from mmalign.tokenizer.chat_template import ChatTemplate
from mmalign.validation import check

log = logging.getLogger("mmalign")
if "mmalign" not in model_registry:  # "python -m" loads this file a second time under its name
    model_registry.register("mmalign", target="mmalign.lm_eval:MmalignLM")

_MODEL_ARGUMENTS = ("pretrained", "precision", "batch_tokens", "cache_tokens", "add_bos_token")
_MODEL_ARGUMENTS += ("prefix_token_id", "max_length")
_GENERATION = ("do_sample", "temperature", "top_k", "top_p", "seed")  # besides length and stops


class MmalignLM(TemplateLM):
    """A language model from a Hugging Face folder or a finetune run, without vision.

    pretrained: the folder or run. precision: fp32, bf16, or auto (bf16 on a GPU). batch_tokens:
    maximum input tokens per forward pass of scoring; cache_tokens: maximum tokens whose keys and
    values generation holds. add_bos_token: whether texts start with BOS; default: what the folder's
    tokenizer does. prefix_token_id: precedes texts without a context; default: BOS, or
    EOS where there is none. max_length: of the context in tokens; default: the model's own.
    lm_eval's --batch_size has no effect.
    """

    def __init__(
        self,
        pretrained: str = "",
        precision: str = "auto",
        device: str = "auto",
        batch_tokens: int = 8192,
        cache_tokens: int = 16384,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        max_length: int | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **unknown,
    ):
        super().__init__()
        if unknown:
            raise UserError(
                f"--model_args {', '.join(unknown)}: supported are {', '.join(_MODEL_ARGUMENTS)}"
            )
        sizes = {"cache_tokens": cache_tokens, "max_length": max_length}
        _require_arguments(pretrained, add_bos_token, batch_tokens=batch_tokens, **sizes)
        check("batch_tokens", batch_tokens)
        if str(batch_size) != "1" or max_batch_size is not None:
            log.warning("--batch_size has no effect: use batch_tokens and cache_tokens")
        self._weights = weights = find_weights(pretrained)
        self._chat: ChatTemplate | None = None  # from the first use on
        self._device = _choose_device(device)
        precision = choose_precision(precision, self._device)
        self._tokens = Tokenizer.from_pretrained(weights)
        if prefix_token_id is not None:
            _require_token(prefix_token_id, DecoderConfig.from_hf(weights).vocab_size)
        dtype = DTYPES[precision]
        with compiled_kernels(weights, dtype, self._device, scores=True, answers=True):
            decoder = load_decoder(weights, dtype).to(self._device)
        self._llava = Llava(decoder.eval(), None, None, self._tokens)
        self.batch_tokens, self.cache_tokens = batch_tokens, cache_tokens
        self.max_length = max_length or decoder.config.context_length
        self.adds_bos = _adds_bos(weights) if add_bos_token is None else add_bos_token
        self._prefix_id = _first_not_none(
            prefix_token_id, self._tokens.bos_token_id, self._tokens.eos_token_id
        )

    @property
    def eot_token_id(self) -> int:
        return self._tokens.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self._prefix_id

    @property
    def tokenizer_name(self) -> str:
        return self._tokens.fingerprint

    def get_model_info(self) -> dict:
        """What lm_eval adds to its results."""
        parameters = list(self._llava.decoder.parameters())
        return {
            "model_num_parameters": sum(x.numel() for x in parameters),
            "model_dtype": str(parameters[0].dtype),
            "model_sha": "",
            "add_bos_token": self.adds_bos,
            "prefix_token_id": self.prefix_token_id,
            "max_length": self.max_length,
            "tokenizer_sha256": self._tokens.fingerprint,
            "mmalign_versions": versions(),
        }

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs
    ) -> list[int]:
        """Ids of a text, with at most one BOS in front, from the text or from the tokenizer."""
        bos = self._tokens.bos_token_id
        if self._chat:
            return self._encode_chat(string)
        if bos is None:
            return self._tokens.encode(string)
        written = self._tokens.token(bos)
        if add_special_tokens is None and string.startswith(written):
            return [bos, *self._tokens.encode(string.removeprefix(written))]
        adds_bos = self.adds_bos if add_special_tokens is None else add_special_tokens
        return [bos] * adds_bos + self._tokens.encode(string)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The folder's own template, for --apply_chat_template; UserError where it has none."""
        self._chat = ChatTemplate(self._weights, self._tokens)
        return self._chat.text

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        self._chat = self._chat or ChatTemplate(self._weights, self._tokens)
        return self._chat.render(chat_history, add_generation_prompt)

    def _encode_chat(self, string: str) -> list[int]:
        """Ids of a text in which the template has written the names of BOS and EOS."""
        tokens = self._tokens
        ids = {tokens.bos_token_id, tokens.eos_token_id} - {None}
        special = {tokens.token(i): i for i in ids}
        parts = re.split(f"({'|'.join(map(re.escape, special))})", string)
        ids = ([special[x]] if x in special else tokens.encode(x) for x in parts if x)
        return [token_id for part in ids for token_id in part]

    # ---- log-likelihoods ----

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs,
    ) -> list[tuple[float, bool]]:
        scores = self._score([(context, target) for _, context, target in requests], disable_tqdm)
        answers = [(score.loglikelihood, bool(score.is_greedy)) for score in scores]
        for (request, *_), answer in zip(requests, answers, strict=True):
            if request is not None:  # texts that the cache knows the request by
                self.cache_hook.add_partial("loglikelihood", request, answer)
        return answers

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Of whole texts, in windows of max_length tokens as the harness cuts them."""
        pairs, owners = [], []
        for i, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows = [make_disjoint_window(window) for window in windows]
            pairs += windows
            owners += [i] * len(windows)
        totals = [0.0] * len(requests)
        for i, score in zip(owners, self._score(pairs, disable_tqdm), strict=True):
            totals[i] += score.loglikelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _score(
        self, pairs: Sequence[tuple[list[int], list[int]]], disable_tqdm: bool
    ) -> list[Score]:
        """pairs of context and continuation."""
        names = [f"request {i}" for i in range(len(pairs))]
        encoded = [self._encoded(*pair, name) for pair, name in zip(pairs, names, strict=True)]
        if num_cut := sum(request.num_truncated > 0 for request in encoded):
            log.warning("%d contexts truncated on the left to %d tokens", num_cut, self.max_length)
        plan = make_plan(encoded, list(range(len(pairs))), names, self.batch_tokens)
        return run_plan(self._llava.decoder, plan, self._device, not disable_tqdm, greedy=True)

    def _encoded(self, context: list[int], continuation: list[int], name: str) -> EncodedRequest:
        if not context or not 0 < len(continuation) <= self.max_length:
            raise UserError(
                f"{name}: {len(context)} context tokens and {len(continuation)} continuation "
                f"tokens; expected at least 1, and 1 to {self.max_length} (the model's context)"
            )
        ids, vocab_size = np.array(context + continuation, np.int32), self._vocab_size
        if ids.max() >= vocab_size:
            raise UserError(
                f"{name}: token {ids.max()}, but the model's vocabulary has {vocab_size} entries; "
                "use the tokenizer that belongs to the model"
            )
        num_truncated = max(0, len(ids) - (self.max_length + 1))
        return EncodedRequest(ids[num_truncated:-1], ids[-len(continuation) :], num_truncated)

    @property
    def _vocab_size(self) -> int:
        return self._llava.decoder.config.vocab_size

    # ---- generation ----

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts up to the first of the stop strings; equal settings are generated together."""
        texts: dict[int, str] = {}
        settings = [json.dumps(request.arguments[1], sort_keys=True) for request in requests]
        order = sorted(range(len(requests)), key=settings.__getitem__)
        for _, group in groupby(order, key=settings.__getitem__):
            group = list(group)
            contexts = [requests[i].arguments[0] for i in group]
            kwargs = requests[group[0]].arguments[1]
            found = self._generate(contexts, kwargs, disable_tqdm)
            texts |= dict(zip(group, found, strict=True))
        for i, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, texts[i])
        return [texts[i] for i in range(len(requests))]

    def _generate(self, contexts: list[str], settings: dict, disable_tqdm: bool) -> list[str]:
        kwargs = normalize_gen_kwargs(settings, default_max_gen_toks=256)
        num_new = kwargs.pop("max_gen_toks")
        stop = handle_stop_sequences(kwargs.pop("until"), self._tokens.token(self.eot_token_id))
        num_kept = self.max_length - num_new
        if num_kept < 1:
            raise UserError(
                f"max_gen_toks is {num_new}, which leaves no space for a prompt in the model's "
                f"context of {self.max_length} tokens; set --gen_kwargs max_gen_toks=N or "
                "max_length in --model_args"
            )
        prompts = [self.tok_encode(context) for context in contexts]
        if num_cut := sum(len(ids) > num_kept for ids in prompts):
            log.warning("%d prompts truncated on the left to %d tokens", num_cut, num_kept)
        options = GenerationOptions(num_new, **_sampling(dict(kwargs)), stop=tuple(stop))
        prompts = [Prompt(ids[-num_kept:]) for ids in prompts]
        found = generate(
            self._llava,
            self._tokens,
            prompts,
            options,
            self.cache_tokens,
            progress=not disable_tqdm,
        )
        texts = [self._tokens.decode(generation.token_ids) for generation in found]
        return [postprocess_generated_text(text, stop, None) for text in texts]


def _require_arguments(pretrained: object, add_bos_token: object, **numbers: object) -> None:
    """UserError for values of --model_args that cannot be; a number may be None."""
    if not isinstance(pretrained, str) or not pretrained:
        raise UserError("--model_args needs pretrained=DIR, a Hugging Face folder or a run")
    if add_bos_token not in (None, True, False):
        raise UserError(f"add_bos_token is {add_bos_token!r}; expected True or False")
    for name, value in numbers.items():
        if value is not None and (type(value) is not int or value < 1):
            raise UserError(f"{name} is {value!r}; expected a number of tokens, at least 1")


def _require_token(number: object, vocab_size: int) -> None:
    if type(number) is not int or not 0 <= number < vocab_size:
        raise UserError(
            f"prefix_token_id is {number!r}; expected the id of a token, from 0 to {vocab_size - 1}"
        )


def _choose_device(device: str) -> torch.device:
    """lm_eval passes cuda:0 where --device is not given, even on machines without a GPU."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        log.warning("PyTorch sees no CUDA device: running on the CPU")
        device = "cpu"
    return choose_device(device)


def _sampling(kwargs: dict) -> dict:
    """The part of lm_eval's generation_kwargs that GenerationOptions takes."""
    unknown = sorted(set(kwargs) - set(_GENERATION))
    if unknown:
        raise UserError(
            f"generation_kwargs {', '.join(unknown)}: supported are until, max_gen_toks, "
            f"{', '.join(_GENERATION)}"
        )
    if not kwargs.pop("do_sample"):
        return {}
    if not kwargs.get("temperature"):
        raise UserError("do_sample needs a temperature above 0: add temperature=T to --gen_kwargs")
    return kwargs


def _first_not_none(*values: int | None) -> int:
    return next(value for value in values if value is not None)


def _adds_bos(folder: Path) -> bool:
    """Whether transformers' tokenizer of the folder adds BOS; a LLaMA tokenizer.model does."""
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    if isinstance(settings.get("add_bos_token"), bool):
        return settings["add_bos_token"]
    path = folder / "tokenizer.json"
    return not path.is_file() or bool(tokenizers.Tokenizer.from_file(str(path)).encode("").ids)


if __name__ == "__main__":
    with command_line():
        cli_evaluate()
