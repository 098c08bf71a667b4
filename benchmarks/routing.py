"""Trains the quickstart's model with every router and prints how evenly its experts are used.

    python benchmarks/routing.py                      # the table in docs/routing.md: two to four minutes
    python benchmarks/routing.py --only topk sinkhorn

One process, without a strategy. Exits with 1 where a method that is meant to balance is at a load imbalance (largest
over mean tokens per expert, over the last ten steps, averaged over layers) of 1.5 or more, or where the baseline
without any balancing is below all of them.
"""

from __future__ import annotations

import argparse
import logging
import platform
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml

from lightning_moe import AuxLossCallback, ExpertBiasUpdate, ExpertLoadMonitor, MoEConfig
from lightning_moe.data import TextDataModule
from lightning_moe.models import MoELanguageModel

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
LIMIT = 1.5
BASELINE = "none"


@dataclass(frozen=True)
class Method:
    """One way to route and to balance."""

    balance: str
    moe: dict[str, Any]
    aux: dict[str, float] = field(default_factory=lambda: {"load_balancing": 0.0})
    bias_rate: float | None = None


LOSS = {"load_balancing": 0.05}
METHODS = {
    BASELINE: Method("nothing", {"router": "topk"}),
    "topk": Method("loss", {"router": "topk"}, LOSS),
    "topk-bias": Method("bias", {"router": "topk", "score_function": "sigmoid", "expert_bias": True}, bias_rate=0.01),
    "switch": Method("loss", {"router": "switch", "top_k": 1}, LOSS),
    "gshard": Method("loss", {"router": "gshard"}, LOSS),
    "noisy_topk": Method(
        "importance and load losses",
        {"router": "noisy_topk"},
        {"load_balancing": 0.0, "importance": 0.1, "load": 0.1},
    ),
    "sinkhorn": Method("the assignment", {"router": "sinkhorn"}),
    "group_limited": Method("bias", {"router": "group_limited", "num_groups": 4, "topk_groups": 2}, bias_rate=0.01),
    "expert_choice": Method("experts choose", {"router": "expert_choice", "capacity_factor": 2.0}),
    "hash": Method("the hash", {"router": "hash"}),
    "random": Method("chance", {"router": "random"}),
}
EXEMPT = (BASELINE, "hash")  # a hash balances ids in the vocabulary, not tokens: bytes of a text are not even


def train(method: Method, steps: int, seed: int) -> dict[str, float]:
    """One run from the same weights over the same data; returns what it came to."""
    settings = yaml.safe_load(QUICKSTART.read_text())
    model_args = dict(settings["model"]["init_args"])
    moe = MoEConfig(**{**model_args.pop("moe"), **method.moe})
    L.seed_everything(seed, verbose=False)
    callbacks: list[L.Callback] = [AuxLossCallback(**method.aux), ExpertLoadMonitor(prog_bar=False)]
    if method.bias_rate is not None:
        callbacks.append(ExpertBiasUpdate(method.bias_rate))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        val_check_interval=steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=min(10, steps),
        gradient_clip_val=settings["trainer"]["gradient_clip_val"],
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(MoELanguageModel(moe=moe, **model_args), TextDataModule(**settings["data"]["init_args"]))
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def row(name: str, method: Method, found: dict[str, float]) -> str:
    """One line of the table."""
    return f"| {name} | {method.balance} | {found['moe/load_imbalance']:.2f} | {found['val_loss']:.3f} |"


def main() -> int:
    """Runs what is asked for and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps of each run (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of weights and data (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=METHODS, metavar="NAME", help=f"of {', '.join(METHODS)}")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    print(
        f"Load imbalance after {args.steps} steps of configs/quickstart.yaml in one process, seed {args.seed}; "
        f"torch {torch.__version__}, {args.threads} threads, Python {platform.python_version()}.\n"
    )
    print("| method | balanced by | load imbalance | val_loss |\n|---|---|---|---|", flush=True)
    imbalance = {}
    names = args.only or list(METHODS)
    for number, name in enumerate(names, start=1):
        print(f"{number} of {len(names)}: {name}", end="\r", file=sys.stderr, flush=True)
        found = train(METHODS[name], args.steps, args.seed)
        imbalance[name] = found["moe/load_imbalance"]
        print(row(name, METHODS[name], found), flush=True)
    balanced = {name: value for name, value in imbalance.items() if name not in EXEMPT}
    wrong = [f"{name} is at {value:.2f}, not under {LIMIT}" for name, value in balanced.items() if value >= LIMIT]
    if BASELINE in imbalance and balanced and imbalance[BASELINE] <= max(balanced.values()):
        wrong.append(f"without balancing it is {imbalance[BASELINE]:.2f}, no worse than the others")
    for problem in wrong:
        print(problem, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
