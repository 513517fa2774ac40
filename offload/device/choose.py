"""The device that `--device` names."""

from __future__ import annotations

import torch

from cache.errors import DeviceError
from offload.device.base import CpuDevice, Device
from offload.device.cuda import CudaDevice
from offload.device.emulated import EmulatedDevice, link_rate


def make_device(device: str = "auto", link: str | float | None = None) -> Device:
    """The device called `device`: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", "emulated".

    `link` is the emulated link's speed, such as "3GB/s"; by default 3 GB/s or what this machine can emulate.
    Raises DeviceError for a device this machine lacks, and for a link faster than can be emulated honestly.
    """
    kind, _, index = device_kind(device).partition(":")
    if link is not None and kind != "emulated":
        raise DeviceError(f"--link states the speed of the emulated accelerator's link: it has no meaning on {kind}")
    if kind == "cpu" and not index:
        return CpuDevice()
    if kind == "emulated" and not index:
        return EmulatedDevice(link_rate(link))
    if kind == "cuda" and (not index or index.isdecimal()):
        if not torch.cuda.is_available():
            raise DeviceError(
                "--device cuda: no CUDA GPU is usable here: use --device cpu, or install a CUDA build of torch"
            )
        if int(index or 0) >= torch.cuda.device_count():
            raise DeviceError(
                f"--device {device}: this machine has {torch.cuda.device_count()} CUDA GPUs, numbered from 0"
            )
        return CudaDevice(int(index or 0))
    raise DeviceError(f'device "{device}" is not one of auto, cpu, cuda, cuda:N, emulated')


def device_kind(device: str) -> str:
    """`device` as named, or what "auto" means on this machine."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"
