"""Tensors come out of pickles as torch.load gives them; a gadget in any place and format never runs."""

import argparse
import collections
import enum
import io
import os
import pickle
import random
import struct
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from megatron_ds.errors import CheckpointError
from megatron_ds.hf import pickles
from megatron_ds.hf.pickles import read_pickled_tensors


@pytest.fixture
def touched(tmp_path):
    """A file that every gadget would make; it must not be there afterwards."""
    path = tmp_path / "touched"
    yield path
    assert not path.exists()


class Call:
    """Unpickles as the result of a call."""

    def __init__(self, function, *arguments):
        self.called = function, arguments

    def __reduce__(self):
        return self.called


def tensors():
    return {
        "fp32": torch.arange(12.0).view(3, 4),
        "bf16": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "fp8": torch.tensor([1.5, -2.0]).to(torch.float8_e4m3fn),
        "uint16": torch.tensor([1, 65535], dtype=torch.uint16),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "view": torch.arange(20.0).view(4, 5).t()[1:, ::2],
        "parameter": nn.Parameter(torch.ones(2)),
    }


def saved(path, content, **options):
    torch.save(content, path, **options)
    return path


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and not found[name].requires_grad
        assert torch.equal(found[name].float(), tensor.detach().float()), name


def repacked(path, change):
    """Write the archive again, after ``change`` of the list of its (name, content)."""
    with zipfile.ZipFile(path) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    change(entries)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return path


def program(path, code):
    """An archive of torch's whose pickle is ``code``."""

    def put(entries):
        entries[:] = [(name, code if name.endswith("data.pkl") else content) for name, content in entries]

    return repacked(saved(path, {}), put)


# --- what is read ---------------------------------------------------------------------------------------------------


def test_a_state_dict_comes_back_mapped(tmp_path):
    path = saved(tmp_path / "pytorch_model.bin", collections.OrderedDict(tensors()))
    found = read_pickled_tensors(path)
    assert_same(found, tensors())
    with path.open("r+b") as file:  # the values are in the file, not in memory
        file.seek(path.read_bytes().index(struct.pack("<3f", 0, 1, 2)))
        file.write(struct.pack("<f", 99))
    assert read_pickled_tensors(path)["fp32"][0, 0] == 99


def test_a_module_keeps_shared_storage(tmp_path):
    tied = torch.ones(5, 3)
    found = read_pickled_tensors(saved(tmp_path / "m.pt", {"embedding": tied, "head": tied}))
    assert found["embedding"].data_ptr() == found["head"].data_ptr()


def test_deepspeed_states_give_the_module(tmp_path):
    content = {
        "module": collections.OrderedDict({"a.weight": torch.ones(2), "b": torch.zeros(1)}),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}},
        "param_shapes": [collections.OrderedDict(a=torch.Size([2]))],
        "sparse_tensor_module_names": {"a"},
        "ds_config": {"train_batch_size": 8},
        "ds_version": "0.19.8",
    }
    path = saved(tmp_path / "mp_rank_00_model_states.pt", content)
    assert_same(read_pickled_tensors(path), {"a.weight": torch.ones(2), "b": torch.zeros(1)})


def test_megatron_states_give_the_model_without_calling_anything_of_megatron(tmp_path, monkeypatch, touched):
    """Neither is Megatron needed, nor used where it is: its enums are names only."""
    module = types.ModuleType("megatron.core.enums")
    module.ModelType = enum.Enum("ModelType", ["encoder_or_decoder"], module=module.__name__)
    for name in ("megatron", "megatron.core"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    content = {
        "args": argparse.Namespace(
            params_dtype=torch.bfloat16, lr=np.float32(3), model_type=module.ModelType.encoder_or_decoder, device="cpu"
        ),
        "checkpoint_version": 3.0,
        "iteration": 2**40,
        "model": {
            "language_model": {
                "embedding": {"word_embeddings": {"weight": torch.ones(4, 2)}},
                "encoder": collections.OrderedDict({"layers.0.norm.weight": torch.zeros(2), "_extra_state": None}),
            }
        },
        "rng_state": [{"np_rng_state": np.random.get_state(), "random_rng_state": random.getstate()}],
        "optimizer": {"buffer": io.BytesIO(b"x")},
    }
    path = saved(tmp_path / "model_optim_rng.pt", content)
    expected = {
        "language_model.embedding.word_embeddings.weight": torch.ones(4, 2),
        "language_model.encoder.layers.0.norm.weight": torch.zeros(2),
    }
    assert_same(read_pickled_tensors(path), expected)
    module.ModelType = lambda *_: touched.touch()
    assert_same(read_pickled_tensors(path), expected)


def test_a_namespace_cannot_be_made_to_act():
    inert = pickles._Inert(1, 2)
    inert.__setstate__({"keys": 1})
    assert vars(inert) == {}
    assert not [
        one for one in torch.serialization.get_safe_globals() if isinstance(one, tuple) and one[0] is type(inert)
    ]


# --- what is refused ------------------------------------------------------------------------------------------------

GADGETS = {
    "posix.system": lambda path: Call(os.system, f"touch {path}"),
    "__builtin__.eval": lambda path: Call(eval, f"open({str(path)!r}, 'w')"),
    "__builtin__.exec": lambda path: Call(exec, f"open({str(path)!r}, 'w')"),
    "__builtin__.getattr": lambda path: Call(getattr, Call(__import__, "os"), "system"),
    "io.open": lambda path: Call(io.open, str(path), "w"),
    "commands.Popen": lambda path: Call(subprocess.Popen, ["touch", str(path)]),
    "pathlib.Path": lambda path: Call(Path.touch, path),
    "torch.hub.load": lambda path: Call(torch.hub.load, str(path.parent), "m", "local"),
    "torch.storage._load_from_bytes": lambda path: Call(torch.storage._load_from_bytes, b"x"),
    "functools.partial": lambda path: __import__("functools").partial(os.system, f"touch {path}"),
}


@pytest.mark.parametrize("name", GADGETS)
@pytest.mark.parametrize("place", ["value", "key", "nested", "argument"])
def test_gadgets_are_refused_by_name(tmp_path, touched, name, place):
    gadget = GADGETS[name](touched)
    content = {
        "value": {"w": torch.ones(2), "x": gadget},
        "key": {"w": torch.ones(2), Call(str, gadget): 1},
        "nested": {"model": {"a": [{"b": (torch.ones(2), {"c": gadget})}]}},
        "argument": {"w": Call(torch._utils._rebuild_tensor_v2, gadget, 0, (1,), (1,), False, None)},
    }[place]
    path = saved(tmp_path / "pytorch_model.bin", content)
    with pytest.raises(CheckpointError, match=r"imports .*, which no tensor needs; refused, nothing was run") as caught:
        read_pickled_tensors(path)
    assert name in str(caught.value) and "weights_only" not in str(caught.value)


def test_the_gadgets_do_act_when_a_file_is_trusted(tmp_path):
    """What the other tests prove has a meaning: the same files, loaded as any pickle is, touch the file."""
    touched = tmp_path / "acted"
    torch.load(saved(tmp_path / "m.bin", {"x": GADGETS["posix.system"](touched)}), weights_only=False)
    assert touched.exists()


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_bare_pickles_and_the_old_format_are_refused_unread(tmp_path, touched, protocol):
    path = tmp_path / "pytorch_model.bin"
    content = {"w": torch.ones(2), "x": GADGETS["posix.system"](touched)}
    path.write_bytes(pickle.dumps(content, protocol))
    with pytest.raises(CheckpointError, match=r"not a file of torch.save from version 1\.6 on"):
        read_pickled_tensors(path)
    saved(path, content, _use_new_zipfile_serialization=False, pickle_protocol=protocol)
    with pytest.raises(CheckpointError, match=r"not a file of torch.save from version 1\.6 on"):
        read_pickled_tensors(path)


def test_an_old_file_with_an_archive_at_its_end_is_refused(tmp_path, touched):
    """zipfile looks at the end, torch at the beginning."""
    path = saved(tmp_path / "m.bin", {"x": GADGETS["posix.system"](touched)}, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes() + saved(tmp_path / "good.bin", {"w": torch.ones(2)}).read_bytes())
    with pytest.raises(CheckpointError):
        read_pickled_tensors(path)


@pytest.mark.parametrize(
    ("code", "named"),
    [
        (b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x01x\x85R.", "SHORT_BINUNICODE"),
        (b"\x80\x02X\x05\x00\x00\x00posixX\x06\x00\x00\x00system\x93X\x04\x00\x00\x00true\x85R.", "STACK_GLOBAL"),
        (b"\x80\x02(S'true'\niposix\nsystem\n.", "STRING"),
        (b"\x80\x02(X\x04\x00\x00\x00trueiposix\nsystem\n.", "INST"),
        (b"\x80\x02(cposix\nsystem\nX\x04\x00\x00\x00trueo.", "posix.system"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x02Pname\n.", "PERSID"),
        (b"\x80\x02ctorch.storage\nUntypedStorage._from_buffer\n.", "torch.storage.UntypedStorage._from_buffer"),
        (b"\x80\x02c__builtin__\neval\nX\x04\x00\x00\x001111\x85R.", "__builtin__.eval"),
        (b"\x80\x02cbuiltins\nset\n.", "builtins.set"),
        (b"\x80\x02}q\x00.cposix\nsystem\n.", "holds no tensors"),
        (b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.", "RecursionError"),
        (b"\x80\x02]q\x00.", "as a dictionary"),
        (b"\x80\x02X\x0e\x00\x00\x00not terminated", "not a file of torch.save"),
        (b"\x80\x02cargparse\nNamespace\n)R.", "as a dictionary"),
        (b"", "not a file of torch.save"),
    ],
)
def test_programs_by_hand(tmp_path, code, named):
    with pytest.raises(CheckpointError) as caught:
        read_pickled_tensors(program(tmp_path / "m.bin", code))
    assert named in str(caught.value)


def test_the_second_line_of_defence_is_torchs(tmp_path, touched, monkeypatch):
    """Were our lists not looked at, torch would still refuse, and we would not load the file in any other way."""
    path = saved(tmp_path / "m.bin", {"w": torch.ones(2), "x": GADGETS["posix.system"](touched)})
    monkeypatch.setattr(pickles, "_check", lambda path: None)
    with pytest.raises(CheckpointError, match="torch's restricted unpickler refuses it; save its tensors as safe"):
        read_pickled_tensors(path)


def gadget_program(touched):
    return f"\x80\x02cposix\nsystem\nX{chr(6 + len(str(touched)))}\0\0\0touch {touched}\x85R.".encode("latin1")


@pytest.mark.parametrize(
    "name", ["m/data.pkl", "m/other.pkl", "m/DATA.PKL", "other/data.pkl", "data.pkl", "m/x/data.pkl"]
)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_with_another_pickle_is_refused(tmp_path, touched, name, first):
    path = saved(tmp_path / "m.pt", {"w": torch.ones(2)})
    entry = (name, gadget_program(touched))
    repacked(path, lambda entries: entries.insert(0 if first else len(entries), entry))
    with pytest.raises(CheckpointError, match=r"not a file of torch\.save"):
        read_pickled_tensors(path)


def test_archives_that_are_no_checkpoints(tmp_path):
    path = tmp_path / "m.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", pickle.dumps({}, 2))
    for change, word in [
        (lambda: None, "compressed"),
        (lambda: repacked(path, lambda entries: entries.clear()), "root"),
        (lambda: path.write_bytes(saved(tmp_path / "n", {"w": torch.ones(99)}).read_bytes()[:-50]), "zip"),
        (lambda: path.unlink(), "No such file"),
        (lambda: saved(path, {"a": 1}), "holds no tensors"),
        (lambda: saved(path, {"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}), "two of its tensors have one name"),
        (lambda: saved(path, torch.ones(1)), "as a dictionary"),
    ]:
        change()
        with pytest.raises(CheckpointError, match=word):
            read_pickled_tensors(path)


def test_random_damage_is_refused_or_gives_tensors(tmp_path):
    """Nothing but CheckpointError comes out of a damaged file, and no name beyond the lists is ever let through."""
    whole, chance = (
        saved(tmp_path / "whole", {"w": torch.ones(2), "a": argparse.Namespace(x=1)}).read_bytes(),
        random.Random(0),
    )
    outcomes, path = [], tmp_path / "m.pt"
    start = whole.index(b"\x80\x02")
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            damaged[start + chance.randrange(300)] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            outcomes.append(set(read_pickled_tensors(path)) <= {"w"})
        except CheckpointError:
            outcomes.append(None)
    assert outcomes.count(None) > 200 and False not in outcomes
