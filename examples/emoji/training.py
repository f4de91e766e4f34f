"""What the three training stages share: a time budget, a learning-rate curve, an average, a CUDA graph, checkpoints."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Clock:
    """A budget in seconds that survives a restart: `spent` is what earlier runs used."""

    limit: float
    spent: float = 0.0
    _started: float = field(default_factory=time.monotonic)

    @property
    def elapsed(self) -> float:
        """Seconds used, earlier runs included."""
        return self.spent + time.monotonic() - self._started

    @property
    def progress(self) -> float:
        """The part of the budget used, 0 to 1."""
        return min(1.0, self.elapsed / self.limit)


def set_rate(optimizer: torch.optim.Optimizer, progress: float, peak: float, warm: float = 0.02) -> None:
    """Linear warm-up, then a cosine down to 1 % of `peak`."""
    rate = (
        progress / warm if progress < warm else 0.01 + 0.495 * (1 + math.cos(math.pi * (progress - warm) / (1 - warm)))
    )
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(peak * max(rate, 0.01))  # in place: a CUDA graph reads it
        else:
            group["lr"] = peak * max(rate, 0.01)


class Average:
    """An exponential moving average of a module's parameters and buffers, kept beside it."""

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        self.decay = decay
        self.steps = 0
        self._live = module.state_dict()  # shares the module's memory
        self.values = {name: value.clone() for name, value in self._live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the module's present values; the first steps count more."""
        self.steps += 1
        weight = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        floating = [name for name, value in self._live.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.values[name] for name in floating], [self._live[name] for name in floating], weight)
        for name in self._live.keys() - set(floating):
            self.values[name].copy_(self._live[name])

    def copy_to(self, module: nn.Module) -> None:
        """Put the average into the module."""
        module.load_state_dict(self.values)


@dataclass
class Run:
    """One stage's state: what it trains, for how long, and where its checkpoint lies."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    average: Average
    clock: Clock
    file: Path
    step: int = 0
    losses: list[tuple[float, float]] = field(default_factory=list)  # (seconds, loss), one in a hundred steps
    _saved: float = field(default_factory=time.monotonic)
    _replay: Callable[[], Tensor] | None = None

    @classmethod
    def start(cls, module: nn.Module, rate: float, seconds: float, file: Path, decay: float = 0.999) -> "Run":
        """Begin, or go on from the checkpoint at `file`."""
        device = next(module.parameters()).device
        settings: dict[str, Any] = {"lr": rate, "betas": (0.9, 0.99), "weight_decay": 0.01}
        if device.type == "cuda":
            settings |= {"lr": torch.tensor(rate, device=device), "fused": True, "capturable": True}
        optimizer = torch.optim.AdamW(module.parameters(), **settings)
        run = cls(module, optimizer, Average(module, decay), Clock(seconds), file)
        if file.exists():
            run._resume(device)
        return run

    def _resume(self, device: torch.device) -> None:
        saved = torch.load(self.file, map_location=device, weights_only=True)
        self.module.load_state_dict(saved["module"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.average.values, self.average.steps = saved["average"], saved["step"]
        self.step, self.losses = saved["step"], [tuple(pair) for pair in saved["losses"]]
        self.clock = Clock(self.clock.limit, saved["spent"])

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.values,
            "step": self.step,
            "losses": self.losses,
            "spent": self.clock.elapsed,
        }
        partial = self.file.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.file)
        self._saved = time.monotonic()

    def update(self, loss_of: Callable[[], Tensor], peak: float, *, graphed: bool = False) -> None:
        """One optimizer step; every half minute a checkpoint, every hundred steps a line.

        Args:
            loss_of: the loss of the next batch.
            graphed: record the step as a CUDA graph and replay it from then on: `loss_of` may then not depend on
                anything but tensors on the GPU and its default generator. These small models are bound by launches.
        """
        set_rate(self.optimizer, self.clock.progress, peak)
        if graphed and self._replay is None:
            self._replay = self._record(loss_of)
        loss = self._replay() if self._replay else self._step(loss_of)
        self.average.update()
        if self.step % 100 == 0:
            self.losses.append((round(self.clock.elapsed, 1), round(float(loss.detach()), 5)))
            print(
                f"{self.file.stem}: step {self.step}, {self.clock.elapsed:.0f} s, loss {self.losses[-1][1]}", flush=True
            )
        self.step += 1
        if time.monotonic() - self._saved > 30:
            self.save()

    def _step(self, loss_of: Callable[[], Tensor]) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        for weight in self.module.parameters():
            if weight.grad is not None:
                weight.grad.nan_to_num_(0, 0, 0)  # one infinite gradient would make all weights NaN
        self.optimizer.step()
        return loss

    def _record(self, loss_of: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Warm up on a side stream, capture one step, and return its replay."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._step(loss_of)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            loss = self._step(loss_of)

        def replay() -> Tensor:
            graph.replay()
            return loss

        return replay
