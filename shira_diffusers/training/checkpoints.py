"""Checkpoints of a run: ``output_dir/checkpoint-<step>`` with the run's state and the adapter as it was then."""

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from shira_diffusers.adapter import ShiraAdapter
from shira_diffusers.errors import ShiraError, listing
from shira_diffusers.files import save_adapter
from shira_diffusers.training.config import TrainingConfig

_STATE = "state.pt"
_NAME = re.compile(r"checkpoint-(\d+)")


def save_checkpoint(output: Path, step: int, state: dict[str, Any], adapter: ShiraAdapter, limit: int | None) -> Path:
    """Write a checkpoint, whole or not at all, and remove the oldest ones beyond ``limit``."""
    target, unfinished = output / f"checkpoint-{step}", output / f".checkpoint-{step}.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    torch.save({"step": step, **state}, unfinished / _STATE)
    save_adapter(adapter, unfinished)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(unfinished, target)
    if limit is not None:
        for old in list_checkpoints(output)[:-limit]:
            shutil.rmtree(old)
    return target


def list_checkpoints(output: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = {int(match[1]): path for path in output.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))}
    return [found[step] for step in sorted(found)]


def load_checkpoint(output: Path, wanted: str) -> dict[str, Any] | None:
    """Read the state of a checkpoint, on the CPU.

    Args:
        output: the run's folder.
        wanted: ``latest``, or the checkpoint's path, or its name in the run's folder.

    Returns:
        What ``save_checkpoint`` was given, and ``step``; None for the latest where there is none yet.

    Raises:
        ShiraError: there is no such checkpoint.
    """
    have = list_checkpoints(output)
    if wanted == "latest":
        folder = have[-1] if have else None
    else:
        folder = next((path for path in (Path(wanted), output / wanted) if (path / _STATE).is_file()), None)
        if folder is None:
            raise ShiraError(
                f"no checkpoint {wanted!r}; {output} has {', '.join(path.name for path in have) or 'none'}; "
                'give one of them, or "latest"'
            )
    if folder is None:
        return None
    state: dict[str, Any] = torch.load(folder / _STATE, map_location="cpu", weights_only=True)
    return state


def choices(config: TrainingConfig) -> dict[str, Any]:
    """The settings that a checkpoint holds to: the masks follow from them, and what is trained how."""
    masks = ("mask_type", "density", "mask_seed", "target_modules", "train_text_encoder", "avoid_adapters")
    names = (*masks, "use_dora")
    return {**{name: getattr(config, name) for name in names}, "optimizer": config.optimizer.lower()}


def require_same_run(config: TrainingConfig, checkpoint: Mapping[str, Any]) -> None:
    """Refuse to resume with other masks, another optimizer or seed, or for fewer steps than are done.

    Raises:
        ShiraError: names the settings that differ.
    """
    then, now = dict(checkpoint["choice"]), choices(config)
    if config.seed is not None:
        then["seed"], now["seed"] = checkpoint["seed"], config.seed
    wrong = [f"{name} was {then[name]!r}, got {now[name]!r}" for name in now if then[name] != now[name]]
    if config.max_train_steps is not None and config.max_train_steps < checkpoint["step"]:
        wrong.append(f"max_train_steps is {config.max_train_steps}, but {checkpoint['step']} steps are done")
    if wrong:
        raise ShiraError(
            "a run resumes with the masks, the optimizer and the seed that it began with; give the same settings:"
            f"{listing(wrong)}"
        )
