"""The optimizer steps of a run, from wherever it stands, on one process or several."""

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from shira_diffusers._version import __version__
from shira_diffusers.dreambooth import optimizers
from shira_diffusers.dreambooth.config import TrainingConfig
from shira_diffusers.dreambooth.data import Batch, Examples, batches_in
from shira_diffusers.dreambooth.data_parallel import Share, add_up
from shira_diffusers.dreambooth.interrupts import StopRequest
from shira_diffusers.dreambooth.loss import Objective
from shira_diffusers.dreambooth.prepare import load_shares
from shira_diffusers.dreambooth.progress import Progress
from shira_diffusers.dreambooth.published_settings import public_name
from shira_diffusers.dreambooth.run_identity import choices
from shira_diffusers.errors import ShiraError
from shira_diffusers.seeds import step_seed
from shira_diffusers.training.tuner import SparseTuner


def checkpoint_interval(steps: int) -> int:
    """Return the default steps between checkpoints: a quarter of the run, at most 500; a run has at least one."""
    return min(500, steps // 4 or steps)


class Run:
    """The optimizer steps of a run.

    Args:
        accelerator: places, precision, processes and trackers.
        tuner: what is trained.
        examples: the data; which of them a step takes, and its noise, depend on ``seed`` and the step alone, so a run
            that resumes goes on as if it had never stopped. Of each batch every process computes its share.
        inherited: metadata of the adapter from an earlier one.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: TrainingConfig,
        tuner: SparseTuner,
        examples: Examples,
        seed: int,
        inherited: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._accelerator, self._config, self._tuner, self._inherited = accelerator, config, tuner, inherited
        self._examples, self._seed = examples, seed
        self._accumulation: int = accelerator.gradient_accumulation_steps
        batch = config.train_batch_size * accelerator.num_processes
        self.steps_per_epoch = math.ceil(batches_in(examples.frames, batch) / self._accumulation)
        self.last = config.max_train_steps or config.num_train_epochs * self.steps_per_epoch
        self.checkpointing_steps = config.checkpointing_steps or checkpoint_interval(self.last)
        self.stopped = False
        self._done = 0
        self._average, self._averaged = torch.zeros_like(tuner.deltas), 0  # the mean, and of how many steps it is
        self._averaged_before = int(config.average_from * self.last)  # steps that the mean leaves out
        self._groups = 2 if config.with_prior_preservation else 1
        self._slices = optimizers.Slices(tuner.deltas, tuner.trained)
        optimizer = optimizers.make_optimizer(config, self._slices, batch * self._accumulation)
        self._schedule = optimizers.make_schedule(config, optimizer, self.last)
        self._optimizer = accelerator.prepare(optimizer)

    def steps(self, objective: Objective, stop: StopRequest) -> Iterator[int]:
        """Train; yields the number of each step when it is done, from 1 to ``last``.

        Args:
            stop: asks to end; after the step in which that is seen, ``stopped`` is true, on all processes.

        Raises:
            ShiraError: a loss that is not finite.
        """
        first, last = (steps * self._accumulation for steps in (self._done, self.last))
        processes = self._accelerator.process_index, self._accelerator.num_processes
        batches = iter(load_shares(self._examples, self._config, self._seed, first, last, *processes))
        with Progress(self._accelerator, self.last, self._done) as progress:
            while self._done < self.last:
                progress.begin()
                loss, pictures = self._step(objective, batches, stop)
                self._done += 1
                self._require_finite(loss)
                progress.end(self._done, loss, self._schedule.get_last_lr(), pictures)
                yield self._done

    def _step(
        self, objective: Objective, batches: Iterator[tuple[Batch, Share]], stop: StopRequest
    ) -> tuple[float, int]:
        """One optimizer step: its loss, and how many pictures it took, of all processes."""
        generator = torch.Generator(self._accelerator.device)
        total = torch.zeros((), device=self._accelerator.device)
        pictures = 0
        for part in range(self._accumulation):
            batch, share = next(batches)
            generator.manual_seed(step_seed(self._seed, "noise", self._done * self._accumulation + part))
            with self._accelerator.autocast():
                loss = objective.loss(batch, generator, share) * share.weight
            self._accelerator.backward(loss)  # divides by the accumulation steps
            total += loss.detach()
            pictures += share.whole(len(batch.prompts), self._groups)
        figures = torch.stack([total, torch.full_like(total, bool(stop.number))])
        if self._accelerator.num_processes > 1:
            add_up(self._tuner.deltas, figures)
        self._slices.receive_gradients()
        self._accelerator.clip_grad_norm_([self._tuner.deltas], self._config.max_grad_norm)
        self._optimizer.step()
        if not self._optimizer.step_was_skipped:
            self._schedule.step()
        self._slices.clear_gradients()
        self._tuner.apply()
        self._take_mean()
        summed, stopped = figures.tolist()
        self.stopped = bool(stopped)
        return summed / self._accumulation, pictures

    @torch.no_grad()
    def _take_mean(self) -> None:
        """Stochastic weight averaging (arXiv 1803.05407): the mean of the values after each step of the run's end."""
        if self._done + 1 > self._averaged_before:
            self._averaged += 1
            self._average.lerp_(self._tuner.deltas, 1 / self._averaged)

    @property
    def deltas(self) -> Tensor:
        """What an adapter made now consists of, float32: the mean of the values, once there is one, or the last."""
        return self._average if self._averaged else self._tuner.deltas.detach()

    def finish(self) -> None:
        """Write the adapter's values into the model, in place of the last step's."""
        with torch.no_grad():
            self._tuner.deltas.copy_(self.deltas)
        self._tuner.apply()

    def _require_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise ShiraError(
                f"the loss is {loss} at step {self._done}: training diverged, nothing was saved for it; lower "
                "--learning_rate, or use --mixed_precision bf16 or no"
            )

    @property
    def checkpoints(self) -> int:
        """How many checkpoints it keeps."""
        made = self.last // self.checkpointing_steps
        return min(made, self._config.checkpoints_total_limit or made)

    def saves(self, step: int) -> bool:
        """Whether this process writes a checkpoint after a step."""
        return self._accelerator.is_main_process and (step % self.checkpointing_steps == 0 or self.stopped)

    def validates(self, step: int) -> bool:
        """Whether this process makes validation pictures after a step and trains on."""
        periods = [self._config.validation_epochs * self.steps_per_epoch, self._config.validation_steps]
        due = step < self.last and any(period and step % period == 0 for period in periods)
        return self._accelerator.is_main_process and due

    def metadata(self) -> dict[str, str]:
        """Return the metadata of an adapter made now."""
        config = self._config
        return {
            "base_model": public_name(config.pretrained_model_name_or_path),
            "mask": config.mask_type,
            **({"mask_budget": "global"} if config.mask_budget == "global" and not self._inherited else {}),
            "density": f"{config.density:g}",
            "mask_seed": str(config.mask_seed),
            "targets": " ".join(config.target_modules) + (" and convolutions" if config.include_conv else ""),
            **({"dora": "true"} if config.use_dora else {}),
            "instance_prompt": config.instance_prompt,
            "steps": str(self._done),
            "learning_rate": f"{config.learning_rate:g}",
            "train_batch_size": str(config.train_batch_size),
            "resolution": str(config.resolution),
            "seed": str(self._seed),
            "library_version": __version__,
            **({"resumed_from": public_name(config.resume_from_adapter)} if config.resume_from_adapter else {}),
            **self._inherited,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what ``load_state_dict`` needs to resume from here."""
        scaler = self._accelerator.scaler
        return {
            "seed": self._seed,
            "choice": choices(self._config),
            "tuner": self._tuner.state_dict(),
            "average": self._average.cpu().clone(),
            "averaged": self._averaged,
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a checkpoint, with the current settings' learning rate.

        The mean begins with the steps that both the run which wrote it and this one, which may have another number of
        steps in all, take it of.
        """
        self._tuner.load_state_dict(state["tuner"])
        optimizers.resume(self._optimizer.optimizer, self._schedule, state)
        if self._accelerator.scaler and state["scaler"]:
            self._accelerator.scaler.load_state_dict(state["scaler"])
        self._done = state["step"]
        average = state.get("average", state["tuner"]["deltas"])  # older checkpoints have none,
        averaged = state.get("averaged", self._done if average.any() else 0)  # nor how many steps it is of
        self._average.copy_(average)
        self._averaged = min(averaged, max(0, self._done - self._averaged_before))
