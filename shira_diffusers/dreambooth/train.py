"""DreamBooth training of a SHiRA adapter for Stable Diffusion 1.x to 3.5 and Flux."""

import logging
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from shira_diffusers.adapters.adapter import ShiraAdapter
from shira_diffusers.dreambooth.base_model import (
    adapted_models,
    adapted_targets,
    cast,
    complete,
    family_of_base,
    idle_settings,
    load_base,
)
from shira_diffusers.dreambooth.checkpoints import (
    find_checkpoint,
    read_checkpoint,
    run_number,
    save_checkpoint,
    save_result,
    tell_of_other_runs,
)
from shira_diffusers.dreambooth.command_line import launch_command
from shira_diffusers.dreambooth.config import TrainingConfig
from shira_diffusers.dreambooth.data import Examples
from shira_diffusers.dreambooth.earlier_adapter import inherited, read_earlier, require_fit, start_from
from shira_diffusers.dreambooth.families import Pipe
from shira_diffusers.dreambooth.interrupts import StopRequest, end_by
from shira_diffusers.dreambooth.launch import (
    choose_seed,
    close_trackers,
    from_main,
    start,
    start_trackers,
    without_cudnn_attention,
)
from shira_diffusers.dreambooth.loss import Objective
from shira_diffusers.dreambooth.model_card import Origin, create_repository, upload, write_card
from shira_diffusers.dreambooth.optimizers import require_optimizer, warm_up_problem
from shira_diffusers.dreambooth.out_of_memory import explained_memory, is_out_of_memory
from shira_diffusers.dreambooth.output_folder import require_outputs, require_room
from shira_diffusers.dreambooth.pictures import instance_pictures
from shira_diffusers.dreambooth.prepare import load_shares, prepare_examples
from shira_diffusers.dreambooth.progress import show
from shira_diffusers.dreambooth.run import Run
from shira_diffusers.dreambooth.run_identity import RunIdentity, identity_of, require_same_run
from shira_diffusers.dreambooth.sampling import class_pictures, validate, validation_files
from shira_diffusers.errors import counted, verb
from shira_diffusers.formats.shira_file import WEIGHTS_NAME, load_adapter
from shira_diffusers.masks.families import CALIBRATED, build_masks
from shira_diffusers.seeds import step_seed
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
        ShiraError: settings, pictures or a base that cannot be used, folders that cannot be written into (nothing has
            been written then), memory that runs out, a loss that is not finite, or a checkpoint that cannot be
            written, or an adapter.
        OSError: other files that cannot be read or written.
        KeyboardInterrupt, SystemExit: after Ctrl-C, or with code 143 after SIGTERM; if training had begun, the step
            under way was finished and a checkpoint written.
    """
    asked, config = config, complete(config)
    for problem in [*config.idle, *idle_settings(asked)]:
        logger.warning(problem)
    require_outputs(config)
    require_optimizer(config)
    saved: list[Path] = []
    with without_cudnn_attention(), explained_memory(config, lambda: _so_far(saved)):
        return _train(asked, config, saved)


def _train(asked: TrainingConfig, config: TrainingConfig, saved: list[Path]) -> Path:
    """Train with complete settings.

    Args:
        asked: as they were given, from which the command to resume is made.
        saved: receives the checkpoint that is resumed and those that are written.
    """
    accelerator = start(config)
    output = Path(config.output_dir)
    groups = [instance_pictures(config)]
    identity = identity_of(config, groups[0])
    resumed, checkpoint = _find_resumed(config, identity)
    saved += [resumed] if resumed else []
    number = run_number(output, resumed)
    tell_of_other_runs(output, number)
    seed = choose_seed(accelerator, config, checkpoint)
    identity = replace(identity, held={**identity.held, "seed": seed})
    earlier = read_earlier(config)
    avoided = [] if checkpoint else [load_adapter(path) for path in config.avoid_adapters]
    if config.with_prior_preservation:
        with accelerator.main_process_first():  # which generates those that lack
            groups.append(class_pictures(config, accelerator.device, seed))
    half = _HALVES.get(accelerator.mixed_precision)
    # UNets are read in float32, from which masks are chosen; transformers and T5 may not fit in that
    resident = half if half and family_of_base(config).flow else torch.float32
    pipe = load_base(config, accelerator.device, resident)
    examples, objective = prepare_examples(pipe, config, groups, seed)
    models = adapted_models(pipe, config)
    if earlier:
        require_fit(earlier, models, config)
    if checkpoint:
        masks = checkpoint["tuner"]["masks"]
    elif earlier:
        masks = {name: delta.indices for name, delta in earlier.deltas.items()}
    else:
        masks = from_main(accelerator, lambda: choose_masks(pipe, models, config, examples, objective, seed, avoided))

    with SparseTuner(models, masks, recompute=config.recompute_inputs, dora=config.use_dora) as tuner:
        run = Run(accelerator, config, tuner, examples, seed, inherited(earlier) if earlier else {})
        if checkpoint:
            run.load_state_dict(checkpoint)
        elif earlier:
            start_from(tuner, earlier)
        if half:
            cast(pipe, half)
        require_room(output, tuner.deltas.numel(), run.checkpoints)
        if problem := warm_up_problem(config, run.last):
            logger.warning(problem)
        repository = create_repository(config) if config.push_to_hub and accelerator.is_main_process else None
        start_trackers(accelerator, config)
        entries, weights = counted(tuner.deltas.numel(), "entry"), counted(len(masks), "weight")
        logger.info("training %s of %s for %s", entries, weights, counted(run.last, "step"))
        with StopRequest() as stop:
            for step in run.steps(objective, stop):
                if run.saves(step):
                    adapter = tuner.adapter(run.metadata(), deltas=run.deltas)
                    limit = config.checkpoints_total_limit
                    written = save_checkpoint(
                        output, step, run.state_dict(), adapter, limit, run=number, identity=identity
                    )
                    saved.append(written)
                    logger.info("saved %s", written)
                if run.stopped and step < run.last:
                    accelerator.wait_for_everyone()  # for the checkpoint
                    _tell_how_to_go_on(asked, step, run.last, accelerator.num_processes)
                    close_trackers(accelerator)
                    end_by(stop.number or signal.SIGTERM)
                if run.validates(step):
                    try_to_validate(accelerator, pipe, config, step, seed)
        run.finish()
        adapter = tuner.adapter(run.metadata())
        if not tuner.deltas.any():
            logger.warning(
                "all values of the adapter are 0: the learning rate is 0, or no gradient reached the weights"
            )
        if accelerator.is_main_process:
            logger.info("wrote %s", save_result(output, adapter))  # first: what follows can fail
            try_to_validate(accelerator, pipe, config, run.last, seed)

    if accelerator.is_main_process:
        pictures = validation_files(config, run.last)
        shown = replace(config, seed=seed, mixed_precision=accelerator.mixed_precision)
        write_card(shown, adapter, pictures, Origin(type(pipe).__name__, accelerator.num_processes, repository))
        if repository:
            logger.info("uploaded %s", upload(config, repository, pictures))
    accelerator.wait_for_everyone()
    close_trackers(accelerator)
    return output / WEIGHTS_NAME


def _find_resumed(config: TrainingConfig, identity: RunIdentity) -> tuple[Path | None, dict[str, Any] | None]:
    """The checkpoint that a run goes on from, and its state; None for a run that starts anew."""
    wanted = config.resume_from_checkpoint
    resumed = find_checkpoint(Path(config.output_dir), wanted, identity) if wanted else None
    if resumed is None:
        return None, None
    checkpoint = read_checkpoint(resumed)
    require_same_run(config, checkpoint)
    done = checkpoint["step"]
    logger.info("resuming from %s: %s %s done", resumed, counted(done, "step"), verb(done, "is", "are"))
    return resumed, checkpoint


def _so_far(saved: Sequence[Path]) -> str:
    """What a run that fails has saved, for its error."""
    if not saved:
        return "nothing was saved yet"
    return f"{saved[-1]} is saved: resume from it with --resume_from_checkpoint latest"


def _tell_how_to_go_on(asked: TrainingConfig, step: int, last: int, processes: int) -> None:
    command = launch_command(replace(asked, resume_from_checkpoint="latest"), processes)
    logger.warning("stopped after step %d of %d, which is saved; resume with\n%s", step, last, command)


def try_to_validate(accelerator: Accelerator, pipe: Pipe, config: TrainingConfig, step: int, seed: int) -> None:
    """Make, save and track the validation pictures of a step; where that fails, warn, and training goes on."""
    try:
        show(accelerator, validate(pipe, config, step, seed), step)
    except Exception as error:  # noqa: BLE001 - pictures and trackers, which are others' code, must not cost an adapter
        remedy = "; try --sample_batch_size 1 or fewer --num_validation_images" if is_out_of_memory(error) else ""
        logger.warning("no validation pictures of step %d: %s%s; the adapter is not affected", step, error, remedy)


def choose_masks(
    pipe: Pipe,
    models: Mapping[str, nn.Module],
    config: TrainingConfig,
    examples: Examples,
    objective: Objective,
    seed: int,
    avoided: Sequence[ShiraAdapter],
) -> dict[str, Tensor]:
    """Build the masks on the CPU; calibrated ones from the gradients of the first batches.

    Args:
        avoided: adapters whose entries are not used.
    """
    calibrated = config.mask_type in CALIBRATED
    untrained = pipe.components.keys() - models.keys()
    masks = build_masks(
        models,
        config.mask_type,
        config.density,
        adapted_targets(pipe, models, config),
        seed=config.mask_seed,
        calibration=_calibration(config, examples, objective, seed) if calibrated else None,
        avoid=[adapter for adapter in avoided if not untrained.issuperset(adapter.component_names())],
        budget=config.mask_budget or "weight",
    )
    return {name: mask.cpu() for name, mask in masks.items()}


def _calibration(config: TrainingConfig, examples: Examples, objective: Objective, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator(objective.device)
    for number, (batch, _) in enumerate(load_shares(examples, config, seed, 0, config.calibration_steps)):
        yield objective.loss(batch, generator.manual_seed(step_seed(seed, "calibration", number)))
