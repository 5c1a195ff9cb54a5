"""The native library, and how tensors get into and out of it."""

from __future__ import annotations

import contextlib
import ctypes
import operator
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tvm_ffi

torch: Any
try:
    import torch
except (ImportError, OSError):  # absent, or unable to load its own libraries
    torch = None
_increment_version: Any = None if torch is None else torch.autograd.graph.increment_version

# tvm-ffi knows ValueError and TypeError; any kind it does not know becomes a RuntimeError.
tvm_ffi.register_error("NotImplementedError", NotImplementedError)


def _find_library(name: str) -> Path:
    # More than one folder only where the package is installed in editable mode.
    folders = [Path(folder) / "lib" for folder in sys.modules[__package__].__path__]
    for folder in folders:
        if (folder / name).exists():
            return folder / name
    raise ImportError(f"{name} is in none of {', '.join(map(str, folders))}: is it installed?")


_path = str(_find_library("libselect_attn_ops_ffi.so"))
LIB: Any = tvm_ffi.load_module(_path)
TEXTS = ctypes.CDLL(_path)  # the functions of the same library that return texts


class _Exportable:
    """A read-only NumPy array described as a writable one, which NumPy agrees to export.

    DLPack before 1.0, which tvm-ffi asks for, cannot say that a tensor is read-only.
    """

    def __init__(self, array: Any) -> None:
        address, _ = array.__array_interface__["data"]
        self.__array_interface__ = array.__array_interface__ | {"data": (address, False)}
        self._array = array  # the memory's owner


def is_numpy(tensor: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(tensor, numpy.ndarray)


def is_torch(tensor: Any) -> bool:
    return torch is not None and isinstance(tensor, torch.Tensor)


def check_tensor(name: str, tensor: Any) -> None:
    if not hasattr(tensor, "__dlpack__"):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")


def dtype_name(dtype: Any) -> str:
    """A framework's dtype as messages spell it."""
    return str(dtype).rsplit(".", 1)[-1]


def extents(name: str, tensor: Any) -> tuple[int, ...]:
    """Shape of a tensor that a new output is to be made from."""
    if not is_torch(tensor):
        check_tensor(name, tensor)
        if not hasattr(tensor, "shape"):
            raise TypeError(f"{name} of type {type(tensor).__name__} has no shape: pass the output")
    return tuple(tensor.shape)


def argument(name: str, tensor: Any, *, written: bool = False) -> Any:
    """A tensor argument as the library takes it, or an error that names it."""
    check_tensor(name, tensor)
    if is_torch(tensor):
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}")
        if tensor.is_quantized:
            raise TypeError(f"{name} must be of an unquantized type, got {tensor.dtype}")
        if written and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} is written and must not require grad")
        if tensor.is_neg():
            raise ValueError(
                f"{name} must hold its values, got a view that torch negates lazily: "
                "call resolve_neg()"
            )
    if is_numpy(tensor):
        dtype = tensor.dtype
        if dtype.kind not in "iuf" or dtype.itemsize > 8 or not dtype.isnative:
            raise TypeError(f"{name} must be of a native integer or float type, got {dtype}")
        if not tensor.flags.writeable:
            if written:
                raise ValueError(f"{name} is written and must not be read-only")
            return sys.modules["numpy"].asarray(_Exportable(tensor))
    return tensor


def optional_argument(name: str, tensor: Any, *, written: bool = False) -> Any:
    """As `argument`, for one that may be None."""
    return None if tensor is None else argument(name, tensor, written=written)


def integer(name: str, value: Any) -> int:
    try:
        # torch.compile traces ints as symbols, which an index would turn into constants.
        number = value if isinstance(value, int) else operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{name} must be a 64-bit integer, got {number}")
    return number


def optional_number(name: str, value: Any) -> float | None:
    """A number as a float, or None for a default."""
    if value is None:
        return None
    if not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be a 64-bit float, got {value}") from None


def mark_written(*tensors: Any) -> None:
    """Tell torch's autograd that the library has changed tensors behind its back."""
    mark_torch_written(filter(is_torch, tensors))


def mark_torch_written(tensors: Iterable[Any]) -> None:
    """As `mark_written`, for torch tensors."""
    for tensor in tensors:
        if not tensor.is_inference():
            _increment_version(tensor)


def is_on_cpu(tensor: Any) -> bool:
    if is_torch(tensor):
        return bool(tensor.device.type == "cpu")
    return is_numpy(tensor) or int(tensor.__dlpack_device__()[0]) == 1


def allocating_for(tensor: Any, stream: int | None) -> contextlib.AbstractContextManager[Any]:
    """Where memory must be allocated that a call on `stream`, with `tensor`, is to use.

    torch's allocator gives memory that was freed to whoever works on the same stream next: what
    belonged to the current one must not be in use on another.
    """
    if stream is None or not is_torch(tensor) or tensor.device.type != "cuda":
        return contextlib.nullcontext()
    external = torch.cuda.ExternalStream(integer("stream", stream), device=tensor.device)
    return torch.cuda.stream(external)  # type: ignore[no-any-return]


def new_int32(shape: tuple[int, ...], like: Any) -> Any:
    """An int32 tensor to be written, on the device of `like`; see `in_kind_of`."""
    return _new(shape, like, "int32")


def new_like(shape: tuple[int, ...], like: Any) -> Any:
    """A tensor to be written, of the type and on the device of `like`; see `in_kind_of`."""
    return _new(shape, like, None)


def _new(shape: tuple[int, ...], like: Any, dtype: str | None) -> Any:
    if is_torch(like):
        # Dense, and fake where `like` is: a wrong layout is for `argument` to report.
        torch_dtype = like.dtype if dtype is None else getattr(torch, dtype)
        if type(like) is torch.Tensor and shape:
            # Unpacked, because torch takes longer over a tuple.
            return torch.empty(*shape, dtype=torch_dtype, device=like.device)
        return like.new_empty(shape, dtype=torch_dtype, requires_grad=False)
    if is_numpy(like):
        return sys.modules["numpy"].empty(shape, dtype=dtype or like.dtype)
    namespace = namespace_of(like)
    if is_on_cpu(like):
        import numpy

        return numpy.empty(shape, dtype=dtype or _numpy_dtype(like))
    namespace_dtype = like.dtype if dtype is None else getattr(namespace, dtype)
    return namespace.empty(shape, dtype=namespace_dtype, device=like.device)


def _numpy_dtype(tensor: Any) -> Any:
    import numpy

    try:
        return numpy.from_dlpack(tensor).dtype
    except (BufferError, RuntimeError, TypeError):
        raise TypeError(
            f"no tensor like a {type(tensor).__name__} can be made (NumPy cannot take its type): "
            "pass the output"
        ) from None


def in_kind_of(like: Any, tensor: Any) -> Any:
    """What `new_int32` or `new_like` made for `like`, once written, as one of its framework."""
    if is_torch(like) or is_numpy(like) or not is_numpy(tensor):
        return tensor
    return namespace_of(like).from_dlpack(tensor)


def new_workspace(size: int, like: Any) -> Any:
    """Zero-filled scratch on the device of `like`, or None for no bytes."""
    if size == 0:
        return None
    # From the framework's allocator on its current stream, which graph capture allows.
    if is_torch(like):
        return like.new_zeros(size, dtype=torch.uint8)
    namespace = namespace_of(like)
    return namespace.zeros(size, dtype=namespace.uint8, device=like.device)


def namespace_of(tensor: Any) -> Any:
    """The module with the functions of a tensor that implements the array API."""
    if not hasattr(tensor, "__array_namespace__"):
        raise TypeError(
            f"no tensor like a {type(tensor).__name__} can be made (it has no array namespace): "
            "pass the output"
        )
    return tensor.__array_namespace__()


def stream_handle(tensor: Any, stream: int | None) -> int | None:
    """The stream to run on; None where the library finds the current one by itself."""
    if stream is not None:
        return integer("stream", stream)
    # torch's DLPack exchange reports streams for CUDA only, and the null stream for others.
    if is_torch(tensor) and tensor.device.type == "npu":
        return int(torch.npu.current_stream(tensor.device).npu_stream)
    return None
