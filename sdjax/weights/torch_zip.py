"""Reading PyTorch's own files (`.ckpt`, `.pt`, `.bin`) without PyTorch and without running what they say.

Such a file is a zip of a pickle, which describes the tensors, and of their bytes. A pickle is a program, and unpickled
as usual it may call anything. Here a small interpreter carries out only the operations that describe containers,
numbers, text and tensors: it looks up no name and calls nothing. What else a pickle makes (trainers left callbacks,
settings and numpy's numbers in it) is noted as `_Made` and passed over, but where it stands for a tensor or the state
dict: there it is refused by name. The bytes lie in the zip as they are, so a tensor is found by its place in the file,
as in a safetensors file.
"""

import math
import pickletools
import zipfile
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np

from sdjax.weights.safetensors import CheckpointError, Entry, check_key

SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
ALLOWED_BY = "--allow-ckpt, or allow_ckpt in a training configuration"  # what users set, for errors
MAX_PICKLE_BYTES = 16_000_000  # of a description, whose objects take up to 100 times that; Stable Diffusion's has one
_MAX_AXES = 64  # that numpy has
_MAX_DEPTH = 20  # of dicts within dicts
_MAX_NOTE_BYTES = 64  # of what takes a word, such as the order of bytes

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
_NOT_CALLED = "could run code and is not called; only plain tensors and dicts of them are read"
_PARAMETERS = "torch.nn.modules.container ParameterDict"  # of A1111's textual inversions
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


class _Name(NamedTuple):
    """A name that the pickle mentions; it stands for nothing but itself."""

    text: str


class _Storage(NamedTuple):
    """The bytes of one or more tensors; without a dtype where its type is none that is read."""

    key: str
    dtype: np.dtype | None


class _Tensor(NamedTuple):
    """Elements of a storage from `offset`, in an order given by strides."""

    storage: str
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Made:
    """What a call that is not carried out would make, and what it was given; it is compared by identity."""

    def __init__(self, name: str, *given: Any) -> None:
        self.name, self.given = name.replace(" ", "."), list(given)

    @property
    def parameters(self) -> Any:
        """The parameters of a ParameterDict."""
        states = [state for state in self.given if isinstance(state, dict) and "_parameters" in state]
        return states[-1]["_parameters"] if states and self.name == _PARAMETERS.replace(" ", ".") else self


_KEYS = (str, int, float, bool, type(None), _Name, _Made)  # tuples within tuples take forever to hash


def read_header(file: IO[bytes], name: str) -> dict[str, Entry]:
    """The tensors of the state dict in a file that torch.save wrote; `name` is what errors call it.

    The state dict is what lies under `state_dict`, else the whole; a dict inside of it adds its key and a dot.

    Raises:
        CheckpointError: the file is no such zip, is damaged, or its state dict is of more than tensors.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = {info.filename: info for info in archive.infolist()}
            pickles = [info for filename, info in members.items() if filename.endswith("data.pkl")]
            if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE_BYTES:
                raise CheckpointError("it holds no data.pkl of a readable size")
            root = pickles[0].filename.removesuffix("data.pkl")
            order = members.get(f"{root}byteorder")
            if order is not None and (order.file_size > _MAX_NOTE_BYTES or archive.read(order) != b"little"):
                raise CheckpointError("its numbers are not little-endian, which is not supported")
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
    """What a pickle describes: containers, numbers, text, `_Tensor`s; `_Name`s and `_Made`s stand for the rest."""
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
                stack.append(_CONSTANTS[operation.name])
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
                (stack[-1].given if isinstance(stack[-1], _Made) else stack[-1]).extend(items)
            case "SETITEM" | "SETITEMS":
                items = pop_to_mark() if operation.name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                _put(stack[-1], items)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_Name(str(argument)))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE" | "NEWOBJ":
                arguments = stack.pop()
                stack.append(_made(stack.pop(), arguments))
            case "BUILD":
                state = stack.pop()
                # The attributes of a state dict say nothing of its tensors.
                if isinstance(stack[-1], _Made):
                    stack[-1].given.append(state)
            case other:
                raise CheckpointError(f"its pickle uses {other}, which torch.save does not write for tensors")
    raise CheckpointError("its pickle has no end")


def _put(target: Any, items: list[Any]) -> None:
    """Give a dict its items, keys and values in turn."""
    if isinstance(target, _Made):
        target.given.extend(items)
        return
    for key in items[::2]:
        if type(key) not in _KEYS:
            raise CheckpointError(f"its pickle has a {type(key).__name__} as the key of a dict, which is not supported")
    target.update(zip(items[::2], items[1::2], strict=True))


def _storage(described: Any) -> _Storage:
    match described:
        case ("storage", _Name(text), str() as key, _, _):
            return _Storage(key, _STORAGES.get(text))
    raise CheckpointError("its pickle refers to something that is no storage")


def _made(name: Any, arguments: Any) -> Any:
    """What a call that the pickle asks for would make."""
    match name, arguments:
        case _Name(text), () if text == _DICT:
            return {}
        case _Name(text), (_Tensor() as tensor, *_) if text == _PARAMETER:
            return tensor
        case _Name(text), (
            _Storage(key, np.dtype() as dtype),
            int() as offset,
            tuple() as shape,
            tuple() as strides,
            *_,
        ):
            numbers = all(isinstance(n, int) for n in (*shape, *strides))
            if text == _TENSOR and numbers and len(shape) == len(strides) <= _MAX_AXES:
                return _Tensor(key, dtype, offset, shape, strides)
    if not isinstance(name, _Name):
        raise CheckpointError("its pickle calls something that is no name")
    return _Made(name.text, arguments)


def _tensors(described: Any) -> dict[str, _Tensor]:
    found: dict[str, _Tensor] = {}
    seen: set[int] = set()  # a pickle may name one thing over and over

    def walk(value: dict[Any, Any], prefix: str, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise CheckpointError(f"its state dict has more than {_MAX_DEPTH} dicts within one another")
        seen.add(id(value))
        for key, item in value.items():
            name = check_key(f"{prefix}{key}")
            item = item.parameters if isinstance(item, _Made) else item
            if isinstance(item, _Tensor):
                found[name] = item
            elif isinstance(item, dict) and id(item) not in seen:
                walk(item, f"{name}.", depth + 1)
            elif isinstance(item, _Made) and _holds_tensors(item, seen):
                raise CheckpointError(f"its {name} is made by {item.name}, which {_NOT_CALLED}")

    inner = described.get("state_dict") if isinstance(described, dict) else None
    described = inner if isinstance(inner, dict | _Made) else described
    if isinstance(described, _Made):
        raise CheckpointError(f"its state dict is made by {described.name}, which {_NOT_CALLED}")
    if not isinstance(described, dict):
        raise CheckpointError("it holds no state dict")
    walk(described, "", 1)
    return found


def _holds_tensors(made: _Made, seen: set[int]) -> bool:
    """Whether tensors are among what a call was given."""
    rest: list[Any] = [made]
    while rest:
        value = rest.pop()
        if isinstance(value, _Tensor | _Storage):
            return True
        if isinstance(value, _Made | dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            rest += value.given if isinstance(value, _Made) else value.values() if isinstance(value, dict) else value
    return False


def _entry(file: IO[bytes], members: dict[str, zipfile.ZipInfo], root: str, key: str, tensor: _Tensor) -> Entry:
    """Where a tensor's bytes lie in the file."""
    info = members.get(f"{root}data/{tensor.storage}")
    if info is None or info.compress_type != zipfile.ZIP_STORED:
        raise CheckpointError(f"the bytes of {key} are missing or compressed")
    shape, itemsize = tensor.shape, tensor.dtype.itemsize
    # The axes as they lie, the outermost first; where a tensor has but one element along an axis, its stride is void.
    axes = sorted(range(len(shape)), key=lambda axis: (shape[axis] != 1, -tensor.strides[axis]))
    steps = [math.prod(shape[axis] for axis in axes[i + 1 :]) for i in range(len(axes))]
    wrong = [axis for axis, step in zip(axes, steps, strict=True) if shape[axis] != 1 and tensor.strides[axis] != step]
    if wrong and math.prod(shape):
        raise CheckpointError(f"{key} has gaps or repeats between its numbers, which is not supported")
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
    return Entry(tensor.dtype, shape, base + start, base + end, tuple(axes))
