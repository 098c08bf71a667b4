"""What an ExpertHeatmap has written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def lines(folder: Path, name: str = "load.jsonl", of: str = "experts") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / of / name).read_text().splitlines()]


def figures(folder: Path, of: str = "experts") -> list[str]:
    """Names of the figures, each of which is a whole PNG."""
    from PIL import Image

    paths = sorted((folder / of).glob("*.png"))
    for path in paths:
        with Image.open(path) as image:
            image.load()
            assert min(image.size) > 100
            assert image.getextrema()[0] == (0, 255)
    return [path.name for path in paths]
