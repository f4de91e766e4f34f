"""Checkpoints of a run: ``output_dir/checkpoint-<step>`` with the run's state and the adapter as it was then.

A folder may hold checkpoints of several runs. Each checkpoint says in ``run.json`` which run it is of: a number, which
counts the runs of the folder, and the run's identity.
"""

import json
import logging
import os
import pickle
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from shira_diffusers.adapters.adapter import ShiraAdapter
from shira_diffusers.dreambooth.run_identity import RunIdentity, differences
from shira_diffusers.errors import ShiraError, listing
from shira_diffusers.formats.shira_file import WEIGHTS_NAME, save_adapter

logger = logging.getLogger(__name__)

_STATE = "state.pt"
_RUN = "run.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def save_checkpoint(
    output: Path,
    step: int,
    state: dict[str, Any],
    adapter: ShiraAdapter,
    limit: int | None,
    *,
    run: int = 0,
    identity: RunIdentity | None = None,
) -> Path:
    """Write a checkpoint, whole or not at all, and remove the oldest ones of the same run beyond ``limit``.

    Args:
        run: the number of the run among those that wrote into ``output``, see ``run_number``.
        identity: of the run, by which ``latest`` finds its checkpoints.

    Raises:
        ShiraError: it cannot be written, as where no disk space is left; those before it are untouched.
    """
    target, unfinished = output / f"checkpoint-{step}", output / f".checkpoint-{step}.tmp"
    about = {"run": run, "learned": identity.learned, "held": identity.held} if identity else {"run": run}
    _sweep(output)
    try:
        unfinished.mkdir(parents=True)
        with open(unfinished / _STATE, "wb") as file:
            torch.save({"step": step, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        (unfinished / _RUN).write_text(json.dumps(about, indent=1), encoding="utf-8")
        save_adapter(adapter, unfinished)
        before = _set_aside(target)
        os.replace(unfinished, target)
        shutil.rmtree(before, ignore_errors=True)
    except (OSError, RuntimeError) as error:  # PyTorch's writer raises the latter
        shutil.rmtree(unfinished, ignore_errors=True)
        raise ShiraError(f"{_not_written(target, error)}; {_REMEDY}") from error
    if limit is not None:
        for old in [path for path in list_checkpoints(output) if _run_of(path) == run][:-limit]:
            shutil.rmtree(_set_aside(old))
    return target


def save_result(output: Path, adapter: ShiraAdapter) -> Path:
    """Write the adapter of a finished run into its folder.

    Raises:
        ShiraError: it cannot be written; it says where the adapter was written instead, if that was possible.
            Checkpoints are untouched.
    """
    try:
        return save_adapter(adapter, output)
    except OSError as error:
        problem = _not_written(output / WEIGHTS_NAME, error)
        elsewhere = _rescue(adapter)
        remedy = (
            f"the trained adapter is in {elsewhere} instead: move it before it is removed" if elsewhere else _REMEDY
        )
        raise ShiraError(f"{problem}; {remedy}") from error


_REMEDY = "make room, or lower --checkpoints_total_limit, and resume with --resume_from_checkpoint latest"


def _not_written(target: Path, error: Exception) -> str:
    # PyTorch's writer hides why a write to the file failed
    reason = error.__context__ if isinstance(error.__context__, OSError) else error
    return f"cannot write {target}: {reason}; the last whole checkpoint is {last_checkpoint(target.parent)}"


def _rescue(adapter: ShiraAdapter) -> Path | None:
    """Write an adapter that took long to train into a temporary folder; None where that fails, too."""
    folder = None
    try:
        folder = tempfile.mkdtemp(prefix="shira-")
        return save_adapter(adapter, folder)
    except OSError:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
        return None


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
    """List the checkpoints in a folder, of all runs that wrote into it, by step."""
    found = {int(match[1]): path for path in output.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))}
    return [found[step] for step in sorted(found)]


def last_checkpoint(output: Path) -> str:
    """Return the name of the last checkpoint, or "none"."""
    return next((path.name for path in reversed(list_checkpoints(output))), "none")


def run_number(output: Path, resumed: Path | None) -> int:
    """Number a run that begins now, among those that wrote checkpoints into a folder.

    Args:
        resumed: the checkpoint that it goes on from. If that is the last one of its run in ``output``, it is the same
            run. Otherwise, and without one, it is a new run, whose checkpoints count apart from those there.
    """
    have = list_checkpoints(output)
    if resumed is not None and resumed.resolve().parent == output.resolve():
        number = _run_of(resumed)
        names = [path.name for path in have if _run_of(path) == number]
        if names[-1:] == [resumed.name]:  # a checkpoint that was renamed is not among them
            return number
    return 1 + max(map(_run_of, have), default=0)


def tell_of_other_runs(output: Path, run: int) -> None:
    """Warn where there are checkpoints of other runs than the one of this number; with what else will be replaced."""
    others = [path.name for path in list_checkpoints(output) if _run_of(path) != run]
    if others:
        finished = f"; so is {WEIGHTS_NAME} when it ends" if (output / WEIGHTS_NAME).is_file() else ""
        logger.warning(
            "%s holds checkpoints of another run (%s): they do not count as this run's, and are replaced where it "
            "reaches the same steps%s; choose another --output_dir to keep them", output, ", ".join(others), finished
        )  # fmt: skip


def find_checkpoint(output: Path, wanted: str, mine: RunIdentity | None = None) -> Path | None:
    """Find the checkpoint to resume.

    Args:
        output: the run's folder.
        wanted: ``latest``, or the checkpoint's path, or its name in the run's folder.
        mine: which run it should be of; None takes any.

    Returns:
        Its folder. For ``latest`` the last one of the newest run with this identity; None, after a warning, where
        there is none. A checkpoint given by name is taken from another run too, with a warning that lists the
        differences.

    Raises:
        ShiraError: there is no such checkpoint.
    """
    have = list_checkpoints(output)
    if wanted == "latest":
        return _latest(output, have, mine or RunIdentity())
    folder = next((path for path in (Path(wanted), output / wanted) if (path / _STATE).is_file()), None)
    if folder is None:
        raise ShiraError(
            f"no checkpoint {wanted!r}; {output} has {', '.join(path.name for path in have) or 'none'}; "
            'give one of them, or "latest"'
        )
    others = differences(_identity_in(folder).learned, mine.learned) if mine else []
    if others:
        logger.warning("%s is of another run, and training goes on from it:%s", folder, listing(others))
    return folder


def _latest(output: Path, have: list[Path], mine: RunIdentity) -> Path | None:
    if not have:
        logger.warning("no checkpoint in %s to resume from: starting a new run", output)
        return None
    have = sorted(have, key=_run_of)  # stable: by run, then by step
    same = [path for path in have if not differences(_identity_in(path).learned, mine.learned)]
    if not same:
        others = differences(_identity_in(have[-1]).learned, mine.learned)
        logger.warning(
            "no checkpoint of this run in %s: starting a new one. %s is of another run; to resume from it anyway, "
            "name it with --resume_from_checkpoint:%s", output, have[-1].name, listing(others)
        )  # fmt: skip
        return None
    alike = [path for path in same if not differences(_identity_in(path).held, mine.held)]
    return (alike or same)[-1]  # ``require_same_run`` reports settings that differ


def require_only_checkpoints(output: Path) -> None:
    """Refuse a folder in which there is something by the name of a checkpoint that is none: it could be replaced.

    Raises:
        ShiraError: names all of it.
    """
    strangers = [path.name for path in list_checkpoints(output) if not (path / _STATE).is_file()]
    if strangers:
        raise ShiraError(
            f"{output} holds {', '.join(strangers)}, expected checkpoints of this trainer (with {_STATE}); move them "
            "away, or choose another --output_dir"
        )


def _about(checkpoint: Path) -> dict[str, Any]:
    """What ``run.json`` holds; nothing in checkpoints of versions that wrote none."""
    try:
        about = json.loads((checkpoint / _RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}


def _run_of(checkpoint: Path) -> int:
    return int(_about(checkpoint).get("run", 0))


def _identity_in(checkpoint: Path) -> RunIdentity:
    about = _about(checkpoint)
    return RunIdentity(about.get("learned", {}), about.get("held", {}))


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """Read the state in a checkpoint's folder, on the CPU: what ``save_checkpoint`` was given, and ``step``.

    Raises:
        ShiraError: it cannot be read.
    """
    try:
        return torch.load(folder / _STATE, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ShiraError(f"cannot read {folder / _STATE}: {error}; resume from another checkpoint") from error
