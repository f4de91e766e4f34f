"""Checkpoints of a run: ``output_dir/checkpoint-<step>`` with the run's state and the adapter as it was then."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from shira_diffusers.adapter import ShiraAdapter
from shira_diffusers.errors import ShiraError
from shira_diffusers.files import save_adapter

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
