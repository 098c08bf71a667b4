"""The page of ``lightning-moe report`` in a browser: no errors, nothing from the network, figures, slider."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lightning_moe.commands.report.command import main
from lightning_moe.commands.report.figures import thinned
from tests.reported import write_classes, write_csv, write_loads

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_CHROMIUM = next((path for path in map(shutil.which, _NAMES) if path), None)
_PATIENCE = 60.0
needs_chromium = pytest.mark.skipif(_CHROMIUM is None, reason=f"no browser: none of {', '.join(_NAMES)} is installed")


class Browser:
    """Headless Chromium, driven through the DevTools protocol over a pair of pipes."""

    def __init__(self, profile: Path) -> None:
        assert _CHROMIUM
        flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        flags += "--disable-component-update --disable-sync --remote-debugging-pipe --window-size=1200,900"
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for pair in (os.pipe(), os.pipe()) for end in _closing(pair)]
        its_in, self._out, self._in, its_out = ends

        def hand_over() -> None:  # it reads from 3 and writes to 4
            os.dup2(its_in, 3)
            os.dup2(its_out, 4)

        self._process = subprocess.Popen(
            [_CHROMIUM, *flags.split(), f"--user-data-dir={profile}", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(3, 4),
            preexec_fn=hand_over,  # noqa: PLW1509  # the child does nothing else before it is Chromium
            start_new_session=True,
        )
        os.close(its_in)
        os.close(its_out)
        self._received = b""
        self._number = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        os.close(self._out)
        os.close(self._in)  # which ends it
        try:
            self._process.wait(_PATIENCE)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # all of it
            self._process.wait()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = self._send(method, params)
        answer = self._until(lambda m: m.get("id") == number)
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, page: Path) -> None:
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri())
        if not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._until(lambda m: m.get("method") == "Page.loadEventFired")

    def evaluate(self, expression: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str, code: int) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def faults(self) -> list[str]:
        """What the page did wrong since it was opened: errors, and requests but for itself."""
        self.evaluate("new Promise(done => setTimeout(done, 100))")
        found = []
        for event in self.events:
            method, params = event["method"], event["params"]
            if method == "Runtime.exceptionThrown":
                found.append(params["exceptionDetails"]["exception"]["description"])
            elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                found.append(params["entry"]["text"])
            elif method == "Runtime.consoleAPICalled":
                found.append(f"console.{params['type']}")
            elif method == "Network.requestWillBeSent" and params.get("type") != "Document":
                url = params["request"]["url"]
                found += [] if url.startswith("data:") else [f"requested {url}"]
            elif method == "Page.javascriptDialogOpening":
                found.append(f"dialog {params['message']}")
        return found

    def _send(self, method: str, params: dict[str, Any]) -> int:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        content = json.dumps(message).encode() + b"\0"
        while content:
            content = content[os.write(self._out, content) :]
        return self._number

    def _until(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        end = time.monotonic() + _PATIENCE
        while True:
            while b"\0" in self._received:
                line, _, self._received = self._received.partition(b"\0")
                message = json.loads(line)
                if "method" in message:
                    self.events.append(message)
                if message.get("method") == "Page.javascriptDialogOpening":  # or nothing goes on
                    self._send("Page.handleJavaScriptDialog", {"accept": True})
                if wanted(message):
                    return message
            ready, _, _ = select.select([self._in], [], [], max(0.0, end - time.monotonic()))
            part = os.read(self._in, 1 << 20) if ready else b""
            assert part, f"Chromium {'said no more' if ready else f'took more than {_PATIENCE:.0f} s'}"
            self._received += part


def _closing(pair: tuple[int, int]) -> Iterator[int]:
    """Ends of a pipe, which are closed once they have been used."""
    for end in pair:
        yield end
        os.close(end)


@pytest.fixture
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    profile = tmp_path_factory.mktemp("profile")
    opened = Browser(profile)
    yield opened
    opened.close()
    shutil.rmtree(profile, ignore_errors=True)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run with everything, and with names that are hard to show."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    steps = range(9, 500, 10)
    curves = ("train_loss", "val_loss", "lr", "<script>alert(1)</script>", "_$x^$")
    metrics = ("load_imbalance", "router_entropy", "dead_experts", "dropped_fraction", "rerouted_fraction", "aux_loss")
    metrics += ("dispatch_share", "dispatch_seconds", "dispatch_seconds_slowest", "dispatch_bytes")
    names = [*curves, *(f"moe/{metric}" for metric in metrics)]
    names += [f"moe/layer_{layer:02d}/load_imbalance" for layer in range(12)]
    write_csv(folder, {name: {s: (i + 1) / (s + 9) + 0.5 for s in steps} for i, name in enumerate(names)})
    write_loads(folder, {s: [[s, 100, 0, 7 * layer] for layer in range(12)] for s in (50, 100, 150)})
    write_classes(folder, 150, ["space", "<img src=x onerror=alert(2)>"], [[[1, 2, 3, 4], [4, 3, 2, 1]]] * 12)
    (folder / "config.yaml").write_text("model: '<script>alert(3)</script>'\n")
    assert main([str(folder)]) == 0
    return folder / "report.html"


@needs_chromium
def test_faults_are_seen(browser: Browser, tmp_path: Path) -> None:
    faulty = {
        "<script>nobody.knows()</script>": "nobody is not defined",
        "<script>throw new Error('mine')</script>": "mine",
        "<script>console.error('x')</script>": "console.error",
        "<img src='http://127.0.0.1:9/figure.png'>": "requested http://127.0.0.1:9/figure.png",
        "<style>@import 'http://127.0.0.1:9/font.css';</style>": "requested http://127.0.0.1:9/font.css",
        "<script>setTimeout(() => alert('hello'))</script>": "dialog hello",
    }
    for i, (content, fault) in enumerate(faulty.items()):
        path = tmp_path / f"{i}.html"
        path.write_text(f"<!DOCTYPE html><link rel='icon' href='data:,'><p>Hello</p>{content}")
        browser.open(path)
        assert any(fault in found for found in browser.faults()), (content, browser.events)


@needs_chromium
def test_it_has_no_errors_asks_for_nothing_and_has_its_figures(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.faults() == []
    browser.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    images = browser.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth, i.hidden, i.width, i.alt])")
    assert len(images) == 3 + 12 + 2  # heatmaps, layers over time, token classes
    for complete, natural, hidden, width, alt in images:
        assert complete
        assert natural > 200
        assert hidden or width > 200
        assert alt
    sizes = "const box = s.getBoundingClientRect(); return [box.width, box.height, s.getAttribute('aria-label')]"
    charts = browser.evaluate(f"[...document.querySelectorAll('svg')].map(s => {{ {sizes} }})")
    assert len(charts) > 10
    for width, height, label in charts:
        assert width > 300
        assert height > 100
        assert label
    drawn = "[...document.querySelectorAll('svg path')].filter(p => p.getTotalLength() > 100).length"
    assert browser.evaluate(drawn) > 3 * len(charts)  # axes and curves
    ids = browser.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(set(ids)) == len(ids)
    broken = "[...document.querySelectorAll('use')].filter(u => !document.querySelector(u.getAttribute('href'))).length"
    assert browser.evaluate(broken) == 0
    anchors = "[...document.querySelectorAll('nav a')].every(a => document.querySelector(a.getAttribute('href')))"
    assert browser.evaluate(anchors)
    assert "<script>alert(3)</script>" in browser.evaluate("document.querySelector('pre').textContent")


@needs_chromium
def test_the_slider_shows_another_step(browser: Browser, page: Path) -> None:
    browser.open(page)
    shown = "[...document.querySelectorAll('.snapshots img')].filter(i => i.checkVisibility()).map(i => i.dataset.step)"
    output = "document.querySelector('output').value"
    assert (browser.evaluate(shown), browser.evaluate(output)) == (["150"], "150")
    browser.evaluate("document.querySelector('input').focus()")
    for key, code, step in (
        ("ArrowLeft", 37, "100"),
        ("Home", 36, "50"),
        ("ArrowRight", 39, "100"),
        ("End", 35, "150"),
    ):
        browser.press(key, code)
        assert (browser.evaluate(shown), browser.evaluate(output)) == ([step], step)
    browser.evaluate("document.querySelector('input').scrollIntoView()")
    middle = browser.evaluate(
        "(b => [b.x + b.width / 2, b.y + b.height / 2])(document.querySelector('input').getBoundingClientRect())"
    )
    for kind in ("mousePressed", "mouseReleased"):
        browser.call("Input.dispatchMouseEvent", type=kind, x=middle[0], y=middle[1], button="left", clickCount=1)
    assert (browser.evaluate(shown), browser.evaluate(output)) == (["100"], "100")
    assert browser.faults() == []


@needs_chromium
def test_without_scripts_only_the_slider_is_missing(browser: Browser, page: Path) -> None:
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    browser.open(page)
    visible = "[...document.querySelectorAll({})].filter(i => i.checkVisibility())"
    assert browser.evaluate(f"{visible.format(repr('.snapshots img'))}.map(i => i.dataset.step)") == ["150"]
    assert browser.evaluate(f"{visible.format(repr('.control'))}.length") == 0
    assert browser.evaluate(f"{visible.format(repr('svg'))}.length") >= 10
    assert "needs scripts" in browser.evaluate("document.querySelector('noscript').innerText")


@needs_chromium
def test_it_is_readable_on_a_telephone_and_in_the_dark(browser: Browser, page: Path) -> None:
    browser.call("Emulation.setDeviceMetricsOverride", width=360, height=700, deviceScaleFactor=1, mobile=True)
    browser.open(page)
    assert browser.evaluate("document.documentElement.scrollWidth") <= 360
    assert browser.evaluate("[...document.images].every(i => i.getBoundingClientRect().right <= 360)")
    colours = "['body', 'svg'].map(s => getComputedStyle(document.querySelector(s)).backgroundColor)"
    assert browser.evaluate(colours) == ["rgb(255, 255, 255)"] * 2
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert browser.evaluate(colours) == ["rgb(22, 24, 28)", "rgb(255, 255, 255)"]


@pytest.mark.parametrize("size", [1, 2, 9, 10, 11, 57, 1000, 12345])
def test_a_thinned_curve_keeps_what_stands_out(size: int) -> None:
    steps = [3 * i + 1 for i in range(size)]
    values = [float((i * 7919) % 1009) for i in range(size)]
    values[size // 3], values[size // 2] = 5000.0, -5000.0
    for most in (10, 100, 2000):
        kept_steps, kept = thinned(steps, values, most)
        assert len(kept) <= max(most, min(size, most))
        assert kept_steps == sorted(set(kept_steps))
        assert all(values[(step - 1) // 3] == value for step, value in zip(kept_steps, kept, strict=True))
        assert (kept_steps[0], kept_steps[-1]) == (steps[0], steps[-1])
        assert {min(values), max(values)} <= set(kept)
        if size <= most:
            assert kept == values


def test_a_thinned_curve_keeps_its_gaps() -> None:
    values = [float("nan") if 400 <= i < 600 else float(i % 10) for i in range(1000)]
    steps, kept = thinned(range(1000), values, 100)
    gap = [step for step, value in zip(steps, kept, strict=True) if value != value]
    assert gap
    assert min(gap) >= 400
    assert max(gap) < 600
    assert {value for value in kept if value == value} == {0.0, 9.0}
