"""Names of layers as figures have room for them."""

from __future__ import annotations

from collections.abc import Sequence

_LONGEST_NAME = 28  # characters


def short_names(names: Sequence[str]) -> tuple[list[str], str]:
    """Names of layers without the parts that are the same in all, and the pattern of the whole names.

    >>> short_names(["model.blocks.1.moe", "model.blocks.3.moe"])
    (['00: blocks.1', '01: blocks.3'], 'model.blocks.*.moe')
    """
    parts = [name.split(".") for name in names]
    if len(names) == 1:
        short = names[0]
        while len(short) > _LONGEST_NAME and "." in short:
            short = short.split(".", 1)[1]
        return [_with_index(0, short)], names[0] if len(short) > _LONGEST_NAME or short != names[0] else ""
    shortest = min(len(p) for p in parts)
    head = _num_shared([p[:shortest] for p in parts])
    tail = _num_shared([p[head:][::-1] for p in parts])
    middles = [p[head : len(p) - tail] for p in parts]
    stars = "*"
    if len({len(m) for m in middles}) == 1:
        same = [len(set(column)) == 1 for column in zip(*middles, strict=True)]
        stars = ".".join(part if is_same else "*" for part, is_same in zip(middles[0], same, strict=True))
        middles = [[part for part, is_same in zip(m, same, strict=True) if not is_same] for m in middles]
    if head and all(m and m[0].isdecimal() for m in middles):
        middles = [[parts[0][head - 1], *m] for m in middles]
    pattern = ".".join([*parts[0][:head], stars, *parts[0][len(parts[0]) - tail :]])
    return [_with_index(i, ".".join(m)) for i, m in enumerate(middles)], "" if pattern == "*" else pattern


def printable(text: str) -> str:
    """With control characters written as Python writes them."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shortened(text: str, limit: int = _LONGEST_NAME) -> str:
    """Cut in the middle, so that the ends of long names stay apart."""
    if len(text) <= limit:
        return text
    head = (limit - 1) // 3
    return f"{text[:head]}…{text[len(text) - (limit - 1 - head) :]}"


def _num_shared(lists: Sequence[Sequence[str]]) -> int:
    """How many leading entries all lists have in common; at least one entry of each is left over."""
    most = min(map(len, lists)) - 1
    return next((i for i in range(most) if len({entries[i] for entries in lists}) > 1), max(most, 0))


def _with_index(index: int, name: str) -> str:
    return shortened(name) if name.startswith("layer_") or not name else f"{index:02d}: {shortened(name)}"
