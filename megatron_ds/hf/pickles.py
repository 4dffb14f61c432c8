"""Tensors out of pickles, without trusting them: ``pytorch_model.bin``, DeepSpeed's and Megatron's old checkpoints.

A pickle is a program, and what it may do is decided by the names it imports. So before anything is unpickled, its
opcodes are read as data: only those that torch's own files consist of may occur, and only names that build plain
tensors, or that are known to be beside them. The latter become ``_Inert``: nothing of Megatron, DeepSpeed, numpy or
argparse is ever called. Then torch's restricted unpickler loads the file, and refuses other names once more. There is
no other way to load: what this module refuses stays unread. Converting names is the caller's business.
"""

import pickle
import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_ds.errors import CheckpointError


class _Inert:
    """What stands in for every object that is no tensor: takes any arguments and state, and keeps nothing."""

    def __new__(cls, *args: object) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


_STORAGES = ("Float", "Double", "Half", "BFloat16", "Byte", "Char", "Short", "Int", "Long", "Bool")
_DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool,
    torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip
KNOWN = frozenset(
    {
        "__builtin__.set",
        "_codecs.encode",
        "collections.OrderedDict",
        "torch.Size",
        "torch.device",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch.storage.UntypedStorage",
        *(f"torch.{name}Storage" for name in _STORAGES),
        *map(str, _DTYPES),
    }
)
"""Names for tensors and plain values, which torch's restricted unpickler knows, too."""
INERT = frozenset(
    {
        "_io.BytesIO",
        "argparse.Namespace",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
        "megatron.core.enums.ModelType",
        "megatron.core.transformer.enums.AttnBackend",
        "megatron.model.enums.AttnMaskType",
        "megatron.model.enums.LayerType",
        "megatron.model.enums.ModelType",
        "megatron.model.enums.PositionEmbeddingType",
        "numpy._core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "numpy.core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "numpy.dtype",
        "numpy.ndarray",
    }
)
"""Names that stand beside tensors in checkpoints of training runs: arguments, random states, counters."""
_OPCODES = frozenset(
    {
        "PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID",
        "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE",
        "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS",
        "EMPTY_DICT", "SETITEM", "SETITEMS", "BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT",
    }
)  # fmt: skip
"""Opcodes of torch's files; all names are in GLOBAL."""
_WRAPPERS = ("module", "model")
"""Where DeepSpeed and Megatron keep the weights, beside other things."""
_CONVERT = "save its tensors as safetensors where it is trusted, and give that"


def read_pickled_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that ``torch.save`` wrote, by name, on the CPU; memory-mapped.

    Names of nested dictionaries are joined with dots. Of a checkpoint of DeepSpeed or Megatron those of the model are
    returned, without the outermost ``module.`` or ``model.``; what is no tensor, and lists, are left out.

    Raises CheckpointError, before anything is unpickled, when the file imports a name or uses an opcode that is not on
    the lists here, or is not one zip archive with one pickle; also when it is damaged or two tensors have one name.
    """
    path = Path(path)
    _check(path)
    try:
        with torch.serialization.safe_globals([(_Inert, name) for name in sorted(INERT)]):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        named = list(_flat(next((content[key] for key in _WRAPPERS if isinstance(content.get(key), dict)), content)))
    except pickle.UnpicklingError as error:  # torch's message advises to load it without the restriction
        raise CheckpointError(f"{path}: torch's restricted unpickler refuses it; {_CONVERT}") from error
    except (OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, EOFError) as error:
        raise CheckpointError(f"{path}: torch cannot load it as a dictionary ({error!r:.200}); {_CONVERT}") from error
    tensors = dict(named)
    if len(tensors) < len(named):
        raise CheckpointError(f"{path}: two of its tensors have one name; {_CONVERT}")
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors; give the file with the weights")
    return tensors


def _flat(content: dict, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for key, value in content.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value.detach()
        elif isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")


def _check(path: Path) -> None:
    """Raise CheckpointError unless the file is one archive with one pickle of listed names and opcodes."""
    try:
        names, unknown = _imports(_only_pickle(path))
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a file of torch.save from version 1.6 on ({error}); {_CONVERT}") from error
    foreign = sorted(names - KNOWN - INERT)
    if foreign:
        raise CheckpointError(f"{path}: imports {', '.join(foreign)}, which no tensor needs; refused, nothing was run")
    if unknown:
        raise CheckpointError(f"{path}: uses pickle opcode {unknown[0]}, which no tensor needs; refused")


def _only_pickle(path: Path) -> bytes:
    """The pickle of an archive; ValueError when it has another one, or is made so that readers may differ on it."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        if len({name.lower() for name in names}) < len(names):
            raise ValueError("two entries of the archive have one name")
        if len({name.partition("/")[0] for name in names}) != 1:
            raise ValueError("the archive has more than one root")
        pickles = [entry for entry in entries if entry.filename.lower().endswith(".pkl")]
        if [entry.filename.partition("/")[2] for entry in pickles] != ["data.pkl"]:
            raise ValueError("the archive has not one pickle, named data.pkl")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("entries of the archive are compressed")
        return archive.read(pickles[0])


def _imports(program: bytes) -> tuple[set[str], list[str]]:
    """The names that a pickle imports, and its opcodes that are not listed; nothing is executed."""
    names, unknown = set(), []
    for opcode, argument, _ in pickletools.genops(program):
        if opcode.name == "GLOBAL":
            names.add(argument.replace(" ", ".", 1))
        elif opcode.name not in _OPCODES:
            unknown.append(opcode.name)
    return names, unknown
