from __future__ import annotations

import os
import re
import shutil
import sysconfig
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning as L
import pytest
import torch

from lightning_moe.data import TextDataModule
from lightning_moe.data.text import split_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """20 files of 200 bytes; every byte of file i is i, so that a window tells where it is from."""
    folder = tmp_path / "texts"
    for number in range(20):
        file = folder / f"part{number % 3}" / f"{number:02}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes([100 + number]) * 200)
    return folder


def make(path: Path | str, **settings: Any) -> TextDataModule:
    settings = {"pattern": "**/*.txt", "sequence_length": 7, "batch_size": 4, "val_fraction": 0.2, **settings}
    return TextDataModule(str(path), **settings)


def ready(path: Path | str, **settings: Any) -> TextDataModule:
    data = make(path, **settings)
    data.setup("fit")
    return data


def message(text: str) -> str:
    return f"^{re.escape(text)}$"


# ------------------------------------------------------------------------------------------------- loaders


def test_a_batch_is_int64_windows_of_sequence_length_plus_one(folder: Path) -> None:
    data = ready(folder)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        batch = next(iter(loader))
        assert batch.shape == (4, 8)
        assert batch.dtype == torch.int64


def test_windows_are_the_joined_files_without_overlap(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_bytes((name * 5).encode())
    data = ready(tmp_path, sequence_length=2, batch_size=1, val_fraction=0.34)
    first, second = (name[0] for name in data.train_files)
    windows = torch.cat(list(data.train_dataloader())).tolist()
    text = f"{first * 5}\n{second * 5}".encode()
    assert sorted(windows) == sorted(list(text[i : i + 3]) for i in range(0, 9, 3))


def test_train_drops_a_short_batch_and_validation_keeps_it(folder: Path) -> None:
    data = ready(folder, batch_size=7)
    assert all(len(batch) == 7 for batch in data.train_dataloader())
    val = list(data.val_dataloader())
    assert sum(len(batch) for batch in val) == (4 * 200 + 3) // 8
    assert len(val[-1]) != 7


def test_test_and_predict_see_the_validation_windows_in_order(folder: Path) -> None:
    data = ready(folder)
    loaders = (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader())
    val, test, predict = (torch.cat(list(loader)) for loader in loaders)
    assert torch.equal(val, test)
    assert torch.equal(val, predict)
    assert torch.equal(val, torch.cat(list(data.val_dataloader())))


def test_max_val_bytes_cuts_validation_only(folder: Path) -> None:
    whole, cut = ready(folder), ready(folder, max_val_bytes=81)
    assert len(torch.cat(list(cut.val_dataloader()))) == 10
    assert len(cut.train_dataloader()) == len(whole.train_dataloader())


def test_training_is_shuffled_and_reproducible(folder: Path) -> None:
    first, again = (torch.cat(list(ready(folder).train_dataloader())) for _ in range(2))
    other = torch.cat(list(ready(folder, seed=1).train_dataloader()))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    loader = ready(folder).train_dataloader()
    assert not torch.equal(torch.cat(list(loader)), torch.cat(list(loader)))


def test_every_byte_value_survives(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_bytes(bytes(range(256)))
    data = ready(tmp_path, pattern="*", sequence_length=255, batch_size=1)
    assert next(iter(data.val_dataloader()))[0].tolist() == list(range(256))


def test_workers_give_the_same(folder: Path) -> None:
    alone = torch.cat(list(ready(folder).val_dataloader()))
    loader = ready(folder, num_workers=1).val_dataloader()
    assert torch.equal(torch.cat(list(loader)), alone)


def test_setup_reads_once(folder: Path) -> None:
    data = ready(folder)
    shutil.rmtree(folder)
    data.setup("validate")
    assert len(data.val_dataloader()) > 0


# --------------------------------------------------------------------------------------------------- split


def test_no_file_is_on_both_sides(folder: Path) -> None:
    data = ready(folder)
    assert len(data.val_files) == 4
    assert len(data.train_files) == 16
    assert not set(data.train_files) & set(data.val_files)
    train, val = (set(torch.cat(list(x())).unique().tolist()) for x in (data.train_dataloader, data.val_dataloader))
    assert train & val == {ord("\n")}
    assert {f"part{(b - 100) % 3}/{b - 100:02}.txt" for b in val - {10}} == set(data.val_files)


def test_the_split_does_not_depend_on_where_the_folder_is(folder: Path, tmp_path: Path) -> None:
    elsewhere = shutil.copytree(folder, tmp_path / "else" / "where")
    one, other = ready(folder), ready(elsewhere)
    assert one.val_files == other.val_files
    assert torch.equal(torch.cat(list(one.train_dataloader())), torch.cat(list(other.train_dataloader())))
    os.chdir(elsewhere)
    assert ready(".").val_files == one.val_files
    assert ready("**/*.txt").val_files == one.val_files


def test_the_seed_chooses_the_split(folder: Path) -> None:
    assert len({tuple(ready(folder, seed=seed).val_files) for seed in range(5)}) > 1


def test_an_added_file_moves_no_other_from_validation_to_training() -> None:
    names = [f"{number}.txt" for number in range(100)]
    _, before = split_files(names, 0.1, seed=0)
    _, after = split_files([*names, "new.txt"], 0.1, seed=0)
    assert len(set(before) - set(after)) <= 1


@pytest.mark.parametrize(("num_files", "val_fraction", "num_val"), [(2, 0.01, 1), (2, 0.99, 1), (10, 0.25, 3)])
def test_both_sides_have_a_file(num_files: int, val_fraction: float, num_val: int) -> None:
    train, val = split_files([str(number) for number in range(num_files)], val_fraction, seed=0)
    assert len(val) == num_val
    assert len(train) == num_files - num_val


def test_several_names_of_one_file_count_once(folder: Path) -> None:
    (folder / "link.txt").symlink_to(folder / "part0" / "00.txt")
    (folder / "hard.txt").hardlink_to(folder / "part0" / "03.txt")
    data = ready(folder)
    assert len(data.train_files + data.val_files) == 20


def test_a_name_that_is_no_utf8_is_split(tmp_path: Path) -> None:
    try:
        for name in (b"\xff.txt", b"a.txt"):
            Path(os.fsdecode(bytes(tmp_path) + b"/" + name)).write_bytes(b"x" * 100)
    except OSError:
        pytest.skip("this file system wants UTF-8")
    assert len(ready(tmp_path).train_files) == 1


# --------------------------------------------------------------------------------------------------- files


def test_stdlib_is_this_interpreters_without_packages_and_tests() -> None:
    data = TextDataModule(max_val_bytes=100_000)
    data.setup("fit")
    names = data.train_files + data.val_files
    assert len(names) > 300
    assert "argparse.py" in names
    left_out = {"site-packages", "dist-packages", "test", "tests"}
    assert not [name for name in names if left_out & set(name.split("/")[:-1])]
    root = Path(sysconfig.get_paths()["stdlib"])
    assert all((root / name).is_file() for name in names)


def test_a_glob_reads_what_it_matches(folder: Path) -> None:
    data = ready(f"{folder}/part[01]/*.txt", pattern="not used")
    assert {name.split("/")[0] for name in data.train_files + data.val_files} == {"part0", "part1"}


def test_a_folder_with_brackets_in_its_name_is_a_folder(folder: Path) -> None:
    brackets = folder.rename(folder.with_name("texts[1]"))
    assert len(ready(brackets).train_files) == 16


def test_exclude_leaves_out(folder: Path) -> None:
    names = ready(folder, exclude=["part0/*", "*/01.txt"]).train_files
    assert names
    assert not [name for name in names if name.startswith("part0/") or name.endswith("01.txt")]


def test_folders_that_match_are_no_files(folder: Path) -> None:
    (folder / "folder.txt").mkdir()
    assert len(ready(folder).train_files) == 16


def test_empty_files_are_left_out_without_a_word(folder: Path, recwarn: pytest.WarningsRecorder) -> None:
    for number in range(30):
        (folder / f"empty{number}.txt").touch()
    data = ready(folder)
    assert len(data.train_files + data.val_files) == 20
    assert not [warning for warning in recwarn if "path=" in str(warning.message)]


def test_unreadable_files_are_left_out_with_one_warning(folder: Path) -> None:
    (folder / "a.txt").symlink_to(folder / "missing")
    os.mkfifo(folder / "b.txt")  # reading it would wait for ever
    with pytest.warns(UserWarning, match="cannot be read") as warned:
        data = ready(folder)
    assert len(data.train_files + data.val_files) == 20
    assert [str(w.message) for w in warned] == [
        (f"path='{folder}': 2 of 22 files cannot be read, a.txt for example: it is a broken link. They are left out.")
    ]


def test_a_file_without_permission_is_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_bytes = Path.read_bytes

    def deny(path: Path) -> bytes:  # tests may run as root, who may read everything
        if path.name == "04.txt":
            raise PermissionError(13, "Permission denied")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", deny)
    told = "1 of 20 files cannot be read, part1/04.txt for example: Permission denied."
    with pytest.warns(UserWarning, match=re.escape(told)):
        data = ready(folder)
    assert len(data.train_files + data.val_files) == 19


# -------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"sequence_length": 0}, "sequence_length=0: must be at least 1. Use 128, for example."),
        ({"batch_size": 0}, "batch_size=0: must be at least 1. Use 16, for example."),
        ({"num_workers": -1}, "num_workers=-1: must be 0 or more. Use 0 to load in the main process."),
        *(
            (
                {"val_fraction": value},
                (f"val_fraction={value}: must be above 0 and below 1, a share of the files. Use 0.05, for example."),
            )
            for value in (0.0, 1.0, -0.1, float("nan"))
        ),
        (
            {"sequence_length": 7, "max_val_bytes": 7},
            (
                "max_val_bytes=7: must be at least sequence_length + 1 = 8, one window. Raise it, or leave "
                "it out to validate on all of the held-out text."
            ),
        ),
    ],
)
def test_wrong_settings_are_refused_at_once(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=message(expected)):
        TextDataModule(**settings)


@pytest.mark.parametrize("name", ["nowhere", "nowhere/*.txt"])
def test_a_path_that_does_not_exist(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    expected = (
        f"path='{path}': {tmp_path / 'nowhere'} does not exist or is not accessible. Name a folder, "
        "a glob or a file of text, or 'stdlib' for Python's own library."
    )
    with pytest.raises(ValueError, match=message(expected)):
        make(path).setup("fit")


def test_no_file_matches(folder: Path) -> None:
    expected = (
        f"path='{folder}': no file below {folder} matches pattern='*.md'. Change pattern, '**/*' takes "
        "every file, or name another folder."
    )
    with pytest.raises(ValueError, match=message(expected)):
        make(folder, pattern="*.md").setup("fit")


def test_exclude_leaves_nothing(folder: Path) -> None:
    expected = (
        f"path='{folder}': no file below {folder} matches pattern='**/*.txt' and is not left out by "
        "exclude=['*']. Change pattern, '**/*' takes every file, or name another folder."
    )
    with pytest.raises(ValueError, match=message(expected)):
        make(folder, exclude=["*"]).setup("fit")


@pytest.mark.parametrize("pattern", ["/abs/*.txt", ""])
def test_a_pattern_that_is_no_glob(folder: Path, pattern: str) -> None:
    with pytest.raises(ValueError, match="is not a glob below a folder") as raised:
        make(folder, pattern=pattern).setup("fit")
    start, end = f"pattern={pattern!r}: is not a glob below a folder: ", ". Use '**/*.txt', for example."
    assert str(raised.value).startswith(start)
    assert str(raised.value).endswith(end)


def test_no_file_is_readable(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").symlink_to(tmp_path / "missing")
    expected = (
        f"path='{tmp_path}': 2 of 2 files cannot be read, a.txt for example: it is a broken link. Make them "
        "readable, or name another folder."
    )
    with pytest.raises(ValueError, match=message(expected)):
        make(tmp_path).setup("fit")


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    for path in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(ValueError, match=message(f"path='{path}': a.txt is empty. Name files with text.")):
            make(path).setup("fit")


def test_only_empty_files(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").touch()
    expected = f"path='{tmp_path}': all 2 files are empty. Name files with text."
    with pytest.raises(ValueError, match=message(expected)):
        make(tmp_path).setup("fit")


def test_a_single_file(folder: Path) -> None:
    path = folder / "part0" / "00.txt"
    expected = (
        f"path='{path}': 00.txt is the only file with text, and the split is by file, so that "
        "validation text was never seen. Cut it into several files, or name a folder with more."
    )
    with pytest.raises(ValueError, match=message(expected)):
        make(path).setup("fit")


def test_sequence_length_longer_than_the_text(folder: Path) -> None:
    expected = (
        "sequence_length=1000: one window takes 1001 bytes, and there are 3215 bytes in 16 training files "
        "and 803 in 4 validation files. Lower sequence_length, add text, or change val_fraction=0.2 or "
        "seed=0, which choose the files."
    )
    with pytest.raises(ValueError, match=message(expected)):
        make(folder, sequence_length=1000).setup("validate")


def test_one_window_exactly_is_enough(folder: Path) -> None:
    data = ready(folder, sequence_length=802, batch_size=3)
    assert len(data.val_dataloader()) == 1
    assert len(data.train_dataloader()) == 1


@pytest.mark.parametrize("world_size", [1, 4])
def test_fewer_windows_than_a_batch_per_rank(folder: Path, world_size: int) -> None:
    data = make(folder, batch_size=401)
    data.trainer = Mock(L.Trainer, world_size=world_size)
    expected = (
        f"batch_size=401: one batch for each of {world_size} ranks takes {401 * world_size} windows, and the "
        "training text has 401 of 8 bytes. Lower batch_size or sequence_length, or add text."
    )
    if world_size == 1:
        data.setup("fit")
    else:
        with pytest.raises(ValueError, match=message(expected)):
            data.setup("fit")
    data.setup("validate")


def test_a_loader_before_setup(folder: Path) -> None:
    expected = "TextDataModule has no text yet: call setup() first, or hand it to a Trainer."
    with pytest.raises(RuntimeError, match=message(expected)):
        make(folder).train_dataloader()
