"""The Lightning strategy: expert and data process groups beside DeepSpeed's ZeRO."""

from __future__ import annotations

import atexit
import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch.distributed as dist
from lightning.fabric.utilities.distributed import _destroy_dist_connection
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.enums import GradClipAlgorithmType
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_moe.engine import deepspeed as engine
from lightning_moe.engine.param_groups import split_expert_groups
from lightning_moe.nn import MoE
from lightning_moe.parallel import Topology, building_for, is_expert_parameter
from lightning_moe.strategies.checkpointing import CheckpointingStrategy, OnSaveError
from lightning_moe.strategies.run_state import OptimizerGroups

if TYPE_CHECKING:
    import lightning as L
    from lightning.pytorch.utilities.types import LRSchedulerConfig


class ExpertParallelStrategy(CheckpointingStrategy):
    """Expert parallelism (EP) for any LightningModule with MoE layers, on DeepSpeed's ZeRO, on GPU and CPU ranks.

    Every rank is a data rank with its own batch. The experts of a layer are spread over ``expert_parallel_size``
    consecutive ranks; ranks that hold the same experts reduce their gradients among themselves, everything else
    over all ranks. Four ranks, ``expert_parallel_size=2``, four experts::

        rank        0      1      2      3
        batch       a      b      c      d
        experts    0 1    2 3    0 1    2 3
        EP group   [    0    ]   [    1    ]      tokens travel inside a group
        gradients of experts 0 1 reduce over ranks 0 2, those of 2 3 over ranks 1 3, the rest over all four

    A run is the same run as that of one process over the same global batch.

    In ``configure_model`` each rank makes only its own experts, and ``self.device_mesh["ep"]`` and
    ``self.device_mesh["edp"]`` are there; a model built whole in ``__init__`` is sharded at setup.

    Args:
        expert_parallel_size: Ranks that together hold all experts once; divides the number of ranks and every
            layer's ``num_experts``. ``"auto"`` is the ranks of one node, or the largest number below that divides
            the experts of the layers that exist before ``configure_model``.
        stage: ZeRO stage, 0 to 3.
        async_save: Writes checkpoints while training goes on, from a copy of this rank's share in host memory.
        on_save_error: ``"raise"`` ends the run when a checkpoint cannot be saved, ``"warn"`` goes on without it. The
            checkpoints that were there stay in both.
        **deepspeed_kwargs: Everything that Lightning's ``DeepSpeedStrategy`` takes.

    Raises:
        ValueError: ``expert_parallel_size`` is neither ``"auto"`` nor at least 1, ``stage`` is not 0 to 3, or
            ``on_save_error`` is not one of its values.
        MisconfigurationException: at setup, on every rank and before the first forward, when model, Trainer and
            strategy do not fit together.
    """

    strategy_name = "expert_parallel"

    def __init__(
        self,
        expert_parallel_size: int | Literal["auto"] = "auto",
        *,
        stage: int = 1,
        async_save: bool = False,
        on_save_error: OnSaveError = "raise",
        **deepspeed_kwargs: Any,
    ) -> None:
        if expert_parallel_size != "auto" and not (isinstance(expert_parallel_size, int) and expert_parallel_size >= 1):
            raise ValueError(
                f"expert_parallel_size={expert_parallel_size!r}: must be 'auto' or a whole number of at least 1. "
                "Use 1 to keep every expert on every rank."
            )
        if stage not in (0, 1, 2, 3):
            raise ValueError(f"stage={stage!r}: must be 0, 1, 2 or 3. Use 1 to shard optimizer states.")
        engine.prepare_import()
        super().__init__(stage=stage, async_save=async_save, on_save_error=on_save_error, **deepspeed_kwargs)
        self.expert_parallel_size = expert_parallel_size
        self._unpartitioned_norm: float | None = None

    def __repr__(self) -> str:
        # The other package's Trainer knows nothing of this class and puts this text into its refusal.
        return (
            f"ExpertParallelStrategy(expert_parallel_size={self.expert_parallel_size!r}) of lightning.pytorch, which "
            "a Trainer of pytorch_lightning cannot use: import Trainer, LightningModule and callbacks from "
            "'lightning' instead"
        )

    # ---------------------------------------------------------------------------------------- groups

    @override
    def setup_environment(self) -> None:
        engine.ignore_deprecations()
        if isinstance(self.accelerator, CPUAccelerator):
            engine.use_cpu()
            DDPStrategy.setup_environment(self)  # the parent refuses everything but CUDA
        else:
            super().setup_environment()

    @override
    def setup_distributed(self) -> None:
        self.set_world_ranks()
        topology = self._topology()  # arithmetic first: a wrong size fails before any rank waits for another
        if not dist.is_initialized():
            # Threads of a process group that outlive the interpreter abort the process after all its work is done.
            atexit.register(_destroy_dist_connection)
        if isinstance(self.accelerator, CPUAccelerator):
            reset_seed()
            self._init_deepspeed_distributed()
        else:
            super().setup_distributed()
        self.expert_groups = engine.new_expert_groups(topology)
        if self.lightning_module is not None:
            self.lightning_module._device_mesh = engine.device_mesh(self.expert_groups, topology, self.root_device.type)

    def _topology(self) -> Topology:
        size = self.expert_parallel_size
        if size == "auto":
            size = self.num_processes
            for layer in _moe_layers(self.lightning_module):
                size = math.gcd(size, layer.num_experts)
        return Topology(self.world_size, size)

    @override
    @contextmanager
    def model_sharded_context(self) -> Generator[None, None, None]:
        assert self.expert_groups is not None
        with super().model_sharded_context(), building_for(self.expert_groups):
            yield

    # ----------------------------------------------------------------------------------------- setup

    @override
    def setup(self, trainer: L.Trainer) -> None:
        self._init_config_if_needed()
        assert self.model is not None
        self._check(trainer, self.model)
        super().setup(trainer)

    def _check(self, trainer: L.Trainer, model: nn.Module) -> None:
        """Refuses what would fail later, or train wrongly without a word."""
        assert self.expert_groups is not None
        size = self.expert_groups.ep_size
        native = list(engine.native_moe_layers(model))
        if not native and not _moe_layers(model):
            raise MisconfigurationException(
                f"strategy='expert_parallel': {type(self.lightning_module).__name__} has no MoE layer. Build one with "
                "lightning_moe.MoE in __init__ or configure_model, or use strategy='deepspeed'."
            )
        for name, layer in native:
            if layer.ep_size != size:
                raise MisconfigurationException(
                    f"{name}.ep_size={layer.ep_size}: every MoE layer of a model uses the same, and "
                    f"expert_parallel_size is {size}. Set both to one number."
                )
            if self._stage == 3:
                raise MisconfigurationException(
                    f"stage=3: {name} is a deepspeed.moe.layer.MoE, which ZeRO 3 does not partition. "
                    "Use stage 0, 1 or 2, or lightning_moe.MoE."
                )
        self._check_checkpoint_callbacks(trainer)
        if trainer.gradient_clip_algorithm == GradClipAlgorithmType.VALUE:
            raise MisconfigurationException(
                "gradient_clip_algorithm='value': gradients are partitioned over ranks and can only be clipped by "
                "norm. Use gradient_clip_algorithm='norm'."
            )
        zero = (self.config or {}).get("zero_optimization", {})
        for name in ("contiguous_gradients", "reduce_scatter"):
            if self._stage in (1, 2) and zero.get(name, True) is False:
                raise MisconfigurationException(
                    f"{name}=False: with ZeRO {self._stage} the gradients of experts would be reduced over the wrong "
                    f"ranks. Leave it at True, or use stage 0 or 3."
                )

    @override
    def _setup_model(self, model: nn.Module) -> nn.Module:  # type: ignore[override]
        assert self.expert_groups is not None
        engine.release_earlier_engine(model)
        for name, layer in model.named_modules():
            if isinstance(layer, MoE):
                layer.shard_(self.expert_groups)
                engine.adopt_layer(layer)
                if layer.tuner is not None:
                    layer.tuner.layer = name
        return super()._setup_model(model)

    @override
    def _init_optimizers(self) -> tuple[Optimizer, LRSchedulerConfig | None]:
        from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers

        assert self.lightning_module is not None
        optimizers, schedulers = _init_optimizers_and_lr_schedulers(self.lightning_module)
        if len(optimizers) != 1 or len(schedulers) > 1:
            raise MisconfigurationException(
                f"configure_optimizers returned {len(optimizers)} optimizers and {len(schedulers)} schedulers: ZeRO "
                "works with one optimizer and at most one scheduler. Return one optimizer with several parameter "
                "groups, or chain schedulers with torch.optim.lr_scheduler.SequentialLR."
            )
        parameters = [p for group in optimizers[0].param_groups for p in group["params"]]
        if self._stage in (1, 2) and not any(is_expert_parameter(parameter) for parameter in parameters):
            raise MisconfigurationException(
                f"configure_optimizers returned an optimizer without any expert's parameters: with ZeRO {self._stage} "
                "DeepSpeed needs some. Use stage 0 or 3 to train with all experts frozen."
            )
        scheduler = schedulers[0] if schedulers else None
        names = {id(parameter): name for name, parameter in self.lightning_module.named_parameters()}
        made = [[names[id(p)] for p in group["params"] if id(p) in names] for group in optimizers[0].param_groups]
        sources = split_expert_groups(
            optimizers[0], [scheduler.scheduler] if scheduler else [], engine.name_param_group
        )
        # DeepSpeed drops groups without parameters.
        kept = [s for s, group in zip(sources, optimizers[0].param_groups, strict=True) if group["params"]]
        self.optimizer_groups = OptimizerGroups(made, kept)
        return optimizers[0], scheduler

    @override
    def _setup_model_and_optimizer(
        self, model: nn.Module, optimizer: Optimizer | None, lr_scheduler: Any = None
    ) -> tuple[Any, Optimizer]:
        assert isinstance(self.config, dict)
        return engine.initialize(model, self.config, self.root_device, optimizer=optimizer, lr_scheduler=lr_scheduler)

    # -------------------------------------------------------------------------------------- training

    @property
    @override
    def handles_gradient_accumulation(self) -> bool:
        """Lightning decides when to step, so that the last, short window of an epoch is stepped as under DDP."""
        return False

    @override
    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Nothing to block: the engine reduces at the boundary that ``backward`` gives it, or partitions at once."""
        yield

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        accumulates = self.lightning_module.automatic_optimization and trainer.fit_loop._should_accumulate()
        self.deepspeed_engine.set_gradient_accumulation_boundary(not accumulates)
        # Lightning has divided the loss by accumulate_grad_batches, and the engine would divide it again.
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        def closure_then_clip() -> Any:
            result = closure()
            if self._stage == 0:
                assert self.expert_groups is not None
                assert self.expert_groups.ep_group is not None
                self._unpartitioned_norm = engine.clip_unpartitioned_gradients(
                    self.deepspeed_engine, self.expert_groups.ep_group, self._clip_norm
                )
            return result

        return super().optimizer_step(optimizer, closure_then_clip, model, **kwargs)

    def global_grad_norm(self) -> float | None:
        """Norm over all parameters, dense and of all experts, of the last optimizer step, before clipping.

        The same on every rank; ``None`` before the first step.
        """
        if self._stage == 0:
            return self._unpartitioned_norm
        norm = self.deepspeed_engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    @override
    def _format_batch_size_and_grad_accum_config(self) -> None:
        super()._format_batch_size_and_grad_accum_config()
        assert isinstance(self.config, dict)
        self._clip_norm = float(self.config.get("gradient_clipping") or 0.0)
        if self._stage == 0:
            self.config["gradient_clipping"] = 0.0  # clipped in optimizer_step instead

    @override
    def _auto_select_batch_size(self) -> int:
        # DeepSpeed only logs it. The parent asks the user's loader, once more than it should, and one that has no
        # batch sampler makes it fail.
        return 1

    # ------------------------------------------------------------------------------------ evaluation

    @override
    def _initialize_deepspeed_inference(self, model: nn.Module) -> None:
        assert isinstance(self.config, dict)
        if self._stage == 3:
            keys = ["fp16", "bf16", "zero_allow_untested_optimizer", "zero_optimization"]
        else:
            # With a bf16 config but no optimizer the engine makes one, and that refuses experts.
            keys = []
            engine.cast_parameters(model, self.precision_plugin._desired_dtype)  # type: ignore[attr-defined]
        config = {
            "train_micro_batch_size_per_gpu": 1,
            **{k: self.config[k] for k in keys if k in self.config},
        }
        self.model, _ = engine.initialize(model, config, self.root_device)

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: Any) -> None:
        strategy_registry.register(
            "expert_parallel", cls, description="Expert parallelism on DeepSpeed ZeRO", override=True
        )


def _moe_layers(model: nn.Module | None) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)] if model is not None else []
