"""The settings of a training run: one frozen dataclass, checked as a whole, from which the command line is made."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from shira_diffusers.errors import ShiraError, listing
from shira_diffusers.masks.families import FAMILIES, RANKED
from shira_diffusers.weights.targets import DEFAULT_TARGETS, PRESETS, Targets


def _flag(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


def _secret(help: str) -> Any:
    return field(default=None, repr=False, metadata={"help": help, "secret": True})


def _of_base(help: str) -> Any:
    """Not given: None until the base is known, whose family has a default (``base_model.complete``)."""
    return field(default=None, metadata={"help": help})


def _required(help: str) -> Any:
    return field(metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The settings of a DreamBooth run; names and defaults are those of diffusers' ``train_dreambooth_lora.py``.

    Raises:
        ShiraError: settings out of range or at odds with each other; all of them in one message.
    """

    pretrained_model_name_or_path: str = _required(
        "Stable Diffusion 1.x to 3.5 or Flux.1: a diffusers folder or a Hub id"
    )
    pretrained_vae_model_name_or_path: str | None = _flag(None, "another autoencoder: a diffusers folder or a Hub id")
    revision: str | None = _flag(None, "branch, tag or commit of the Hub repository")
    variant: str | None = _flag(None, "variant of the model files, such as fp16")

    instance_data_dir: str | None = _flag(None, "folder of training pictures; a .txt beside a picture is its caption")
    dataset_name: str | None = _flag(None, "in place of --instance_data_dir: a data set of the Hub, or a local one")
    dataset_config_name: str | None = _flag(None, "configuration of the data set, where it has several")
    image_column: str = _flag("image", "column of the data set that holds the pictures")
    caption_column: str | None = _flag(None, "column of the data set that holds the captions; without, there are none")
    cache_dir: str | None = _flag(None, "where `datasets` keeps what it downloads and prepares")
    instance_prompt: str = _required("prompt of the pictures that have no caption of their own")
    max_sequence_length: int | None = _of_base("tokens of a prompt that T5 reads (default: SD3 77, Flux 512)")
    resolution: int = _of_base("pixels per side to which pictures are resized and cropped (default: 512, SDXL 1024)")
    center_crop: bool = _flag(False, "crop the centre; otherwise crops are random")
    random_flip: bool = _flag(False, "mirror pictures at random")
    repeats: int = _flag(1, "how often each training picture counts in a pass over the data")
    image_interpolation_mode: Literal[
        "nearest", "nearest_exact", "bilinear", "bicubic", "box", "hamming", "lanczos"
    ] = _flag("lanczos", "how pictures are resized")
    on_bad_image: Literal["error", "skip"] = _flag("error", "refuse to start with unreadable pictures, or skip them")
    enable_bucket: bool = _flag(False, "keep aspect ratios: frames of about resolution x resolution, one per batch")
    min_bucket_reso: int | None = _flag(None, "shortest side of frames with --enable_bucket; default: --resolution / 2")
    max_bucket_reso: int | None = _flag(None, "longest side of frames with --enable_bucket; default: 2 x --resolution")
    bucket_reso_steps: int | None = _flag(None, "step of frames' sides; default: --resolution / 8, at most 64")
    caption_dropout_rate: float = _flag(0.0, "how often a prompt is left empty, so that guidance keeps what is learned")
    cache_latents: bool = _flag(False, "encode each picture once (mirrored too); needs crops that are not random")

    mask_type: str = _of_base(
        f"which entries are trained: {', '.join(FAMILIES)} (default: SD 1.x, 2.x and XL grad_mean, others wm)"
    )
    mask_budget: Literal["weight", "global"] | None = _of_base(
        "the same density in each weight, or the highest ranks of all weights together (default: global for grad_mean, "
        "else weight)"
    )
    density: float = _flag(0.02, "fraction of each adapted weight's entries that is trained, in (0, 1]")
    mask_seed: int = _flag(0, "seed of random masks, apart from --seed")
    target_modules: tuple[str, ...] = _flag(
        (DEFAULT_TARGETS,), "a preset (attention, attention+ff, all-linear, all), or layer names and patterns"
    )
    include_conv: bool = _flag(False, "adapt all convolutions (Conv2d) beside --target_modules")
    calibration_steps: int = _flag(8, "batches whose gradients choose the entries of grad, grad_mean and snip masks")
    avoid_adapters: tuple[str, ...] = _flag((), "adapter files whose entries must not be used again")
    resume_from_adapter: str | None = _flag(None, "an adapter to go on from: its entries are trained, from its values")
    use_dora: bool = _flag(False, "train masked entries as DoRA does; the result is an ordinary adapter")
    train_text_encoder: bool = _flag(False, "adapt the text encoder too; of SDXL and SD3 both CLIPs")

    seed: int | None = _flag(None, "the same seed gives the same adapter, bit for bit on CPU (default: random)")
    train_batch_size: int = _flag(4, "pictures per batch")
    num_train_epochs: int = _flag(1, "passes over the pictures, unless --max_train_steps is given")
    max_train_steps: int | None = _flag(None, "optimizer steps in all; overrides --num_train_epochs")
    gradient_accumulation_steps: int = _flag(1, "batches per optimizer step")
    gradient_checkpointing: bool = _flag(False, "save memory by computing activations twice")
    recompute_inputs: bool = _flag(False, "recompute inputs of adapted layers in backward: less memory, more time")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = _flag(
        None, "precision of the models (default: as accelerate is configured)"
    )
    allow_tf32: bool = _flag(False, "use TF32 matrix products on Ampere GPUs and later")
    dataloader_num_workers: int = _flag(0, "processes that load pictures; 0 loads in the main one")

    learning_rate: float = _of_base("learning rate after warmup (default: SD 1.x and 2.x 5e-4, others 1e-4)")
    text_encoder_lr: float | None = _of_base(
        "learning rate of text encoders (default: SD 1.x and 2.x --learning_rate, others 5e-6)"
    )
    average_from: float = _flag(
        0.5,
        "the adapter is the mean of its values after the steps from this part of the run on; 1 is those of the last",
    )
    scale_lr: bool = _flag(False, "multiply the learning rate by processes, batch size and accumulation steps")
    optimizer: str = _flag("AdamW", "AdamW or prodigy, which must be installed (prodigyopt) and finds its step size")
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = _flag("constant", "how the learning rate changes")
    lr_warmup_steps: int = _flag(500, "warmup of the schedules that have one")
    lr_num_cycles: int = _flag(1, "restarts of cosine_with_restarts")
    lr_power: float = _flag(1.0, "power of the polynomial schedule")
    use_8bit_adam: bool = _flag(False, "AdamW of bitsandbytes, which must be installed")
    adam_beta1: float = _flag(0.9, "decay of the first moment")
    adam_beta2: float = _flag(0.999, "decay of the second moment")
    adam_weight_decay: float = _of_base(
        "pulls deltas to zero, so weights to the base (default: SD 1.x and 2.x 1e-2, others 1e-4)"
    )
    adam_weight_decay_text_encoder: float | None = _of_base(
        "that of text encoders (default: SD 1.x and 2.x --adam_weight_decay, others 1e-3)"
    )
    adam_epsilon: float = _flag(1e-8, "epsilon of Adam")
    prodigy_beta3: float | None = _flag(None, "decay of Prodigy's step size statistics (default: root of --adam_beta2)")
    prodigy_decouple: bool = _flag(True, "weight decay apart from the gradient, as in AdamW")
    prodigy_use_bias_correction: bool = _flag(True, "Adam's bias correction in Prodigy")
    prodigy_safeguard_warmup: bool = _flag(True, "keep the learning rate out of Prodigy's statistics during warmup")
    max_grad_norm: float = _flag(1.0, "gradients are clipped to this norm")
    noise_offset: float = _flag(0.0, "scale of noise shared by all pixels of a channel, for dark and light pictures")
    snr_gamma: float | None = _flag(None, "min-SNR loss weighting (arXiv 2303.09556); 5.0 is recommended there")
    weighting_scheme: Literal["sigma_sqrt", "logit_normal", "mode", "cosmap", "none"] | None = _of_base(
        "how timesteps of flow matching are drawn and weighted (default: SD3 logit_normal, Flux none)"
    )
    logit_mean: float = _flag(0.0, "mean of the weighting scheme logit_normal")
    logit_std: float = _flag(1.0, "standard deviation of the weighting scheme logit_normal")
    mode_scale: float = _flag(1.29, "scale of the weighting scheme mode")
    precondition_outputs: bool | None = _of_base(
        "flow matching: compare clean latents rather than velocities, as EDM does (default: SD3 true, Flux false)"
    )
    guidance_scale: float = _flag(3.5, "what Flux.1 dev, which is distilled from guidance, is told")

    with_prior_preservation: bool = _flag(False, "train on pictures of the class as well, to keep it")
    prior_loss_weight: float = _flag(1.0, "weight of the class pictures' loss")
    class_data_dir: str | None = _flag(None, "folder of class pictures; missing ones are generated into it")
    class_prompt: str | None = _flag(None, "prompt of the class pictures")
    num_class_images: int = _flag(100, "number of class pictures")
    prior_generation_precision: Literal["no", "fp32", "fp16", "bf16"] | None = _flag(
        None, "precision in which class pictures are generated (default: fp16 on a GPU, else fp32)"
    )
    sample_batch_size: int = _flag(4, "class or validation pictures generated per batch")

    output_dir: str = _flag("shira-dreambooth-model", "folder that receives the adapter, checkpoints and pictures")
    validation_prompt: str | None = _flag(None, "prompt of pictures made while and after training")
    num_validation_images: int = _flag(4, "validation pictures at a time")
    validation_epochs: int = _flag(50, "epochs between validations")
    validation_steps: int | None = _flag(None, "steps between validations, beside --validation_epochs")
    validation_scheduler: Literal["DPMSolverMultistepScheduler", "DDPMScheduler"] | None = _flag(
        None, "scheduler of validation pictures (default: the base's own)"
    )
    checkpointing_steps: int | None = _flag(None, "steps per checkpoint (default: a quarter of the run, at most 500)")
    checkpoints_total_limit: int | None = _flag(None, "checkpoints of this run to keep, the newest ones")
    resume_from_checkpoint: str | None = _flag(None, 'a checkpoint, or "latest" of this run in --output_dir')
    report_to: str = _flag("tensorboard", "tracker: tensorboard, wandb, ..., all, none, or jsonl for JSON lines")
    logging_dir: str = _flag("logs", "folder of the trackers, inside --output_dir")
    push_to_hub: bool = _flag(False, "upload adapter, model card and validation pictures to the Hugging Face Hub")
    hub_model_id: str | None = _flag(None, "repository to upload to (default: the name of --output_dir)")
    hub_token: str | None = _secret("token to upload with (default: that of `hf auth login`)")

    def __post_init__(self) -> None:
        wrong = [*_out_of_range(self), *_at_odds(self)]
        if wrong:
            raise ShiraError(f"training settings are wrong ({len(wrong)}):{listing(wrong, shown=len(wrong))}")

    @property
    def targets(self) -> Targets:
        """``target_modules`` as ``build_masks`` takes them."""
        return self.target_modules[0] if len(self.target_modules) == 1 else self.target_modules

    @property
    def uses_prodigy(self) -> bool:
        """``optimizer`` is Prodigy, however it is spelled."""
        return self.optimizer.lower() == "prodigy"

    @property
    def idle(self) -> list[str]:
        """The settings that are given but have no effect, each with the reason."""
        if self.with_prior_preservation:
            return []
        names = [name for name in ("class_data_dir", "class_prompt") if getattr(self, name)]
        return [f"--{name} has no effect without --with_prior_preservation" for name in names]


_AT_LEAST_ONE = (
    "repeats", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps",
    "resolution", "calibration_steps", "train_batch_size", "num_train_epochs", "max_train_steps",
    "gradient_accumulation_steps", "lr_num_cycles", "num_class_images", "sample_batch_size",
    "num_validation_images", "validation_epochs", "validation_steps", "checkpointing_steps", "checkpoints_total_limit",
    "max_sequence_length",
)  # fmt: skip
_SHARES = ("adam_beta1", "adam_beta2", "caption_dropout_rate")
_NOT_NEGATIVE = (
    "learning_rate", "lr_warmup_steps", "lr_power", "adam_weight_decay", "adam_epsilon", "prior_loss_weight",
    "dataloader_num_workers", "noise_offset", "text_encoder_lr", "adam_weight_decay_text_encoder",
    "logit_std", "guidance_scale",
)  # fmt: skip


def _out_of_range(config: TrainingConfig) -> list[str]:
    values = vars(config)
    wrong = [
        f"{n} must be at least 1, got {values[n]}" for n in _AT_LEAST_ONE if values[n] is not None and values[n] < 1
    ]
    given = {n: value for n, value in values.items() if value is not None}
    wrong += [f"{n} must not be negative, got {given[n]}" for n in _NOT_NEGATIVE if n in given and not given[n] >= 0]
    wrong += [f"{n} must be above 0, got {values[n]}" for n in ("max_grad_norm",) if not values[n] > 0]
    wrong += [f"{n} must be in [0, 1), got {values[n]}" for n in _SHARES if not 0 <= values[n] < 1]
    if not 0 < config.density <= 1:
        wrong.append(f"density must be in (0, 1], got {config.density}; 0.01 to 0.02 is usual")
    if (config.max_sequence_length or 0) > 512:
        wrong.append(f"max_sequence_length must be at most 512, as in drawing, got {config.max_sequence_length}")
    if config.snr_gamma is not None and not config.snr_gamma > 0:
        wrong.append(f"snr_gamma must be above 0, got {config.snr_gamma}; 5.0 is usual")
    if config.optimizer.lower() not in ("adamw", "prodigy"):
        wrong.append(f"optimizer must be AdamW or prodigy, got {config.optimizer!r}")
    if config.uses_prodigy and config.learning_rate == 0:
        wrong.append("learning_rate must be above 0 for Prodigy, got 0; 1.0 is usual")
    if not 0 <= config.average_from <= 1:
        wrong.append(f"average_from must be in [0, 1], got {config.average_from}; 0.5 is usual, 1 takes no mean")
    if config.mask_type not in (None, *FAMILIES):
        wrong.append(f"mask_type must be one of {', '.join(FAMILIES)}, got {config.mask_type!r}")
    if config.mask_budget == "global" and config.mask_type not in (None, *RANKED):
        wrong.append(f"mask_budget global needs a mask_type of {', '.join(RANKED)}, got {config.mask_type!r}")
    if not config.instance_prompt.strip():
        wrong.append(
            f"instance_prompt must say what the pictures show, such as 'a picture in sks style', got "
            f"{config.instance_prompt!r}"
        )
    if not config.target_modules:
        wrong.append(f"target_modules is empty, expected a preset such as {DEFAULT_TARGETS!r}, or patterns")
    if len(config.target_modules) > 1 and (presets := PRESETS.keys() & set(config.target_modules)):
        wrong.append(f"target_modules mixes the preset {', '.join(presets)} with others: give one preset, or patterns")
    return wrong


def _at_odds(config: TrainingConfig) -> list[str]:
    wrong = []
    if config.with_prior_preservation:
        lacking = [name for name in ("class_data_dir", "class_prompt") if not getattr(config, name)]
        wrong += [f"with_prior_preservation needs {name}" for name in lacking]
    if config.resume_from_adapter is not None:
        names = [name for name in ("avoid_adapters", "use_dora") if getattr(config, name)]
        wrong += [f"resume_from_adapter goes on with the adapter's own entries and values: drop {n}" for n in names]
    wrong += [*_data_at_odds(config), *_buckets_at_odds(config)]
    if config.report_to == "wandb" and config.hub_token is not None:
        wrong.append("hub_token with report_to wandb could expose the token: log in with `hf auth login` instead")
    base, output = Path(config.pretrained_model_name_or_path), Path(config.output_dir)
    if base.is_dir() and base.resolve() in (output.resolve(), *output.resolve().parents):
        wrong.append(f"output_dir {config.output_dir!r} is inside the base model's folder, which is never written to")
    return wrong


def _data_at_odds(config: TrainingConfig) -> list[str]:
    wrong = []
    if config.instance_data_dir is None and config.dataset_name is None:
        wrong.append("no training pictures: give instance_data_dir or dataset_name")
    if config.instance_data_dir is not None and config.dataset_name is not None:
        wrong.append("instance_data_dir and dataset_name are both given: training pictures come from one of them")
    if config.dataset_name is None:
        idle = [name for name in ("dataset_config_name", "caption_column") if getattr(config, name) is not None]
        wrong += [f"{name} has no effect without dataset_name" for name in idle]
    return wrong


def _buckets_at_odds(config: TrainingConfig) -> list[str]:
    if not config.enable_bucket or config.resolution is None:
        return []
    wrong = []
    shortest, longest = config.min_bucket_reso or 1, config.max_bucket_reso or config.resolution
    if not shortest <= config.resolution <= longest:
        wrong.append(
            f"enable_bucket needs min_bucket_reso <= resolution <= max_bucket_reso, got {config.min_bucket_reso}, "
            f"{config.resolution}, {config.max_bucket_reso}"
        )
    if (config.bucket_reso_steps or 1) > config.resolution:
        wrong.append(f"bucket_reso_steps {config.bucket_reso_steps} is above resolution {config.resolution}")
    return wrong
