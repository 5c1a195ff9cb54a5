"""The device an experiment runs on: ``--device``, alike in scripts and under pytest."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable

import torch

DEVICE_HELP = "where the operators run: cpu (default), cuda, cuda:1, npu, ..."


class DeviceUnavailableError(RuntimeError):
    """The device that was asked for is not on this machine."""


def resolve_device(name: str) -> torch.device:
    """Return the device called ``name``, or raise `DeviceUnavailableError` with the reason."""
    if name.partition(":")[0] == "npu":
        try:
            importlib.import_module("torch_npu")
        except ImportError as error:
            raise DeviceUnavailableError(
                f"device {name} needs the package torch_npu, which cannot be imported: {error}"
            ) from error
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceUnavailableError(f"torch does not know the device {name}: {error}") from error
    if device.type != "cpu":
        module = getattr(torch, device.type, None)
        if module is None or not module.is_available():
            raise DeviceUnavailableError(f"torch finds no {device.type} device on this machine")
        if (device.index or 0) >= module.device_count():
            raise DeviceUnavailableError(
                f"torch finds {module.device_count()} {device.type} device(s), so no {name}"
            )
    return device


def synchronize(device: torch.device) -> None:
    """Wait for the work queued on ``device``; nothing to do on the CPU."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Time a call, with the work that it queues on ``device``."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def script_parser(description: str) -> argparse.ArgumentParser:
    """Return the argument parser every script starts from."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cpu", help=DEVICE_HELP)
    return parser


def device_or_exit(name: str) -> torch.device:
    """Return the device called ``name``; end the script with the reason where it is absent."""
    try:
        return resolve_device(name)
    except DeviceUnavailableError as error:
        sys.exit(f"error: {error}")
