"""Part correctness of gpu_verify.sh: the GPU tests of the kernels, and compute-sanitizer.

The sanitizer runs the tests that call every registered operation on a few rows: its three tools on
the kernels of csrc/, memcheck on Triton's.
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

TESTS = "tests/kernels"
SMALL = "tests/kernels/test_registration.py"  # every operation, a few rows each
SANITIZER_FOUND = 86  # exit code that stands for its findings
TOOLS = {"cuda": ("memcheck", "racecheck", "initcheck"), "triton": ("memcheck",)}
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
        words = [sys.executable, "-m", "pytest", TESTS, "-m", "gpu", f"--junitxml={report}"]
        if find_spec("xdist"):
            words += ["-n", str(PROCESSES)]
        code = verify.run(words, seconds)
        if not report.exists():
            reason = f"pytest ended with {code} and left no report"
            return [Record("gpu_tests", TESTS, "test", "pytest", None, skipped=reason)], [reason]
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
    records = [Record("gpu_tests", TESTS, "test", "pytest", seconds, repeats=1, extra=counts)]
    for case in root.iter("testcase"):
        for outcome in ("failure", "error"):
            for found in case.findall(outcome):
                message = f"{found.get('message', '')}\n{found.text or ''}".strip()[:MESSAGE]
                extra = {"outcome": outcome, "message": message}
                name = f"{case.get('classname')}::{case.get('name')}"
                records.append(Record("gpu_tests", name, "test", "pytest", None, extra=extra))
    return records


# ---- compute-sanitizer ----


def sanitize(options: verify.Options) -> tuple[list[Record], list[str]]:
    if shutil.which("compute-sanitizer") is None:
        reason = "compute-sanitizer is not on PATH; it comes with the CUDA toolkit"
        return [Record("sanitizer", SMALL, "test", "all", None, skipped=reason)], [reason]
    records, problems = [], []
    for backend, tools in TOOLS.items():
        for tool in tools:
            record = _sanitize(backend, tool, options.seconds_left)
            records.append(record)
            if record.extra.get("exit_code"):
                problems.append(f"compute-sanitizer {tool}, {backend}: see the record's output")
    return records, problems


def _sanitize(backend: str, tool: str, seconds: float) -> Record:
    name = ("sanitizer", f"{SMALL}, {backend}", "test", tool)
    if seconds < 20:
        return Record(*name, None, skipped="the part's 8 minutes were over")
    words = ["compute-sanitizer", "--tool", tool, "--target-processes", "all"]
    words += ["--error-exitcode", str(SANITIZER_FOUND)]
    words += [sys.executable, "-m", "pytest", SMALL, "-m", "gpu", "-k", f"opcheck and {backend}"]
    # PyTorch's cache of freed blocks would hide reads past the end of a tensor
    env = dict(os.environ, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    started = time.monotonic()
    code, output = verify.run_quietly(words, seconds, env)
    taken = time.monotonic() - started
    if code == verify.NO_TESTS:
        return Record(*name, None, skipped=f"no {backend} kernel was collected")
    extra = {"exit_code": code} | ({"output": output[-MESSAGE:]} if code else {})
    return Record(*name, taken, repeats=1, extra=extra)


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
    words = [sys.executable, "-m", "pytest", TESTS, "--collect-only", "-k", "triton or cuda"]
    code, output = verify.run_quietly(words, options.seconds_left)
    print(output.strip().splitlines()[-1])
    return problems + ([f"{TESTS} cannot be collected: {output[-MESSAGE:]}"] if code else [])


def _family_files() -> list[Path]:
    return sorted((verify.REPOSITORY / TESTS).glob("codegen_*.py"))


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
