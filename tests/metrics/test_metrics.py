"""Every metric against plain loops over tokens, alone, in collections, and over ranks with other data."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torchmetrics import MetricCollection

from lightning_moe import metrics
from tests.metrics.by_hand import NO_TOKENS, SCALARS, Batch, ByHand, all_expected, all_metrics, random_batch

UNEQUAL = [4, 7, 5]
CLOSE = {"rtol": 1e-6, "atol": 1e-7}


def filled(made: dict[str, Any], batches: list[Batch]) -> None:
    for metric in made.values():
        for batch in batches:
            metric.update(**metric._filter_kwargs(**batch.inputs()))


def by_hand(num_experts: list[int], batches: list[Batch]) -> ByHand:
    loops = ByHand(num_experts)
    for batch in batches:
        loops.add(batch)
    return loops


def assert_all_close(values: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert values.keys() == expected.keys()
    for name, value in values.items():
        assert_close(value, expected[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("num_experts", [[4], UNEQUAL], ids=str)
def test_against_plain_loops(num_experts: list[int], top_k: int, full: bool, per_layer: bool) -> None:
    batches = [
        random_batch(layer, tokens, top_k, experts, seed=tokens + layer, full=full)
        for layer, experts in enumerate(num_experts)
        for tokens in (13, 1, 0, 30)
    ]
    made = all_metrics(num_experts, per_layer=per_layer)
    filled(made, batches)
    loops = by_hand(num_experts, batches)
    assert_all_close({name: m.compute() for name, m in made.items()}, all_expected(loops, per_layer))
    if full:
        for name in {*SCALARS} - {"DeadExperts"}:
            assert loops.value(name) != NO_TOKENS.get(name, 0.0), f"{name} is not tried"
    else:
        assert made["ExpertLoad"].compute().sum(-1).tolist() == [44 * top_k] * len(num_experts)


def test_layers_without_tokens_are_left_out_of_means() -> None:
    batches = [random_batch(1, 20, 2, 7, seed=1), random_batch(0, 0, 2, 4, seed=2)]
    for per_layer in (False, True):
        made = all_metrics(UNEQUAL, per_layer=per_layer)
        filled(made, batches)
        values = {name: m.compute() for name, m in made.items()}
        assert_all_close(values, all_expected(by_hand(UNEQUAL, batches), per_layer))
        if per_layer:
            assert values["LoadImbalance"][[0, 2]].tolist() == [1, 1]
            assert values["LoadImbalance"][1] > 1.1


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
@pytest.mark.parametrize("per_layer", [False, True])
def test_no_tokens_at_all_raise_no_alarm(per_layer: bool) -> None:
    made = all_metrics(UNEQUAL, per_layer=per_layer)
    expected = {**dict.fromkeys(SCALARS, 0.0), "LoadImbalance": 1.0, "RouterEntropy": 1.0}
    for name, value in expected.items():
        shape = (3,) if per_layer else ()
        assert_close(made[name].compute(), torch.full(shape, value, dtype=torch.float64))
    assert not made["ExpertLoad"].compute().any()
    assert not made["ExpertAffinity"].compute().any()
    assert metrics.RoutingStability(4).compute() == 0


def test_known_values() -> None:
    ids = torch.tensor([[0], [0], [0], [1]])
    made = all_metrics([4])
    probs = torch.tensor([[0.5, 0.5, 0, 0], [1, 0, 0, 0], [0.25, 0.25, 0.25, 0.25], [1.0, 0, 0, 0]])
    kept, placed = torch.tensor([[True], [True], [False], [True]]), torch.tensor([[0], [2], [0], [1]])
    filled(made, [Batch(0, ids, placed, kept, None, probs, None, 2)])
    values = {name: m.compute() for name, m in made.items()}
    assert values["ExpertLoad"].tolist() == [[3, 1, 0, 0]]
    assert values["ExpertLoad"].dtype == torch.int64
    assert values["ExpertAffinity"].tolist() == [[[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]]
    expected = {"LoadImbalance": 3, "LoadCV": 1.5**0.5, "DeadExperts": 2, "RouterEntropy": 0.375,
                "DroppedFraction": 0.25, "ReroutedFraction": 0.25, "CapacityUtilization": 0.375}  # fmt: skip
    assert {name: float(values[name]) for name in expected} == pytest.approx(expected)


# ----------------------------------------------------------------------- stability


def test_stability_is_the_share_of_changed_sets_against_a_loop() -> None:
    num_experts, looks = [4, 6], 5
    metric = metrics.RoutingStability(num_experts, per_layer=True)
    changed, compared = [0, 0], [0, 0]
    last: list[list[set[int] | None]] = [[None] * 12, [None] * 12]
    for look in range(looks):
        for layer, experts in enumerate(num_experts):
            batch = random_batch(layer, 12, 2, experts, seed=look % 3 + 10 * layer)  # also some that are as before
            ids_TK, assigned_TK = batch.topk_ids_TK, batch.assigned_TK
            assert assigned_TK is not None
            assert batch.valid_T is not None
            if look % 2:
                ids_TK, assigned_TK = ids_TK.flip(1), assigned_TK.flip(1)
            metric.update(ids_TK, assigned_TK, batch.valid_T, layer)
            for token in range(12):
                now = {int(e) for e, a in zip(ids_TK[token], assigned_TK[token], strict=True) if a}
                valid = bool(batch.valid_T[token])
                before = last[layer][token]
                if valid and before is not None:
                    compared[layer] += 1
                    changed[layer] += now != before
                last[layer][token] = now if valid else None
        if look == 2:
            assert 0 < changed[0] < compared[0]
            metric.reset()  # but what was seen last is still known
            changed, compared = [0, 0], [0, 0]
    assert_close(metric.compute(), torch.tensor([c / n for c, n in zip(changed, compared, strict=True)]).double())


def test_stability_of_one_batch() -> None:
    metric = metrics.RoutingStability(4)
    ids = torch.tensor([[0, 1], [2, 3], [1, 2]])
    assert metric(ids) == 0
    assert metric(ids.flip(1)) == 0  # the same sets
    assert metric(torch.tensor([[0, 1], [2, 0], [1, 2]])) == pytest.approx(1 / 3)
    assert metric.compute() == pytest.approx(1 / 6)
    assigned = torch.tensor([[True, True], [True, False], [True, True]])
    settled = metrics.RoutingStability(4)
    settled.update(ids)
    assert settled(ids, assigned) == pytest.approx(1 / 3)  # one token has an expert less
    assert settled(torch.tensor([[0, 1], [2, 0], [1, 2]]), assigned) == 0  # and what stands in its place is nothing
    with pytest.raises(ValueError, match=r"shape \[2, 2\]: the first look at layer 0 was at \[3, 2\].*forget"):
        metric.update(ids[:2])
    metric.forget()
    metric.update(ids[:2])
    assert metric.compute() == pytest.approx(1 / 6)


# ----------------------------------------------------------------------- as torchmetrics has it


def test_reset_forward_clone_and_pickle() -> None:
    batch, more = random_batch(0, 20, 2, 4, seed=1), random_batch(0, 9, 2, 4, seed=2)
    for name, metric in all_metrics([4]).items():
        inputs, others = (metric._filter_kwargs(**b.inputs()) for b in (batch, more))
        of_batch = all_expected(by_hand([4], [batch]))[name]
        of_both = all_expected(by_hand([4], [batch, more]))[name]
        assert_close(metric(**inputs), of_batch, **CLOSE)
        copies = [metric.clone(), pickle.loads(pickle.dumps(metric))]
        for each in (metric, *copies):
            shapes = {state: getattr(each, state).shape for state in each._defaults}
            each.update(**others)
            assert_close(each.compute(), of_both, **CLOSE)
            each.reset()
            each.update(**inputs)
            assert_close(each.compute(), of_batch, **CLOSE)
            assert {state: getattr(each, state).shape for state in each._defaults} == shapes


def test_a_collection_hands_each_metric_what_it_needs() -> None:
    batches = [random_batch(layer, 15, 2, e, seed=layer) for layer, e in enumerate(UNEQUAL)]
    collection = MetricCollection(all_metrics(UNEQUAL))
    for batch in batches:
        collection.update(**batch.inputs())
    assert_all_close(collection.compute(), all_expected(by_hand(UNEQUAL, batches)))
    grouped = [group for group in collection.compute_groups.values() if len(group) > 1]
    assert [sorted(group) for group in grouped] == [["DeadExperts", "ExpertLoad", "LoadCV", "LoadImbalance"]]


def test_a_collection_whose_first_batch_drops_and_moves_nothing_keeps_its_metrics_apart() -> None:
    first, second = random_batch(0, 9, 2, 4, seed=1, full=False), random_batch(0, 9, 2, 4, seed=2)
    collection = MetricCollection(all_metrics([4]))
    for batch in (first, second):
        collection.update(**batch.inputs())
    assert_all_close(collection.compute(), all_expected(by_hand([4], [first, second])))


def test_states_made_in_inference_mode_count_on() -> None:
    batch = random_batch(0, 9, 2, 4, seed=1)
    made = {**all_metrics([4]), "RoutingStability": metrics.RoutingStability(4)}
    with torch.inference_mode():
        for metric in made.values():
            metric.reset()
        filled(made, [batch])
    filled(made, [batch])
    del made["RoutingStability"]
    assert_all_close({n: m.compute() for n, m in made.items()}, all_expected(by_hand([4], [batch, batch])))


def test_autocast_does_not_round_counts() -> None:
    ids = torch.tensor([[0, 1]]).expand(1001, 2)  # bf16 has no 1001
    metric = metrics.ExpertAffinity(3)
    with torch.autocast("cpu", torch.bfloat16):
        metric.update(ids)
    assert metric.chosen_together[0].tolist() == [[1001, 1001, 0], [1001, 1001, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: metrics.ExpertLoad(0), "num_experts=0: must be at least 1"),
        (lambda: metrics.ExpertLoad([]), "must be at least 1"),
        (lambda: metrics.ExpertLoad(4, num_layers=0), "num_layers=0: must be at least 1"),
        (lambda: metrics.LoadCV([4, 4], num_layers=3), "num_layers=3: num_experts has 2 entries"),
        (lambda: metrics.LoadCV(4, 2).update(torch.zeros(3, 2).long(), layer=2), "layer=2.*made for 2 layers"),
        (lambda: metrics.LoadCV(4).update(torch.zeros(3).long()), r"shape \[3\]: must be \[T, K\]"),
        (lambda: metrics.LoadCV(4).update(torch.zeros(3, 2).long(), valid_T=torch.ones(2).bool()), r"valid_T.*\[2\]"),
        (
            lambda: metrics.DroppedFraction(4).update(torch.zeros(3, 2).long(), kept_TK=torch.ones(3, 1).bool()),
            r"kept_TK has shape \[3, 1\]: must be \[3, 2\]",
        ),
        (lambda: metrics.RouterEntropy([4, 5]).update(torch.ones(3, 4), layer=1), "layer 1 was said to have 5"),
        (lambda: metrics.RouterEntropy(4).update(torch.ones(4)), r"probs_TE has shape \[4\]: must be \[T, E\]"),
        (lambda: metrics.RouterEntropy(4).update(torch.tensor([[-1.0, 1, 2, 3]])), "below 0: must be probabilities"),
        (lambda: metrics.RouterEntropy(4).update(torch.ones(3, 4).long()), "probs_TE has dtype torch.int64"),
        (lambda: metrics.ExpertLoad(4).update(torch.tensor([[0, 4]])), "topk_ids_TK has 4: must be from 0 to 3"),
        (lambda: metrics.ExpertLoad(4).update(torch.tensor([[0, -1]])), "topk_ids_TK has -1: must be from 0 to 3"),
        (lambda: metrics.ExpertLoad(4).update(torch.ones(3, 2)), "topk_ids_TK has dtype torch.float32: must be whole"),
        (lambda: metrics.ExpertLoad(4).update(torch.ones(3, 2).bool()), "topk_ids_TK has dtype torch.bool"),
        (
            lambda: metrics.ReroutedFraction(4).update(torch.zeros(1, 1).long(), torch.full((1, 1), 7)),
            "placed_ids_TK has 7: must be from 0 to 3",
        ),
        (
            lambda: metrics.LoadCV(4).update(torch.zeros(3, 2).long(), valid_T=torch.ones(3)),
            r"valid_T has dtype torch.float32: must be torch.bool. Use valid_T.bool\(\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        make()


def test_ids_of_what_does_not_count_may_be_anything() -> None:
    load = metrics.ExpertLoad(4)
    load.update(
        torch.tensor([[0, 9], [-5, 4]]), torch.tensor([[True, False], [True, True]]), torch.tensor([True, False])
    )
    assert load.compute().tolist() == [[1, 0, 0, 0]]


# ----------------------------------------------------------------------- over ranks


def batches_of(rank: int, world: int) -> list[Batch]:
    """Every rank's own, and none on the last; another number of them, too."""
    if rank == world - 1:
        return []
    return [
        random_batch(layer, 5 + 7 * rank + index, 2, experts, seed=100 * rank + 10 * index + layer)
        for layer, experts in enumerate(UNEQUAL)
        for index in range(rank + 1)
    ]


def on_a_rank(world: int, per_layer: bool) -> list[dict[str, Tensor]]:
    rank = torch.distributed.get_rank()
    batches = batches_of(rank, world)
    alone = all_metrics(UNEQUAL, per_layer=per_layer)
    filled(alone, batches)
    collection = MetricCollection(all_metrics(UNEQUAL, per_layer=per_layer))
    for batch in batches:
        collection.update(**batch.inputs())
    first = {name: metric.compute() for name, metric in alone.items()}
    # After compute() the sums are this rank's again, and more can be added: but not by the last, which must not hang.
    filled(alone, batches)
    return [first, collection.compute(), {name: metric.compute() for name, metric in alone.items()}]


@pytest.mark.parametrize(
    ("world", "per_layer"),
    [
        (2, False),
        (4, True),
        pytest.param(2, True, marks=pytest.mark.grid),
        pytest.param(4, False, marks=pytest.mark.grid),
    ],
)
def test_all_ranks_have_the_value_of_all_tokens(world: int, per_layer: bool, get_pool: Any) -> None:
    results = get_pool(world).run(on_a_rank, world, per_layer)
    batches = [batch for rank in range(world) for batch in batches_of(rank, world)]
    expected = all_expected(by_hand(UNEQUAL, batches), per_layer)
    twice = all_expected(by_hand(UNEQUAL, batches * 2), per_layer)
    for alone, collection, again in results:
        assert_all_close(alone, expected)
        assert_all_close(collection, expected)
        assert_all_close(again, twice)
    for name, value in results[0][0].items():
        assert all(torch.equal(value, other[0][name]) for other in results), name


def probes_of(rank: int, look: int) -> Tensor:
    return random_batch(0, 4 + 3 * rank if rank != 1 else 0, 2, 4, seed=10 * rank + look, full=False).topk_ids_TK


def looks_on_a_rank() -> Tensor:
    metric = metrics.RoutingStability(4)
    for look in range(2):
        metric.update(probes_of(torch.distributed.get_rank(), look))
    return metric.compute()


@pytest.mark.parametrize("world", [2, 4])
def test_stability_over_ranks(world: int, get_pool: Any) -> None:
    changed = compared = 0
    for rank in range(world):
        for before, now in zip(probes_of(rank, 0).tolist(), probes_of(rank, 1).tolist(), strict=True):
            compared += 1
            changed += set(before) != set(now)
    assert 0 < changed < compared
    for value in get_pool(world).run(looks_on_a_rank):
        assert value == pytest.approx(changed / compared)
