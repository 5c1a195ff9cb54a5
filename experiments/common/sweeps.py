"""Grids of test cases: the whole product, or a sample that meets every value of every axis."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Grid:
    """Product of named axes, without the combinations that ``keep`` turns down.

    Parameters
    ----------
    axes : dict of str to sequence
        Values of each keyword of a case.
    keep : callable, optional
        Called with the keywords of a case; true if the case makes sense.
    """

    def __init__(
        self, axes: dict[str, Sequence[Any]], keep: Callable[..., bool] = lambda **case: True
    ) -> None:
        self.axes = axes
        self.keep = keep

    def all(self) -> list[dict[str, Any]]:
        """Return every case."""
        cases = (
            dict(zip(self.axes, point, strict=True))
            for point in itertools.product(*self.axes.values())
        )
        return [case for case in cases if self.keep(**case)]

    def sample(self, count: int, seed: int = 0) -> list[dict[str, Any]]:
        """Return ``count`` different cases in which the values of an axis take turns."""
        draw = random.Random(seed)
        turns = {name: _take_turns(values, draw) for name, values in self.axes.items()}
        cases: list[dict[str, Any]] = []
        for _ in range(1000 * count):
            if len(cases) == count:
                break
            case = {name: next(turn) for name, turn in turns.items()}
            if case not in cases and self.keep(**case):
                cases.append(case)
        return cases


def _take_turns(values: Sequence[Any], draw: random.Random) -> Iterator[Any]:
    """Yield all values in random order, again and again."""
    while True:
        yield from draw.sample(values, len(values))


def case_id(case: dict[str, Any]) -> str:
    """Return the name of a case in a report."""
    return "-".join(f"{name}={_text(value)}" for name, value in case.items())


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return case_id(value)
    if isinstance(value, (list, tuple)):
        return "x".join(map(str, value))
    return str(value).removeprefix("torch.")


def parametrize(cases: Sequence[dict[str, Any]]) -> pytest.MarkDecorator:
    """Parametrise a test over ``case``."""
    return pytest.mark.parametrize("case", cases, ids=case_id)


def pick_sweep(metafunc: pytest.Metafunc) -> None:
    """Parametrise a test marked ``extensive`` or ``large`` over its sample or its full grid.

    The marker carries both: ``@pytest.mark.extensive(full=grid.all, sample=grid.sample(40))``.
    """
    for name in ("extensive", "large"):
        marker = metafunc.definition.get_closest_marker(name)
        if marker is not None and "sample" in marker.kwargs:
            full = metafunc.config.getoption("--full-sweeps", default=False)
            cases = marker.kwargs["full"]() if full else marker.kwargs["sample"]
            metafunc.parametrize("case", cases, ids=case_id)
