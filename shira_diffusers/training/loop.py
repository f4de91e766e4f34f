"""DreamBooth training of a SHiRA adapter for Stable Diffusion 1.x and 2.x."""

import logging
import math
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import ProjectConfiguration
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from tqdm.auto import tqdm

from shira_diffusers._version import __version__
from shira_diffusers.errors import ShiraError, listing
from shira_diffusers.files import load_adapter, save_adapter
from shira_diffusers.masks import build_masks
from shira_diffusers.training.base import adapted_models, cast, complete, load_base
from shira_diffusers.training.card import write_card
from shira_diffusers.training.checkpoints import load_checkpoint, save_checkpoint
from shira_diffusers.training.config import TrainingConfig
from shira_diffusers.training.data import Batch, Examples, batches_in, find_pictures, step_seed
from shira_diffusers.training.examples import load_batches, prepare_examples
from shira_diffusers.training.objective import Objective
from shira_diffusers.training.publish import create_repository, upload
from shira_diffusers.training.sampling import class_pictures, validate, validation_files
from shira_diffusers.training.tuner import SparseTuner

logger = logging.getLogger(__name__)

_HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def train(config: TrainingConfig) -> Path:
    """Train an adapter as the settings say. The base model's files are read only.

    Returns:
        The adapter's file, ``output_dir/pytorch_shira_weights.safetensors``.

    Raises:
        ShiraError: settings, pictures or a base that cannot be used, or a loss that is not finite.
        OSError: files that cannot be read or written.
    """
    config = complete(config)
    accelerator = start(config)
    output = Path(config.output_dir)
    checkpoint = load_checkpoint(output, config.resume_from_checkpoint) if config.resume_from_checkpoint else None
    if checkpoint:
        require_same_run(config, checkpoint)
    seed = _seed(config, checkpoint)
    groups = [find_pictures(config.instance_data_dir, config.instance_prompt)]
    pipe = load_base(config, accelerator.device)
    if config.with_prior_preservation:
        groups.append(class_pictures(pipe, config, seed))
    examples, objective = prepare_examples(pipe, config, groups, seed)
    models = adapted_models(pipe, config)
    repository = create_repository(config) if config.push_to_hub else None
    masks = checkpoint["tuner"]["masks"] if checkpoint else choose_masks(models, config, examples, objective, seed)

    with SparseTuner(models, masks) as tuner:
        run = Run(accelerator, config, tuner, examples, seed)
        if checkpoint:
            run.load_state_dict(checkpoint)
        if accelerator.mixed_precision in _HALVES:
            cast(pipe, _HALVES[accelerator.mixed_precision])
        logger.info("training %d entries of %d weights for %d steps", tuner.deltas.numel(), len(masks), run.last)
        for step in run.steps(objective):
            if step % config.checkpointing_steps == 0:
                adapter = tuner.adapter(run.metadata())
                saved = save_checkpoint(output, step, run.state_dict(), adapter, config.checkpoints_total_limit)
                logger.info("saved %s", saved)
            if step == run.last or step % (config.validation_epochs * run.steps_per_epoch) == 0:
                show(accelerator, validate(pipe, config, step, seed), step)
        adapter = tuner.adapter(run.metadata())
        file = save_adapter(adapter, output)
    logger.info("wrote %s", file)
    pictures = validation_files(config, run.last)
    write_card(replace(config, seed=seed), adapter, pictures, repository)
    if repository:
        logger.info("uploaded %s", upload(config, repository, pictures))
    accelerator.end_training()
    return file


class Run:
    """The optimizer steps of a run, from wherever it stands.

    Args:
        accelerator: places, precision and trackers.
        tuner: what is trained.
        examples: the data; which of them a step takes, and its noise, depend on ``seed`` and the step alone, so a run
            that resumes goes on as if it had never stopped.
    """

    def __init__(
        self, accelerator: Accelerator, config: TrainingConfig, tuner: SparseTuner, examples: Examples, seed: int
    ) -> None:
        self._accelerator, self._config, self._tuner = accelerator, config, tuner
        self._examples, self._seed = examples, seed
        self._accumulation: int = accelerator.gradient_accumulation_steps
        self.steps_per_epoch = math.ceil(batches_in(len(examples), config.train_batch_size) / self._accumulation)
        self.last = config.max_train_steps or config.num_train_epochs * self.steps_per_epoch
        self._done = 0
        optimizer = make_optimizer(config, tuner.deltas, self._accumulation)
        schedule = get_scheduler(
            config.lr_scheduler,
            optimizer=optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=self.last,
            num_cycles=config.lr_num_cycles,
            power=config.lr_power,
        )
        self._optimizer, self._schedule = accelerator.prepare(optimizer, schedule)

    def steps(self, objective: Objective) -> Iterator[int]:
        """Train; yields the number of each step when it is done, from 1 to ``last``.

        Raises:
            ShiraError: a loss that is not finite.
        """
        first = self._done * self._accumulation
        batches = iter(load_batches(self._examples, self._config, self._seed, first, self.last * self._accumulation))
        with tqdm(desc="Steps", total=self.last, initial=self._done) as progress:
            while self._done < self.last:
                loss = self._step(objective, batches)
                self._done += 1
                self._report(loss, progress)
                yield self._done

    def _step(self, objective: Objective, batches: Iterator[Batch]) -> Tensor:
        generator = torch.Generator(self._accelerator.device)
        total = torch.zeros((), device=self._accelerator.device)
        for part in range(self._accumulation):
            generator.manual_seed(step_seed(self._seed, "noise", self._done * self._accumulation + part))
            with self._accelerator.autocast():
                loss = objective.loss(next(batches), generator)
            self._accelerator.backward(loss)  # divides by the accumulation steps
            total += loss.detach()
        self._accelerator.clip_grad_norm_([self._tuner.deltas], self._config.max_grad_norm)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()
        self._tuner.apply()
        return total / self._accumulation

    def _report(self, loss: Tensor, progress: "tqdm[Any]") -> None:
        logs = {"loss": loss.item(), "lr": self._schedule.get_last_lr()[0]}
        if not math.isfinite(logs["loss"]):
            raise ShiraError(
                f"the loss is {logs['loss']} at step {self._done}: training diverged, nothing was saved for it; lower "
                "--learning_rate, or use --mixed_precision bf16 or no"
            )
        progress.set_postfix(logs, refresh=False)
        progress.update()
        self._accelerator.log(logs, step=self._done)

    def metadata(self) -> dict[str, str]:
        """What an adapter made now tells about itself."""
        config = self._config
        return {
            "base_model": config.pretrained_model_name_or_path,
            "mask": config.mask_type,
            "density": f"{config.density:g}",
            "mask_seed": str(config.mask_seed),
            "targets": " ".join(config.target_modules),
            "instance_prompt": config.instance_prompt,
            "steps": str(self._done),
            "learning_rate": f"{config.learning_rate:g}",
            "train_batch_size": str(config.train_batch_size),
            "resolution": str(config.resolution),
            "seed": str(self._seed),
            "library_version": __version__,
        }

    def state_dict(self) -> dict[str, Any]:
        """What ``load_state_dict`` needs to go on from here."""
        scaler = self._accelerator.scaler
        return {
            "seed": self._seed,
            "choice": _choice(self._config),
            "tuner": self._tuner.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._tuner.load_state_dict(state["tuner"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        if self._accelerator.scaler and state["scaler"]:
            self._accelerator.scaler.load_state_dict(state["scaler"])
        self._done = state["step"]


def start(config: TrainingConfig) -> Accelerator:
    """Set up accelerate and the trackers.

    Raises:
        ShiraError: a tracker that is not installed, several processes, or fp16 on a CPU.
    """
    available = [str(tracker) for tracker in get_available_trackers()]
    if config.report_to not in ("none", "all", *available):
        raise ShiraError(
            f"report_to {config.report_to!r} is not installed, there is {', '.join(available) or 'none'}; "
            f"pip install {config.report_to}, or choose --report_to none"
        )
    accelerator = Accelerator(
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        mixed_precision=config.mixed_precision,
        log_with=None if config.report_to == "none" else config.report_to,
        project_config=ProjectConfiguration(config.output_dir, str(Path(config.output_dir, config.logging_dir))),
    )
    if accelerator.num_processes > 1:
        raise ShiraError(f"expected one process, got {accelerator.num_processes}: launch with --num_processes 1")
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ShiraError("mixed_precision fp16 needs a GPU, and this run is on a CPU: use bf16 or no")
    if config.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    if accelerator.log_with:
        settings = {n: v if isinstance(v, int | float | str) else str(v) for n, v in vars(config).items()}
        settings.pop("hub_token")
        accelerator.init_trackers("dreambooth-shira", config=settings)
    return accelerator


def _seed(config: TrainingConfig, checkpoint: Mapping[str, Any] | None) -> int:
    """The run's seed: as given, or that of the run that resumes, or a fresh one."""
    if config.seed is not None:
        return config.seed
    return int(checkpoint["seed"]) if checkpoint else secrets.randbelow(2**31)


def _choice(config: TrainingConfig) -> dict[str, Any]:
    """The settings that the masks follow from."""
    names = ("mask_type", "density", "mask_seed", "target_modules", "train_text_encoder", "avoid_adapters")
    return {name: getattr(config, name) for name in names}


def require_same_run(config: TrainingConfig, checkpoint: Mapping[str, Any]) -> None:
    """Refuse to resume with other masks or another seed than the checkpoint's, or for fewer steps than are done.

    Raises:
        ShiraError: names the settings that differ.
    """
    then, now = dict(checkpoint["choice"]), _choice(config)
    if config.seed is not None:
        then["seed"], now["seed"] = checkpoint["seed"], config.seed
    wrong = [f"{name} was {then[name]!r}, got {now[name]!r}" for name in now if then[name] != now[name]]
    if config.max_train_steps is not None and config.max_train_steps < checkpoint["step"]:
        wrong.append(f"max_train_steps is {config.max_train_steps}, but {checkpoint['step']} steps are done")
    if wrong:
        raise ShiraError(
            f"a run resumes with the masks and the seed that it began with; give the same settings:{listing(wrong)}"
        )


def choose_masks(
    models: Mapping[str, nn.Module], config: TrainingConfig, examples: Examples, objective: Objective, seed: int
) -> dict[str, Tensor]:
    """Build the masks that the settings ask for; grad and snip ones from the first batches' gradients."""
    calibrated = config.mask_type in ("grad", "snip")
    return build_masks(
        models,
        config.mask_type,
        config.density,
        config.targets,
        seed=config.mask_seed,
        calibration=_calibration(config, examples, objective, seed) if calibrated else None,
        avoid=[load_adapter(path) for path in config.avoid_adapters],
    )


def _calibration(config: TrainingConfig, examples: Examples, objective: Objective, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator(objective.device)
    for number, batch in enumerate(load_batches(examples, config, seed, 0, config.calibration_steps)):
        yield objective.loss(batch, generator.manual_seed(step_seed(seed, "calibration", number)))


def make_optimizer(config: TrainingConfig, deltas: nn.Parameter, accumulation: int) -> torch.optim.Optimizer:
    """AdamW over the deltas.

    Raises:
        ShiraError: 8-bit Adam without bitsandbytes.
    """
    kind = _adamw_8bit() if config.use_8bit_adam else torch.optim.AdamW
    scale = config.train_batch_size * accumulation if config.scale_lr else 1
    optimizer: torch.optim.Optimizer = kind(
        [deltas],
        lr=config.learning_rate * scale,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
    )
    return optimizer


def _adamw_8bit() -> Any:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ShiraError("use_8bit_adam needs bitsandbytes: pip install bitsandbytes, or drop it") from error
    return AdamW8bit


def show(accelerator: Accelerator, images: list[Any], step: int) -> None:
    """Send validation pictures to the trackers that take pictures."""
    for tracker in accelerator.trackers:
        if images and hasattr(tracker, "log_images"):
            pixels = np.stack([np.asarray(image) for image in images])
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"validation": pixels}, step=step, **options)
