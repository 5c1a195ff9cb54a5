"""What the tests share: the experiments' oracles, Hypothesis profiles, the runtime's state."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from select_attn_ops import runtime

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))

import common  # noqa: F401  (makes every experiment's modules importable)

_COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}
settings.register_profile("default", max_examples=300, derandomize=True, database=None, **_COMMON)
settings.register_profile("full", max_examples=10_000, **_COMMON)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _same_runtime() -> Iterator[None]:
    """Leave threads and SIMD target as they were."""
    threads, target = runtime.get_num_threads(), runtime.simd_target()
    yield
    runtime.set_num_threads(threads)
    if runtime.simd_target() != target:
        runtime.set_simd_target(target)
