"""NumPy arrays and torch tensors as the native half takes them: one view of their memory, shape and strides.

Nothing is copied, but for arrays with negative strides and numbers in foreign byte order. torch is never imported
here: a tensor brings it along.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

#: What the native half is handed: memory in one piece, element type, shape and strides of four dimensions.
Operand = tuple[np.ndarray, str, tuple[int, int, int, int], tuple[int, int, int, int]]

_TENSOR_TYPES: dict[Any, str] = {}
_NUMPY_TYPES = {np.dtype(np.float32): "float32", np.dtype(np.float16): "float16"}
_FOUR = "expected a NumPy array or a torch tensor"


def is_tensor(array: Any) -> bool:
    """Whether `array` is a torch tensor."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def type_name(name: str, array: Any) -> str:
    """The element type of `array`: `float32`, `float16` or `bfloat16`."""
    if is_tensor(array):
        torch = sys.modules["torch"]
        found = _TENSOR_TYPES.get(array.dtype)
        if found is None:
            found = _TENSOR_TYPES[array.dtype] = str(array.dtype).removeprefix("torch.")
        if array.device.type != "cpu":
            raise ValueError(f"{name} is on {array.device}; expected a tensor on the CPU: move it with .cpu()")
        if array.layout is not torch.strided:
            raise TypeError(f"{name} has layout {array.layout}; expected a dense tensor")
    elif isinstance(array, np.ndarray):
        # ml_dtypes calls its own type so.
        found = "bfloat16" if array.dtype.name == "bfloat16" else _NUMPY_TYPES.get(array.dtype, array.dtype.name)
    else:
        raise TypeError(f"{name} is a {type(array).__name__}; {_FOUR}")
    if found not in ("float32", "float16", "bfloat16"):
        raise TypeError(f"{name} has numbers of type {found}; expected float32, float16 or bfloat16")
    return found


def operand(name: str, array: Any, found: str, dimensions: int = 4) -> Operand:
    """`array`, whose element type is `found`, for the native half, of `dimensions` dimensions (a missing batch counts as
    one)."""
    if array.ndim != dimensions:
        wanted = "[batch, heads, tokens, width]" if dimensions == 4 else "[heads, tokens, width]"
        raise ValueError(f"{name} has {array.ndim} dimensions, {tuple(array.shape)}; expected {dimensions}: {wanted}")
    if is_tensor(array):
        return _tensor_operand(array, found, dimensions)
    return _numpy_operand(name, array, found, dimensions)


def _tensor_operand(tensor: Any, found: str, dimensions: int) -> Operand:
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    shape, strides = tuple(tensor.shape), tensor.stride()
    # A short call spends a third of its time here: what lies in order already is not viewed anew.
    flat = tensor
    if not tensor.is_contiguous():
        flat = tensor.as_strided((_span(shape, strides),), (1,), tensor.storage_offset())
    return _tensor_memory(flat, found), found, *_four(shape, strides, dimensions)


def _tensor_memory(tensor: Any, found: str) -> np.ndarray:
    """The numbers of a dense `tensor`, float32 or their bits, without a copy."""
    return tensor.numpy() if found == "float32" else tensor.view(sys.modules["torch"].int16).numpy().view(np.uint16)


def _numpy_operand(name: str, array: np.ndarray, found: str, dimensions: int) -> Operand:
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array; expected a plain one (padding is told by key_lengths)")
    odd = any(stride < 0 or stride % array.itemsize for stride in array.strides) or not array.flags.aligned
    if odd or not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="), order="C", copy=True)
    strides = tuple(stride // array.itemsize for stride in array.strides)
    span = _span(array.shape, strides)
    flat = np.lib.stride_tricks.as_strided(array, (span,), (array.itemsize,), writeable=False)
    # A subclass would come with its own ideas of shape.
    flat = flat.view(np.ndarray)
    if found != "float32":
        flat = flat.view(np.uint16)
    return flat, found, *_four(array.shape, strides, dimensions)


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Numbers from the first to the last."""
    if 0 in shape:
        return 0
    last = 0
    for size, stride in zip(shape, strides):
        last += (size - 1) * stride
    return 1 + last


def _four(shape: tuple[int, ...], strides: tuple[int, ...], dimensions: int) -> tuple[Any, Any]:
    if dimensions == 4:
        return shape, strides
    return ((1,) * (4 - dimensions) + tuple(shape), (0,) * (4 - dimensions) + tuple(strides))


def empty_like(array: Any, found: str, shape: tuple[int, ...]) -> tuple[Any, tuple[np.ndarray, str]]:
    """A new contiguous array of `shape` in the library and element type (`found`) of `array`, and its memory as the native
    half writes it."""
    if is_tensor(array):
        result = sys.modules["torch"].empty(shape, dtype=array.dtype)
        memory = _tensor_memory(result, found)
    else:
        result = np.empty(shape, dtype=array.dtype.newbyteorder("="))
        memory = result if found == "float32" else result.view(np.uint16)
    return result, (memory, found)


def transpose(array: Any, first: int, second: int) -> Any:
    """`array` with two dimensions swapped, as a view."""
    return array.transpose(first, second) if is_tensor(array) else np.swapaxes(array, first, second)
