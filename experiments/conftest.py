"""Options and fixtures of the experiments."""

from __future__ import annotations

from collections.abc import Iterator

import common  # noqa: F401  (makes every experiment's modules importable)
import pytest
import torch
from common.sweeps import pick_sweep


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("select_attn_ops")
    group.addoption(
        "--full-sweeps",
        action="store_true",
        help="run the extensive and large sweeps in full, not a sample of them",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "extensive: the product of many shapes; sampled by default")
    config.addinivalue_line("markers", "large: long requests; sampled by default")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    pick_sweep(metafunc)


@pytest.fixture(autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """Run the references, whose tensors are small, without a team that spins between them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Turn what a device backend says it does not have into a skip; the CPU has no limits."""
    try:
        return (yield)
    except NotImplementedError as error:
        name = item.config.getoption("--device")
        if name == "cpu":
            raise
        pytest.skip(f"{name}: {error}")
