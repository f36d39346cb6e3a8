"""Part correctness of gpu_verify.sh: the tests that need a GPU, and compute-sanitizer.

The sanitizer's three tools run over small cases of every kernel of csrc/, and memcheck over the
tests that call every operation in Triton on a few rows.
"""

import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

from bench import verify
from bench.ceilings import ceilings
from bench.record import Record, write_part

TESTS = ("tests/kernels", "tests/csrc", "tests/training")
COUNTS = ("gpu_tests", " ".join(TESTS), "test", "pytest")
SMALL = "tests/kernels/test_registration.py"  # every operation, a few rows each
SANITIZED = {  # backend: tools, and the module and arguments that they watch
    "cuda": (("memcheck", "racecheck", "initcheck"), ("tests.csrc.sanitize",)),
    "triton": (("memcheck",), ("pytest", SMALL, "-m", "gpu", "-k", "opcheck and triton")),
}
SANITIZER_FOUND = 86  # exit code that stands for its findings
PROCESSES = 8  # of pytest-xdist: most of the time goes into compiling kernels
MESSAGE = 2000  # characters kept of a failure


def run(options: verify.Options) -> list[str]:
    measured = ceilings("cuda")
    records, problems = tests(options.seconds_left - 180)
    write_part(options.results, options.part, records, measured, options.command)
    found, more = sanitize(options)
    write_part(options.results, options.part, found, measured, options.command)
    return problems + more


# ---- tests ----


def tests(seconds: float) -> tuple[list[Record], list[str]]:
    """pytest -m gpu: one record with the counts, and one for each failure."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        words = [sys.executable, "-m", "pytest", *TESTS, "-m", "gpu"]
        words.append(f"--junitxml={report}")
        if find_spec("xdist"):
            words += ["-n", str(PROCESSES)]
        code = verify.run(words, seconds)
        if not report.exists():
            reason = f"pytest ended with {code} and left no report"
            return [Record(*COUNTS, None, skipped=reason)], [reason]
        records = read_report(report)
    problems = [f"{r.case}: {r.extra['outcome']}" for r in records[1:]]
    return records, problems or ([f"pytest ended with {code}"] if code else [])


def read_report(path: Path) -> list[Record]:
    """Records of a JUnit file: the counts first, then the failures."""
    root = ElementTree.parse(path).getroot()
    suites = [root] if root.tag == "testsuite" else root.findall("testsuite")
    counts = {
        key: sum(int(suite.get(key, 0)) for suite in suites)
        for key in ("tests", "failures", "errors", "skipped")
    }
    counts["passed"] = counts["tests"] - sum(counts[k] for k in ("failures", "errors", "skipped"))
    seconds = sum(float(suite.get("time", 0)) for suite in suites)
    records = [Record(*COUNTS, seconds, repeats=1, extra=counts)]
    for case in root.iter("testcase"):
        for outcome in ("failure", "error"):
            for found in case.findall(outcome):
                text = f"{found.get('message', '')}\n{found.text or ''}".strip()
                message = verify.without_paths(text)[:MESSAGE]
                extra = {"outcome": outcome, "message": message}
                name = f"{case.get('classname')}::{case.get('name')}"
                records.append(Record("gpu_tests", name, "test", "pytest", None, extra=extra))
    return records


# ---- compute-sanitizer ----


def sanitize(options: verify.Options) -> tuple[list[Record], list[str]]:
    if shutil.which("compute-sanitizer") is None:
        reason = "compute-sanitizer is not on PATH; it comes with the CUDA toolkit"
        return [Record("sanitizer", "all", "test", "all", None, skipped=reason)], [reason]
    records = [
        _sanitize(backend, tool, program, options.seconds_left)
        for backend, (tools, program) in SANITIZED.items()
        for tool in tools
    ]
    failed = [record for record in records if record.extra.get("exit_code")]
    return records, [f"{r.variant} on {r.case}: {r.extra['output']}" for r in failed]


def _sanitize(backend: str, tool: str, program: tuple[str, ...], seconds: float) -> Record:
    name = ("sanitizer", f"{backend} kernels: {' '.join(program)}", "test", tool)
    if backend == "cuda" and not verify.LIBRARY.exists():
        return Record(*name, None, skipped="csrc/ is not built; --part build says why")
    if seconds < 20:
        return Record(*name, None, skipped="the part's 8 minutes were over")
    words = ["compute-sanitizer", "--tool", tool, "--target-processes", "all"]
    words += ["--error-exitcode", str(SANITIZER_FOUND), sys.executable, "-m", *program]
    # PyTorch's cache of freed blocks would hide reads past the end of a tensor
    env = dict(os.environ, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    started = time.monotonic()
    code, output = verify.run_quietly(words, seconds, env)
    extra = {"exit_code": code} | ({"output": output[-MESSAGE:]} if code else {})
    return Record(*name, time.monotonic() - started, repeats=1, extra=extra)


# ---- without a GPU ----


def dry_run(options: verify.Options) -> list[str]:
    """Compiles every Triton kernel for sm_90, and collects the tests that a GPU would run."""
    problems = []
    families = [path.stem.removeprefix("codegen_") for path in _family_files()]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for family, (code, output) in zip(families, pool.map(_compile, families), strict=True):
            if code:
                problems.append(f"{family} does not compile: {output[-MESSAGE:]}")
            else:
                print(f"{family}: {output.strip()} kernels compiled for sm_90", flush=True)
    # on a CPU Triton's tests run in the interpreter and have no mark
    words = [
        sys.executable,
        "-m",
        "pytest",
        *TESTS,
        "--collect-only",
        "-k",
        "gpu or triton or cuda",
    ]
    code, output = verify.run_quietly(words, options.seconds_left)
    print(output.strip().splitlines()[-1])
    return problems + ([f"tests cannot be collected: {output[-MESSAGE:]}"] if code else [])


def _family_files() -> list[Path]:
    return sorted((verify.REPOSITORY / "tests/kernels").glob("codegen_*.py"))


COMPILE = """
import sys
from tests.kernels import codegen
codegen.TARGETS = (codegen.launch.H100,)
print(len(codegen.compile_family(sys.argv[1])))
"""


def _compile(family: str) -> tuple[int, str]:
    """In a process of its own: the compiler is off where TRITON_INTERPRET was seen."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    words = [sys.executable, "-c", COMPILE, family]
    return verify.run_quietly(words, verify.PART_SECONDS, environment)


if __name__ == "__main__":
    verify.part_main(run, dry_run)
