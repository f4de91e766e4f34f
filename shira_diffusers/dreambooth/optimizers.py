"""Optimizers of a run: AdamW, 8-bit AdamW or Prodigy, with settings of their own for the text encoders."""

import logging
from collections.abc import Mapping
from itertools import groupby
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from shira_diffusers.dreambooth.config import TrainingConfig
from shira_diffusers.errors import ShiraError, counted

logger = logging.getLogger(__name__)

# what a run that resumes takes from its command line, not from the checkpoint
_SETTINGS = ("betas", "eps", "weight_decay", "initial_lr", "beta3", "decouple", "use_bias_correction")


class Slices:
    """A tuner's flat deltas as several parameters, so that an optimizer can have groups of them.

    They share the memory of ``deltas``: an optimizer's step in place on a slice is one on ``deltas``.

    Args:
        deltas: float32 ``(nnz,)``.
        masks: the trained entries by name, in the order of ``deltas``; names begin with the component.
    """

    def __init__(self, deltas: nn.Parameter, masks: Mapping[str, Tensor]) -> None:
        self._deltas = deltas
        self._slices: list[tuple[nn.Parameter, slice]] = []
        self.denoiser: list[nn.Parameter] = []
        self.text_encoders: list[nn.Parameter] = []
        start = 0
        for is_text, names in groupby(masks, lambda name: name.startswith("text_encoder")):
            bounds = slice(start, start + sum(masks[name].numel() for name in names))
            part = nn.Parameter(deltas.detach()[bounds])
            (self.text_encoders if is_text else self.denoiser).append(part)
            self._slices.append((part, bounds))
            start = bounds.stop

    def receive_gradients(self) -> None:
        """Give each slice its part of ``deltas.grad``, without a copy; None where there is no gradient."""
        for part, bounds in self._slices:
            part.grad = None if self._deltas.grad is None else self._deltas.grad[bounds]

    def clear_gradients(self) -> None:
        """Free the gradients of ``deltas`` and of the slices."""
        self._deltas.grad = None
        for part, _ in self._slices:
            part.grad = None


def make_optimizer(config: TrainingConfig, slices: Slices, examples_a_step: int) -> torch.optim.Optimizer:
    """Make the optimizer: one group of the denoiser's deltas and one of the text encoders'.

    Args:
        config: complete, see ``base_model.complete``.
        examples_a_step: by which ``scale_lr`` multiplies the learning rate; not that of text encoders, as in diffusers.

    Raises:
        ShiraError: 8-bit Adam without bitsandbytes, Prodigy without prodigyopt.
    """
    rate = config.learning_rate * (examples_a_step if config.scale_lr else 1)
    text_rate, text_decay = config.text_encoder_lr, config.adam_weight_decay_text_encoder
    if config.uses_prodigy and text_rate not in (None, rate):
        logger.warning("text_encoder_lr has no effect with Prodigy, which knows one learning rate: %g is used", rate)
        text_rate = None
    decay = config.adam_weight_decay
    groups: list[dict[str, Any]] = [
        {"params": slices.denoiser, "lr": rate, "weight_decay": decay},
        {
            "params": slices.text_encoders,
            "lr": rate if text_rate is None else text_rate,
            "weight_decay": decay if text_decay is None else text_decay,
        },
    ]
    options: dict[str, Any] = {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
    groups = [group for group in groups if group["params"]]
    if config.uses_prodigy:
        return _prodigy(config, groups, options)
    kind: Any = _adamw_8bit() if config.use_8bit_adam else torch.optim.AdamW
    return kind(groups, **options)


def _adamw_8bit() -> Any:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ShiraError("use_8bit_adam needs bitsandbytes: pip install bitsandbytes, or drop it") from error
    return AdamW8bit


def _prodigy_class() -> Any:
    try:
        from prodigyopt import Prodigy
    except ImportError as error:
        raise ShiraError("optimizer prodigy needs prodigyopt: pip install prodigyopt, or use AdamW") from error
    return Prodigy


def require_optimizer(config: TrainingConfig) -> None:
    """Check, before anything is loaded, that the optimizer's library is installed and can run.

    Raises:
        ShiraError: 8-bit Adam without bitsandbytes or without a GPU, Prodigy without prodigyopt.
    """
    if config.uses_prodigy:
        _prodigy_class()
    elif config.use_8bit_adam and _adamw_8bit() and not torch.cuda.is_available():
        raise ShiraError("use_8bit_adam needs a GPU that CUDA knows, and there is none here: drop it")


def _prodigy(config: TrainingConfig, groups: list[dict[str, Any]], options: dict[str, Any]) -> torch.optim.Optimizer:
    if config.use_8bit_adam:
        logger.warning("use_8bit_adam has no effect with optimizer prodigy")
    if config.learning_rate <= 0.1:
        logger.warning("Prodigy finds its own step size: a learning_rate of about 1.0 is usual")
    return _prodigy_class()(
        groups,
        beta3=config.prodigy_beta3,
        decouple=config.prodigy_decouple,
        use_bias_correction=config.prodigy_use_bias_correction,
        safeguard_warmup=config.prodigy_safeguard_warmup,
        **options,
    )


def make_schedule(config: TrainingConfig, optimizer: torch.optim.Optimizer, steps: int) -> Any:
    """Make the learning rate schedule over ``steps`` optimizer steps, a ``LambdaLR``."""
    return get_scheduler(
        config.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )


def warm_up_problem(config: TrainingConfig, steps: int) -> str | None:
    """Say what is wrong if a run ends before its learning rate has risen; None if nothing is."""
    if config.lr_scheduler == "constant" or config.lr_warmup_steps < steps:
        return None
    return (
        f"--lr_warmup_steps {config.lr_warmup_steps} is not shorter than the run ({counted(steps, 'step')}): the "
        f"learning rate never reaches {config.learning_rate:g}; lower it, 0 is no warm-up"
    )


def resume(optimizer: torch.optim.Optimizer, schedule: Any, state: Mapping[str, Any]) -> None:
    """Restore moments and position from a checkpoint, but keep the current learning rates and other settings.

    Args:
        optimizer, schedule: newly made.
        state: their ``state_dict()``, as ``optimizer`` and ``schedule``.
    """
    now = [{name: group[name] for name in _SETTINGS if name in group} for group in optimizer.param_groups]
    rates = list(schedule.base_lrs)
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    schedule.base_lrs = rates
    current = [rate * factor(schedule.last_epoch) for rate, factor in zip(rates, schedule.lr_lambdas, strict=True)]
    schedule._last_lr = current
    for group, settings, rate in zip(optimizer.param_groups, now, current, strict=True):
        group.update(settings, lr=rate)
