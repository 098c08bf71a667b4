"""Dense against Mixture-of-Experts at equal active parameters: steps and CPU time to the same validation loss.

All are byte-level language models on the quickstart's data, alike but for their feed-forward blocks, and all get the
same tokens in the same order. Each is trained at each of the same few learning rates, which are constant after a
warm-up, so that every point of a curve is the end of a training of that length and none is tuned to a horizon;
validation is of a moving average of the weights, as if the learning rate had been decayed there. A dense model at half
its budget goes on only if it is ahead of those before it. The best of them sets the target; an MoE model is trained
until its first evaluation at or below that, and the learning rate that gets there first is the one that counts.

One process, no GPU; under 20 minutes on two idle cores:

    python benchmarks/quality.py --output-dir docs
"""

from __future__ import annotations

import argparse
import csv
import logging
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from tqdm import tqdm
from typing_extensions import override

from lightning_moe import ExpertBiasUpdate, MoEConfig
from lightning_moe.data import TextDataModule
from lightning_moe.models import MoELanguageModel
from lightning_moe.models.transformer import Transformer

SEQUENCE_LENGTH = 128


class DenseLanguageModel(MoELanguageModel):
    """The same model, every feed-forward block of which is dense, at the width that a token sees in an MoE layer."""

    @override
    def configure_model(self) -> None:
        """Makes the layers, once."""
        if self.transformer is None:
            no_layer = self.num_layers + 1  # moe_every beyond the last layer
            self.transformer = Transformer(
                self.vocab_size, self.hidden_size, self.num_layers, self.num_heads, self.moe, no_layer
            )


@dataclass(frozen=True)
class Point:
    """One evaluation.

    Args:
        step: Optimizer steps done.
        cpu_seconds: CPU time of the training so far, of all threads, without evaluations.
        val_loss: Nats per byte.
    """

    step: int
    cpu_seconds: float
    val_loss: float


@dataclass(frozen=True)
class Model:
    """What is trained.

    Args:
        name: In tables and figures.
        moe: Settings of the MoE layers; the dense blocks take their width from them.
        bias_rate: Of balancing by a bias; 0 for none.
        is_dense: Whether dense blocks take the place of the MoE layers.
    """

    name: str
    moe: MoEConfig
    bias_rate: float = 0.0
    is_dense: bool = False


@dataclass
class Run:
    """One training.

    Args:
        model: What is trained.
        learning_rate: After the warm-up.
        curve: Evaluations in the order of steps.
        total_parameters: All of the model's.
        active_parameters: Those that one token uses, routers included.
        router_parameters: Those of the routers.
    """

    model: Model
    learning_rate: float
    curve: list[Point] = field(default_factory=list)
    total_parameters: int = 0
    active_parameters: int = 0
    router_parameters: int = 0

    def at(self, step: int) -> Point | None:
        """The evaluation at a step."""
        return next((point for point in self.curve if point.step == step), None)

    def first_at(self, target: float) -> Point | None:
        """The first evaluation at or below a loss."""
        return next((point for point in self.curve if point.val_loss <= target), None)


class Meter(L.Callback):
    """Averages weights, evaluates the average, and notes loss and CPU time of training; may stop it.

    Args:
        run: Gets the evaluations.
        average: Decay per step of the moving average of the weights; 0 evaluates the weights themselves.
        is_done: Asked after every evaluation.
        bar: Advances with every step.
    """

    def __init__(self, run: Run, average: float, is_done: Callable[[Point], bool], bar: tqdm[Any]) -> None:
        self.run = run
        self.average = average
        self.is_done = is_done
        self.bar = bar
        self._parameters: list[Tensor] = []
        self._averages: list[Tensor] = []
        self._cpu_seconds = 0.0
        self._since = 0.0

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._parameters = [parameter.data for parameter in pl_module.parameters()]
        self._averages = [parameter.clone() for parameter in self._parameters]
        self._since = time.process_time()

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.average:
            step = trainer.global_step
            decay = min(self.average, step / (step + 9))  # short at first, to forget where the weights started
            torch._foreach_lerp_(self._averages, self._parameters, 1 - decay)
        self.bar.update()

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._cpu_seconds += time.process_time() - self._since
        self._swap()

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._swap()
        loss = float(trainer.callback_metrics["val_loss"])
        point = Point(trainer.global_step, self._cpu_seconds, loss)
        self.run.curve.append(point)
        self.bar.set_postfix_str(f"val_loss {loss:.3f}", refresh=False)
        trainer.should_stop = self.is_done(point)
        self._since = time.process_time()

    def _swap(self) -> None:
        if self.average:
            for parameter, average in zip(self._parameters, self._averages, strict=True):
                held = parameter.clone()
                parameter.copy_(average)
                average.copy_(held)


def models(args: argparse.Namespace) -> list[Model]:
    """The dense model and the MoE models, each with the same width per token."""
    size = {"num_experts": args.num_experts, "top_k": args.top_k, "intermediate_size": args.expert_width}
    known = {
        "hash": Model("MoE, hash", MoEConfig(**size, router="hash")),
        "topk": Model("MoE, topk", MoEConfig(**size, expert_bias=True), args.bias_rate),
    }
    return [Model("dense", MoEConfig(**size), is_dense=True), *(known[name] for name in args.routers)]


def train(
    args: argparse.Namespace,
    run: Run,
    steps: int,
    data: TextDataModule,
    bar: tqdm[Any],
    is_done: Callable[[Point], bool],
) -> Run:
    """Trains one model and fills the run's curve."""
    L.seed_everything(args.seed, verbose=False)
    kind = DenseLanguageModel if run.model.is_dense else MoELanguageModel
    model = kind(
        moe=run.model.moe,
        hidden_size=args.hidden_size,
        num_layers=args.num_layers,
        learning_rate=run.learning_rate,
        warmup_steps=args.warmup_steps,
        min_lr_ratio=1.0,
    )
    bar.set_description(f"{run.model.name} lr={run.learning_rate:g}")
    callbacks: list[L.Callback] = [Meter(run, args.average, is_done, bar)]
    if run.model.bias_rate:
        callbacks.append(ExpertBiasUpdate(run.model.bias_rate))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        val_check_interval=args.val_interval,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)
    _count_parameters(run, model)
    return run


def train_dense(args: argparse.Namespace, model: Model, data: TextDataModule, bar: tqdm[Any]) -> list[Run]:
    """One run for each learning rate; one that is behind at half the budget ends there."""
    runs: list[Run] = []
    half = args.dense_steps // 2 // args.val_interval * args.val_interval

    def is_behind(point: Point) -> bool:
        others = [other.val_loss for run in runs if (other := run.at(half))]
        return point.step == half and any(loss <= point.val_loss for loss in others)

    for rate in args.learning_rates:
        runs.append(train(args, Run(model, rate), args.dense_steps, data, bar, is_behind))
    return runs


def train_to(target: float, args: argparse.Namespace, model: Model, data: TextDataModule, bar: tqdm[Any]) -> list[Run]:
    """One run for each learning rate, up to the target; one that is behind the fastest ends there."""
    runs: list[Run] = []
    steps = args.dense_steps
    for rate in args.learning_rates:
        run = train(args, Run(model, rate), steps, data, bar, lambda point: point.val_loss <= target)
        runs.append(run)
        steps = run.curve[-1].step
    return runs


def _count_parameters(run: Run, model: MoELanguageModel) -> None:
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    run.total_parameters = sum(sizes.values())
    run.active_parameters = run.total_parameters - experts + experts * run.model.moe.top_k // run.model.moe.num_experts
    run.router_parameters = sum(size for name, size in sizes.items() if ".router." in name)


def report(args: argparse.Namespace, runs: Sequence[Run], best: Sequence[Run]) -> str:
    """The results as markdown; ``best`` is the dense run that sets the target, then one of each MoE model."""
    target = best[0].curve[-1].val_loss
    setup = (
        f"Python {platform.python_version()}, torch {torch.__version__}, lightning {L.__version__}, "
        f"{torch.get_num_threads()} threads, {os.cpu_count()} CPUs ({_cpu_name()}); seed {args.seed}, "
        f"{args.batch_size * SEQUENCE_LENGTH:,} tokens a step. MoE: {args.num_experts} experts of width "
        f"{args.expert_width}, top-{args.top_k}."
    )
    columns = ("model", "parameters", "active", "of them routers", "learning rate", "steps to it", "CPU s to it")
    lines = [
        setup,
        "",
        f"Validation loss of the dense model after {best[0].curve[-1].step:,} steps: **{target:.4f}** nats per byte.",
        "",
        f"| {' | '.join(columns)} | ms a step | fewer steps | less CPU time |",
        f"|{'---|' * (len(columns) + 3)}",
    ]
    dense = best[0].first_at(target)
    assert dense is not None
    for run in best:
        point, last = run.first_at(target), run.curve[-1]
        to_it = f"{point.step:,} | {point.cpu_seconds:.0f}" if point else f"not in {last.step:,} | -"
        ratios = f"{dense.step / point.step:.1f}x | {dense.cpu_seconds / point.cpu_seconds:.1f}x" if point else "- | -"
        lines.append(
            f"| {run.model.name} | {run.total_parameters:,} | {run.active_parameters:,} | {run.router_parameters:,} | "
            f"{run.learning_rate:g} | {to_it} | {1e3 * last.cpu_seconds / last.step:.0f} | {ratios} |"
        )
    lines += ["", "All runs, and where each ended:", ""]
    lines += ["| model | learning rate | steps | CPU s | validation loss |", "|---|---|---|---|---|"]
    for run in runs:
        last = run.curve[-1]
        ended = f"{last.step:,} | {last.cpu_seconds:.0f} | {last.val_loss:.4f}"
        lines.append(f"| {run.model.name} | {run.learning_rate:g} | {ended} |")
    return "\n".join(lines)


def _cpu_name() -> str:
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write_curves(path: Path, runs: Iterable[Run]) -> None:
    """Every evaluation of every run as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "learning_rate", "step", "cpu_seconds", "val_loss"])
        for run in runs:
            for point in run.curve:
                seconds, loss = f"{point.cpu_seconds:.2f}", f"{point.val_loss:.5f}"
                writer.writerow([run.model.name, run.learning_rate, point.step, seconds, loss])


def plot_curves(path: Path, best: Sequence[Run]) -> None:
    """The curves of the best runs over steps and over CPU time."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "quality"  # the same file for the same curves
    from matplotlib import pyplot as plt

    target = best[0].curve[-1].val_loss
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, name, label in zip(axes, ("step", "cpu_seconds"), ("optimizer steps", "CPU seconds"), strict=True):
        for run in best:
            losses = [point.val_loss for point in run.curve]
            axis.plot([getattr(point, name) for point in run.curve], losses, label=run.model.name)
        axis.axhline(target, color="gray", linewidth=0.8, linestyle="--")
        axis.set(xlabel=label, ylim=(target - 0.05, target + 0.5))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("validation loss, nats per byte")
    axes[0].legend()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0] + "\n\n" + __doc__.partition("\n\n")[2],
        formatter_class=_Formatter,
    )
    add = parser.add_argument
    add("--output-dir", type=Path, default=None, help="folder for quality.csv and quality.svg; left out: only print")
    add("--no-plot", action="store_true", help="leave quality.svg out, for which matplotlib is needed")
    add("--threads", type=int, default=2, help="threads of torch")
    add("--path", default="stdlib", help="text: stdlib, a folder or a glob")
    add("--seed", type=int, default=0, help="of weights and shuffling")
    add("--dense-steps", type=int, default=6000, help="budget of a dense training; an MoE one has at most the same")
    add("--routers", nargs="+", choices=["hash", "topk"], default=["hash", "topk"], help="of the MoE models")
    add(
        "--learning-rates",
        type=float,
        nargs="+",
        default=[2e-3, 4e-3],
        metavar="RATE",
        help="those that both models try",
    )
    add("--warmup-steps", type=int, default=100, help="of the learning rate, which is constant after")
    add("--average", type=float, default=0.99, help="decay of the weight average that is evaluated; 0 for none")
    add("--batch-size", type=int, default=32, help=f"sequences of {SEQUENCE_LENGTH} bytes a step")
    add("--val-interval", type=int, default=50, help="steps between evaluations")
    add("--val-bytes", type=int, default=65536, help="held-out text of an evaluation")
    add("--hidden-size", type=int, default=64, help="model width")
    add("--num-layers", type=int, default=2, help="Transformer blocks")
    add("--num-experts", type=int, default=64, help="experts a layer")
    add("--top-k", type=int, default=4, help="experts a token")
    add("--expert-width", type=int, default=64, help="of one expert; the dense block has top_k times that")
    add("--bias-rate", type=float, default=0.001, help="of balancing topk by a bias")
    args = parser.parse_args(argv)
    if args.dense_steps % args.val_interval:
        parser.error(f"--dense-steps must be a multiple of --val-interval={args.val_interval}")
    if args.output_dir and not args.no_plot and find_spec("matplotlib") is None:
        parser.error("quality.svg needs matplotlib: pip install matplotlib, or add --no-plot")
    return args


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the description's lines and shows defaults."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"lightning(_fabric)?\..*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    data = TextDataModule(
        args.path,
        sequence_length=SEQUENCE_LENGTH,
        batch_size=args.batch_size,
        max_val_bytes=args.val_bytes,
        seed=args.seed,
    )
    dense, *moes = models(args)
    steps = args.dense_steps * (1 + len(args.learning_rates) + len(args.learning_rates) * len(moes)) // 2
    with tqdm(total=steps, unit="step", mininterval=1) as bar:
        runs = train_dense(args, dense, data, bar)
        best = [min((run for run in runs if run.at(args.dense_steps)), key=lambda run: run.curve[-1].val_loss)]
        target = best[0].curve[-1].val_loss
        for model in moes:
            found = train_to(target, args, model, data, bar)
            runs += found
            best.append(min(found, key=lambda run: (run.first_at(target) is None, run.curve[-1].step)))
        bar.total = bar.n  # how many steps an MoE model needs is what this is about
        bar.refresh()
    print(report(args, runs, best))
    if args.output_dir:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        write_curves(args.output_dir / "quality.csv", runs)
        if not args.no_plot:
            plot_curves(args.output_dir / "quality.svg", best)


if __name__ == "__main__":
    main()
