"""Operands of an operator as one value that can be copied, moved and checked as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch

from .layouts import clone_with_storage, whole_storage

Self = TypeVar("Self", bound="Operands")


class Operands:
    """Base of the dataclasses that the generators return."""

    def map(self: Self, function: Callable[[torch.Tensor], Any]) -> Self:
        """Return a copy with ``function`` applied to every tensor."""
        changed = {
            field.name: function(value)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return replace(self, **changed)

    def tensors(self) -> list[torch.Tensor]:
        """Return every tensor."""
        values = (getattr(self, field.name) for field in fields(self))
        return [value for value in values if isinstance(value, torch.Tensor)]

    def snapshot(self: Self) -> Self:
        """Return a copy that shares nothing and keeps every stride."""
        return self.map(clone_with_storage)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Check that the block changes no byte of any tensor's storage."""
        before = [whole_storage(tensor).clone() for tensor in self.tensors()]
        yield
        for tensor, old in zip(self.tensors(), before, strict=True):
            new = whole_storage(tensor)
            assert torch.equal(new.view(torch.uint8), old.view(torch.uint8)), (
                f"an input of shape {list(tensor.shape)} was written"
            )
