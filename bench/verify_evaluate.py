"""Part evaluate of gpu_verify.sh: TruthfulQA and ETHICS on the 7B shape with random weights.

Measured is what follows the loading of the model: tokenising, building the tree of prefixes and
scoring. Real documents with --data-root and --tokenizer; else drawn ones of the same lengths, whose
tokenising costs nothing, and the case says so.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench import documents, verify
from bench.ceilings import ceilings
from bench.models import CPU_SMALL, LLAMA2_7B, Size, random_decoder
from bench.record import Record, write_part
from mmalign.evaluation.scoring import ScoringPlan, plan_scoring, run_plan
from mmalign.evaluation.tasks import load_documents, resolve_tasks
from mmalign.flops import Workload, forward_flops
from mmalign.model.decoder import Decoder
from mmalign.tokenizer import Tokenizer

BENCHMARK = "score_7b"
PEERS = ("bench_scoring.py",)
BATCH_TOKENS = 16384
REPEATS = {"truthfulqa": 3, "ethics": 2}
WARM_UP_REQUESTS = 300


@dataclass(frozen=True)
class Examination:
    task: str  # truthfulqa, ethics
    kind: str  # "real documents", "drawn documents"
    requests: list[documents.Request]
    tokenizer: Tokenizer | documents.NumberTokenizer

    def plan(self, size: Size, limit: int | None = None) -> ScoringPlan:
        config = size.decoder
        return plan_scoring(
            self.tokenizer,
            self.requests[:limit],
            config.max_position_embeddings,
            config.vocab_size,
            BATCH_TOKENS,
            progress=False,
        )


def examinations(options: verify.Options, vocab_size: int) -> list[Examination]:
    if options.data_root is None:
        makers: dict[str, Callable] = {
            "truthfulqa": documents.truthfulqa,
            "ethics": documents.ethics,
        }
        numbers = documents.NumberTokenizer()
        return [
            Examination(task, "drawn documents", make(vocab_size), numbers)
            for task, make in makers.items()
        ]
    tokenizer = Tokenizer.from_pretrained(options.tokenizer)
    found = []
    for task in REPEATS:
        by_task = load_documents(resolve_tasks([task]), options.data_root)
        requests = [request for rows in by_task.values() for d in rows for request in d.requests]
        found.append(Examination(task, "real documents", requests, tokenizer))
    return found


def measure(
    examination: Examination, size: Size, decoder: Decoder, measured: dict, limit: int | None = None
) -> Record:
    """Median of the repeats, each from text to scores; with a limit once, on that many requests."""
    if limit is None:
        warm_up = examination.plan(size, WARM_UP_REQUESTS)
        run_plan(decoder, warm_up, _device(decoder), progress=False)
        torch.cuda.reset_peak_memory_stats()
    taken = []
    for _ in range(1 if limit else REPEATS[examination.task]):
        started = time.perf_counter()
        plan = examination.plan(size, limit)
        planned = time.perf_counter()
        run_plan(decoder, plan, _device(decoder), progress=False)  # its scores come to the host
        taken.append((time.perf_counter() - started, planned - started))
    seconds = statistics.median(total for total, _ in taken)
    flops = least_flops(size, plan)
    reference = measured["matrix_reference"]
    return Record(
        BENCHMARK,
        f"{examination.task}, {size.name}, {examination.kind}",
        "score",
        "mmalign",
        seconds,
        fastest=min(taken)[0],
        slowest=max(taken)[0],
        repeats=len(taken),
        flops=flops,
        ceiling=reference,
        share=flops / seconds / measured["matrix_flops_per_second"][reference],
        peak_memory_bytes=None if limit else torch.cuda.max_memory_allocated(),
        extra={
            "plan_seconds": statistics.median(planned for _, planned in taken),
            "tokens_per_second": plan.num_tokens / seconds,
            "tokens_computed": plan.num_tokens,
            "tokens_of_harness": plan.num_tokens_harness,
            "requests": len(plan.unique_of),
            "batch_tokens": BATCH_TOKENS,
        },
    )


def least_flops(size: Size, plan: ScoringPlan) -> int:
    """Of the projections and lm_head; the attention, which is little, is left out."""
    work = forward_flops(
        Workload(size.decoder), [plan.num_tokens], len(set(plan.targets.tokens.tolist())), 0
    )
    return work.projections + work.lm_head


def _device(decoder: Decoder) -> torch.device:
    return decoder.embed_tokens.weight.device


def run(options: verify.Options) -> list[str]:
    if options.only is None:
        measure_all(options)
    return verify.run_benchmarks(PEERS, options)


def measure_all(options: verify.Options) -> None:
    measured, size = ceilings("cuda"), LLAMA2_7B
    decoder = random_decoder(size.decoder, torch.device("cuda"), torch.bfloat16)
    records = []
    for examination in examinations(options, size.decoder.vocab_size):
        records.append(measure(examination, size, decoder, measured))
        print(verify.line(records[-1]), flush=True)
        write_part(options.results, options.part, records, measured, options.command)
    del decoder
    torch.cuda.empty_cache()


def dry_run(options: verify.Options) -> list[str]:
    """The plans of the 7B shape on paper, a few requests on a small model, the peers collected."""
    small = random_decoder(CPU_SMALL.decoder, torch.device("cpu"), torch.float32)
    measured = ceilings("cpu")
    for examination in examinations(options, LLAMA2_7B.decoder.vocab_size):
        plan = examination.plan(LLAMA2_7B)
        cache = plan.cache_bytes(LLAMA2_7B.decoder, torch.bfloat16)
        print(
            f"{examination.task}, {examination.kind}: {len(plan.unique_of)} requests, "
            f"{plan.num_tokens} tokens computed (lm-evaluation-harness: "
            f"{plan.num_tokens_harness}), {least_flops(LLAMA2_7B, plan) / 1e12:.0f} TFLOP, "
            f"{cache / 1e9:.2f} GB of keys and values",
            flush=True,
        )
        print(verify.line(measure(examination, CPU_SMALL, small, measured, limit=6)))
    return verify.collect_benchmarks(PEERS, options)


if __name__ == "__main__":
    verify.part_main(run, dry_run)
