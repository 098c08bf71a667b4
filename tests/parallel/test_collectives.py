"""Collectives, forward and backward, against values that were worked out by hand; different data on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moe.parallel.collectives import all_gather, all_to_all, reduce_scatter
from lightning_moe.testing import RankPool

# Rows from sender (outer) to receiver (inner); rank 1 of four sends nothing, and rank 3 of two receives little.
SPLITS = {
    2: [[0, 2], [3, 0]],
    4: [[1, 0, 2, 0], [0, 0, 0, 0], [3, 1, 0, 2], [0, 2, 1, 1]],
}
SILENT = {  # nobody sends to rank 0, and rank 1 sends nothing
    2: [[0, 2], [0, 0]],
    4: [[0, 3, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 2, 0]],
}


def world_group() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def row(sender: int, receiver: int, index: int) -> list[float]:
    return [100.0 * sender + 10 * receiver + index, -1.0 - sender]


def gradient(sender: int, receiver: int, index: int) -> list[float]:
    """What the receiver's loss says about this row."""
    return [0.5 + 7 * receiver + index, 1000.0 * sender + receiver]


def tensor(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).view(-1, 2)


def exchange(splits: list[list[int]], dtype: torch.dtype) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    sends, receives = splits[rank], [sender[rank] for sender in splits]
    sent = [(rank, peer, i) for peer in range(world) for i in range(sends[peer])]
    arriving = [(peer, rank, i) for peer in range(world) for i in range(receives[peer])]

    x = tensor([row(*key) for key in sent]).to(dtype).requires_grad_()
    y = all_to_all(x, receives, sends, world_group())
    assert y.dtype == dtype
    assert y.tolist() == tensor([row(*key) for key in arriving]).to(dtype).tolist()
    y.backward(tensor([gradient(*key) for key in arriving]).to(dtype))
    assert x.grad is not None
    assert x.grad.tolist() == tensor([gradient(*key) for key in sent]).to(dtype).tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("splits", [SPLITS, SILENT], ids=["uneven", "silent"])
@pytest.mark.parametrize("world", [2, 4])
def test_all_to_all(
    world: int, splits: dict[int, list[list[int]]], dtype: torch.dtype, get_pool: Callable[..., RankPool]
) -> None:
    get_pool(world).run(exchange, splits[world], dtype)


def gather() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    x = torch.tensor([[1.0 + rank, 2.0], [3.0, 10.0 * rank]], dtype=torch.float64, requires_grad=True)
    y = all_gather(x, world_group())
    assert y.tolist() == [r for p in range(world) for r in ([1.0 + p, 2.0], [3.0, 10.0 * p])]
    # Rank q weighs what came from rank p by 10^q + p: rank p's gradient is the sum over q.
    weights = [[[10.0**rank + p, -(10.0**rank)], [p * 10.0**rank, 1.0]] for p in range(world)]
    y.backward(torch.tensor(weights, dtype=torch.float64).view(-1, 2))
    ones = sum(10.0**q for q in range(world))
    assert x.grad is not None
    assert x.grad.tolist() == [[ones + world * rank, -ones], [rank * ones, float(world)]]


def scatter() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    # Rank q holds for every receiver p the row (10^q, p + q).
    x = torch.tensor([[10.0**rank, float(p + rank)] for p in range(world)], dtype=torch.float64)
    x.requires_grad_()
    y = reduce_scatter(x, world_group())
    of_all = sum(range(world))
    assert y.tolist() == [[sum(10.0**q for q in range(world)), float(world * rank + of_all)]]
    y.backward(torch.tensor([[rank + 0.25, -3.0 * rank]], dtype=torch.float64))
    assert x.grad is not None
    assert x.grad.tolist() == [[p + 0.25, -3.0 * p] for p in range(world)]


def gather_integers() -> list[int]:
    rank = dist.get_rank()
    return all_gather(torch.tensor([2**40 + rank, -rank]), world_group()).tolist()


@pytest.mark.parametrize("world", [2, 4])
def test_all_gather(world: int, get_pool: Callable[..., RankPool]) -> None:
    get_pool(world).run(gather)


@pytest.mark.parametrize("world", [2, 4])
def test_reduce_scatter(world: int, get_pool: Callable[..., RankPool]) -> None:
    get_pool(world).run(scatter)


def test_all_gather_of_counts(pool4: RankPool) -> None:
    assert pool4.run(gather_integers) == [[2**40, 0, 2**40 + 1, -1, 2**40 + 2, -2, 2**40 + 3, -3]] * 4


def _operations() -> dict[str, tuple[Callable[[Tensor], Tensor], int]]:
    """Every collective with the number of rows that it takes on this rank."""
    rank, world, group = dist.get_rank(), dist.get_world_size(), world_group()
    sends, receives = SPLITS[world][rank], [sender[rank] for sender in SPLITS[world]]
    return {
        "all_to_all": (lambda x: all_to_all(x, receives, sends, group), sum(sends)),
        "all_gather": (lambda x: all_gather(x, group), 3),
        "reduce_scatter": (lambda x: reduce_scatter(x, group), 2 * world),
    }


def check_numerically(name: str) -> None:
    """Central differences of sum over ranks of <g, f(x)>, one input of one rank after the other, as gradcheck does."""
    rank, world = dist.get_rank(), dist.get_world_size()
    function, num_rows = _operations()[name]
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(num_rows, 2, dtype=torch.float64, generator=generator)

    def value(y: Tensor, g: Tensor) -> Tensor:
        return (y.sin() * g).sum()  # not linear, so that a wrong row shows in the derivative, too

    leaf = x.clone().requires_grad_()
    y = function(leaf)
    g = torch.randn(y.shape, dtype=torch.float64, generator=generator)
    value(y, g).backward()
    assert leaf.grad is not None

    def total(x: Tensor) -> float:
        with torch.no_grad():
            of_all = value(function(x), g)
        dist.all_reduce(of_all)
        return float(of_all)

    sizes: list[Any] = [None] * world
    dist.all_gather_object(sizes, x.numel())
    for perturbed in range(world):
        for i in range(sizes[perturbed]):
            step = torch.zeros_like(x).view(-1)
            if perturbed == rank:
                step[i] = 1e-6
            slope = (total(x + step.view_as(x)) - total(x - step.view_as(x))) / 2e-6
            if perturbed == rank:
                assert abs(slope - float(leaf.grad.view(-1)[i])) < 1e-8


@pytest.mark.parametrize("name", ["all_to_all", "all_gather", "reduce_scatter"])
@pytest.mark.parametrize("world", [2, 4])
def test_gradient_is_the_numerical_one(world: int, name: str, get_pool: Callable[..., RankPool]) -> None:
    get_pool(world).run(check_numerically, name)


def check_strides(name: str) -> None:
    function, num_rows = _operations()[name]
    x = torch.randn(2, num_rows, generator=torch.Generator().manual_seed(dist.get_rank())).double().t()
    assert torch.equal(function(x), function(x.contiguous()))
    leaves = [x.detach().clone().requires_grad_() for _ in range(2)]
    function(leaves[0]).sum().backward()  # an expanded gradient
    y = function(leaves[1])
    y.backward(torch.ones(y.shape, dtype=y.dtype))
    assert leaves[0].grad is not None
    assert leaves[1].grad is not None
    assert torch.equal(leaves[0].grad, leaves[1].grad)


@pytest.mark.parametrize("name", ["all_to_all", "all_gather", "reduce_scatter"])
def test_rows_and_gradients_of_any_stride(name: str, pool4: RankPool) -> None:
    pool4.run(check_strides, name)


def differentiate_twice(name: str) -> bool:
    """The backward of the backward of a linear function is the function."""
    rank = dist.get_rank()
    function, num_rows = _operations()[name]
    x = torch.randn(num_rows, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    leaf = x.clone().requires_grad_()
    y = function(leaf)
    upstream = torch.randn(y.shape, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(y, leaf, upstream, create_graph=True)
    (again,) = torch.autograd.grad(grad, upstream, x)
    return torch.equal(again, y.detach())


@pytest.mark.parametrize("name", ["all_to_all", "all_gather", "reduce_scatter"])
def test_the_backward_has_a_backward(name: str, pool4: RankPool) -> None:
    assert pool4.run(differentiate_twice, name) == [True] * 4
