"""The machine of a run, and the most that it reaches: copy bandwidth and a large matrix product.

Measured in the run that is compared with them, on random operands (zeros run faster).
"""

import os
import platform
import re
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from mmalign_kernels import linear

from bench.timing import measure
from mmalign.system import versions


def measured_peaks(device: torch.device) -> dict:
    """{"copy_bytes_per_second", "matmul_flops_per_second", "matmul": what was multiplied by what}.

    A copy counts bytes read and written. The product is square; on a CPU the faster of PyTorch's
    own and mmalign_kernels.linear counts. Needs 5 GB of a GPU, and frees them.
    """
    with torch.no_grad():
        peaks = _measure(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return peaks


def _measure(device: torch.device) -> dict:
    on_gpu = device.type == "cuda"
    dtype, numel, size = (torch.bfloat16, 1 << 30, 8192) if on_gpu else (None, 1 << 26, 2048)
    source = torch.randn(numel, device=device, dtype=dtype)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in "ab")
    square = f"{'bf16' if on_gpu else 'fp32'} {size}x{size}x{size}"
    calls = {"copy": lambda: target.copy_(source), square: lambda: a @ b}
    if not on_gpu:
        calls[f"{square} mmalign_kernels.linear"] = lambda: linear(a, b)
    seconds = {name: timing.median for name, timing in measure(calls, device).items()}
    copy_seconds = seconds.pop("copy")
    fastest = min(seconds, key=seconds.__getitem__)
    return {
        "copy_bytes_per_second": 2 * source.nbytes / copy_seconds,
        "matmul_flops_per_second": 2 * size**3 / seconds[fastest],
        "matmul": fastest,
    }


def machine() -> dict[str, Any]:
    """Device, driver and versions; "name" is the machine's folder under bench/results."""
    found = {key: value for key, value in versions().items() if key != "git_commit"}
    if torch.cuda.is_available():
        device = name = torch.cuda.get_device_name()
        driver = _nvidia_smi("driver_version")
    else:
        device, driver = _cpu_model(), None
        name = f"cpu {device} {len(os.sched_getaffinity(0))} cores"
        found |= _cpu_settings()
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    own = {"name": slug, "device": device, "driver": driver, "system": platform.system()}
    return found | own


class GpuMonitor:
    """nvidia-smi beside a run: clocks, power, and how often the GPU was slowed down."""

    QUERY = "clocks.sm,power.draw,clocks_throttle_reasons.active"
    SLOWED = 0x04 | 0x08 | 0x20 | 0x40 | 0x80  # nvml.h: power cap, slowdown, thermal, power brake

    def __init__(self):
        self.folder, self.process = tempfile.TemporaryDirectory(), None
        self.log = Path(self.folder.name, "samples.csv")
        if torch.cuda.is_available() and shutil.which("nvidia-smi"):
            command = ["nvidia-smi", f"--query-gpu={self.QUERY}", "-lms", "200", "-i", "0"]
            command.append("--format=csv,noheader,nounits")
            with open(self.log, "w") as file:
                self.process = subprocess.Popen(command, stdout=file)

    def stop(self) -> dict[str, float]:
        """Medians of the samples, and the share of them that were throttled; {} without a GPU."""
        if self.process is None:
            return {}
        self.process.terminate()
        self.process.wait()
        lines = self.log.read_text().splitlines()  # [N/A]: the GPU does not say it
        rows = [line.split(", ") for line in lines if line.count(",") == 2 and "[" not in line]
        if not rows:
            return {}
        clocks, watts, reasons = zip(*rows, strict=True)
        return {
            "sm_clock_mhz": statistics.median(map(float, clocks)),
            "power_watts": statistics.median(map(float, watts)),
            "throttled": sum(bool(int(x, 16) & self.SLOWED) for x in reasons) / len(rows),
        }


def _nvidia_smi(query: str) -> str | None:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.partition("\n")[0] or None


def _cpu_model() -> str:
    """The name does not tell: every generation of one is an "AMD EPYC" to a virtual machine."""
    found = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    name = found.get("model name") or platform.processor() or platform.machine()
    numbers = [f"{key.split()[-1]} {found[key]}" for key in ("cpu family", "model") if key in found]
    return f"{name} ({', '.join(numbers)})" if numbers else name


def _cpu_settings() -> dict[str, str | int]:
    """Vector width, threads, and the libraries inside PyTorch that multiply matrices."""
    text = torch.__config__.show()
    libraries = {"mkl": r"Math Kernel Library Version (\S+)", "onednn": r"MKL-DNN v(\S+)"}
    matches = {name: re.search(pattern, text) for name, pattern in libraries.items()}
    return {
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        **{name: match[1] for name, match in matches.items() if match},
    }
