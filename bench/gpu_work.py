"""What the processes of bench/gpu.py measure, one part in each: python -m bench.gpu_work PART FILE.

Every result is appended to FILE (JSON lines) and printed as soon as it is there. A kernel that
breaks CUDA ends its process; started again, that goes on after it, and first repeats what was
interrupted without the kernels of csrc/. --list PART ... names the items of parts.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import torch
from codegen.compiler import families as codegen_families
from mmalign_kernels.costs.cost import H100  # a pretended device, where there is none
from mmalign_kernels.triton import launch

from bench import shapes
from bench.bench_scoring import OURS, Scoring
from bench.bench_shortcuts import Shortcuts
from bench.bench_train_step import RecipeStep
from bench.comparison import BOTH, MATMUL, Comparison
from bench.measured_peaks import machine, measured_peaks
from bench.models import LLAMA2_7B, Size
from bench.records import BROKEN, Records, read_records
from bench.session import Session
from bench.shapes import DEVICE, ON_GPU, REHEARSAL
from bench.timing import measure
from bench.verdict import title_of

OPERATIONS = ("attention", "norms", "elementwise", "lm_head", "adamw", "prefix_attention")
VARIANTS = [  # csrc/ first: it is left out where it has broken a process
    *("mmalign cuda", "mmalign triton", "torch_varlen through mmalign", "liger-kernel"),
    *("torch eager*", "torch rms_norm", "torch sdpa*", "torch fused*", "cuDNN sdpa*"),
]
OTHER_SHAPES = (
    "2048 tokens",
    "2048 rows",
    "openllama",
    "one long",
    "wide mix",
    "32003",
    "frozen",
    "1146 of",
)
IN_INTERPRETER = ("adamw split", "adamw stochastic")  # bf16, which it computes wrongly
SECONDS = 0.4  # of a comparison's timing
TINY = Size("tiny", shapes.TINY_DECODER, shapes.TINY_VISION)
SIZE, PRECISION = (TINY, "fp32") if REHEARSAL else (LLAMA2_7B, "bf16")


def operations(more: bool | None) -> list[Comparison]:
    """At the shapes that training and scoring spend their time in; more: at the others."""
    found = []
    for name in OPERATIONS:
        for comparison in import_module(f"bench.bench_{name}").COMPARISONS:
            one_way = comparison.direction != BOTH or comparison.benchmark == "linear_cross_entropy"
            other = any(words in comparison.case for words in OTHER_SHAPES)
            wrong_here = REHEARSAL and comparison.benchmark in IN_INTERPRETER
            if one_way and not wrong_here and (more is None or other == more):
                found.append(comparison)
    return found


def recipe_step(recipe: str, tokens: int, policies: Sequence[str | None] = (None,)) -> RecipeStep:
    if REHEARSAL:
        return RecipeStep(TINY, f"tiny-{recipe.partition('-')[0]}", [2048], 4, policies)
    return RecipeStep(SIZE, recipe, [tokens], policies=policies)


def programs() -> dict[str, list[Comparison]]:
    """Of each part: whole steps and evaluations."""
    policies = recipe_step("finetune-7b", 8192, ("none", "elementwise", "mlp", "full"))
    policies.rounds = 2
    count, tokens = (2, 512) if REHEARSAL else (64, 16384)
    truthfulqa, ethics = (4, 5) if REHEARSAL else (None, 400)
    vocab_size = LLAMA2_7B.decoder.vocab_size  # of the documents' tokenizer
    scored = replace(SIZE, decoder=replace(SIZE.decoder, vocab_size=vocab_size))
    scoring = {"rounds": 1, "variants": (OURS,)}
    return {
        "finetune": [recipe_step("finetune-7b", 8192)],
        "pretrain": [recipe_step("pretrain-7b", 16384)],
        "scoring": [
            Scoring(scored, "truthfulqa", truthfulqa, PRECISION, tokens, **scoring),
            Scoring(scored, "ethics", ethics, PRECISION, tokens, **scoring),
        ],
        "recompute": [policies],
        "prefix": [Shortcuts(SIZE, "pretrain", count, tokens, PRECISION)],
    }


# ---- the parts ----


def peaks(records: Records) -> None:
    """A copy, a large product, and the products of a LLaMA2-7B layer."""
    records.write("machine", **machine())
    records.write("peaks", **measured_peaks(DEVICE))
    decoder = SIZE.decoder
    hidden, inner = decoder.hidden_size, decoder.intermediate_size
    weights = {
        "qkv": (sum(decoder.qkv_sizes), hidden),
        "o": (hidden, hidden),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
    }
    for tokens in (96,) if REHEARSAL else (8192, 16384):
        for name, (rows, columns) in weights.items():
            x, grad = shapes.activations(tokens, columns), shapes.activations(tokens, rows)
            weight = (0.02 * torch.randn(rows, columns, device=DEVICE)).to(shapes.DTYPE)
            calls: dict[str, Callable] = {
                "forward": lambda x=x, weight=weight: x @ weight.t(),
                "by the input": lambda grad=grad, weight=weight: grad @ weight,
                "by the weight": lambda grad=grad, x=x: grad.t() @ x,
            }
            case = f"{name}_proj, {tokens} tokens"
            info = {"flops": 2 * tokens * rows * columns, "bound": MATMUL}
            for direction, timing in measure(calls, DEVICE, max_seconds=SECONDS).items():
                fields = dict(benchmark="product", case=case, direction=direction)
                seconds = timing.median
                records.write("measured", **fields, variant="torch", seconds=seconds, info=info)


def compile_kernels(records: Records) -> None:
    """Every Triton launch of production, for this GPU, into Triton's cache: a process each."""
    gpu = launch.gpu(torch.empty(0, device=DEVICE)) if ON_GPU else H100
    families = ["swiglu", "quick_gelu"] if REHEARSAL else codegen_families()
    workers = max(len(os.sched_getaffinity(0)) - 2, 1)  # the others build csrc/
    with ThreadPoolExecutor(workers) as pool:
        jobs = {name: pool.submit(_compile, name, gpu) for name in families}
        for name, job in jobs.items():
            try:
                records.write("compiled", family=name, **job.result())
            except RuntimeError as error:
                records.write("failed", what=f"compiling {name}", reason=str(error)[-400:])


COMPILE = """
import sys
from codegen.compiler import compile_family
from mmalign_kernels.triton.launch import Gpu
found = compile_family(sys.argv[1], "bfloat16", (Gpu(*map(int, sys.argv[2:])),))
print(len(found), *(f"{x.kernel}:{x.spills}" for x in found if x.spills))
"""


def _compile(family: str, gpu: launch.Gpu) -> dict:
    begin = time.monotonic()
    command = [sys.executable, "-c", COMPILE, family, *map(str, gpu)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    kernels, *spills = done.stdout.split()
    return {"seconds": time.monotonic() - begin, "kernels": int(kernels), "spills": spills or None}


def compare(records: Records, comparisons: Sequence[Comparison]) -> None:
    """Verifies and times; what an earlier process of this run finished is left out."""
    earlier = read_records(records.path)
    own = [x for x in earlier if x["part"] == records.part]
    begun = [x["what"] for x in own if x["kind"] == "begin"]
    ended = {x["what"] for x in own if x["kind"] == "end"}
    session = Session(max_seconds=SECONDS)
    session.peaks = next((x for x in reversed(earlier) if x["kind"] == "peaks"), {})
    for comparison in comparisons:
        what = title_of(comparison)
        if what in ended or begun.count(what) > 1:
            continue
        variants = VARIANTS[what in begun :]
        session.patterns = ["*"] if comparison.rounds else variants  # programs have a few
        records.write("begin", what=what)
        if what in begun:
            records.write("failed", what=what, reason="interrupted; repeated without csrc/")
        try:
            _compare(records, session, comparison)
        except Exception as error:  # the next comparison may run
            records.write("failed", what=what, reason=f"{type(error).__name__}: {error}"[:400])
        _leave_if_broken(records, what)
        records.write("end", what=what)
    for variant, reasons in session.not_measured.items() if ON_GPU else ():
        records.write("left out", what=variant, reason="; ".join(reasons))
    records.write("gpu", **session.monitor.stop())


def _compare(records: Records, session: Session, comparison: Comparison) -> None:
    timings, wrong = session.measure(comparison, timed=True)
    infos = session.extra_info(comparison, timings)
    for variant, timing in timings.items():
        info = infos[variant] | _beside(comparison, variant)
        names = {n: getattr(comparison, n) for n in ("benchmark", "case", "direction")}
        seconds = timing.median
        records.write("measured", **names, variant=variant, seconds=seconds, info=info)
    for message in wrong:
        records.write("wrong", what=title_of(comparison), reason=message[:400])


def _leave_if_broken(records: Records, what: str) -> None:
    try:
        if ON_GPU:
            torch.cuda.synchronize()
    except RuntimeError as error:
        records.write("failed", what=what, reason=str(error).partition("\n")[0])
        os._exit(BROKEN)  # destructors would only fail, too


def _beside(comparison: Comparison, variant: str) -> dict:
    """Of a recipe's step on a GPU: the most memory that the device held, CUDA's own included."""
    if not isinstance(comparison, RecipeStep) or not ON_GPU or len(comparison.variants) > 1:
        return {}
    free, total = torch.cuda.mem_get_info()
    outside = total - free - torch.cuda.memory_reserved()
    return {"device_bytes": torch.cuda.max_memory_reserved() + outside}


def items(part: str) -> list[Comparison]:
    if part in ("kernels", "shapes"):
        return operations(more=part == "shapes")
    return programs().get(part, [])


def run(part: str, path: Path) -> None:
    records = Records(path, part)
    if part in ("peaks", "compile"):
        {"peaks": peaks, "compile": compile_kernels}[part](records)
        return
    compare(records, items(part))


if __name__ == "__main__":
    if sys.argv[1] == "--list":
        print(json.dumps({part: list(map(title_of, items(part))) for part in sys.argv[2:]}))
    else:
        run(sys.argv[1], Path(sys.argv[2]))
