"""What a run says about its speed and its machine: rates, MFU, memory; on NVIDIA cards power,
energy, clock, temperature and throttling.

Nothing here waits for the device: rates come from what the loop has timed, CUDA's memory counters
live on the host, and NVML is asked by a thread of its own, whose last answer each step takes.
"""

import logging
import resource
import sys
import threading
from types import ModuleType

import torch

from mmalign.config import TrainConfig
from mmalign.distributed import Ranks
from mmalign.errors import UserError
from mmalign.flops import peak_bf16_flops

log = logging.getLogger("mmalign")

# nvml.h: bits of nvmlDeviceGetCurrentClocksEventReasons that slow the card down
THROTTLE_REASONS = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "software thermal",
    0x40: "hardware thermal",
    0x80: "power brake",
}


class Telemetry:
    """Use as a context manager around the loop: the card is watched inside."""

    def __init__(self, config: TrainConfig, ranks: Ranks):
        """Only the main process, which writes the metrics, asks about its card."""
        self.device = ranks.device
        self.peak_flops = _peak_flops(config, ranks.device) if ranks.is_main else None
        self.card = _open_card(ranks.device) if ranks.is_main else None

    def __enter__(self) -> "Telemetry":
        if self.card:
            self.card.start()
        return self

    def __exit__(self, *exception) -> None:
        if self.card:
            self.card.stop()

    def record(
        self, *, tokens: int, samples: int, flops: int, seconds: float, data_seconds: float
    ) -> dict:
        """Fields of a step's line in metrics.jsonl.

        tokens and samples of all processes; flops of this process's share, so tflops_per_second
        and mfu are those of its device. seconds: the whole step, data_seconds of it for data.
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
        return fields | memory(self.device) | (self.card.latest() if self.card else {})


def progress(record: dict) -> str:
    """The part of a step's record that the progress bar shows."""
    parts = [
        f"loss {record['loss']:.4f}",
        f"{record['tokens_per_second']:,.0f} tokens/s",
        f"{record['samples_per_second']:,.1f} samples/s",
        f"{record['tflops_per_second']:,.3g} TFLOP/s",
    ]
    if "mfu" in record:
        parts.append(f"mfu {record['mfu']:.1%}")
    parts.append(f"data wait {record['data_wait_share']:.0%}")
    parts.append(f"{record['memory_peak_bytes'] / 2**30:.1f} GiB")
    if "power_watts" in record:
        parts.append(f"{record['power_watts']:.0f} W")
    if record.get("throttle_reasons"):
        parts.append(f"throttled: {', '.join(record['throttle_reasons'])}")
    return "  ".join(parts)


def memory(device: torch.device) -> dict[str, int]:
    """Bytes that tensors hold now and held at most on a GPU; on a CPU the process's peak."""
    if device.type == "cuda":
        return {
            "memory_allocated_bytes": torch.cuda.memory_allocated(device),
            "memory_peak_bytes": torch.cuda.max_memory_allocated(device),
        }
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes there, KiB elsewhere
    return {"memory_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def _peak_flops(config: TrainConfig, device: torch.device) -> float | None:
    """The denominator of MFU; None where it is not known, which is said once."""
    if config.peak_tflops is not None:
        if config.peak_tflops <= 0:
            raise UserError(f"--peak-tflops {config.peak_tflops}: expected a rate above 0")
        return config.peak_tflops * 1e12
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peak = peak_bf16_flops(name) if config.precision == "bf16" else None
    else:
        name, peak = "the CPU", None
    if peak is None:
        log.info("no mfu: the %s peak of %s is unknown; --peak-tflops", config.precision, name)
    return peak


def _open_card(device: torch.device) -> "Card | None":
    """NVML's view of the device; where there is none, says once why."""
    if device.type != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        log.info("no power, clocks and temperature: pip install nvidia-ml-py for these")
        return None
    try:
        uuid = torch.cuda.get_device_properties(device).uuid
        return Card(pynvml, f"GPU-{uuid}")
    except pynvml.NVMLError as error:
        log.info("no power, clocks and temperature: NVML says %s", error)
        return None


class Card:
    """Asks NVML every `interval` seconds, in a thread. A value that the card lacks is left out."""

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
        questions = {
            "power_watts": self._power,
            "energy_joules": self._energy,
            "sm_clock_mhz": self._clock,
            "temperature_celsius": self._temperature,
            "throttle_reasons": self._throttle_reasons,
        }
        values = {}
        for name, ask in questions.items():
            if name in self.unsupported:
                continue
            try:
                values[name] = ask()
            except self.nvml.NVMLError as error:
                self.unsupported.add(name)
                log.info("no %s: NVML says %s", name, error)
        self.values = values  # replaced whole: the loop never sees half a sample

    def _power(self) -> float:
        return self.nvml.nvmlDeviceGetPowerUsage(self.handle) / 1000  # given in mW

    def _energy(self) -> float:
        """Since the loop's start; the card counts mJ since its driver was loaded."""
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
