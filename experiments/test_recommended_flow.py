"""The example of the recommended use runs, and its own checks pass."""

from __future__ import annotations

import torch
from recommended_flow import UPDATE_EVERY, run


def test_recommended_flow(device: torch.device) -> None:
    run(device, steps=UPDATE_EVERY + 3)
