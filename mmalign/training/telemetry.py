"""Rates, MFU and memory of a step; on NVIDIA GPUs power, energy, clock, temperature, throttling.

Nothing here waits for the device: the loop measures the times, CUDA's memory counters live on the
host, and a thread of its own polls NVML, whose latest values each step takes.
"""

import logging
import resource
import sys
import threading
from types import ModuleType

import torch

from mmalign.config import TrainConfig
from mmalign.distributed import DistributedContext
from mmalign.flops import peak_bf16_flops

log = logging.getLogger("mmalign")

# nvml.h: bits of nvmlDeviceGetCurrentClocksEventReasons that slow the GPU down
THROTTLE_REASONS = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "software thermal",
    0x40: "hardware thermal",
    0x80: "power brake",
}


class Telemetry:
    """Use as a context manager around the loop: inside, NVML is polled."""

    def __init__(self, config: TrainConfig, ranks: DistributedContext):
        """Only the main process, which writes the metrics, polls its GPU."""
        self.device = ranks.device
        self.peak_flops = _peak_flops(config, ranks.device) if ranks.is_main else None
        self.gpu = _open_gpu(ranks.device) if ranks.is_main else None

    def __enter__(self) -> "Telemetry":
        if self.gpu:
            self.gpu.start()
        return self

    def __exit__(self, *exception) -> None:
        if self.gpu:
            self.gpu.stop()

    def record(
        self, *, tokens: int, samples: int, flops: int, seconds: float, data_seconds: float
    ) -> dict:
        """Fields of a step's line in metrics.jsonl.

        tokens and samples of all ranks; flops of this rank's share, so tflops_per_second and mfu
        are those of its device. seconds: the whole step, data_seconds of them waiting for data.
        """
        rate = flops / seconds
        fields = {
            "tokens_per_second": tokens / seconds,
            "samples_per_second": samples / seconds,
            "data_wait_share": data_seconds / seconds,
            "tflops_per_second": rate / 1e12,
        }
        if self.peak_flops:
            fields["mfu"] = rate / self.peak_flops
        return fields | memory(self.device) | (self.gpu.latest() if self.gpu else {})


def memory(device: torch.device) -> dict[str, int]:
    """Bytes of tensors, now and at their peak, on a GPU; on a CPU the process's peak."""
    if device.type == "cuda":
        return {
            "memory_allocated_bytes": torch.cuda.memory_allocated(device),
            "memory_peak_bytes": torch.cuda.max_memory_allocated(device),
        }
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes there, KiB elsewhere
    return {"memory_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def _peak_flops(config: TrainConfig, device: torch.device) -> float | None:
    """The denominator of MFU; None where it is unknown, which is logged once."""
    if config.peak_tflops is not None:
        return config.peak_tflops * 1e12
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peak = peak_bf16_flops(name) if config.precision == "bf16" else None
    else:
        name, peak = "the CPU", None
    if peak is None:
        log.info(
            "no mfu: the %s peak of %s is unknown; set it with --peak-tflops",
            *(config.precision, name),
        )
    return peak


def _open_gpu(device: torch.device) -> "GpuMonitor | None":
    """NVML's view of the device; without one, logs the reason once."""
    if device.type != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        log.info("no power, clocks and temperature: pip install nvidia-ml-py for these")
        return None
    try:
        uuid = torch.cuda.get_device_properties(device).uuid
        return GpuMonitor(pynvml, f"GPU-{uuid}")
    except pynvml.NVMLError as error:
        log.info("no power, clocks and temperature: NVML says %s", error)
        return None


class GpuMonitor:
    """Polls NVML every `interval` seconds in a thread; leaves out what the GPU does not report."""

    def __init__(self, nvml: ModuleType, uuid: str, interval: float = 1.0):
        self.nvml, self.interval = nvml, interval
        nvml.nvmlInit()
        self.handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        self.first_energy: int | None = None
        self.unsupported: set[str] = set()
        self.values: dict = {}
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True, name="nvml")

    def start(self) -> None:
        self.sample()
        self.thread.start()

    def stop(self) -> None:
        self.stopped.set()
        self.thread.join()
        self.nvml.nvmlShutdown()

    def latest(self) -> dict:
        return self.values

    def _watch(self) -> None:
        while not self.stopped.wait(self.interval):
            self.sample()

    def sample(self) -> None:
        readings = {
            "power_watts": self._power,
            "energy_joules": self._energy,
            "sm_clock_mhz": self._clock,
            "temperature_celsius": self._temperature,
            "throttle_reasons": self._throttle_reasons,
        }
        values = {}
        for name, read in readings.items():
            if name in self.unsupported:
                continue
            try:
                values[name] = read()
            except self.nvml.NVMLError as error:
                self.unsupported.add(name)
                log.info("no %s: NVML says %s", name, error)
        self.values = values  # replaced as a whole: the loop never sees a half-updated sample

    def _power(self) -> float:
        return self.nvml.nvmlDeviceGetPowerUsage(self.handle) / 1000  # in mW

    def _energy(self) -> float:
        """Since the start of the loop; the GPU counts mJ since its driver was loaded."""
        total = self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle)
        if self.first_energy is None:
            self.first_energy = total
        return (total - self.first_energy) / 1000

    def _clock(self) -> int:
        return self.nvml.nvmlDeviceGetClockInfo(self.handle, self.nvml.NVML_CLOCK_SM)

    def _temperature(self) -> int:
        return self.nvml.nvmlDeviceGetTemperature(self.handle, self.nvml.NVML_TEMPERATURE_GPU)

    def _throttle_reasons(self) -> list[str]:
        bits = self.nvml.nvmlDeviceGetCurrentClocksEventReasons(self.handle)
        return [name for bit, name in THROTTLE_REASONS.items() if bits & bit]
