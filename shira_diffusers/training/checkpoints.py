"""Checkpoints of a run: ``output_dir/checkpoint-<step>`` with the run's state and the adapter as it was then."""

import os
import pickle
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from shira_diffusers.adapter import ShiraAdapter
from shira_diffusers.errors import ShiraError, listing
from shira_diffusers.files import WEIGHTS_NAME, save_adapter
from shira_diffusers.training.config import TrainingConfig

_STATE = "state.pt"
_NAME = re.compile(r"checkpoint-(\d+)")


def save_checkpoint(output: Path, step: int, state: dict[str, Any], adapter: ShiraAdapter, limit: int | None) -> Path:
    """Write a checkpoint, whole or not at all, and remove the oldest ones beyond ``limit``.

    Raises:
        ShiraError: it cannot be written, as where no disk space is left; those before it are untouched.
    """
    target, unfinished = output / f"checkpoint-{step}", output / f".checkpoint-{step}.tmp"
    _sweep(output)
    try:
        unfinished.mkdir(parents=True)
        with open(unfinished / _STATE, "wb") as file:
            torch.save({"step": step, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        save_adapter(adapter, unfinished)
        before = _set_aside(target)
        os.replace(unfinished, target)
        shutil.rmtree(before, ignore_errors=True)
    except (OSError, RuntimeError) as error:  # PyTorch's writer raises the latter
        shutil.rmtree(unfinished, ignore_errors=True)
        raise _not_written(target, error) from error
    if limit is not None:
        for old in list_checkpoints(output)[:-limit]:
            shutil.rmtree(_set_aside(old))
    return target


def save_result(output: Path, adapter: ShiraAdapter) -> Path:
    """Write the adapter of a finished run into its folder.

    Raises:
        ShiraError: it cannot be written; checkpoints are untouched.
    """
    try:
        return save_adapter(adapter, output)
    except OSError as error:
        raise _not_written(output / WEIGHTS_NAME, error) from error


def _not_written(target: Path, error: Exception) -> ShiraError:
    # PyTorch's writer hides why a write to the file failed
    reason = error.__context__ if isinstance(error.__context__, OSError) else error
    last = next((path.name for path in reversed(list_checkpoints(target.parent))), "none")
    return ShiraError(
        f"cannot write {target}: {reason}; the last whole checkpoint is {last}; make room, or lower "
        "--checkpoints_total_limit, and go on with --resume_from_checkpoint latest"
    )


def _set_aside(checkpoint: Path) -> Path:
    """Rename a checkpoint, if it is there: one that is half removed must not be taken for a whole one."""
    aside = checkpoint.with_name(f".{checkpoint.name}.old")
    if checkpoint.is_dir():
        os.replace(checkpoint, aside)
    return aside


def _sweep(output: Path) -> None:
    """Remove what was left by a process that was killed while it wrote or removed a checkpoint."""
    for pattern in (".checkpoint-*.tmp", ".checkpoint-*.old"):
        for path in output.glob(pattern):
            shutil.rmtree(path)


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
        ShiraError: there is no such checkpoint, or it cannot be read.
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
    try:
        state: dict[str, Any] = torch.load(folder / _STATE, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ShiraError(f"cannot read {folder / _STATE}: {error}; resume from another checkpoint") from error
    return state


def choices(config: TrainingConfig) -> dict[str, Any]:
    """The settings that a checkpoint holds to: the masks follow from them, and what is trained how."""
    masks = ("mask_type", "density", "mask_seed", "target_modules", "include_conv", "train_text_encoder")
    names = (*masks, "avoid_adapters", "use_dora")
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
