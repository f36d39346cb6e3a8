"""Everything that only a GPU can show, in one command of at most 8 minutes.

    bash scripts/gpu_verify.sh --wheels DIR --data DIR   # kernels, both stages, scoring, tests
    bash scripts/gpu_verify.sh --more                    # then, at most 4 minutes: sanitizer, ...
    bash scripts/gpu_verify.sh --dry-run                 # shows all of it, on any machine
    bash scripts/gpu_verify.sh --cpu-rehearsal           # runs all of it on a CPU, on tiny shapes

Results are appended to RESULTS/<gpu>/verification.jsonl as they come, so a run that is stopped
keeps what it measured; at the end they become verdict.md there, beside the predictions of
bench/predictions.json (at any time: python -m bench.verdict FILE). A part that fails or takes too
long does not stop the others; one that would exceed the limit is skipped. Exit code: 0 where
everything ran and was right, 1 where something failed or was wrong, 3 where parts were skipped or
cut short.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from bench.gpu_parts import LIMITS, SANITIZER, Part, parts
from bench.measured_peaks import machine
from bench.records import BROKEN, Records, read_records
from bench.verdict import PREDICTIONS, problems, render
from mmalign.files import write_text

REPOSITORY = Path(__file__).resolve().parents[1]
STARTS = 4  # of a part whose process breaks
STALLED = 45  # seconds without a result: a kernel hangs
GRACE = 8  # seconds between an interrupt and the end of a process


@dataclass(frozen=True)
class Options:
    more: tyro.conf.FlagCreatePairsOff[bool] = False
    """The second command: sanitizer, other shapes, recomputation policies, frozen prefix."""
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show the parts with the seconds that each should take, and run none."""
    cpu_rehearsal: tyro.conf.FlagCreatePairsOff[bool] = False
    """Run the same program on a CPU: tiny shapes, Triton's kernels in its interpreter."""
    part: tuple[str, ...] = ()
    """Only these, e.g. --part peaks kernels; by default all."""
    results: Path | None = None
    """Folder of the results, RESULTS/<gpu>/verification.jsonl, verdict.md and logs; default
    bench/results, of a rehearsal a temporary one."""
    data: Path | None = None
    """Folder of truthfulqa/, ethics/ and llama_tokenizer/; default $MMALIGN_SHARED_DATA, else
    synthetic documents of the same lengths."""
    limit: float | None = None
    """Seconds in all."""

    @property
    def chosen(self) -> list[Part]:
        found = parts(self.more, self.cpu_rehearsal)
        return [part for part in found if not self.part or part.name in self.part]

    @property
    def folder(self) -> Path:
        temporary = self.cpu_rehearsal and not self.results
        root = Path(tempfile.gettempdir()) if temporary else REPOSITORY / "bench/results"
        return (self.results or root) / ("mmalign-rehearsal" if temporary else machine()["name"])


# ---- running ----


class Run:
    """The parts of one command, their processes and records."""

    def __init__(self, options: Options, folder: Path):
        self.options, self.folder = options, folder
        self.started = time.monotonic()
        self.limit = options.limit or LIMITS[options.more]
        self.records = Records(folder / "verification.jsonl", "run")
        self.behind: dict[str, tuple[Part, subprocess.Popen, float]] = {}

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def all(self, chosen: Iterable[Part]) -> None:
        for part in chosen:
            for name in part.needs:
                self._finish(name)
            late = self.elapsed + part.expected > self.limit
            if late and not part.behind:
                left = max(self.limit - self.elapsed, 0)
                note = f"takes about {part.expected:.0f} s, {left:.0f} of {self.limit:.0f} are left"
                self._record(part, "skipped", 0, note)
            elif part.behind:
                self.behind[part.name] = part, self._start(part), self.elapsed
            else:
                self._run(part)
        for name in list(self.behind):
            self._finish(name)

    def stop(self) -> None:
        for part, process, _ in self.behind.values():
            end(process)
            self._record(part, "stopped", 0, "")
        self.behind.clear()

    def _log(self, part: Part) -> Path:
        """Where a command's output goes; bench.gpu_work prints its results."""
        return self.folder / f"{part.name.replace(' ', '-')}.log"

    def _start(self, part: Part) -> subprocess.Popen:
        command, environment = self._command(part), self._environment(part)
        print(f"==== {self.elapsed:.0f} s: {part.name}: {shown(command)}", flush=True)
        own = {"cwd": REPOSITORY, "env": environment, "start_new_session": True}
        if part.command is None:
            return subprocess.Popen(command, **own)
        with open(self._log(part), "w") as log:
            return subprocess.Popen(command, **own, stdout=log, stderr=subprocess.STDOUT)

    def _command(self, part: Part) -> list[str]:
        if part.command is None:
            return [sys.executable, "-m", "bench.gpu_work", part.name, str(self.records.path)]
        if shutil.which(part.command[0]) or part.command[0] == SANITIZER[0]:
            return list(part.command)
        return [sys.executable, *part.command]

    def _environment(self, part: Part) -> dict[str, str]:
        more = {}
        if self.options.data:
            more["MMALIGN_SHARED_DATA"] = str(self.options.data.resolve())
        if shutil.which("ninja"):
            more["CMAKE_GENERATOR"] = "Ninja"
        if "sanitizer" in part.name:  # PyTorch's cache would hide reads past the end of a tensor
            more["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        if self.options.cpu_rehearsal:
            more |= {"MMALIGN_BENCH_REHEARSAL": "1", "TRITON_INTERPRET": "1"}
        return {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", **more}

    def _run(self, part: Part) -> None:
        """Starts it again where its process breaks or stalls and finishes items in between."""
        begin = self.elapsed
        end_at = min(begin + part.most, self.limit)
        code, reason = None, ""
        for _ in range(STARTS if part.command is None else 1):
            try:
                process = self._start(part)
            except OSError as error:
                code, reason = 127, f"{part.command[0] if part.command else ''}: {error.strerror}"
                break
            code, reason = self._wait(part, process, end_at)
            if reason == "cut short" or code in (0, 1):  # 1: an exception, not a kernel
                break
        self._end(part, code, reason, self.elapsed - begin)

    def _wait(self, part: Part, process: subprocess.Popen, end_at: float) -> tuple[int | None, str]:
        """Exit code, or None and why it was ended."""
        size, heard = 0, self.elapsed
        watched = part.name in ("kernels", "shapes")
        try:
            while process.poll() is None:
                time.sleep(0.1)
                now, known = self.elapsed, self.records.path.stat().st_size
                size, heard = (known, now) if known != size else (size, heard)
                if now > end_at:
                    end(process)
                    return None, "cut short"
                if watched and now - heard > STALLED:
                    end(process)
                    return None, f"no result for {STALLED} s"
        except BaseException:  # this process is told to stop
            end(process)
            raise
        return process.returncode, "CUDA broke" if process.returncode == BROKEN else ""

    def _finish(self, name: str) -> None:
        """Waits for a part that runs behind others."""
        if name not in self.behind:
            return
        part, process, begin = self.behind.pop(name)
        code, reason = self._wait(part, process, min(begin + part.most, self.limit))
        self._end(part, code, reason, self.elapsed - begin)

    def _end(self, part: Part, code: int | None, reason: str, seconds: float) -> None:
        log = self._log(part)
        text = log.read_text(errors="replace") if part.command and log.exists() else ""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        lines = [line for line in lines if not line.startswith("-- Docs")]  # pytest's last one
        status = "done" if code == 0 else "cut short" if reason == "cut short" else "failed"
        last = lines[-1] if lines else ""
        own = Records(self.records.path, part.name)
        if status == "failed":
            own.write("failed", what="process", reason=reason or last[:300] or f"exit code {code}")
        for line in lines:
            if line.startswith(("FAILED", "ERROR ")):
                own.write("failed", what="test", reason=line[:300])
        self._record(part, status, seconds, last[:120] if status == "done" else reason)

    def _record(self, part: Part, status: str, seconds: float, note: str) -> None:
        fields = dict(what=part.name, status=status, seconds=seconds, expected=part.expected)
        self.records.write("part", **fields, note=note)


def end(process: subprocess.Popen) -> None:
    """Ends a process and what it started: an interrupt first, so that pytest sums up."""
    for sent, seconds in ((signal.SIGINT, GRACE), (signal.SIGKILL, GRACE)):
        try:
            os.killpg(process.pid, sent)
            process.wait(seconds)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def shown(command: Sequence[str]) -> str:
    text = shlex.join(command).replace(sys.executable, "python")
    return text.replace(f"{REPOSITORY}/", "")


def dry_run(options: Options) -> None:
    """The parts, when each should begin, and what it measures."""
    chosen, run = options.chosen, Run(options, Path("RESULTS/GPU"))
    command = [sys.executable, "-m", "bench.gpu_work", "--list", *(part.name for part in chosen)]
    environment = os.environ | {"MMALIGN_BENCH_DEVICE": "cuda"}  # a GPU's rows, on any machine
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    items, at, beside = json.loads(done.stdout), 0.0, 0.0
    for part in chosen:
        at = max(at, beside) if part.needs else at
        print(f"{at:4.0f} s  {part.name}: about {part.expected:.0f} s, at most {part.most:.0f}")
        print(f"        {shown(run._command(part))}")
        print("".join(f"        - {title}\n" for title in items[part.name]), end="")
        at, beside = (at, at + part.expected) if part.behind else (at + part.expected, beside)
    print(f"{at:4.0f} s  end, of {run.limit:.0f} s")


def verify(options: Options) -> int:
    """Runs the parts and writes the verdict; the exit code."""
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "verification.jsonl"
    if not options.more and not options.part:
        path.write_text("")  # --more and single parts add to it
    path.touch()
    before = len(read_records(path))
    run = Run(options, folder)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
    try:
        run.all(options.chosen)
    finally:
        run.stop()
        records = read_records(path)
        verdict = render(records, json.loads(PREDICTIONS.read_text()))
        write_text(folder / "verdict.md", verdict)
        print(f"\n{verdict}\n{run.elapsed:.0f} s in all; {path}")
    new = records[before:]
    if problems(new):
        return 1
    return 0 if all(x["status"] == "done" for x in new if x["kind"] == "part") else 3


def main() -> None:
    options = tyro.cli(Options, prog="gpu_verify.sh", description=__doc__)
    if options.dry_run:
        dry_run(options)
        return
    if not options.cpu_rehearsal and not torch.cuda.is_available():
        sys.exit(
            "PyTorch sees no CUDA device here; --dry-run shows what would run, --cpu-rehearsal "
            "runs it on tiny shapes"
        )
    try:
        sys.exit(verify(options))
    except KeyboardInterrupt:
        sys.exit(3)


if __name__ == "__main__":
    main()
