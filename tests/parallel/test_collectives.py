"""Collectives, and journeys there and back, against values worked out by hand; different data on every rank."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moe.parallel.collectives import (
    Leg,
    Pending,
    all_gather,
    start_all_gather,
    start_all_to_all,
    start_reduce_scatter,
    travel,
)
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


def to_peers(splits: list[list[int]]) -> tuple[Leg, Leg]:
    """There and back by all-to-all."""
    rank = dist.get_rank()
    sends, receives = splits[rank], [sender[rank] for sender in splits]

    def leg(outputs: list[int], inputs: list[int], rows: Tensor) -> Pending[tuple[Tensor, ...]]:
        return start_all_to_all(rows, outputs, inputs, world_group()).then(lambda rows: (rows,))

    return partial(leg, receives, sends), partial(leg, sends, receives)


def to_all(rows: Tensor) -> Pending[tuple[Tensor, ...]]:
    return start_all_gather(rows, world_group()).then(lambda rows: (rows,))


def from_all(rows: Tensor) -> Pending[tuple[Tensor, ...]]:
    return start_reduce_scatter(rows, world_group()).then(lambda rows: (rows,))


def row(sender: int, receiver: int, index: int) -> list[float]:
    return [100.0 * sender + 10 * receiver + index, -1.0 - sender]


def gradient(sender: int, receiver: int, index: int) -> list[float]:
    """What the receiver's loss says about this row."""
    return [0.5 + 7 * receiver + index, 1000.0 * sender + receiver]


def tensor(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).view(-1, 2)


def keys(splits: list[list[int]]) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
    """(sender, receiver, index) of the rows that leave this rank, and of those that arrive."""
    rank, world = dist.get_rank(), dist.get_world_size()
    sent = [(rank, peer, i) for peer in range(world) for i in range(splits[rank][peer])]
    return sent, [(peer, rank, i) for peer in range(world) for i in range(splits[peer][rank])]


def exchange(splits: list[list[int]], dtype: torch.dtype) -> None:
    sent, arriving = keys(splits)
    x = tensor([row(*key) for key in sent]).to(dtype).requires_grad_()
    (y,) = travel(*to_peers(splits), x).wait()
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
    (y,) = travel(to_all, from_all, x).wait()
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
    (y,) = travel(from_all, to_all, x).wait()
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


def several(order: list[int]) -> None:
    """Three journeys are on their way at once, the last with numbers that have no gradient, and are met in any order."""
    splits = [SPLITS[dist.get_world_size()], SILENT[dist.get_world_size()]]
    rank, world = dist.get_rank(), dist.get_world_size()
    x = [tensor([row(*key) for key in keys(each)[0]]).requires_grad_() for each in splits]
    x.append(torch.tensor([[1.0 + rank, -2.0]], dtype=torch.float64, requires_grad=True))

    def with_ids(rows: Tensor) -> Pending[tuple[Tensor, ...]]:
        ids = start_all_gather(torch.tensor([rank, 2**40]), world_group())
        return to_all(rows).then(lambda arrived: (ids.wait(), *arrived))

    pending = [travel(*to_peers(each), leaf) for each, leaf in zip(splits, x, strict=False)]
    pending.append(travel(with_ids, from_all, x[2]))
    met = {i: pending[i].wait() for i in order}
    ids, gathered = met[2]
    assert (ids.tolist(), ids.requires_grad) == ([i for p in range(world) for i in (p, 2**40)], False)
    assert gathered.tolist() == [[1.0 + p, -2.0] for p in range(world)]
    grads = [torch.full_like(gathered, 10.0**rank)]
    for i, each in enumerate(splits):
        arriving = keys(each)[1]
        assert met[i][0].tolist() == tensor([row(*key) for key in arriving]).tolist()
        grads.append(tensor([gradient(*key) for key in arriving]))
    torch.autograd.backward([gathered, met[0][0], met[1][0]], grads)
    expected = [tensor([gradient(*key) for key in keys(each)[0]]) for each in splits]
    expected.append(torch.full((1, 2), sum(10.0**p for p in range(world)), dtype=torch.float64))
    for leaf, grad in zip(x, expected, strict=True):
        assert leaf.grad is not None
        assert leaf.grad.tolist() == grad.tolist()


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]], ids=str)
@pytest.mark.parametrize("world", [2, 4])
def test_journeys_at_once(world: int, order: list[int], get_pool: Callable[..., RankPool]) -> None:
    get_pool(world).run(several, order)


def _operations() -> dict[str, tuple[Callable[[Tensor], Tensor], int]]:
    """Every journey with the number of rows that it takes on this rank."""
    rank, world = dist.get_rank(), dist.get_world_size()
    legs = {
        "all_to_all": (to_peers(SPLITS[world]), sum(SPLITS[world][rank])),
        "all_gather": ((to_all, from_all), 3),
        "reduce_scatter": ((from_all, to_all), 2 * world),
    }

    def there(legs: tuple[Leg, Leg], x: Tensor) -> Tensor:
        return travel(*legs, x).wait()[0]

    return {name: (partial(there, both), num_rows) for name, (both, num_rows) in legs.items()}


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


# The journey itself needs no ranks.


class Legs:
    """There doubles and counts, back multiplies by 10; both write a log."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def there(self, x: Tensor, z: Tensor) -> Pending[tuple[Tensor, ...]]:
        self.log.append(f"{self.name} sets out")
        return Pending(lambda: self.arrives(x, z))

    def arrives(self, x: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        self.log.append(f"{self.name} arrives")
        return 2 * x, torch.arange(len(x)), x > 0, 2 * z

    def back(self, *grads: Tensor) -> Pending[tuple[Tensor, ...]]:
        grad_x, grad_z = grads  # and none of what is not floating-point
        self.log.append(f"{self.name} turns back")
        return Pending(lambda: self.returns(grad_x, grad_z))

    def returns(self, grad_x: Tensor, grad_z: Tensor) -> tuple[Tensor, ...]:
        self.log.append(f"{self.name} returns")
        return 10 * grad_x, 10 * grad_z

    def travel(self, x: Tensor, z: Tensor) -> Pending[tuple[Tensor, ...]]:
        return travel(self.there, self.back, x, z)


class Meanwhile(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, log: list[str]) -> Tensor:
        ctx.log = log
        log.append("meanwhile")
        return 3 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.log.append("meanwhile, backward")
        return 3 * grad, None


def test_what_happens_meanwhile_happens_meanwhile_in_backward() -> None:
    log: list[str] = []
    x = torch.tensor([[1.0, -2.0]], requires_grad=True)
    z = torch.tensor([[4.0]], requires_grad=True)
    pending = Legs("it", log).travel(x, z)
    side = Meanwhile.apply(x, log)
    assert log == ["it sets out", "meanwhile"]
    y, ids, positive, doubled = pending.wait()
    assert log == ["it sets out", "meanwhile", "it arrives"]
    assert (y.tolist(), ids.tolist(), positive.tolist(), doubled.tolist()) == ([[2, -4]], [0], [[True, False]], [[8]])
    assert [t.requires_grad for t in (y, ids, positive, doubled)] == [True, False, False, True]
    for times in (1, 2):  # the graph can be gone back through again
        log.clear()
        (y + side).sum().backward(retain_graph=times == 1)
        assert log == ["it turns back", "meanwhile, backward", "it returns"]
        assert x.grad is not None
        assert z.grad is not None
        assert x.grad.tolist() == [[13.0 * times, 13.0 * times]]
        assert z.grad.tolist() == [[0.0]]  # nobody used it


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_gradients_travel_at_once_too(order: str) -> None:
    log: list[str] = []
    x = torch.tensor([[1.0]], requires_grad=True)
    pending = {name: Legs(name, log).travel(x, x) for name in "ab"}
    arrived = {name: pending[name].wait()[0] for name in order}
    assert log == ["a sets out", "b sets out", f"{order[0]} arrives", f"{order[1]} arrives"]
    log.clear()
    (arrived["a"] + 100 * arrived["b"]).sum().backward()
    assert log == [f"{order[1]} turns back", f"{order[0]} turns back", "b returns", "a returns"]
    assert x.grad is not None
    assert x.grad.item() == 10 + 1000


@pytest.mark.parametrize("how", ["no_grad", "no tensor has one"])
def test_without_gradient_there_is_no_graph(how: str) -> None:
    log: list[str] = []
    with torch.set_grad_enabled(how != "no_grad"):
        x = torch.ones(1, 1, requires_grad=how == "no_grad")
        pending = Legs("it", log).travel(x, x)
        assert log == ["it sets out"]
        arrived = pending.wait()
    assert [t.tolist() for t in arrived] == [[[2]], [0], [[True]], [[2]]]
    assert not any(t.requires_grad for t in arrived)


def test_one_tensor_may_have_no_gradient() -> None:
    x, z = torch.ones(1, 1), torch.ones(1, 1, requires_grad=True)
    y, *_, doubled = Legs("it", []).travel(x, z).wait()
    (5 * y + doubled).sum().backward()
    assert x.grad is None
    assert z.grad is not None
    assert z.grad.tolist() == [[10]]


def test_second_derivatives_are_refused() -> None:
    """Not left out in silence."""
    x = torch.ones(1, 1, requires_grad=True)
    y = Legs("it", []).travel(x.sin(), x).wait()[0]
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


def test_then_is_done_when_it_is_there() -> None:
    log: list[str] = []
    pending = Pending(lambda: log.append("there") or 2).then(lambda number: log.append("then") or number + 1)
    assert log == []
    assert pending.wait() == 3
    assert log == ["there", "then"]
