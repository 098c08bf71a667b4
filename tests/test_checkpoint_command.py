"""The command ``lightning-moe checkpoint``: what it prints, its exit codes, and its messages."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_moe.checkpoint.manifest import SavedLayout
from lightning_moe.checkpoint.pieces import Piece
from lightning_moe.checkpoint.saving import Snapshot, save
from lightning_moe.cli import main
from lightning_moe.commands.description import size_text
from tests.test_cli import from_a_shell

PARAMETERS = {"layer.experts.w1": torch.randn(4, 20, 5), "layer.norm": torch.randn(20)}
COUNTS = torch.arange(4)
GROUPS = [
    {"names": ["layer.experts.w1"], "values": {"lr": 0.00025, "betas": (0.9, 0.95), "fused": None}},
    {"names": ["layer.norm"], "values": {"lr": torch.tensor(0.5), "weight_decay": 0}},
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A small checkpoint with all that there can be."""
    tensors = {f"model/{name}": value for name, value in PARAMETERS.items()} | {"model/layer.counts": COUNTS}
    for state in ("exp_avg", "exp_avg_sq"):
        tensors |= {f"optimizer/{state}/{name}": value.clone() for name, value in PARAMETERS.items()}
    save(
        Snapshot(
            {name: Piece(tuple(value.shape), 0, value.reshape(-1)) for name, value in tensors.items()},
            run={"optimizer_groups": GROUPS, "extra_state": {"layer._extra_state": {"a": 1}}},
            layout=SavedLayout(world_size=8, expert_parallel_size=4, stage=2, precision="bf16-mixed"),
            step=12_345,
            epoch=2,
            versions={"lightning_moe": "0.1.0", "torch": "2.13.0"},
        ),
        tmp_path / "last.ckpt",
    )
    return tmp_path / "last.ckpt"


def run(capsys: pytest.CaptureFixture[str], *args: str | Path) -> tuple[int | str | None, str, str]:
    """Exit code, stdout and stderr of ``lightning-moe checkpoint`` with these arguments."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["checkpoint", *map(str, args)])
    out, err = capsys.readouterr()
    return ended.value.code, out, err


def damage(path: Path, name: str = "rank00000-0000.safetensors") -> None:
    content = bytearray((path / name).read_bytes())
    content[-1] ^= 1
    (path / name).write_bytes(content)


# ------------------------------------------------------------------------------------------- inspect


def test_inspect(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "inspect", path)
    assert (code, err) == (0, "")
    sizes = {file.name: size_text(file.stat().st_size) for file in path.iterdir()}
    sizes["total"] = size_text(sum(file.stat().st_size for file in path.iterdir()))
    width = max(map(len, sizes.values()))
    files = "\n".join(f"  {name:26}  {sizes[name]:>{width}}" for name in sorted(sizes))
    assert out == (
        f"""\
{path}
  format      version 1
  saved by    lightning_moe 0.1.0, torch 2.13.0
  saved in    8 ranks, expert_parallel_size 4, ZeRO stage 2, precision bf16-mixed
  step        12,345
  epoch       2
  parameters  424; 420 of them optimized

Weights
  name              shape       dtype      size
  layer.counts      [4]         int64      32 B
  layer.experts.w1  [4, 20, 5]  float32  1.6 kB
  layer.norm        [20]        float32    80 B
  3 tensors, 1.7 kB
  and in run.pt: layer._extra_state

Optimizer
  exp_avg     2 tensors, 1.7 kB
  exp_avg_sq  2 tensors, 1.7 kB
  group 0     1 parameter, lr=0.00025, betas=(0.9, 0.95), fused=None
  group 1     1 parameter, lr=0.5, weight_decay=0

Files
{files}
"""
    )


def test_inspect_all(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, short, _ = run(capsys, "inspect", path)
    code, out, _ = run(capsys, "inspect", path, "--all")
    assert code == 0
    for state in ("exp_avg", "exp_avg_sq"):
        table = (
            f"Optimizer {state}\n"
            "  name              shape       dtype      size\n"
            "  layer.experts.w1  [4, 20, 5]  float32  1.6 kB\n"
            "  layer.norm        [20]        float32    80 B\n"
            "  2 tensors, 1.7 kB\n\n"
        )
        assert table in out
        out = out.replace(table, "")
    assert out == short


def test_inspect_json(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "inspect", path, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    files = found.pop("files")
    assert {file["name"]: file["size"] for file in files} == {f.name: f.stat().st_size for f in path.iterdir()}
    assert found.pop("size") == sum(file["size"] for file in files)
    experts = {"name": "layer.experts.w1", "shape": [4, 20, 5], "dtype": "float32", "size": 1600}
    norm = {"name": "layer.norm", "shape": [20], "dtype": "float32", "size": 80}
    assert found == {
        "path": str(path),
        "format_version": 1,
        "versions": {"lightning_moe": "0.1.0", "torch": "2.13.0"},
        "step": 12_345,
        "epoch": 2,
        "layout": {"world_size": 8, "expert_parallel_size": 4, "stage": 2, "precision": "bf16-mixed"},
        "num_parameters": 424,
        "num_optimized": 420,
        "weights": [{"name": "layer.counts", "shape": [4], "dtype": "int64", "size": 32}, experts, norm],
        "moments": [{"state": state, **entry} for state in ("exp_avg", "exp_avg_sq") for entry in (experts, norm)],
        "extra_state": ["layer._extra_state"],
        "optimizer_groups": [
            {"names": ["layer.experts.w1"], "values": {"lr": 0.00025, "betas": [0.9, 0.95], "fused": None}},
            {"names": ["layer.norm"], "values": {"lr": 0.5, "weight_decay": 0}},
        ],
    }


def test_inspect_reads_no_tensors(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = run(capsys, "inspect", path)
    (file,) = path.glob("rank*.safetensors")
    size = file.stat().st_size
    file.write_bytes(b"x" * size)
    assert run(capsys, "inspect", path) == before
    file.unlink()
    assert run(capsys, "inspect", path) == (1, before[1], f"{file}: is missing or of another size\n")


def test_inspect_weights_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(Snapshot({"model/w": Piece((2,), 0, torch.ones(2))}, run={"extra_state": {}}), tmp_path / "weights.ckpt")
    code, out, _ = run(capsys, "inspect", tmp_path / "weights.ckpt")
    assert code == 0
    assert "  parameters  2\n" in out
    assert "  saved in    1 rank," in out
    assert "1 tensor, 8 B\n\nFiles\n" in out


def test_long_hyper_parameters_are_wrapped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {f"hyper_parameter_{i}": (i, 0.5) for i in range(9)}
    run_state = {"optimizer_groups": [{"names": ["w"], "values": values}]}
    save(Snapshot({"model/w": Piece((2,), 0, torch.ones(2))}, run=run_state), tmp_path / "a.ckpt")
    _, out, _ = run(capsys, "inspect", tmp_path / "a.ckpt")
    lines = out.partition("  group 0  ")[2].partition("\n\n")[0].split("\n")
    assert len(lines) == 5
    assert all(line.startswith(" " * 11) and len(line) <= 91 for line in lines[1:])
    expected = ["1 parameter", *(f"hyper_parameter_{i}=({i}, 0.5)" for i in range(9))]
    assert ", ".join(expected) == " ".join(line.strip() for line in lines)
    assert all(f"=({i}, 0.5)" in out for i in range(9)), "a value was torn apart"


def test_inspect_damaged_state(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(path, "run.pt")
    code, out, err = run(capsys, "inspect", path)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {path / 'run.pt'}: its checksum is another")


# -------------------------------------------------------------------------------------------- verify


def test_verify(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = size_text(sum(file.stat().st_size for file in path.iterdir()))
    assert run(capsys, "verify", path) == (0, f"whole: 4 files, {size}\n", "")


def test_verify_names_every_damaged_file(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(path)
    (path / "ranks.pt").unlink()
    code, out, err = run(capsys, "verify", path)
    assert (code, out) == (1, "")
    first, second = err.splitlines()
    assert first.startswith(f"{path / 'rank00000-0000.safetensors'}: its checksum is another")
    assert second.startswith(f"{path / 'ranks.pt'}: it is missing")


def test_verify_damaged_manifest(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = path / "checkpoint.json"
    manifest.write_text(manifest.read_text().replace('"step": 12345', '"step": 12346'))
    code, _, err = run(capsys, "verify", path)
    assert code == 1
    assert err.startswith(f"error: {manifest}: its checksum is another")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("action", ["verify", "export"])
def test_progress_on_a_terminal(
    action: str, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    args = [path] if action == "verify" else [path, tmp_path / "out"]
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", terminal)
        code, out, _ = run(capsys, action, *args)
    assert code == 0
    assert "verifying: " in terminal.getvalue()
    assert "\r" not in out


# -------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize(
    ("args", "dtype"),
    [([], torch.float32), (["--dtype=fp32"], torch.float32), (["--dtype", "bf16"], torch.bfloat16)],
    ids=["stored", "fp32", "bf16"],
)
def test_export(
    args: list[str], dtype: torch.dtype, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "export", path, tmp_path / "out", *args)
    assert code == 0
    file = tmp_path / "out" / "model.safetensors"
    size = size_text(420 * dtype.itemsize + 32)
    assert out == f"{file}  {size_text(file.stat().st_size):>8}\nexported: 3 tensors, {size}\n"
    assert err == "left out, because safetensors files hold only tensors: layer._extra_state\n"
    found = load_file(file)
    assert sorted(found) == ["layer.counts", "layer.experts.w1", "layer.norm"]
    assert torch.equal(found["layer.counts"], COUNTS)
    assert all(found[name].dtype == dtype and torch.equal(found[name], v.to(dtype)) for name, v in PARAMETERS.items())


def test_export_again(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(capsys, "export", path, out)[0] == 0
    code, said, err = run(capsys, "export", path, out, "--max_shard_bytes=1000")
    assert (code, said) == (1, "")
    assert err.startswith(f"error: output='{out}': has model.safetensors already.")
    assert "--overwrite" in err
    assert run(capsys, "export", path, out, "--max_shard_bytes=1000", "--overwrite")[0] == 0
    assert sorted(file.name for file in out.iterdir()) == [
        *(f"model-0000{i}-of-00003.safetensors" for i in range(1, 4)),
        "model.safetensors.index.json",
    ]


def test_export_damaged(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(path)
    code, out, err = run(capsys, "export", path, tmp_path / "out")
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {path / 'rank00000-0000.safetensors'}: its checksum is another")


# ----------------------------------------------------------------------------------- wrong use, and help


@pytest.mark.parametrize("action", ["inspect", "verify", "export"])
def test_no_checkpoint(action: str, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["out"] if action == "export" else []
    code, out, err = run(capsys, action, tmp_path / "nothing.ckpt", *more)
    assert (code, out) == (1, "")
    assert err == (
        f"error: {tmp_path / 'nothing.ckpt'}: is not a checkpoint: it does not exist. "
        f"Checkpoints beside it, newest first: {path}.\n"
    )
    (tmp_path / "lightning.ckpt").write_bytes(b"")
    code, _, err = run(capsys, action, tmp_path / "lightning.ckpt", *more)
    assert code == 1
    assert err.startswith(f"error: {tmp_path / 'lightning.ckpt'}: is a file, and a checkpoint of ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "{inspect,verify,export}"),
        (["look"], "invalid choice: 'look'"),
        (["verify"], "path"),
        (["export", "a.ckpt"], "output"),
        (["export", "a.ckpt", "out", "--dtype=fp16"], "invalid choice: 'fp16' (choose from 'stored', 'fp32', 'bf16')"),
        (["export", "a.ckpt", "out", "--max_shard_bytes=0"], "0 does not conform to restriction v>0"),
        (["inspect", "a.ckpt", "--every"], "--every"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_wrong_use(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *args)
    assert (code, out) == (2, "")
    assert message in err.partition("error: ")[2]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], ["inspect Show what", "verify Compare", "export Write", "that ExpertParallelStrategy saved"]),
        (["inspect"], ["path Folder of the checkpoint.", "--all List every", "--json Write everything as JSON"]),
        (["verify"], ["path Folder of the checkpoint.", "The exit code is 0 if"]),
        (
            ["export"],
            [
                "path Folder of the checkpoint.",
                "output Folder for the files",
                "--dtype {stored,fp32,bf16} What tensors",
                "--max_shard_bytes MAX_SHARD_BYTES How many bytes",
                "--overwrite Replace an earlier export",
            ],
        ),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) and len(x) < 2 else "",
)
def test_help(args: list[str], said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *args, "--help")
    assert (code, err) == (0, "")
    text = " ".join(out.split())
    assert [phrase for phrase in said if phrase not in text] == []


def test_help_of_the_whole_command_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, from_a_shell():
        main(["--help"])
    assert ended.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "lightning-moe checkpoint --help" in said
    assert "lightning-moe report --help" in said


def test_a_reader_that_has_had_enough(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``lightning-moe checkpoint inspect last.ckpt | head -1``: no message, now or when what is left is flushed."""
    reading, writing = os.pipe()
    os.close(reading)
    with monkeypatch.context() as patched, open(writing, "w") as closed:
        patched.setattr(sys, "stdout", closed)
        code, _, err = run(capsys, "inspect", path)
    assert (code, err) == (1, "")
