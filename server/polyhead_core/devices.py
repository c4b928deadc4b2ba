"""The names of devices, and whether they are there."""

from __future__ import annotations

import re

from polyhead_core.errors import ConfigError

DEVICE_NAME = re.compile(r"cpu|cuda(:[0-9]+)?")


def check_device(name: str, setting: str) -> None:
    """Raises ConfigError for what `setting` cannot be: no name of a device, or a GPU that is not there."""
    if DEVICE_NAME.fullmatch(name) is None:
        raise ConfigError(f"{setting} = {name}: expected cpu, cuda, or cuda:N for one GPU of several")
    import torch  # settings are read without it

    device = torch.device(name)
    if device.type == "cpu":
        return
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) < num_gpus:
        return
    there = f"{num_gpus} GPUs, numbered from 0" if num_gpus else "no GPU that this PyTorch can use"
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU alone"
    found = "" if num_gpus else ", which finds no CUDA device"
    raise ConfigError(
        f"{setting} = {name}: here is {there} (PyTorch {torch.__version__}, built for {built}{found}; `nvidia-smi` "
        f"shows what the driver has): set {setting} = {'cuda' if num_gpus else 'cpu'}, or run on another machine"
    )
