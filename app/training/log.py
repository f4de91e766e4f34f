"""Follow a training by the files that the trainer writes while it runs."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from shira_diffusers.cli.terminal import printable
from shira_diffusers.dreambooth.checkpoints import list_checkpoints
from shira_diffusers.dreambooth.jsonl_tracker import JSONL_NAME
from shira_diffusers.formats.shira_file import WEIGHTS_NAME

RECENT = 20  # steps that say how fast it goes
TAIL = 20_000  # bytes of the log that are looked at for the last line


@dataclass(frozen=True, slots=True)
class Steps:
    """The steps done.

    Args:
        losses: by step, in order.
        speed: pictures per second, of the last steps; 0 before the first.
        peak_gib: memory that the trainer took at most.
        times: when each step ended, in seconds since 1970, by step; of old logs none.
    """

    losses: Mapping[int, float]
    speed: float = 0.0
    peak_gib: float = 0.0
    times: Mapping[int, float] = field(default_factory=dict)

    @property
    def done(self) -> int:
        """The last step."""
        return max(self.losses, default=0)

    def since(self, begun: float) -> tuple[int, ...]:
        """The steps that ended after a time, in order."""
        return tuple(step for step, ended in self.times.items() if ended > begun)

    def seconds_per_step(self, begun: float, most: int) -> float | None:
        """As the clock says, samples and all that takes time between included: a mean over the last steps since then.

        Args:
            most: that it looks at.
        """
        steps = self.since(begun)[-most:]
        return (self.times[steps[-1]] - self.times[steps[0]]) / (len(steps) - 1) if len(steps) > 1 else None


def read_steps(output: Path) -> Steps:
    """The steps in a training's ``output`` folder; lines that are not whole are passed over."""
    lines = _lines(output / "logs" / JSONL_NAME)
    by_step = {int(line["step"]): line for line in lines}  # of a step that was done again, the last
    steps = [by_step[step] for step in sorted(by_step)]
    if not steps:
        return Steps({})
    speed = median(float(line.get("images_per_second", 0)) for line in steps[-RECENT:])
    peak = max(float(line.get("peak_memory_gib", 0)) for line in steps)
    times = {int(line["step"]): float(line["time"]) for line in steps if "time" in line}
    return Steps({int(line["step"]): float(line["loss"]) for line in steps}, speed, peak, times)


def _lines(file: Path) -> list[dict[str, float]]:
    if not file.is_file():
        return []
    found = []
    for text in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            if math.isfinite(line["loss"]) and line["step"] > 0:
                found.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    return found


def samples(output: Path) -> list[tuple[int, Path]]:
    """The pictures that show what was learned, each with its step, in order."""
    found = sorted((output / "validation").glob("step-*-*.png"))
    return [(int(path.stem.split("-")[1]), path) for path in found]


def last_checkpoint(output: Path) -> tuple[int, Path] | None:
    """Step and adapter file of the last whole checkpoint."""
    checkpoints = [path / WEIGHTS_NAME for path in list_checkpoints(output)]
    return (int(checkpoints[-1].parent.name.split("-")[1]), checkpoints[-1]) if checkpoints else None


def last_line(log: Path) -> str:
    """What the trainer's output says at its end, in a line fit to be shown: its error with the first offender, if any.

    Progress bars say nothing; folders around the log's own are left out.
    """
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL))
        text = file.read().decode(errors="replace")
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip() and "%|" not in line]
    errors = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    message = " ".join(lines[errors[-1] :][:2]) if errors else lines[-1] if lines else ""
    return printable(message.removeprefix("error: ").replace(f"{log.parent}{os.sep}", ""))[:500]
