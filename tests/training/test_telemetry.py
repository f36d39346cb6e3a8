"""Rates and MFU of a step, and what a GPU reports, through a stand-in for pynvml."""

import inspect
import json
import logging
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmalign.files import read_json_lines
from mmalign.flops import step_flops
from mmalign.training import telemetry
from mmalign.training.loop import train
from mmalign.training.metrics import progress
from mmalign.training.telemetry import GpuMonitor, Telemetry
from tests.training.helpers import CPU, small_config, small_loop


class NVMLError(Exception):
    pass


class FakeNVML:
    """The functions of nvidia-ml-py 13 that are used, with its signatures and units."""

    NVMLError = NVMLError
    NVML_CLOCK_SM = 1
    NVML_TEMPERATURE_GPU = 0

    def __init__(self, missing: tuple[str, ...] = ()):
        self.missing, self.calls, self.energy = missing, [], 5_000_000

    def nvmlInit(self):
        self.calls.append("nvmlInit")

    def nvmlShutdown(self):
        self.calls.append("nvmlShutdown")

    def nvmlDeviceGetHandleByUUID(self, uuid):
        assert uuid == "GPU-c0ffee"
        return "handle"

    def nvmlDeviceGetPowerUsage(self, handle):
        return self._answer("power", handle, 652_500)  # mW

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        self.energy += 1500  # mJ
        return self._answer("energy", handle, self.energy)

    def nvmlDeviceGetClockInfo(self, handle, type):
        return self._answer("clock", handle, {1: 1755}[type])

    def nvmlDeviceGetTemperature(self, handle, sensor):
        return self._answer("temperature", handle, {0: 61}[sensor])

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle):
        return self._answer("throttle", handle, 0x1 | 0x4 | 0x40)  # idle, power cap, thermal

    def _answer(self, name, handle, value):
        assert handle == "handle"
        self.calls.append(name)
        if name in self.missing:
            raise NVMLError("Not Supported")
        return value


def test_the_stand_in_has_the_signatures_and_constants_of_pynvml():
    pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    for name, function in inspect.getmembers(FakeNVML, inspect.isfunction):
        if name.startswith("nvml"):
            parameters = list(inspect.signature(function).parameters)[1:]
            assert list(inspect.signature(getattr(pynvml, name)).parameters) == parameters, name
    assert pynvml.NVML_CLOCK_SM == FakeNVML.NVML_CLOCK_SM
    assert pynvml.NVML_TEMPERATURE_GPU == FakeNVML.NVML_TEMPERATURE_GPU
    reasons = {
        "power cap": pynvml.nvmlClocksEventReasonSwPowerCap,
        "hardware slowdown": pynvml.nvmlClocksEventReasonHwSlowdown,
        "software thermal": pynvml.nvmlClocksEventReasonSwThermalSlowdown,
        "hardware thermal": pynvml.nvmlClocksEventReasonHwThermalSlowdown,
        "power brake": pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown,
    }
    assert {bit: name for name, bit in reasons.items()} == telemetry.THROTTLE_REASONS


def test_gpu_reports_in_watts_joules_and_names():
    gpu = GpuMonitor(FakeNVML(), "GPU-c0ffee")
    gpu.sample()
    first = gpu.latest()
    gpu.sample()
    assert first["power_watts"] == 652.5 and first["energy_joules"] == 0
    assert gpu.latest()["energy_joules"] == 1.5
    assert first["sm_clock_mhz"] == 1755 and first["temperature_celsius"] == 61
    assert first["throttle_reasons"] == ["power cap", "hardware thermal"]


def test_gpu_is_asked_by_a_thread_of_its_own():
    nvml, asked_by = FakeNVML(), []
    again = threading.Event()
    gpu = GpuMonitor(nvml, "GPU-c0ffee", interval=0.001)
    sample = gpu.sample

    def note_and_sample():
        asked_by.append(threading.current_thread().name)
        sample()
        if len(asked_by) > 2:
            again.set()

    gpu.sample = note_and_sample
    gpu.start()
    assert again.wait(10)
    before = len(nvml.calls)
    assert gpu.latest()["power_watts"] == 652.5  # the loop only takes what is there
    gpu.stop()
    assert set(asked_by[1:]) == {"nvml"} and before and nvml.calls[-1] == "nvmlShutdown"


def test_what_a_gpu_does_not_report_is_left_out_and_logged_once(caplog):
    caplog.set_level(logging.INFO, logger="mmalign")
    gpu = GpuMonitor(FakeNVML(missing=("energy",)), "GPU-c0ffee")
    gpu.sample()
    gpu.sample()
    assert "energy_joules" not in gpu.latest() and "power_watts" in gpu.latest()
    assert [record.message for record in caplog.records] == [
        "no energy_joules: NVML says Not Supported"
    ]


def test_without_nvidia_ml_py_it_says_so_once(monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="mmalign")
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    assert telemetry._open_gpu(torch.device("cuda")) is None
    assert len(caplog.records) == 1 and "nvidia-ml-py" in caplog.text


def test_gpu_is_found_by_its_uuid(monkeypatch):
    properties = SimpleNamespace(uuid="c0ffee")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setitem(__import__("sys").modules, "pynvml", FakeNVML())
    assert telemetry._open_gpu(torch.device("cuda", 1)).handle == "handle"


def test_peak_is_given_published_or_unknown(small_world, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    cuda = torch.device("cuda")
    bf16 = small_config(small_world, tmp_path, precision="bf16")
    fp32 = small_config(small_world, tmp_path)
    given = small_config(small_world, tmp_path, peak_tflops=0.5)
    assert telemetry._peak_flops(bf16, cuda) == 989.4e12
    assert telemetry._peak_flops(fp32, cuda) is None  # a bf16 rate is no denominator for fp32
    assert telemetry._peak_flops(fp32, CPU.device) is None
    assert telemetry._peak_flops(given, CPU.device) == 0.5e12


def test_rates_of_a_step(small_world, tmp_path):
    record = Telemetry(small_config(small_world, tmp_path, peak_tflops=4.0), CPU).record(
        tokens=1000, samples=10, flops=3 * 10**12, seconds=2.0, data_seconds=0.5
    )
    assert record["tokens_per_second"] == 500 and record["samples_per_second"] == 5
    assert record["tflops_per_second"] == 1.5 and record["mfu"] == 0.375
    assert record["data_wait_share"] == 0.25
    peak = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    assert record["memory_peak_bytes"] == pytest.approx(peak, rel=0.05)
    shown = progress(
        record | {"loss": 1.5, "power_watts": 650.2, "throttle_reasons": ["power cap"]}
    )
    for part in ("loss 1.5000", "500 tokens/s", "5.0 samples/s", "1.5 TFLOP/s", "mfu 37.5%"):
        assert part in shown
    assert "data wait 25%" in shown and "650 W" in shown and "throttled: power cap" in shown


def test_every_step_of_a_run_has_its_rates(small_world, tmp_path):
    config = small_config(
        small_world,
        tmp_path,
        num_steps=2,
        peak_tflops=0.1,
        tensorboard=True,
        micro_batch_tokens=500,
    )
    train(config)
    records = read_json_lines(tmp_path / "metrics.jsonl")
    loop = small_loop(small_config(small_world, tmp_path / "again", num_steps=2))
    for record, step in zip(records, loop.loader, strict=True):
        flops = record["tflops_per_second"] * record["seconds"] * 1e12
        assert flops == pytest.approx(step_flops(loop.workload, step.batches).total, rel=1e-9)
        assert record["mfu"] == pytest.approx(record["tflops_per_second"] / 0.1)
        assert record["data_wait_share"] == record["data_wait_seconds"] / record["seconds"]
        assert record["memory_peak_bytes"] > 0
    assert json.loads((tmp_path / "config.json").read_text())["peak_tflops"] == 0.1
