"""Energy that a run takes, by the counters of GPU (NVML) and CPU (RAPL), where the system lets them be read.

A counter is a whole device's: what else ran there meanwhile is in it. With several ranks it is the main rank's GPU, and
its machine's CPUs.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from polyhead_trainer.loop import StepReport, TrainingLoop

logger = logging.getLogger(__name__)

POWERCAP = Path("/sys/class/powercap")
_PACKAGE = re.compile(r"intel-rapl:\d+")
"""A CPU package, on AMD too; what is inside of one (`intel-rapl:0:0`) is in its sum."""


class EnergyCounter(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def wraps_at_joules(self) -> float | None:
        """Where it starts again at 0; None: never."""

    def read_joules(self) -> float:
        """Raises OSError."""


@dataclass(frozen=True)
class RaplPackage:
    """One CPU package of the kernel's powercap tree. Often readable by root alone."""

    folder: Path

    @property
    def name(self) -> str:
        return f"CPU {(self.folder / 'name').read_text().strip()}"

    @property
    def wraps_at_joules(self) -> float:
        return int((self.folder / "max_energy_range_uj").read_text()) / 1e6

    def read_joules(self) -> float:
        return int((self.folder / "energy_uj").read_text()) / 1e6


class NvmlGpu:
    """One GPU, since its driver was loaded. Needs Volta or newer, and the package nvidia-ml-py."""

    wraps_at_joules = None

    def __init__(self, device: torch.device) -> None:
        """Raises OSError."""
        import pynvml

        self._nvml: Any = pynvml
        properties: Any = torch.cuda.get_device_properties(device)
        self.name = f"GPU {properties.name}"
        try:
            pynvml.nvmlInit()
            # By its UUID: NVML numbers the machine's GPUs, torch those that it is shown.
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
        except pynvml.NVMLError as error:
            raise OSError(str(error)) from error

    def read_joules(self) -> float:
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3
        except self._nvml.NVMLError as error:
            raise OSError(str(error)) from error


def readable_counters(device: torch.device, powercap: Path = POWERCAP) -> list[EnergyCounter]:
    """Those of the machine that can be read now; often none."""
    found: list[EnergyCounter] = []
    zones = sorted(powercap.iterdir()) if powercap.is_dir() else []
    for zone in zones:
        if _PACKAGE.fullmatch(zone.name):
            package = RaplPackage(zone)
            try:
                # `psys` is the whole board, the packages included.
                if package.name.startswith("CPU package") and package.wraps_at_joules and package.read_joules() >= 0:
                    found.append(package)
            except (OSError, ValueError) as error:
                logger.info("energy of %s cannot be read: %s", zone.name, error)
    if device.type == "cuda":
        try:
            gpu = NvmlGpu(device)
            gpu.read_joules()
            found.append(gpu)
        except (OSError, ModuleNotFoundError) as error:
            logger.info("energy of %s cannot be read: %s", device, error)
    return found


class EnergyMeter:
    """Implements Hook and Stateful: adds up what the counters advance from `start` on, read at every step because
    RAPL's wrap around within an hour."""

    def __init__(self, counters: Sequence[EnergyCounter]) -> None:
        self.joules: dict[str, float] = {}
        """By the counter's name; one that stopped being readable is left out."""
        self._counters = {counter.name: counter for counter in counters}
        self._last: dict[str, float] = {}

    def start(self) -> None:
        for name in list(self._counters):
            self.joules.setdefault(name, 0.0)
        self.read()

    def after_step(self, loop: TrainingLoop, report: StepReport) -> None:
        self.read()

    def read(self) -> None:
        for name, counter in list(self._counters.items()):
            try:
                now = counter.read_joules()
                spent = now - self._last.get(name, now)
                self.joules[name] += spent if spent >= 0 else spent + (counter.wraps_at_joules or 0.0)
                self._last[name] = now
            except (OSError, ValueError) as error:
                logger.warning("energy of %s cannot be read any more: %s", name, error)
                del self._counters[name], self.joules[name]

    def state_dict(self) -> dict[str, Any]:
        return {"joules": self.joules}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """A counter that the earlier process could not read knows only a part of the run: it is left out."""
        self.joules = {name: joules for name, joules in state["joules"].items() if name in self._counters}
        self._counters = {name: counter for name, counter in self._counters.items() if name in self.joules}

    def tensors(self, loop: TrainingLoop) -> dict[str, Tensor]:
        return {}
