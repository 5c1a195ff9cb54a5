"""What tests and experiments share: the device that they run on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent / "experiments"))

from common.devices import DEVICE_HELP, DeviceUnavailableError, resolve_device


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("select_attn_ops").addoption("--device", default="cpu", help=DEVICE_HELP)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Device under test; skips with the reason where this machine does not have it."""
    try:
        return resolve_device(request.config.getoption("--device"))
    except DeviceUnavailableError as error:
        pytest.skip(str(error))
