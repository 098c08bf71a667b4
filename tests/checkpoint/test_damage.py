"""What cannot be saved, and what cannot be loaded: every time the user is told what is wrong, and nothing is lost."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_moe.checkpoint import Checkpoint, CheckpointError, is_checkpoint, read_weights
from lightning_moe.checkpoint.manifest import FILE_NAME, FORMAT_VERSION
from lightning_moe.checkpoint.objects import check_readable, plain
from lightning_moe.checkpoint.pieces import Piece
from lightning_moe.checkpoint.saving import Snapshot, save
from lightning_moe.testing import RankPool
from tests.checkpoint.crashing import snapshot

VERSIONS = Path(__file__).parent / "data"


def make(path: Path, value: float = 1.0, numel: int = 1000) -> Path:
    weights = torch.full((numel,), value)
    save(Snapshot({"model/w": Piece((numel // 10, 10), 0, weights)}, run={"value": value}, rank={}), path)
    return path


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_weights(path)
    return str(caught.value)


FILES = [FILE_NAME, "rank00000-0000.safetensors", "run.pt", "ranks.pt"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = make(tmp_path / "a.ckpt")
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    assert read_weights(path)["w"].shape == (100, 10)
    return path


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_flipped_byte(name: str, share: float, saved: Path) -> None:
    content = bytearray((saved / name).read_bytes())
    content[int(share * len(content))] ^= 1
    (saved / name).write_bytes(content)
    assert refused(saved).startswith(f"{saved / name}: ")
    assert "damaged" in refused(saved)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("length", [0, 100])
def test_a_truncated_file(name: str, length: int, saved: Path) -> None:
    size = (saved / name).stat().st_size
    os.truncate(saved / name, length)
    message = refused(saved)
    assert message.startswith(f"{saved / name}: ")
    if name != FILE_NAME:
        assert f"it has {length} bytes and was written with {size}" in message


@pytest.mark.parametrize("name", FILES[1:])
def test_a_missing_file(name: str, saved: Path) -> None:
    (saved / name).unlink()
    assert refused(saved) == (
        f"{saved / name}: it is missing. This checkpoint is damaged: copy that file again, or resume from another one."
    )


def test_every_damaged_file_is_named(saved: Path) -> None:
    (saved / "run.pt").unlink()
    os.truncate(saved / "ranks.pt", 3)
    assert [line.split(": ")[0] for line in refused(saved).splitlines()] == [
        str(saved / "ranks.pt"),
        str(saved / "run.pt"),
    ]


def test_a_file_of_another_checkpoint_is_not_read(saved: Path) -> None:
    other = make(saved.with_name("b.ckpt"), 5.0)
    shutil.copy(other / "rank00000-0000.safetensors", saved / "rank00001-0000.safetensors")
    assert float(read_weights(saved)["w"].mean()) == 1.0
    values_N = torch.zeros(1000)
    Checkpoint(saved).fill({"model/w": Piece((100, 10), 0, values_N)})
    assert float(values_N.mean()) == 1.0


def test_a_file_of_lightnings_is_no_folder(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "one.ckpt")
    assert refused(tmp_path / "one.ckpt").startswith(f"{tmp_path}/one.ckpt: is a file, and a checkpoint of ")


def test_a_state_that_was_not_verified_is_refused_in_words(saved: Path) -> None:
    os.truncate(saved / "run.pt", 100)
    with pytest.raises(CheckpointError, match=r"run\.pt: cannot be read \("):
        Checkpoint(saved).run()


def test_tensors_that_overlap_are_saved(tmp_path: Path) -> None:
    flat = torch.arange(30.0)
    places = {"a": (0, 20), "b": (20, 30), "view": (5, 25), "again": (0, 20)}
    save(Snapshot({f"model/{n}": Piece((j - i,), 0, flat[i:j]) for n, (i, j) in places.items()}), tmp_path / "a.ckpt")
    assert {n: w.tolist() for n, w in read_weights(tmp_path / "a.ckpt").items()} == {
        n: flat[i:j].tolist() for n, (i, j) in places.items()
    }


def test_no_manifest_is_no_checkpoint(saved: Path) -> None:
    whole = make(saved.with_name("b.ckpt"))
    (saved / FILE_NAME).unlink()
    assert not is_checkpoint(saved)
    assert refused(saved) == (
        f"{saved}: is not a checkpoint: it has no {FILE_NAME}, so that it is none or was never finished. Checkpoints "
        f"beside it, newest first: {whole}."
    )
    nowhere = saved.with_name("nowhere") / "c.ckpt"
    assert refused(nowhere) == f"{nowhere}: is not a checkpoint: it does not exist. There is none beside it."
    newer = make(saved.with_name("1.ckpt"))
    assert refused(saved.parent) == (
        f"{saved.parent}: is not a checkpoint, but holds some. Give the path of one: {newer}, {whole}."
    )


def edit(path: Path, **changes: Any) -> None:
    """Changes the manifest as who wrote it would have, with the checksum that belongs to it."""
    content = json.loads((path / FILE_NAME).read_text())
    del content["crc32"]
    content |= changes
    content["crc32"] = zlib.crc32(json.dumps(content, sort_keys=True).encode())
    (path / FILE_NAME).write_text(json.dumps(content))


def test_a_newer_format(saved: Path) -> None:
    versions = {"lightning_moe": "9.1"}
    edit(saved, format_version=FORMAT_VERSION + 1, versions=versions)
    assert refused(saved) == (
        f"{saved}: has format version {FORMAT_VERSION + 1}, and this lightning_moe reads up to {FORMAT_VERSION}. "
        "Install lightning_moe 9.1 or newer."
    )


class Malicious:
    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("name", ["run.pt", "ranks.pt"])
def test_nothing_is_executed(name: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even from a file whose checksum is right."""
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Malicious()}, saved / name)
    content = json.loads((saved / FILE_NAME).read_text())
    written = (saved / name).read_bytes()
    edit(saved, files={**content["files"], name: {"size": len(written), "crc32": zlib.crc32(written)}})
    with pytest.raises(CheckpointError, match="cannot be read without executing code from it, which is not done"):
        Checkpoint(saved).run() if name == "run.pt" else Checkpoint(saved).ranks()
    assert not (tmp_path / "executed").exists()
    pickle.loads(pickle.dumps(Malicious()))
    assert (tmp_path / "executed").exists(), "not what an unpickler would have done"


# ------------------------------------------------------------------------------------------ saving


def test_what_could_not_be_read_back_is_not_saved() -> None:
    class Local:
        pass

    with pytest.raises(CheckpointError) as caught:
        check_readable({"callbacks": {"Mine": {"ok": 1, "state": Local()}}}, "checkpoint")
    assert str(caught.value).startswith("checkpoint['callbacks']['Mine']['state']: cannot be saved, because ")
    with pytest.raises(CheckpointError, match=r"checkpoint\['x'\]: .* because it holds argparse\.ArgumentParser, "):
        check_readable({"x": argparse.ArgumentParser}, "checkpoint")
    check_readable(plain({"path": Path("a"), "layout": Checkpoint.__name__, "n": (1, [2.0, None])}), "checkpoint")


def failing_save(path: Path, hinder: Callable[[], object]) -> str:
    """What is said by a process that cannot save over a checkpoint, which stays."""

    def child() -> None:
        os.chdir("/")
        hinder()
        try:
            make(path, 2.0, 100_000)
        except CheckpointError as error:
            said.send(str(error))
        else:
            said.send("nothing")

    heard, said = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    text: str = heard.recv() if heard.poll(30) else "nothing in time"
    process.join(10)
    assert float(read_weights(path)["w"][0, 0]) == 1.0
    assert not (path.parent / ".writing").exists()
    return text


@pytest.mark.parametrize("limit", [100, 5_000])
def test_a_quota(limit: int, saved: Path) -> None:
    said = failing_save(saved, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert said.startswith(f"{saved}: the checkpoint could not be saved (on rank 0: ")
    assert "File too large" in said
    assert said.endswith(
        "). What was there before is untouched. Free space, or save elsewhere, for example by "
        "ModelCheckpoint(dirpath=...)."
    )


def test_a_full_disk(tmp_path: Path) -> None:
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", tmp_path], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        path = make(tmp_path / "a.ckpt", numel=10_000)
        with pytest.raises(CheckpointError, match=r"could not be saved \(on rank 0: .*No space left on device.*\)"):
            make(path, 2.0, 100_000)
        assert float(read_weights(path)["w"][0, 0]) == 1.0
        assert not (tmp_path / ".writing").exists()
        make(path, 3.0, 10_000)  # there is space again
        assert float(read_weights(path)["w"][0, 0]) == 3.0
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_a_folder_that_may_not_be_written(saved: Path) -> None:
    for folder in (saved.parent, *saved.parent.parents[:2]):
        folder.chmod(0o755)  # pytest's are its user's alone
    saved.parent.chmod(0o555)
    try:
        said = failing_save(saved, lambda: os.geteuid() or os.setuid(65534))  # root may write anything
    finally:
        saved.parent.chmod(0o755)
    assert said.startswith(f"{saved}: the checkpoint could not be saved (Permission denied: {saved.parent}/.writing")


@pytest.mark.parametrize("name", ["a.ckpt", ""])
def test_a_folder_with_something_else_is_not_replaced(name: str, tmp_path: Path) -> None:
    """As by a slip: ``trainer.save_checkpoint(dirpath)``."""
    path = tmp_path / name
    make(path / "in it.ckpt")
    with pytest.raises(CheckpointError) as caught:
        make(path, 2.0)
    assert str(caught.value) == (
        f"{path}: the checkpoint could not be saved (there is a folder with other files, which would be lost: {path}). "
        "What was there before is untouched. Save elsewhere, for example by ModelCheckpoint(dirpath=...)."
    )
    assert float(read_weights(path / "in it.ckpt")["w"][0, 0]) == 1.0


def test_a_folder_of_deepspeeds_and_an_empty_one_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").mkdir()
    (tmp_path / "a.ckpt" / "latest").write_text("checkpoint")
    (tmp_path / "b.ckpt").mkdir()
    for name in ("a.ckpt", "b.ckpt"):
        assert float(read_weights(make(tmp_path / name, 2.0))["w"][0, 0]) == 2.0


def test_files_have_the_mode_of_others(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        path = make(tmp_path / "a.ckpt")
    finally:
        os.umask(before)
    assert {oct(file.stat().st_mode & 0o777) for file in path.iterdir()} == {"0o664"}


def test_the_place_of_a_file_is_taken(tmp_path: Path) -> None:
    """A file of Lightning's, and a link, go when a folder takes their name."""
    torch.save({}, tmp_path / "last.ckpt")
    make(tmp_path / "last.ckpt", 2.0)
    (tmp_path / "link.ckpt").symlink_to("last.ckpt")
    make(tmp_path / "link.ckpt", 3.0)
    assert [float(read_weights(tmp_path / n)["w"][0, 0]) for n in ("last.ckpt", "link.ckpt")] == [2.0, 3.0]
    assert not (tmp_path / "link.ckpt").is_symlink()


# ------------------------------------------------------------------------------------ other models


def test_another_model_is_refused_by_its_first_differences(tmp_path: Path) -> None:
    pieces = {f"model/layer{i}.w": Piece((4, i + 1), 0, torch.zeros(4 * (i + 1))) for i in range(8)}
    save(Snapshot(pieces), tmp_path / "a.ckpt")
    shapes = {f"layer{i}.w": (8, i + 1) if i < 3 else (4, i + 1) for i in range(1, 8)} | {"new": (2,)}
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(tmp_path / "a.ckpt").check(shapes)
    assert str(caught.value) == (
        f"{tmp_path}/a.ckpt: is of another model; 4 of its tensors differ:\n"
        "  layer1.w: [4, 2] in the checkpoint, [8, 2] in the model\n"
        "  layer2.w: [4, 3] in the checkpoint, [8, 3] in the model\n"
        "  layer0.w: only in the checkpoint\n"
        "  new: only in the model\n"
        "Build the model that was saved, or pass strict_loading=False for names that only one has."
    )
    both = Checkpoint(tmp_path / "a.ckpt").check({"layer7.w": (4, 8), "new": (2,)}, strict=False)
    assert both == ["layer7.w"]


def save_a_half(path: str) -> str:
    rank = torch.distributed.get_rank()
    try:
        save(snapshot(0, 1.0) if rank == 0 else Snapshot({}), Path(path), torch.distributed.group.WORLD)
    except CheckpointError as error:
        return str(error)
    return "saved"


def test_a_tensor_of_which_a_part_is_on_no_rank_is_not_saved(pool2: RankPool, tmp_path: Path) -> None:
    said = pool2.run(save_a_half, str(tmp_path / "a.ckpt"))
    assert "model/w invalid fill tensor-volume: 1000 chunks-volume: 500" in said[0]
    assert said[0] == said[1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("version", sorted(path.name for path in VERSIONS.glob("version_*")))
def test_stored_checkpoints_of_every_version_load(version: str, tmp_path: Path) -> None:
    path = tmp_path / "copy.ckpt"
    shutil.copytree(VERSIONS / version, path)
    saved = Checkpoint(path)
    assert saved.manifest.format_version == int(version.removeprefix("version_"))
    weights = read_weights(path)
    assert torch.equal(weights["experts.w1"], torch.arange(24.0).view(4, 3, 2))
    assert torch.equal(weights["bias"], torch.tensor([1.5, -2.0], dtype=torch.bfloat16))
    assert torch.equal(weights["bias_again"], weights["bias"])
    assert torch.equal(saved.tensor("optimizer/exp_avg/experts.w1"), torch.arange(24.0).view(4, 3, 2) / 8)
    run = saved.run()
    assert run["scalars"] == {"experts.w1": {"step": torch.tensor(7.0)}}
    assert run["optimizer_groups"] == [{"names": ["experts.w1"], "values": {"lr": 0.1, "betas": (0.9, 0.99)}}]
    assert run["lightning"]["epoch"] == 2
    assert [state["rank"] for state in saved.ranks()] == [0, 1]
    assert saved.manifest.step == 7
    assert saved.manifest.layout.world_size == 2


def test_the_current_version_is_stored() -> None:
    assert (VERSIONS / f"version_{FORMAT_VERSION}").is_dir()
