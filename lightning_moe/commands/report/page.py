"""A report as one page of HTML with everything in it: no script, style, font or image from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from html import escape

from lightning_moe.commands.report.data import is_of_test, is_of_validation
from lightning_moe.commands.report.find import Run
from lightning_moe.commands.report.health import Tile, tiles
from lightning_moe.commands.report.parts import Part, Section
from lightning_moe.commands.report.sections import sections

_STILL_WRITTEN = 300  # seconds: what was written so long ago may not be at its end
_MAX_OTHER_RUNS = 20
_MARKS = {"good": "\u2713", "watch": "!", "bad": "\u2717"}

_STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1c1e21; --soft: #5c6370; --line: #d9dce1; --box: #f6f7f9;
  --good: #11693b; --watch: #8a5300; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --back: #16181c; --text: #e6e8eb; --soft: #a2a9b4; --line: #3a3f47;
  --box: #20242a; --good: #6cd49a; --watch: #f0b35a; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem; max-width: 78rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0 0 .3rem; font-size: 1.5rem; } h2 { margin: 2.2rem 0 .2rem; font-size: 1.25rem; }
h2 { padding-top: .6rem; border-top: 1px solid var(--line); } h3 { margin: 1.2rem 0 .4rem; font-size: 1rem; }
p, dl { margin: .4rem 0; } small, .soft, .missing, dt { color: var(--soft); }
nav a { margin-right: .9rem; white-space: nowrap; }
a { color: inherit; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; } dd { margin: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); gap: .7rem; margin: 1rem 0; }
.tile { padding: .6rem .8rem; border: 1px solid var(--line); border-left: 5px solid var(--line); border-radius: 6px;
  background: var(--box); } .tile b { display: block; font-size: 1.45rem; line-height: 1.3; }
.tile span { display: block; } .tile small { display: block; }
.good { border-left-color: var(--good); } .good em { color: var(--good); }
.watch { border-left-color: var(--watch); } .watch em { color: var(--watch); }
.bad { border-left-color: var(--bad); } .bad em { color: var(--bad); }
.tile em { font-style: normal; font-weight: 600; }
.missing { padding: .5rem .8rem; border-left: 4px solid var(--line); background: var(--box); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 1rem; }
figure { margin: .6rem 0; max-width: 42rem; } figcaption { font-size: .9rem; }
svg.chart { display: block; width: 100%; height: auto; margin-top: .3rem; background: #fff; border-radius: 4px; }
svg.chart * { stroke-linejoin: round; stroke-linecap: butt; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
img:not([hidden]) { display: block; margin: .5rem 0; } .heatmaps { display: flex; flex-wrap: wrap; gap: .4rem 1rem; }
.control input { width: min(28rem, 60%); vertical-align: middle; } .control output { font-weight: 600; }
.wide { overflow-x: auto; } table { border-collapse: collapse; margin: .6rem 0; font-size: .9rem; }
th, td { padding: .2rem .7rem .2rem 0; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }
details { margin: .6rem 0; } summary { cursor: pointer; }
pre { padding: .8rem; background: var(--box); border: 1px solid var(--line); border-radius: 6px; overflow: auto;
  max-height: 40rem; font-size: .85rem; overflow-wrap: normal; }
@media print { details:not([open]) > *:not(summary) { display: block; } pre { max-height: none; } }
"""

# Shows one of the images that are in the page already.
_SCRIPT = """
for (const box of document.querySelectorAll(".snapshots")) {
  const slider = box.querySelector("input"), step = box.querySelector("output"), images = box.querySelectorAll("img");
  if (!slider) continue;
  const show = () => {
    images.forEach((image, i) => { image.hidden = i !== Number(slider.value); });
    step.value = images[slider.value].dataset.step;
    slider.setAttribute("aria-valuetext", "step " + step.value);
  };
  slider.addEventListener("input", show);
  box.querySelector(".control").hidden = false;
  show();
}
"""


def page(run: Run, now: float, track: Callable[[Sequence[Part]], Iterable[Part]] = iter) -> str:
    """The whole page.

    Args:
        run: What is shown.
        now: When the page is made, in seconds since the epoch.
        track: Passes on what is to be drawn, and may show how far it is.
    """
    shown = sections(run)
    body = [_head(run, now, shown)]
    parts: list[Part] = []
    for section in shown:
        parts.append(f'<section id="{_anchor(section)}"><h2>{escape(section.name)}</h2>')
        parts += [f'<p class="soft">{escape(section.meaning)}</p>', *section.parts, "</section>"]
    body += [part if isinstance(part, str) else part() for part in track(parts)]
    return _document(f"{run.given.resolve().name}: MoE report", "\n".join(body))


def _document(title: str, body: str) -> str:
    allowed = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="lightning-moe report">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
</head>
<body>
{body}
<script>{_SCRIPT}</script>
</body>
</html>
"""


def _anchor(section: Section) -> str:
    return section.name.lower().replace(" ", "-")


def _head(run: Run, now: float, shown: Sequence[Section]) -> str:
    # Evaluation may be logged by its own batches.
    trained = [series for name, series in run.scalars.items() if not (is_of_validation(name) or is_of_test(name))]
    last = max(series.steps[-1] for series in trained or run.scalars.values())
    found = re.search(r"^  max_steps: (\d+)\s*$", run.config[1], re.M) if run.config else None
    planned = int(found[1]) if found else 0
    rows = [
        ("Run", ", ".join(map(str, run.folders))),
        ("Last step", f"{last:,}, counted from 0" + (f"; max_steps is {planned:,}" if planned else "")),
        ("Last written", f"{_time(run.written)}, {_age(now - run.written)} before this page was made"),
        ("Page made", _time(now)),
    ]
    done = max(last + 1, run.loads[-1].step if run.loads else 0)  # loggers count from 0, and miss the last steps
    if planned and done >= planned:
        rows.append(("State", "All steps are done."))
    elif now - run.written < _STILL_WRITTEN:
        rows.append(("State", "May still be running: run the command again for newer numbers."))
    elif planned:
        rows.append(("State", "It ended before its last step, or writes nothing."))
    lines = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in rows)
    links = "".join(f'<a href="#{_anchor(section)}">{escape(section.name)}</a>' for section in shown)
    notes = "".join(f'<p class="missing">{escape(note)}</p>' for note in run.notes)
    if run.others:
        items = "".join(f"<li><code>{escape(str(path))}</code></li>" for path in run.others[:_MAX_OTHER_RUNS])
        more = len(run.others) - _MAX_OTHER_RUNS
        items += f"<li>and {more} more</li>" if more > 0 else ""
        notes += f"<details><summary>Folders of other runs</summary><ul>{items}</ul></details>"
    boxes = "".join(map(_tile, tiles(run)))
    name = run.given.resolve().name  # of "."
    return (
        f"<header><h1>MoE report: {escape(str(run.given) if run.given.name else name)}</h1><dl>{lines}</dl>{notes}"
        f'<div class="tiles">{boxes}</div><nav aria-label="Sections">{links}</nav></header>'
    )


def _tile(tile: Tile) -> str:
    mark = f"{_MARKS[tile.state]} " if tile.state else ""
    verdict = f"<em>{mark}{escape(tile.verdict)}</em>" if tile.verdict else ""
    return (
        f'<div class="tile {tile.state}"><span>{escape(tile.label)}</span><b>{escape(tile.value)}</b>{verdict}'
        f"<small>{escape(tile.note)}</small></div>"
    )


def _time(moment: float) -> str:
    return datetime.fromtimestamp(moment).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")


def _age(elapsed: float) -> str:
    """A time span in its largest unit.

    >>> _age(59), _age(90), _age(7200), _age(200000)
    ('59 s', '1 min', '2 h', '2 days')
    """
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if elapsed >= length * (2 if unit == "days" else 1):
            return f"{elapsed // length:.0f} {unit}"
    return f"{max(elapsed, 0):.0f} s"
