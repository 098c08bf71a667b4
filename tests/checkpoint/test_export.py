"""The export of a checkpoint's weights: as other tools read it, tensor by tensor, whole or not at all."""

from __future__ import annotations

import errno
import json
import struct
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from lightning_moe.checkpoint import Checkpoint, CheckpointError, export
from lightning_moe.checkpoint.pieces import Piece
from lightning_moe.checkpoint.saving import Snapshot, save
from lightning_moe.checkpoint.stream import NAMES

INDEX = "model.safetensors.index.json"


def tensors() -> dict[str, Tensor]:
    """Of several types; in this order their places in a file would not be multiples of the sizes of their elements."""
    return {
        "flags": torch.tensor([True, False, True]),
        "half": torch.randn(5).bfloat16(),
        "layer.bias": torch.randn(3),
        "layer.weight": torch.randn(3, 4, 2),
        "scale": torch.randn(()),
        "steps": torch.arange(5),
    }


def saved(path: Path, model: dict[str, Tensor], **run: Any) -> Path:
    """A checkpoint of one process with these weights, and with moments of them."""
    pieces = {f"model/{name}": whole(value) for name, value in model.items()}
    pieces |= {f"optimizer/exp_avg/{name}": whole(value.clone()) for name, value in model.items()}
    save(Snapshot(pieces, run=run), path)
    return path


def whole(value: Tensor) -> Piece:
    return Piece(tuple(value.shape), 0, value.reshape(-1))


def read(folder: Path) -> dict[str, Tensor]:
    """What is in the files of an export, all of them."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        of_file = load_file(path)
        assert not found.keys() & of_file.keys()
        found |= of_file
    return found


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        assert raw(found[name]) == raw(value), name


def raw(value: Tensor) -> bytes:
    data: bytes = value.reshape(-1).view(torch.uint8).numpy().tobytes()
    return data


# --------------------------------------------------------------------------------------- what is in it


def test_as_stored(tmp_path: Path) -> None:
    model = tensors()
    done = export(saved(tmp_path / "a.ckpt", model), tmp_path / "out")
    assert_equal(read(tmp_path / "out"), model)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert done.files == [tmp_path / "out" / "model.safetensors"]
    assert (done.num_tensors, done.left_out) == (6, [])
    assert done.size == 3 + 5 * 2 + 3 * 4 + 24 * 4 + 4 + 5 * 8
    with safe_open(done.files[0], framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_converted(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tensors()
    done = export(saved(tmp_path / "a.ckpt", model), tmp_path / "out", dtype=dtype)
    expected = {name: value.to(dtype) if value.is_floating_point() else value for name, value in model.items()}
    assert {value.dtype for value in expected.values()} == {dtype, torch.bool, torch.int64}
    assert_equal(read(tmp_path / "out"), expected)
    assert done.size == sum(value.nbytes for value in expected.values())


def test_every_type_that_safetensors_has(tmp_path: Path) -> None:
    bits = torch.arange(48, dtype=torch.uint8)
    model = {str(dtype): bits.clone().view(dtype) for dtype in NAMES if dtype != torch.bool}
    export(saved(tmp_path / "a.ckpt", model), tmp_path / "out")
    assert_equal(read(tmp_path / "out"), model)


@pytest.mark.parametrize("length_of_name", [1, 2])
def test_the_file_is_laid_out_as_the_format_says(length_of_name: int, tmp_path: Path) -> None:
    """Strict readers refuse holes, and read in place only what begins at a multiple of the size of its elements."""
    model = tensors() | {"x" * length_of_name: torch.ones(1)}  # two headers, of which one at least is to be padded
    export(saved(tmp_path / "a.ckpt", model), tmp_path / "out")
    content = (tmp_path / "out" / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    assert length % 8 == 0
    header = json.loads(content[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    places = sorted(entry["data_offsets"] for entry in header.values())
    assert [start for start, _ in places] == [0, *(end for _, end in places[:-1])]
    assert 8 + length + places[-1][1] == len(content)
    for entry in header.values():
        size = {"BOOL": 1, "BF16": 2, "F32": 4, "I64": 8}[entry["dtype"]]
        assert entry["data_offsets"][0] % size == 0


def save_half(path: Path) -> None:
    rank = dist.get_rank()
    values = torch.arange(70_000.0)
    half = Piece((7, 10_000), rank * 35_000, values[rank * 35_000 : (rank + 1) * 35_000])
    alone = {"model/counts": whole(torch.arange(4))} if rank == 1 else {}
    save(Snapshot({"model/experts": half, **alone}), path, dist.group.WORLD)


def test_a_tensor_in_files_of_two_ranks(pool2: Any, tmp_path: Path) -> None:
    pool2.run(save_half, tmp_path / "a.ckpt")
    assert len(list((tmp_path / "a.ckpt").glob("*.safetensors"))) == 2
    export(tmp_path / "a.ckpt", tmp_path / "out")
    assert_equal(read(tmp_path / "out"), {"experts": torch.arange(70_000.0).view(7, 10_000), "counts": torch.arange(4)})


def test_extra_state(tmp_path: Path) -> None:
    """Tensors that the module's state_dict has beside parameters and buffers are there, other objects are named."""
    total = torch.randn(4, 3).t()
    extra = {"metric.total": total, "layer._extra_state": {"scale": 2.0}, "sparse": torch.eye(2).to_sparse()}
    path = saved(tmp_path / "a.ckpt", {"weight": torch.ones(2)}, extra_state=extra)
    done = export(path, tmp_path / "out", dtype=torch.bfloat16)
    assert_equal(
        read(tmp_path / "out"), {"weight": torch.ones(2).bfloat16(), "metric.total": total.contiguous().bfloat16()}
    )
    assert done.left_out == ["layer._extra_state", "sparse"]


# ------------------------------------------------------------------------------------------- shards


def test_shards(tmp_path: Path) -> None:
    model = {f"w{i}": torch.randn(n) for i, n in enumerate((4, 4, 4, 30, 1))}
    out = tmp_path / "out"
    done = export(saved(tmp_path / "a.ckpt", model), out, max_shard_bytes=40)
    names = [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    assert [path.name for path in done.files] == [*names, INDEX]
    assert sorted(path.name for path in out.iterdir()) == [*names, INDEX]
    # Two fit into 40 bytes, and one that is larger is alone.
    assert [sorted(load_file(out / name)) for name in names] == [["w0", "w1"], ["w2"], ["w3"], ["w4"]]
    assert_equal(read(out), model)
    index = json.loads((out / INDEX).read_text())
    weight_map = {"w0": names[0], "w1": names[0], "w2": names[1], "w3": names[2], "w4": names[3]}
    assert index == {"metadata": {"total_size": 43 * 4}, "weight_map": weight_map}


def test_shards_are_measured_in_what_is_written(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.ckpt", {"w0": torch.randn(4), "w1": torch.randn(4)})
    assert len(export(path, tmp_path / "32", max_shard_bytes=16).files) == 3
    assert len(export(path, tmp_path / "16", max_shard_bytes=16, dtype=torch.bfloat16).files) == 1


@pytest.mark.parametrize("max_shard_bytes", [5 * 10**9, 4000])
def test_transformers_reads_it(max_shard_bytes: int, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    out = tmp_path / "out"
    done = export(saved(tmp_path / "a.ckpt", model.state_dict()), out, max_shard_bytes=max_shard_bytes)
    assert (len(done.files) > 2) == (max_shard_bytes == 4000)
    config.save_pretrained(out)
    loaded = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert_equal(loaded.state_dict(), model.state_dict())


# ------------------------------------------------------------------------------------------- memory


def test_one_tensor_at_a_time(tmp_path: Path) -> None:
    """Nothing of an earlier tensor is there any more when the next is read, within a file too."""
    path = saved(tmp_path / "a.ckpt", {f"w{i}": torch.randn(8) for i in range(6)})
    given: list[weakref.ref[Any]] = []
    alive = []
    tensor = Checkpoint.tensor

    def watched(self: Checkpoint, name: str) -> Tensor:
        alive.append(sum(reference() is not None for reference in given))
        found = tensor(self, name)
        given.extend((weakref.ref(found), weakref.ref(found.untyped_storage())))
        return found

    with mock.patch.object(Checkpoint, "tensor", watched):
        export(path, tmp_path / "out", dtype=torch.bfloat16, max_shard_bytes=48)
        export(path, tmp_path / "out2")
    assert alive == [0] * 12


# --------------------------------------------------------------------------------- whole or not at all


def damaged(path: Path) -> str:
    """Changes one byte of a file of tensors, and returns its name."""
    file = next(path.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    return file.name


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.ckpt", tensors())
    name = damaged(path)
    with pytest.raises(CheckpointError, match=f"{name}: its checksum is another"):
        export(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def failing(after: int) -> Callable[[Checkpoint, str], Tensor]:
    """Reads some tensors; then the disk is full."""
    tensor, asked = Checkpoint.tensor, iter(range(100))

    def read(self: Checkpoint, name: str) -> Tensor:
        if next(asked) == after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return tensor(self, name)

    return read


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    earlier = {"earlier": torch.randn(3)}
    export(saved(tmp_path / "a.ckpt", earlier), out)
    path = saved(tmp_path / "b.ckpt", tensors())
    with mock.patch.object(Checkpoint, "tensor", failing(after=4)), pytest.raises(CheckpointError) as caught:
        export(path, out, max_shard_bytes=20, overwrite=True)
    assert str(caught.value) == (
        f"{out}: the export could not be written (No space left on device). Free space, or export to another folder."
    )
    assert [file.name for file in out.iterdir()] == ["model.safetensors"]
    assert_equal(read(out), earlier)


def test_files_appear_at_the_end_and_the_index_last(tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = saved(tmp_path / "a.ckpt", {"w0": torch.randn(4), "w1": torch.randn(4)})
    there: list[list[str]] = []
    replace = Path.replace

    def watched(self: Path, target: Path) -> Path:
        there.append(sorted(file.name for file in out.iterdir() if file.is_file()))
        return replace(self, target)

    with mock.patch.object(Path, "replace", watched):
        export(path, out, max_shard_bytes=16)
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert there == [[], [first], [first, second]]
    assert sorted(file.name for file in out.iterdir()) == [first, second, INDEX]


# ------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize(("before", "after"), [(8, 10**9), (10**9, 8), (8, 16), (8, 8)])
def test_overwrite(before: int, after: int, tmp_path: Path) -> None:
    """Nothing of the earlier export is left, whatever files it had; what is not of an export is."""
    out = tmp_path / "out"
    export(saved(tmp_path / "a.ckpt", {f"old{i}": torch.randn(2) for i in range(4)}), out, max_shard_bytes=before)
    (out / "config.json").write_text("{}")
    (out / "model_card.md").write_text("A model.")
    model = {f"new{i}": torch.randn(2) for i in range(4)}
    path = saved(tmp_path / "b.ckpt", model)
    with pytest.raises(CheckpointError, match=r"has model.*safetensors.* already.*--overwrite"):
        export(path, out, max_shard_bytes=after)
    done = export(path, out, max_shard_bytes=after, overwrite=True)
    assert_equal(read(out), model)
    kept = {"config.json", "model_card.md"}
    assert {file.name for file in out.iterdir()} == kept | {file.name for file in done.files}


def test_an_index_alone_is_an_earlier_export(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / INDEX).write_text("{}")
    with pytest.raises(CheckpointError, match=r"has model\.safetensors\.index\.json already"):
        export(saved(tmp_path / "a.ckpt", tensors()), tmp_path / "out")


def test_not_into_a_checkpoint(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.ckpt", tensors())
    with pytest.raises(CheckpointError, match="is a checkpoint, and what is in its folder is read as part of it"):
        export(path, path, overwrite=True)
    assert not list(path.glob("model*"))


def test_a_file_where_the_folder_was_to_be(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(CheckpointError, match=r"out: the export could not be written \(.*Not a directory|File exists"):
        export(saved(tmp_path / "a.ckpt", tensors()), tmp_path / "out")


# ----------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            {"dtype": torch.float16},
            "dtype=torch.float16: must be torch.float32, torch.bfloat16 or None. Use None to keep what is stored.",
        ),
        ({"max_shard_bytes": 0}, "max_shard_bytes=0: must be at least 1. Use 5000000000, for example."),
    ],
)
def test_wrong_value(argument: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.ckpt", tensors())
    with pytest.raises(ValueError, match="must be") as caught:
        export(path, tmp_path / "out", **argument)
    assert str(caught.value) == message


def test_progress(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.ckpt", {"w0": torch.randn(4), "w1": torch.randn(4)})
    told: list[tuple[str, int, int]] = []
    export(path, tmp_path / "out", on_progress=lambda *args: told.append(args))
    size = sum(file.stat().st_size for file in path.iterdir() if file.name != "checkpoint.json")
    assert told[0] == ("verifying", 0, size)
    assert told[3:] == [("verifying", size, size), ("writing", 0, 32), ("writing", 16, 32), ("writing", 32, 32)]
