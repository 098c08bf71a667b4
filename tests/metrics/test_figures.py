"""What the figures say, read back from their data and texts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import Tensor

from lightning_moe import metrics
from lightning_moe.metrics._names import short_names
from lightning_moe.metrics.figures import affinity_figure, class_figure, load_figure, load_over_time_figure


def names(count: int, pattern: str = "transformer.blocks.{}.feed_forward") -> list[str]:
    return [pattern.format(2 * index + 1) for index in range(count)]


def texts(figure: Figure, gid: str) -> list[str]:
    return [text.get_text() for text in figure.texts if text.get_gid() == gid]


def shown(axes: Any) -> np.ma.MaskedArray:
    return axes.images[0].get_array()


def dead(axes: Any) -> list[tuple[int, int]]:
    """Rows and columns that are marked."""
    marked = [image.get_array() for image in axes.images if image.get_gid() == "dead"]
    return [(int(r), int(c)) for mask in marked for r, c in zip(*np.nonzero(mask.filled(False)), strict=True)]


def colour(axes: Any, value: float) -> tuple[float, float, float]:
    image = axes.images[0]
    return tuple(float(part) for part in image.cmap(image.norm(np.array([value]))[0])[:3])


def loads(layers: int, experts: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.rand(experts, generator=generator) * 1000 + 1).long() for _ in range(layers)]


def ticks(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def test_load_is_drawn_as_multiple_of_the_mean() -> None:
    counts = [torch.tensor([3, 1, 0, 0]), torch.tensor([5, 5, 5, 5])]
    figure = load_figure(counts, names(2), "Load at step 50")
    (axes,) = figure.axes
    assert shown(axes).tolist() == [[3, 1, 0, 0], [1, 1, 1, 1]]
    assert dead(axes) == [(0, 2), (0, 3)]
    assert texts(figure, "legend") == ["dead: no token"]
    assert texts(figure, "title") == ["Load at step 50"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("expert", "layer")
    assert ticks(axes.xaxis) == ["0", "1", "2", "3"]
    assert ticks(axes.yaxis) == ["00: blocks.1", "01: blocks.3"]
    assert texts(figure, "note") == ["transformer.blocks.*.feed_forward"]
    assert texts(figure, "scale label") == ["load / mean load; 1 = even"]
    assert [text.get_text() for text in axes.texts] == ["3.00", "1.00", "1.00", "1.00", "1.00", "1.00"]
    marks = [c for c in axes.collections if c.get_gid() == "dead marks"]
    assert marks[0].get_offsets().tolist() == [[2, 0], [3, 0]]


@pytest.mark.parametrize(
    ("counts", "extends"),
    [([5, 5, 5, 5], False), ([9, 1, 1, 1], False), ([80, 1, 1, 1, 1, 1, 1, 1], True)],
)
def test_colours_are_white_at_even_blue_below_and_red_above(counts: list[int], extends: bool) -> None:
    figure = load_figure([torch.tensor(counts)], ["moe"], "")
    (axes,) = figure.axes
    assert colour(axes, 1.0) == pytest.approx((1, 1, 1), abs=0.02)
    for value in (0.0, 0.4, 0.8):
        red, _, blue = colour(axes, value)
        assert blue > red + 0.05
    for value in (1.2, 1.9, 50.0):
        red, _, blue = colour(axes, value)
        assert red > blue + 0.05
    assert colour(axes, 4.0) == pytest.approx(to_rgb("#b2182b"), abs=0.01)
    assert colour(axes, 2.0) == pytest.approx(to_rgb("#ef8a62"), abs=0.02)  # as striking as half of it
    assert texts(figure, "scale") == ["0", "0.5", "1", "2", "3", "4"]  # of every figure
    assert any(artist.get_gid() == "extends" for artist in figure.patches + figure.artists) == extends


def test_layers_of_unequal_size_and_without_tokens() -> None:
    counts = [torch.tensor([1, 3]), torch.tensor([2, 0, 4, 2]), torch.zeros(3, dtype=torch.int64)]
    figure = load_figure(counts, ["a.0.moe", "a.1.moe", "a.2.moe"], "")
    (axes,) = figure.axes
    assert shown(axes).filled(-1).tolist() == [[0.5, 1.5, -1, -1], [1, 0, 2, 1], [-1, -1, -1, -1]]
    assert dead(axes) == [(1, 1)]
    assert texts(figure, "legend") == ["dead: no token", "no such expert or no tokens"]


def test_over_time() -> None:
    loads_SE = torch.tensor([[1, 3], [4, 0], [0, 0]])
    figure = load_over_time_figure([50, 100, 150], loads_SE, "Load of layer_03")
    (axes,) = figure.axes
    assert shown(axes).filled(-1).tolist() == [[0.5, 2, -1], [1.5, 0, -1]]
    assert dead(axes) == [(1, 1)]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("optimizer step", "expert")
    assert ticks(axes.xaxis) == ["50", "100", "150"]
    assert ticks(axes.yaxis) == ["0", "1"]
    assert texts(figure, "legend") == ["dead: no token", "no tokens"]


def test_many_steps_are_summed() -> None:
    loads_SE = torch.arange(2001 * 2).view(2001, 2)
    figure = load_over_time_figure(range(0, 20010, 10), loads_SE, "")
    (axes,) = figure.axes
    columns = [rows.sum(0) for rows in loads_SE.split(5)]
    assert np.allclose(shown(axes).T, torch.stack([c / c.double().mean() for c in columns]))
    assert texts(figure, "note") == ["a column is the sum of 5 counts"]
    at = [int(tick) for tick in axes.get_xticks()]
    assert ticks(axes.xaxis) == [str(50 * tick) for tick in at]
    assert at[0] == 0
    assert at[-1] == 400


def test_classes_are_drawn_as_lift() -> None:
    first, second = torch.tensor([[8, 2, 0], [4, 6, 0]]), torch.tensor([[0, 0], [3, 1]])
    figure = class_figure([first, second], ["space", "$a$\n"], names(2), "Classes")
    left, right = figure.axes
    expected = [[(8 / 10) / (12 / 20), (2 / 10) / (8 / 20)], [(4 / 10) / (12 / 20), (6 / 10) / (8 / 20)]]
    assert np.allclose(shown(left)[:, :2], expected)
    assert dead(left) == [(0, 2), (1, 2)]
    assert shown(right).filled(-1).tolist() == [[-1, -1], [1, 1]]
    assert (left.get_title(loc="left"), right.get_title(loc="left")) == ("layer 00: blocks.1", "layer 01: blocks.3")
    assert (left.get_xlabel(), left.get_ylabel()) == ("expert", "class of token")
    assert ticks(left.yaxis) == ["space", "$a$\\n"]
    assert not left.yaxis.get_ticklabels()[1].get_parse_math()
    assert texts(figure, "scale label") == ["how many times as often as on average; 1 = as often"]
    assert texts(figure, "legend") == ["dead: no token", "no tokens"]


def test_other_classes_are_drawn_where_there_are_any() -> None:
    none, some = torch.tensor([[8, 2], [4, 6], [0, 0]]), torch.tensor([[1, 1], [1, 1], [0, 2]])
    labels = ["a", "b", "other"]
    assert ticks(class_figure([none, none], labels, names(2), "").axes[0].yaxis) == ["a", "b"]
    assert ticks(class_figure([none, some], labels, names(2), "").axes[0].yaxis) == labels
    assert ticks(class_figure([none], ["other", "a", "b"], names(1), "").axes[0].yaxis) == ["other", "a", "b"]
    assert ticks(class_figure([torch.zeros(1, 2)], ["other"], names(1), "").axes[0].yaxis) == ["other"]


def test_affinity() -> None:
    shares = torch.tensor([[1.0, 0.4, 0.0], [0.3, 1.0, 0.0], [0.0, 0.0, 0.0]])
    figure = affinity_figure(shares, "Together")
    (axes,) = figure.axes
    assert shown(axes).filled(-1).tolist() == pytest.approx(np.array([[-1, 0.4, -1], [0.3, -1, -1], [-1, -1, -1]]))
    assert dead(axes) == [(0, 2), (1, 2), (2, 0), (2, 1), (2, 2)]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("expert B", "expert A")
    assert texts(figure, "scale label") == ["share of the tokens of expert A that also chose expert B"]
    assert texts(figure, "scale") == ["0", "0.125", "0.25", "0.375", "0.5"]


# ----------------------------------------------------------------------- legible

LONG = "model.some_very_long_prefix.decoder_layers_with_name_{}.sparse_feed_forward_mixture_block.inner"
TITLE = "A title that goes on and on, to say which run it was, and which of its many steps, and some more"
FIGURES: dict[str, Callable[[], Figure]] = {
    "1x4": lambda: load_figure(loads(1, 4), names(1), "Load"),
    "2x8": lambda: load_figure(loads(2, 8), names(2), "Load"),
    "8x4": lambda: load_figure(loads(8, 4), names(8, LONG), TITLE),
    "32x64": lambda: load_figure(loads(32, 64), names(32), "Load"),
    "3x256": lambda: load_figure(loads(3, 256), names(3), "Load"),
    "time": lambda: load_over_time_figure(range(0, 100_000, 50), torch.rand(2000, 64), TITLE),
    "time, 3 steps": lambda: load_over_time_figure([50, 100, 150], torch.rand(3, 4), "Load"),
    "classes": lambda: class_figure(torch.rand(5, 4, 8), ["a", "newline", "upper case", "x" * 40], names(5), "Classes"),
    "affinity": lambda: affinity_figure(torch.rand(64, 64), "Together"),
}


@pytest.mark.parametrize("kind", FIGURES)
def test_no_text_is_cut_off_or_covered(kind: str) -> None:
    figure = FIGURES[kind]()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()

    def box(text: Text) -> Any:
        return text.get_window_extent(renderer)

    def visible(found: list[Text]) -> list[Text]:
        return [text for text in found if text.get_text() and text.get_visible()]

    groups = [visible([text for text in figure.texts if text.get_gid() != "scale"]), visible(figure.texts)]
    for axes in figure.axes:
        rows, columns = axes.yaxis.get_ticklabels(), axes.xaxis.get_ticklabels()
        groups.append(visible([*rows, *columns, axes.xaxis.label, axes.yaxis.label]))
        assert all(b.xmin > a.xmax for a, b in pairwise(box(text) for text in visible(columns)))
    for group in groups:
        boxes = [(text.get_text(), box(text)) for text in group]
        for text, at in boxes:
            inside = at.xmin >= 0 and at.ymin >= 0 and at.xmax <= figure.bbox.xmax and at.ymax <= figure.bbox.ymax
            assert inside, f"{text!r} at {at} is cut off by {figure.bbox}"
        for i, (text, at) in enumerate(boxes):
            for other, there in boxes[:i]:
                crossing = (
                    at.xmin < there.xmax and there.xmin < at.xmax and at.ymin < there.ymax and there.ymin < at.ymax
                )
                assert not crossing, f"{text!r} covers {other!r}"
    assert all(value < 20 for value in figure.get_size_inches())


@pytest.mark.parametrize(
    ("given", "short", "pattern"),
    [
        (["a.0.moe", "a.1.moe"], ["00: a.0", "01: a.1"], "a.*.moe"),
        (["encoder.1.moe", "decoder.1.moe"], ["00: encoder", "01: decoder"], "*.1.moe"),
        (["a.moe", "b.c.moe"], ["00: a", "01: b.c"], "*.moe"),
        (["moe", "a.moe"], ["00: moe", "01: a.moe"], ""),
        (["moe"], ["00: moe"], ""),
        (["0", "1"], ["00: 0", "01: 1"], ""),
        (["a.b", "a"], ["00: a.b", "01: a"], ""),
        (["layer_00", "layer_01"], ["layer_00", "layer_01"], ""),
        (["model.decoder.blocks.0.feed_forward"], ["00: decoder.blocks.0.feed_forward"[:3] + " blocks.0.feed_forward"],
         "model.decoder.blocks.0.feed_forward"),
    ],
)  # fmt: skip
def test_names_are_shortened(given: list[str], short: list[str], pattern: str) -> None:
    assert short_names(given) == (short, pattern)


def test_long_names_stay_apart() -> None:
    short, pattern = short_names(names(4, LONG))
    assert len({*short}) == 4
    assert max(map(len, short)) <= 32
    assert pattern == LONG.format("").replace("decoder_layers_with_name_", "*")


@pytest.mark.parametrize(
    ("draw", "problem"),
    [
        (lambda: load_figure(loads(2, 4), ["one"], ""), "layer_names has 1 entries and tokens_per_expert has 2"),
        (lambda: load_figure([], [], ""), "at least 1"),
        (lambda: load_over_time_figure([1], torch.ones(2, 4), ""), "steps has 1 entries and loads_SE has 2"),
        (lambda: class_figure(torch.ones(1, 2, 4), ["a"], ["moe"], ""), "class_names has 1 entries"),
        (lambda: affinity_figure(torch.ones(2, 3), ""), r"affinity_EE has shape \[2, 3\]"),
    ],
)
def test_what_does_not_fit_is_refused(draw: Callable[[], Figure], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        draw()


def test_without_matplotlib_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lightning_moe\[plots\]"'):
        load_figure(loads(1, 4), ["moe"], "")


def test_the_metrics_need_no_matplotlib() -> None:
    code = (
        "import sys, torch, lightning  # torchmetrics has its own way to find out\n"
        "for name in [m for m in sys.modules if m.startswith('matplotlib.')] + ['matplotlib', 'matplotlib.figure']:\n"
        "    sys.modules[name] = None\n"
        "from lightning_moe.metrics import ExpertLoad\n"
        "load = ExpertLoad(2); load.update(torch.tensor([[1]])); print(load.compute().tolist())\n"
        "try: load.plot()\n"
        "except ModuleNotFoundError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("[[0, 1]]\nFigures are drawn by matplotlib")


# ----------------------------------------------------------------------- plot() of the metrics


def test_load_plots_its_heatmap() -> None:
    load = metrics.ExpertLoad([4, 3])
    load.update(torch.tensor([[0], [0], [1]]), layer=0)
    load.update(torch.tensor([[2], [1], [0]]), layer=1)
    figure, axes = load.plot(layer_names=["a.0", "a.1"], title="Mine")
    assert isinstance(figure, Figure)
    assert shown(axes).filled(-1).tolist() == pytest.approx(np.array([[8 / 3, 4 / 3, 0, 0], [1, 1, 1, -1]]))
    assert dead(axes) == [(0, 2), (0, 3)]
    assert texts(figure, "title") == ["Mine"]
    assert ticks(load.plot(load.compute())[1].yaxis) == ["layer_00", "layer_01"]
    with pytest.raises(ValueError, match="only one layer"):
        load.plot([load.compute()])
    with pytest.raises(ValueError, match="a figure of its own"):
        load.plot(ax=axes)
    single = metrics.ExpertLoad(4)
    values = [single(torch.tensor([[0], [1]])), single(torch.tensor([[1], [1]]))]
    _, axes = single.plot(values)
    assert shown(axes).tolist() == [[2, 0], [2, 4], [0, 0], [0, 0]]


def test_affinity_plots_one_layer() -> None:
    together = metrics.ExpertAffinity([4, 3])
    together.update(torch.tensor([[0, 1], [0, 2]]), layer=1)
    figure, axes = together.plot(layer=1)
    assert shown(axes).filled(-1).tolist() == [[-1, 0.5, 0.5], [1, -1, 0], [1, 0, -1]]
    assert texts(figure, "title") == ["Experts chosen together, layer_01"]
    with pytest.raises(ValueError, match="only one value"):
        together.plot([together.compute()])


@pytest.mark.parametrize("name", ["LoadImbalance", "LoadCV", "DeadExperts", "DroppedFraction", "ReroutedFraction",
                                  "CapacityUtilization", "RoutingStability", "RouterEntropy"])  # fmt: skip
def test_the_others_plot_a_line_per_layer(name: str) -> None:
    metric = getattr(metrics, name)([4, 3], per_layer=True)
    values = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        for layer, experts in enumerate((4, 3)):
            logits = torch.rand(9, experts, generator=generator)
            inputs = {"topk_ids_TK": logits.topk(2).indices, "probs_TE": logits.softmax(1), "capacity": 7}
            metric.update(**metric._filter_kwargs(**inputs, layer=layer))
        values.append(metric.compute())
    figure, axes = metric.plot(values)
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert lines["layer 0"] == pytest.approx([float(value[0]) for value in values])
    assert lines["layer 1"] == pytest.approx([float(value[1]) for value in values])
    assert axes.get_ylabel() == name
    figure, axes = metric.plot()
    assert isinstance(figure, Figure)
    assert len(axes.lines) == 2
