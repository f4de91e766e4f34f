"""DreamBooth training of a SHiRA adapter for Stable Diffusion 1.x, 2.x and XL."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from shira_diffusers.files import WEIGHTS_NAME, load_adapter
from shira_diffusers.masks import build_masks
from shira_diffusers.training.base import adapted_models, adapted_targets, cast, complete, load_base
from shira_diffusers.training.card import Origin, write_card
from shira_diffusers.training.checkpoints import load_checkpoint, require_same_run, save_checkpoint, save_result
from shira_diffusers.training.config import TrainingConfig
from shira_diffusers.training.data import Examples, step_seed
from shira_diffusers.training.examples import load_batches, prepare_examples
from shira_diffusers.training.families import Pipe
from shira_diffusers.training.instances import instance_pictures
from shira_diffusers.training.launch import choose_seed, from_main, start
from shira_diffusers.training.objective import Objective
from shira_diffusers.training.progress import show
from shira_diffusers.training.publish import create_repository, upload
from shira_diffusers.training.run import Run
from shira_diffusers.training.sampling import class_pictures, validate, validation_files
from shira_diffusers.training.tuner import SparseTuner

logger = logging.getLogger(__name__)

_HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def train(config: TrainingConfig) -> Path:
    """Train an adapter as the settings say. The base model's files are read only.

    Of several processes (``accelerate launch --num_processes``) each computes its share of every batch, and the main
    one alone writes files, makes pictures and reports.

    Returns:
        The adapter's file, ``output_dir/pytorch_shira_weights.safetensors``.

    Raises:
        ShiraError: settings, pictures or a base that cannot be used, a loss that is not finite, or a checkpoint that
            cannot be written, or an adapter.
        OSError: other files that cannot be read or written.
    """
    config = complete(config)
    accelerator = start(config)
    output = Path(config.output_dir)
    checkpoint = load_checkpoint(output, config.resume_from_checkpoint) if config.resume_from_checkpoint else None
    if checkpoint:
        require_same_run(config, checkpoint)
    seed = choose_seed(accelerator, config, checkpoint)
    groups = [instance_pictures(config)]
    if config.with_prior_preservation:
        with accelerator.main_process_first():  # which generates those that lack
            groups.append(class_pictures(config, accelerator.device, seed))
    pipe = load_base(config, accelerator.device)
    examples, objective = prepare_examples(pipe, config, groups, seed)
    models = adapted_models(pipe, config)
    repository = create_repository(config) if config.push_to_hub and accelerator.is_main_process else None
    if checkpoint:
        masks = checkpoint["tuner"]["masks"]
    else:
        masks = from_main(accelerator, lambda: choose_masks(pipe, models, config, examples, objective, seed))

    with SparseTuner(models, masks, recompute=config.recompute_inputs, dora=config.use_dora) as tuner:
        run = Run(accelerator, config, tuner, examples, seed)
        if checkpoint:
            run.load_state_dict(checkpoint)
        if accelerator.mixed_precision in _HALVES:
            cast(pipe, _HALVES[accelerator.mixed_precision])
        logger.info("training %d entries of %d weights for %d steps", tuner.deltas.numel(), len(masks), run.last)
        for step in run.steps(objective):
            if run.saves(step):
                adapter = tuner.adapter(run.metadata())
                saved = save_checkpoint(output, step, run.state_dict(), adapter, config.checkpoints_total_limit)
                logger.info("saved %s", saved)
            if run.validates(step):
                show(accelerator, validate(pipe, config, step, seed), step)
        adapter = tuner.adapter(run.metadata())

    if accelerator.is_main_process:
        logger.info("wrote %s", save_result(output, adapter))
        pictures = validation_files(config, run.last)
        told = replace(config, seed=seed, mixed_precision=accelerator.mixed_precision)
        write_card(told, adapter, pictures, Origin(type(pipe).__name__, accelerator.num_processes, repository))
        if repository:
            logger.info("uploaded %s", upload(config, repository, pictures))
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return output / WEIGHTS_NAME


def choose_masks(
    pipe: Pipe,
    models: Mapping[str, nn.Module],
    config: TrainingConfig,
    examples: Examples,
    objective: Objective,
    seed: int,
) -> dict[str, Tensor]:
    """The masks that the settings ask for, on the CPU; grad and snip ones from the first batches' gradients."""
    calibrated = config.mask_type in ("grad", "snip")
    masks = build_masks(
        models,
        config.mask_type,
        config.density,
        adapted_targets(pipe, models, config),
        seed=config.mask_seed,
        calibration=_calibration(config, examples, objective, seed) if calibrated else None,
        avoid=[load_adapter(path) for path in config.avoid_adapters],
    )
    return {name: mask.cpu() for name, mask in masks.items()}


def _calibration(config: TrainingConfig, examples: Examples, objective: Objective, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator(objective.device)
    for number, batch in enumerate(load_batches(examples, config, seed, 0, config.calibration_steps)):
        yield objective.loss(batch, generator.manual_seed(step_seed(seed, "calibration", number)))
