"""Setting up a run: accelerate, trackers, and what all processes must agree on."""

import os
import secrets
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, broadcast_object_list

from shira_diffusers.errors import ShiraError
from shira_diffusers.training.config import TrainingConfig
from shira_diffusers.training.lines import JsonLines

T = TypeVar("T")

# how long processes wait for the main one, which generates class pictures and validates
_PATIENCE = timedelta(hours=6)


def start(config: TrainingConfig) -> Accelerator:
    """Set up accelerate and the trackers.

    Raises:
        ShiraError: a tracker that is not installed, processes that do not find each other, or fp16 on a CPU.
    """
    available = [str(tracker) for tracker in get_available_trackers()]
    if config.report_to not in ("none", "all", "jsonl", *available):
        raise ShiraError(
            f"report_to: expected an installed tracker ({', '.join(available) or 'there is none'}), "
            f"got {config.report_to!r}; pip install {config.report_to}, or choose --report_to none"
        )
    logs = Path(config.output_dir, config.logging_dir)
    launched = int(os.environ.get("WORLD_SIZE", 1))
    accelerator = Accelerator(
        cpu=launched > 1 and not torch.accelerator.is_available(),  # else accelerate would take each for the only one
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        mixed_precision=config.mixed_precision,
        log_with={"none": None, "jsonl": JsonLines(logs)}.get(config.report_to, config.report_to),
        project_config=ProjectConfiguration(config.output_dir, str(logs)),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
    )
    if accelerator.num_processes != launched:
        raise ShiraError(
            f"{launched} processes were launched, but accelerate knows of {accelerator.num_processes}: launch with "
            "accelerate launch --num_processes or torchrun"
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ShiraError("mixed_precision fp16 needs a GPU, and this run is on a CPU: use bf16 or no")
    if config.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    if accelerator.log_with:
        settings = {n: v if isinstance(v, int | float | str) else str(v) for n, v in vars(config).items()}
        settings.pop("hub_token", None)
        accelerator.init_trackers("dreambooth-shira", config=settings)
    return accelerator


def from_main(accelerator: Accelerator, compute: Callable[[], T]) -> T:
    """What the main process computes, on all processes; tensors should be on the CPU."""
    box = [compute() if accelerator.is_main_process else None]
    broadcast_object_list(box)
    value: Any = box[0]
    result: T = value
    return result


def choose_seed(accelerator: Accelerator, config: TrainingConfig, checkpoint: Mapping[str, Any] | None) -> int:
    """The run's seed: as given, or that of the run that resumes, or a fresh one, the same on all processes."""
    if config.seed is not None:
        return config.seed
    return int(checkpoint["seed"]) if checkpoint else from_main(accelerator, lambda: secrets.randbelow(2**31))
