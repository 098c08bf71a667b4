"""What a router is, what it decides, and how users add their own.

Shapes: T tokens, D width, K experts per token, E experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_moe.config import MoEConfig
from lightning_moe.nn.tokens import Tokens


class Routing(NamedTuple):
    """A router's decision; a tuple, because ZeRO-3 finds the tensors of a module's output in nothing else.

    Args:
        logits_TE: Raw router outputs.
        scores_TE: After the score function.
        topk_scores_TK: Weights of the selected experts' outputs.
        topk_ids_TK: The selected experts, best first.
        kept_TK: False where an assignment has no row: dropped, or never made; ``None`` is nowhere.
        probs_TE: Scores that sum to 1 over the experts, for losses and metrics; ``None`` is ``scores_TE``.
        choice_TE: What was selected by, the higher the better; ``None`` is ``logits_TE``.
        assigned_TK: False where a place holds no assignment: the token is padding, or fewer than K experts chose it;
            ``None`` is nowhere.
        load_TE: Probability of every expert to be selected again under new noise, for the load loss of noisy gates.
        capacity: Scalar, assignments of this rank that each expert has room for; ``None`` is all.
    """

    logits_TE: Tensor
    scores_TE: Tensor
    topk_scores_TK: Tensor
    topk_ids_TK: Tensor
    kept_TK: Tensor | None = None
    probs_TE: Tensor | None = None
    choice_TE: Tensor | None = None
    assigned_TK: Tensor | None = None
    load_TE: Tensor | None = None
    capacity: Tensor | None = None

    @property
    def num_experts(self) -> int:
        """E."""
        return self.logits_TE.shape[1]


class Router(nn.Module, ABC):
    """Base of all routers: a module from tokens [T, D] to a :class:`Routing`.

    Args:
        hidden_size: D.
        config: Settings of the layer.

    Attributes:
        config: As above, resolved; :meth:`lightning_moe.MoE.reconfigure` replaces it.
        balances_itself: Whether the load is even, or out of anybody's hands, without a loss or a bias.
        looks_ahead: Whether a token's experts depend on later tokens at evaluation, too.
        fits_capacity: Whether the choice itself keeps to the capacity.
        estimates_load: Whether ``Routing.load_TE`` is there in training.
    """

    balances_itself: ClassVar[bool] = False
    looks_ahead: ClassVar[bool] = False
    fits_capacity: ClassVar[bool] = False
    estimates_load: ClassVar[bool] = False

    def __init__(self, hidden_size: int, config: MoEConfig) -> None:
        super().__init__()
        self.config = config.resolved()

    @abstractmethod
    def forward(self, x_TD: Tensor, tokens: Tokens) -> Routing:
        """Chooses experts, in ``config.router_dtype`` whatever the precision of ``x_TD``."""

    def rows_per_expert(self, num_tokens: int | Tensor, training: bool) -> Tensor:
        """How many of a rank's tokens an expert takes, where the choice itself keeps to it (``fits_capacity``)."""
        raise NotImplementedError

    def weigh(self, routing: Routing, topk_ids_TK: Tensor) -> Tensor:
        """Weights of a token's experts where one of them is not the router's choice but had room, [T, K].

        Override it with the formula of your own weights.
        """
        return routing.scores_TE.gather(1, topk_ids_TK)


class LearnedRouter(Router):
    """A router with one learned row per expert: ``logits = x @ weight.T``.

    Args:
        hidden_size: D.
        config: Reads ``num_experts``, ``router_dtype`` and ``jitter``.

    Attributes:
        weight: [E, D].
    """

    def __init__(self, hidden_size: int, config: MoEConfig) -> None:
        super().__init__(hidden_size, config)
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights, normal with standard deviation 0.02."""
        nn.init.normal_(self.weight, std=0.02)

    @override
    def forward(self, x_TD: Tensor, tokens: Tokens) -> Routing:
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = x_TD.to(getattr(torch, self.config.router_dtype))
            if self.config.jitter and tokens.training:
                x_TD = x_TD * (1 + self.config.jitter * (2 * tokens.uniform(x_TD.shape[1], JITTER) - 1))
            return self.choose(x_TD, self.project(x_TD, self.weight), tokens)

    @abstractmethod
    def choose(self, x_TD: Tensor, logits_TE: Tensor, tokens: Tokens) -> Routing:
        """Selects experts by their logits."""

    @staticmethod
    def project(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        """``x @ weight.T`` in the dtype of ``x``."""
        return nn.functional.linear(x_TD, weight_ED.to(x_TD.dtype))


# Streams of random numbers within one pass of a layer.
JITTER, CHOICE, DROP = range(3)


def best(choice_TE: Tensor, top_k: int) -> Tensor:
    """Ids of the ``top_k`` highest, best first; [T, E] -> [T, K].

    ``torch.topk`` leaves the order of ties open; here the lower expert id comes first everywhere.
    """
    choice_TE = choice_TE.detach()
    # A few passes of max are faster than a sort, on a CPU, where one can also look whether they found what they should.
    if choice_TE.device.type == "cpu" and 4 * top_k <= choice_TE.shape[1]:
        ids_TK = _best_by_passes(choice_TE, top_k)
        if ids_TK is not None:
            return ids_TK
    order_TE = choice_TE.sort(dim=-1, descending=True, stable=True).indices
    return order_TE[:, :top_k].contiguous()


def _best_by_passes(choice_TE: Tensor, top_k: int) -> Tensor | None:
    """As :func:`best`; ``None`` where minus infinity or NaN would have to be chosen."""
    left_TE, ids_TK = choice_TE.clone(), choice_TE.new_empty(len(choice_TE), top_k, dtype=torch.int64)
    for k in range(top_k):
        highest = left_TE.max(dim=-1, keepdim=True)  # of equals the first
        ids_TK[:, k : k + 1] = highest.indices
        left_TE.scatter_(1, highest.indices, float("-inf"))
    # The last is the lowest of a token's, and NaN counts as the highest.
    is_sound = highest.values.isfinite() | (highest.values == float("inf"))
    return ids_TK if bool(is_sound.all()) else None


def closed(choice: Tensor, where: Tensor) -> Tensor:
    """``choice`` without gradient and with minus infinity ``where`` nothing may be chosen, below all that may."""
    return choice.detach().clamp(min=torch.finfo(choice.dtype).min).masked_fill(where, float("-inf"))


def without_padding(routing: Routing, tokens: Tokens) -> Routing:
    """Leaves padding out of what a router assigned, whether or not the router minded."""
    if tokens.valid_T is None:
        return routing
    assigned_TK = tokens.valid_T.unsqueeze(1).expand_as(routing.topk_ids_TK)
    if routing.assigned_TK is not None:
        assigned_TK = assigned_TK & routing.assigned_TK
    return routing._replace(assigned_TK=assigned_TK)


ROUTERS: dict[str, Callable[[int, MoEConfig], Any]] = {}
"""Known routers, by the name under which a config asks for them."""

Made = TypeVar("Made", bound=Callable[[int, MoEConfig], Any])


def register_router(name: str) -> Callable[[Made], Made]:
    """Makes a router available to ``MoEConfig(router=name)``.

    The decorated class, or a function that makes the module, is called with ``hidden_size`` and the config. Derive
    from :class:`LearnedRouter` for one that selects by logits; see ``docs/routing.md`` for an example.

    Raises:
        ValueError: the name is taken.
    """

    def register(make: Made) -> Made:
        known = ROUTERS.get(name, make)
        if (known.__module__, known.__qualname__) != (make.__module__, make.__qualname__):
            raise ValueError(f"router={name!r}: this name is taken. Register yours under another.")
        ROUTERS[name] = make  # anew where a cell of a notebook runs again
        return make

    return register


def check_router(name: str) -> None:
    """Whether :func:`make_router` knows a name.

    Raises:
        ValueError: it does not; the message lists the known.
    """
    if name not in ROUTERS:
        raise ValueError(
            f"router={name!r}: unknown. Known: {', '.join(sorted(ROUTERS))}. One of your own has to be "
            "registered before the model is built, by lightning_moe.nn.register_router."
        )


def make_router(hidden_size: int, config: MoEConfig) -> Router:
    """The router that ``config.router`` names.

    Raises:
        ValueError: the name is unknown; the message lists the known.
        TypeError: what is registered makes no :class:`Router`.
    """
    check_router(config.router)
    router = ROUTERS[config.router](hidden_size, config)
    if not isinstance(router, Router):
        raise TypeError(
            f"router={config.router!r}: makes a {type(router).__name__}, which is no lightning_moe.nn.Router. "
            "Derive it from Router or LearnedRouter."
        )
    return router
