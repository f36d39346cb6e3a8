"""lm-evaluation-harness's Hugging Face backend on a given model and sentencepiece tokenizer."""

from collections.abc import Sequence
from pathlib import Path

import sentencepiece
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import LlamaForCausalLM, PreTrainedTokenizer

Request = tuple[str, str]  # (context, continuation)


class SentencePieceTokenizer(PreTrainedTokenizer):
    """sentencepiece's own ids, without BOS, as the harness of 2023 scored LLaMA."""

    def __init__(self, model_file: Path):
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
        super().__init__(bos_token="<s>", eos_token="</s>", unk_token="<unk>")

    @property
    def vocab_size(self) -> int:
        return self.pieces.vocab_size()

    def get_vocab(self) -> dict[str, int]:
        return {self.pieces.id_to_piece(i): i for i in range(self.vocab_size)}

    def _convert_token_to_id(self, token: str) -> int:
        return self.pieces.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.pieces.id_to_piece(index)

    def encode(self, text: str, **options) -> list[int]:
        return self.pieces.encode(text)


class Harness:
    def __init__(self, model: LlamaForCausalLM, tokenizer_model: Path):
        self.lm = HFLM(
            pretrained=model,
            tokenizer=SentencePieceTokenizer(tokenizer_model),
            add_bos_token=False,
            prefix_token_id=2,  # </s> stands in for an empty context
            device=str(model.device),
        )

    def scores(self, requests: Sequence[Request], batch_size: int) -> list[float]:
        """Log-likelihood of every continuation."""
        self.lm.batch_size_per_gpu = batch_size
        instances = [
            Instance("loglikelihood", doc={}, arguments=request, idx=i)
            for i, request in enumerate(requests)
        ]
        return [score for score, _ in self.lm.loglikelihood(instances, disable_tqdm=True)]
