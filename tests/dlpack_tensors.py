"""Tensors of no framework: what speaks DLPack and nothing else, and what claims to be elsewhere."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import torch

CPU, CUDA, CUDA_HOST, METAL, EXT_DEV = 1, 2, 3, 8, 12


class ForeignTensor:
    """A tensor that can be exported by DLPack and has neither torch's nor NumPy's interface."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.shape = tuple(tensor.shape)

    def __dlpack__(self, **options: Any) -> Any:
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return CPU, 0


class NamespacedTensor(ForeignTensor):
    """A `ForeignTensor` of an array library, which can make others of its kind."""

    device = "cpu"

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        return SimpleNamespace(
            int32=torch.int32,
            uint8=torch.uint8,
            empty=_new(torch.empty),
            zeros=_new(torch.zeros),
            from_dlpack=lambda tensor: NamespacedTensor(torch.from_dlpack(tensor)),
        )


def _new(function: Any) -> Any:
    return lambda shape, dtype, device: NamespacedTensor(function(shape, dtype=dtype))


class _Device(ctypes.Structure):
    _fields_ = (("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _ManagedTensor(ctypes.Structure):
    _fields_ = (
        ("dl_tensor", _Tensor),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)

_INT, _UINT, _FLOAT, _BFLOAT = 0, 1, 2, 4
_CODES = {
    torch.int32: _INT,
    torch.int64: _INT,
    torch.uint8: _UINT,
    torch.float16: _FLOAT,
    torch.float32: _FLOAT,
    torch.float64: _FLOAT,
    torch.bfloat16: _BFLOAT,
}


class RawTensor:
    """A torch tensor's memory under any DLPack description.

    Parameters
    ----------
    tensor : torch.Tensor
        On the CPU, kept alive.
    device : tuple of int
        What DLPack is told: device type and number.
    data_shift, byte_offset : int
        Bytes added to the address, and those that a consumer must add.
    no_strides : bool
        Leave the strides out, which says row-major.
    lanes : int
        Vector lanes of the element type.
    """

    def __init__(
        self,
        tensor: torch.Tensor,
        device: tuple[int, int] = (CPU, 0),
        *,
        data_shift: int = 0,
        byte_offset: int = 0,
        no_strides: bool = False,
        lanes: int = 1,
    ) -> None:
        self.tensor = tensor
        self.shape = tuple(tensor.shape)
        self.device = device
        rank = tensor.dim()
        self._shape = (ctypes.c_int64 * rank)(*tensor.shape)
        self._strides = (ctypes.c_int64 * rank)(*tensor.stride())
        self._managed = _ManagedTensor()
        raw = self._managed.dl_tensor
        raw.data = tensor.data_ptr() + data_shift
        raw.device = _Device(*device)
        raw.ndim = rank
        raw.dtype = _DataType(_CODES[tensor.dtype], 8 * tensor.element_size(), lanes)
        raw.shape = self._shape
        if not no_strides:
            raw.strides = self._strides
        raw.byte_offset = byte_offset

    def __dlpack__(self, **_: Any) -> Any:
        # Without a deleter the memory stays this object's, which outlives the call.
        return _new_capsule(ctypes.addressof(self._managed), b"dltensor", None)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device
