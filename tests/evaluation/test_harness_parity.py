"""Log-likelihoods and predictions against lm-evaluation-harness's Hugging Face backend."""

import pytest
import sentencepiece
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import LlamaForCausalLM, PreTrainedTokenizer

from mmalign.evaluation.scoring import score_requests
from mmalign.evaluation.tasks import TASKS, load_documents, resolve_tasks


class SentencePieceTokenizer(PreTrainedTokenizer):
    """sentencepiece's own ids: transformers 5 merges a bare tokenizer.model in another order."""

    def __init__(self, model_file: str):
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=model_file)
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

    def encode(self, text, add_special_tokens=True, **kwargs) -> list[int]:
        assert not add_special_tokens, "the harness of 2023 scored without BOS"
        return self.pieces.encode(text)


def harness(folder, tokenizer_model, **options) -> HFLM:
    return HFLM(
        pretrained=LlamaForCausalLM.from_pretrained(folder).eval(),
        tokenizer=SentencePieceTokenizer(str(tokenizer_model)),
        add_bos_token=False,
        prefix_token_id=2,  # the harness of 2023 took </s> where the context is empty
        device="cpu",
        **options,
    )


def harness_scores(model: HFLM, requests: list[tuple[str, str]]) -> list[float]:
    instances = [
        Instance("loglikelihood", doc={}, arguments=request, idx=i)
        for i, request in enumerate(requests)
    ]
    return [score for score, _ in model.loglikelihood(instances, disable_tqdm=True)]


def test_first_100_documents_of_every_task(
    shared_data, llama_folder, tokenizer_model, decoder, tokenizer
):
    documents = load_documents(resolve_tasks(["truthfulqa", "ethics"]), shared_data, limit=100)
    flat = [document for rows in documents.values() for document in rows]
    requests = [request for document in flat for request in document.requests]
    ours = [
        score.loglikelihood
        for score in score_requests(decoder, tokenizer, requests, 8192, progress=False)
    ]
    theirs = harness_scores(harness(llama_folder, tokenizer_model, batch_size=1), requests)
    assert ours == pytest.approx(theirs, abs=1e-3, rel=0)
    begin = 0
    for document in flat:
        part = slice(begin, begin := begin + len(document.requests))
        predict = TASKS[document.task].predict
        assert predict(document, ours[part]) == predict(document, theirs[part]), document.name
