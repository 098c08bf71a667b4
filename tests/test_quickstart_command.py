"""The command of the README's quickstart, through Lightning's own launcher."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.commands import run_command, script_of_environment, write_text


@pytest.mark.timeout(110)
def test_quickstart_command(project_root: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text")
    ended = run_command(
        [
            script_of_environment("lightning-moe"),
            "fit",
            "--config",
            project_root / "configs" / "quickstart.yaml",
            "--trainer.max_steps=2",
            "--trainer.val_check_interval=2",
            "--trainer.limit_val_batches=2",
            f"--data.path={text}",
        ],
        tmp_path,
        timeout=100,
    )
    assert ended.code == 0, ended.output
    assert not ended.left
    assert "Traceback" not in ended.output
    assert "is deprecated" not in ended.output  # calls that others make: see lightning_moe.cli
    # Once, not once per rank.
    places = re.findall(r"^(logs \(\w+\)|config|checkpoint): (.+)$", ended.output, re.M)
    assert [name for name, _ in places] == ["logs (TensorBoardLogger)", "logs (CSVLogger)", "config", "checkpoint"]
    for name, place in places:
        assert (tmp_path / place).exists(), f"{name}: {place}"
    assert ended.output.count("A sample, continuing 'def ':\ndef ") == 1
    # The progress bar shows the loss, and how evenly the experts are used.
    assert re.search(r"train_loss=\d", ended.output)
