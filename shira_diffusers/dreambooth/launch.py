"""Setting up a run: accelerate, trackers, and what all processes must agree on."""

import logging
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, broadcast_object_list

from shira_diffusers.dreambooth.config import TrainingConfig
from shira_diffusers.dreambooth.jsonl_tracker import JsonlTracker
from shira_diffusers.dreambooth.published_settings import public_settings
from shira_diffusers.errors import ShiraError

logger = logging.getLogger(__name__)

T = TypeVar("T")

# how long processes wait for the main one, which generates class pictures and validates
_PATIENCE = timedelta(hours=6)

# environment variables by which accelerate launch asks for what cannot be used here
_PLANS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}


def start(config: TrainingConfig) -> Accelerator:
    """Set up accelerate. Nothing is written yet; ``start_trackers`` does that.

    Raises:
        ShiraError: a tracker that is not installed, processes that do not find each other, fp16 on a CPU, or a
            configuration of accelerate that has no meaning here.
    """
    _require_plain_accelerate()
    available = [str(tracker) for tracker in get_available_trackers()]
    if config.report_to not in ("none", "all", "jsonl", *available):
        raise ShiraError(
            f"report_to: expected an installed tracker ({', '.join(available) or 'there is none'}), "
            f"got {config.report_to!r}; pip install {config.report_to}, or choose --report_to none"
        )
    logs = Path(config.output_dir, config.logging_dir)
    launched = int(os.environ.get("WORLD_SIZE", 1))
    try:
        accelerator = Accelerator(
            cpu=launched > 1 and not torch.accelerator.is_available(),  # or accelerate takes each for the only one
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            mixed_precision=config.mixed_precision,
            log_with={"none": None, "jsonl": JsonlTracker(logs)}.get(config.report_to, config.report_to),
            project_config=ProjectConfiguration(config.output_dir, str(logs)),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
        )
    except (ImportError, NotImplementedError, ValueError) as error:
        raise ShiraError(
            f"accelerate does not start with its configuration: {error}; check it with `accelerate env`, mend it with "
            "`accelerate config`, or give --mixed_precision"
        ) from error
    if accelerator.num_processes != launched:
        raise ShiraError(
            f"{launched} processes were launched, but accelerate knows of {accelerator.num_processes}: launch with "
            "accelerate launch --num_processes or torchrun"
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ShiraError("mixed_precision fp16 needs a GPU, and this run is on a CPU: use bf16 or no")
    if config.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


def _require_plain_accelerate() -> None:
    """Refuse what shards or replaces models and optimizers: here one small parameter is trained.

    Raises:
        ShiraError: DeepSpeed, FSDP, Megatron-LM or another such plan in accelerate's configuration.
    """
    asked = [name for variable, name in _PLANS.items() if os.environ.get(variable, "").lower() in ("true", "1")]
    if asked:
        raise ShiraError(
            f"accelerate is configured to use {' and '.join(asked)}, which cannot be used here and is not needed: the "
            "optimizer holds the trained entries only, 1 to 2 % of the weights; run `accelerate config` and answer no "
            "to it, or launch with `accelerate launch --multi_gpu --num_processes N`, or plain `python`"
        )
    compiler = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if compiler.lower() != "no":
        logger.warning("accelerate's dynamo_backend %s has no effect: models are not compiled in training", compiler)


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Keep attention off cuDNN, torch's first choice on Hopper; flash and memory-efficient attention take its place.

    Its backward pass gives NaN there or reads beyond its memory, as for Flux in half precision (seen with torch 2.11;
    https://github.com/pytorch/pytorch/issues/196678).
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def start_trackers(accelerator: Accelerator, config: TrainingConfig) -> None:
    """Start the trackers, create their folders, and send them the settings with names in place of paths.

    Raises:
        ShiraError: a tracker does not start, as one that is offline or not logged in.
    """
    if not accelerator.log_with:
        return
    public = public_settings(config)
    settings = {name: v if isinstance(v, int | float | str) else str(v) for name, v in public.items()}
    try:
        accelerator.init_trackers("dreambooth-shira", config=settings)
    except Exception as error:  # trackers are others' code: each raises its own kinds
        raise ShiraError(
            f"the tracker does not start: {error}. Nothing was trained; choose another with --report_to, such as jsonl "
            "or none"
        ) from error


def close_trackers(accelerator: Accelerator) -> None:
    """Flush and close the trackers; warn if one fails."""
    try:
        accelerator.end_training()
    except Exception as error:  # noqa: BLE001 - trackers are others' code, and all else is done
        logger.warning("the tracker could not be closed: %s", error)


def from_main(accelerator: Accelerator, compute: Callable[[], T]) -> T:
    """Return on all processes what the main process computes; tensors should be on the CPU."""
    box: list[Any] = [compute() if accelerator.is_main_process else None]
    broadcast_object_list(box)
    return box[0]


def choose_seed(accelerator: Accelerator, config: TrainingConfig, checkpoint: Mapping[str, Any] | None) -> int:
    """Return the seed, the same on all processes: as given, or the resumed run's, or a fresh one."""
    if config.seed is not None:
        return config.seed
    return int(checkpoint["seed"]) if checkpoint else from_main(accelerator, lambda: secrets.randbelow(2**31))
