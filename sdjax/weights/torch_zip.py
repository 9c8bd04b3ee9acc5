"""Reading PyTorch's own files (`.ckpt`, `.pt`) without PyTorch and without running what they say.

Such a file is a zip of a pickle, which describes the tensors, and of their bytes. A pickle is a program, and unpickled
as usual it may call anything. Here a small interpreter carries out only the operations that describe containers,
numbers, text and tensors: it looks up no name, and what it does not know it refuses by name. The bytes lie in the zip
as they are, so a tensor is found by its place in the file, as in a safetensors file.
"""

import math
import pickletools
import zipfile
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np

from sdjax.weights.safetensors import CheckpointError, Entry

SUFFIXES = (".ckpt", ".pt", ".pth")
MAX_PICKLE_BYTES = 64_000_000  # of a description; Stable Diffusion's takes less than one

_STORAGES = {
    "torch DoubleStorage": np.dtype(np.float64),
    "torch FloatStorage": np.dtype(np.float32),
    "torch HalfStorage": np.dtype(np.float16),
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch LongStorage": np.dtype(np.int64),
    "torch IntStorage": np.dtype(np.int32),
    "torch ShortStorage": np.dtype(np.int16),
    "torch CharStorage": np.dtype(np.int8),
    "torch ByteStorage": np.dtype(np.uint8),
    "torch BoolStorage": np.dtype(np.bool_),
}
_DICT, _TENSOR, _PARAMETER = (
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
)
# The last is the key of what its trainer noted in Stable Diffusion 1's files; it is never called.
_NAMES = {_DICT, _TENSOR, _PARAMETER, *_STORAGES, "pytorch_lightning.callbacks.model_checkpoint ModelCheckpoint"}


class _Name(NamedTuple):
    """A name that the pickle mentions; it stands for nothing but itself."""

    text: str


class _Tensor(NamedTuple):
    """Elements of a storage from `offset`, in an order given by strides."""

    storage: str
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_header(file: IO[bytes], name: str) -> dict[str, Entry]:
    """The tensors of the state dict in a file that torch.save wrote; `name` is what errors call it.

    The state dict is what lies under `state_dict`, else the whole; a dict inside of it adds its key and a dot.

    Raises:
        CheckpointError: the file is no such zip, is damaged, or its pickle does more than describe tensors.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = {info.filename: info for info in archive.infolist()}
            pickles = [info for filename, info in members.items() if filename.endswith("data.pkl")]
            if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE_BYTES:
                raise CheckpointError("it holds no data.pkl of a readable size")
            root = pickles[0].filename.removesuffix("data.pkl")
            order = members.get(f"{root}byteorder")
            if order is not None and archive.read(order) != b"little":
                raise CheckpointError("its numbers are big-endian, which is not supported")
            tensors = _tensors(_described(archive.read(pickles[0])))
            return {key: _entry(file, members, root, key, tensor) for key, tensor in tensors.items()}
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from None
    except zipfile.BadZipFile:
        raise CheckpointError(f"{name} is no zip of torch.save (torch 1.6 or later), or is cut short") from None
    # Nonsense may fail anywhere, in the zip's directory or on the interpreter's stack.
    except Exception as error:
        raise CheckpointError(f"{name} cannot be read: {type(error).__name__}") from None


def _described(data: bytes) -> Any:
    """What a pickle describes: containers, numbers, text, `_Tensor`s and `_Name`s."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}

    def pop_to_mark() -> list[Any]:
        mark = marks.pop()
        items = stack[mark:]
        del stack[mark:]
        return items

    for operation, argument, _ in pickletools.genops(data):
        match operation.name:
            case "PROTO":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                marks.append(len(stack))
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[operation.name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINSTRING":
                stack.append(argument)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(operation.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "TUPLE":
                stack.append(tuple(pop_to_mark()))
            case "APPEND" | "APPENDS":
                items = pop_to_mark() if operation.name == "APPENDS" else [stack.pop()]
                stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                items = pop_to_mark() if operation.name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL" if argument in _NAMES:
                stack.append(_Name(argument))
            case "GLOBAL":
                what = str(argument).replace(" ", ".")
                raise CheckpointError(f"its pickle names {what}, which could run code; only tensors are read")
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                arguments = stack.pop()
                stack.append(_made(stack.pop(), arguments))
            case "BUILD":
                stack.pop()  # attributes of a state dict, which say nothing of its tensors
            case other:
                raise CheckpointError(f"its pickle uses {other}, which torch.save does not write for tensors")
    raise CheckpointError("its pickle has no end")


def _storage(described: Any) -> tuple[str, np.dtype]:
    match described:
        case ("storage", _Name(text), str() as key, _, _) if text in _STORAGES:
            return key, _STORAGES[text]
    raise CheckpointError("its pickle refers to something that is no storage")


def _made(name: Any, arguments: Any) -> Any:
    """What a call that the pickle asks for would make."""
    match name, arguments:
        case _Name(text), () if text == _DICT:
            return {}
        case _Name(text), (_Tensor() as tensor, *_) if text == _PARAMETER:
            return tensor
        case _Name(text), (
            (str() as key, np.dtype() as dtype),
            int() as offset,
            tuple() as shape,
            tuple() as strides,
            *_,
        ):
            if text == _TENSOR and all(isinstance(n, int) for n in (*shape, *strides)) and len(shape) == len(strides):
                return _Tensor(key, dtype, offset, shape, strides)
    raise CheckpointError("its pickle asks for a call that describes no tensor")


def _tensors(described: Any) -> dict[str, _Tensor]:
    found: dict[str, _Tensor] = {}
    seen: set[int] = set()  # a pickle may name one dict over and over

    def walk(value: dict[Any, Any], prefix: str) -> None:
        seen.add(id(value))
        for key, item in value.items():
            if isinstance(item, _Tensor):
                found[f"{prefix}{key}"] = item
            elif isinstance(item, dict) and id(item) not in seen:
                walk(item, f"{prefix}{key}.")

    if not isinstance(described, dict):
        raise CheckpointError("it holds no state dict")
    inner = described.get("state_dict")
    walk(inner if isinstance(inner, dict) else described, "")
    return found


def _entry(file: IO[bytes], members: dict[str, zipfile.ZipInfo], root: str, key: str, tensor: _Tensor) -> Entry:
    """Where a tensor's bytes lie in the file."""
    info = members.get(f"{root}data/{tensor.storage}")
    if info is None or info.compress_type != zipfile.ZIP_STORED:
        raise CheckpointError(f"the bytes of {key} are missing or compressed")
    shape, itemsize = tensor.shape, tensor.dtype.itemsize
    steps = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    if any(size != 1 and stride != step for size, stride, step in zip(shape, tensor.strides, steps, strict=True)):
        raise CheckpointError(f"{key} is not contiguous, which is not supported")
    start, end = tensor.offset * itemsize, (tensor.offset + math.prod(shape)) * itemsize
    if start < 0 or min(shape, default=0) < 0 or end > info.file_size:
        raise CheckpointError(f"{key} lies outside of its {info.file_size:,} bytes")
    file.seek(info.header_offset)
    local = file.read(30)
    if len(local) < 30 or local[:4] != b"PK\x03\x04":
        raise CheckpointError(f"the bytes of {key} are missing")
    # A local header has a name and padding of its own lengths.
    base = info.header_offset + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    if base + end > file.seek(0, 2):
        raise CheckpointError(f"the bytes of {key} are missing")
    return Entry(tensor.dtype, shape, base + start, base + end)
