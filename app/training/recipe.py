"""The settings of a training, checked, and as the trainer's command line; with defaults that suit the base."""

import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from torch import nn

from app.library.names import typed_name
from app.settings.checks import SettingsError, number, whole
from app.settings.settings import MAX_SEED
from app.training.pictures import tidy_caption
from shira_diffusers.dreambooth import families
from shira_diffusers.dreambooth.command_line import command_line
from shira_diffusers.dreambooth.config import TrainingConfig
from shira_diffusers.masks.families import FAMILIES
from shira_diffusers.weights.targets import PRESETS, select

SMALL = 100_000_000  # parameters of a denoiser that learns at high rates on a CPU
CHECKPOINTS, SAMPLES = 10, 5  # of a whole training, about: a cancelled one loses at most a tenth
SAMPLE_PICTURES = 2
_TRAINABLE = [kind for kind, family in families.FAMILIES.items() if family.denoiser == "unet"]
BYTES_PER_ENTRY = 3.1  # of a file, see docs/format.md


@dataclass(frozen=True, slots=True)
class Base:
    """What is trained: the model that the app serves.

    Args:
        path: folder or Hub id.
        kind: class of the pipeline.
        device: on which the app draws; trainings run there, too.
        precision: of the weights, as the trainer's ``mixed_precision`` names it.
        weights: entries of each weight of the denoiser, by preset of targets.
        parameters: of the whole pipeline; ``denoiser`` of the UNet alone.
        resolution: that the model draws at.
    """

    path: str
    kind: str
    device: str
    precision: str
    weights: Mapping[str, tuple[int, ...]]
    parameters: int
    denoiser: int
    resolution: int

    @classmethod
    def of(cls, pipe: Any) -> Self:
        """What there is to know about a pipeline; one without a UNet has no weights to train."""
        unet = getattr(pipe, "unet", None)
        parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
        precision = {"torch.float16": "fp16", "torch.bfloat16": "bf16"}.get(str(pipe.dtype), "no")
        path = str(pipe.config.get("_name_or_path", ""))
        return cls(
            path=str(Path(path).resolve()) if Path(path).is_dir() else path,
            kind=type(pipe).__name__,
            device=str(pipe.device),
            precision="no" if precision == "fp16" and pipe.device.type == "cpu" else precision,
            weights={name: _sizes(unet, name) for name in PRESETS} if unet is not None else {},
            parameters=sum(p.numel() for part in parts for p in part.parameters()),
            denoiser=sum(p.numel() for p in unet.parameters()) if unet is not None else 0,
            resolution=int(unet.config.sample_size) * int(pipe.vae_scale_factor) if unet is not None else 512,
        )

    @property
    def trainable(self) -> str:
        """Why it cannot be trained here, in one sentence; empty if it can."""
        if self.kind in _TRAINABLE:
            return ""
        return f"{self.kind} cannot be trained here, only {' and '.join(_TRAINABLE)} (Stable Diffusion 1.x, 2.x and XL)"


def _sizes(model: nn.Module, preset: str) -> tuple[int, ...]:
    return tuple(weight.numel() for weight in select(model, preset).values())


def _words(setting: str) -> str:
    """A setting as the page calls it."""
    return "pictures per step (batch)" if setting == "batch" else setting.replace("_", " ")


def _text(what: str, value: object) -> str:
    if not isinstance(value, str):
        raise SettingsError(f"{what} must be text, got {reprlib.repr(value)}")
    return tidy_caption("".join(c if c.isprintable() else " " for c in value))


def _name(what: str, value: object) -> str:
    if not _text(what, value):
        raise SettingsError("the adapter needs a name")
    return typed_name(value)


def _number(low: float, high: float) -> Any:
    return lambda what, value: number(what, value, low, high)


def _whole(low: int, high: int, step: int = 1) -> Any:
    def check(what: str, value: object) -> int:
        given = whole(what, value, low, high)
        if given % step:
            raise SettingsError(f"{what} must be a multiple of {step}, got {given}")
        return given

    return check


def _one_of(*choices: str) -> Any:
    def check(what: str, value: object) -> str:
        if value not in choices:
            raise SettingsError(f"{what} must be one of {', '.join(choices)}, got {reprlib.repr(value)}")
        return str(value)

    return check


def _truth(what: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise SettingsError(f"{what} must be true or false, got {reprlib.repr(value)}")
    return value


def _names(what: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise SettingsError(f"{what} must be a list of adapters, got {reprlib.repr(value)}")
    return tuple(dict.fromkeys(value))


def _setting(default: Any, check: Callable[[str, object], Any]) -> Any:
    """A field with the check of what a stranger gives for it."""
    return field(default=default, metadata={"check": check})


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The settings of a training; make one with ``checked``.

    Args:
        name: of the adapter.
        prompt: of pictures without a caption.
        mask, density, targets: which entries are trained.
        steps, learning_rate, batch, seed: of the optimizer; ``batch`` counts pictures.
        resolution: pixels per side.
        flip: mirror pictures at random.
        caption_dropout: how often a prompt is left empty, 0 to 0.9.
        avoid: adapters of the library whose entries are avoided.
        class_prompt: of pictures of the class, so that it stays what it was; empty trains without.
        class_pictures: how many of those.
        sample_prompt: of the pictures that show what was learned so far; empty makes none.
    """

    name: str = _setting("my style", _name)
    prompt: str = _setting("", _text)
    mask: str = _setting("grad", _one_of(*FAMILIES))
    density: float = _setting(0.02, _number(0.0001, 0.2))
    targets: str = _setting("all", _one_of(*PRESETS))
    steps: int = _setting(200, _whole(1, 20_000))
    learning_rate: float = _setting(2e-3, _number(1e-7, 0.1))
    batch: int = _setting(4, _whole(1, 64))
    seed: int = _setting(0, _whole(0, MAX_SEED))
    resolution: int = _setting(512, _whole(16, 2048, 8))
    flip: bool = _setting(True, _truth)
    caption_dropout: float = _setting(0.2, _number(0, 0.9))
    avoid: tuple[str, ...] = _setting((), _names)
    class_prompt: str = _setting("", _text)
    class_pictures: int = _setting(32, _whole(1, 500))
    sample_prompt: str = _setting("", _text)

    @classmethod
    def for_base(cls, base: Base) -> Self:
        """Good defaults: high rates and all weights for a small model, the usual ones for a large one."""
        usual = cls(resolution=base.resolution)
        if base.denoiser < SMALL:
            return usual
        return replace(
            usual, mask="wm", targets="attention+ff", steps=1000, learning_rate=1e-4, batch=1, class_pictures=100
        )

    def changed(self, values: Mapping[str, Any], known: tuple[str, ...]) -> Self:
        """The recipe with some settings as a stranger gave them.

        Args:
            values: by the names of the fields.
            known: adapters that can be avoided.

        Raises:
            SettingsError: an unknown setting, or the first that is wrong, what was expected and what came.
        """
        checks = {each.name: each.metadata["check"] for each in fields(self)}
        unknown = ", ".join(map(reprlib.repr, sorted(map(str, values.keys() - checks.keys()))[:5]))
        if unknown:
            raise SettingsError(f"no setting named {unknown}; there are {', '.join(checks)}")
        new = replace(self, **{name: checks[name](_words(name), value) for name, value in values.items()})
        strangers = [name for name in new.avoid if name not in known]
        if strangers:
            raise SettingsError(f"no adapter named {strangers[0][:60]!r} to avoid; there are {', '.join(known)}")
        return new

    def as_dict(self) -> dict[str, Any]:
        """The settings by name, for JSON."""
        return {**asdict(self), "avoid": list(self.avoid)}

    def entries(self, base: Base) -> int:
        """How many entries are trained."""
        return sum(max(1, round(self.density * size)) for size in base.weights.get(self.targets, ()))

    def flags(self, base: Base, folder: Path, avoid: Mapping[str, Path], root: Path, *, resume: bool) -> list[str]:
        """The trainer's command line.

        Args:
            folder: of the training; pictures are in ``pictures`` in it, ``output`` receives the results.
            avoid: files of the adapters to avoid.
            root: where the trainer is run; a base inside it is named from there, as adapters name it.

        Raises:
            SettingsError: no prompt.
            ShiraError: settings that the trainer refuses.
        """
        if not self.prompt:
            raise SettingsError("the prompt is empty: say what the pictures show, like “a picture in sks style”")
        prior = {
            "with_prior_preservation": True,
            "class_prompt": self.class_prompt,
            "class_data_dir": str(folder / "class"),
            "num_class_images": self.class_pictures,
        }
        sampled = {
            "validation_prompt": self.sample_prompt,
            "num_validation_images": SAMPLE_PICTURES,
            "validation_steps": math.ceil(self.steps / SAMPLES),
            "validation_epochs": 10**9,
        }
        path = Path(base.path)
        config = TrainingConfig(
            pretrained_model_name_or_path=str(path.relative_to(root)) if path.is_relative_to(root) else base.path,
            instance_data_dir=str(folder / "pictures"),
            instance_prompt=self.prompt,
            output_dir=str(folder / "output"),
            mask_type=self.mask,
            density=self.density,
            target_modules=(self.targets,),
            calibration_steps=4,
            avoid_adapters=tuple(str(avoid[name]) for name in self.avoid),
            max_train_steps=self.steps,
            learning_rate=self.learning_rate,
            lr_scheduler="cosine",
            lr_warmup_steps=0,
            train_batch_size=self.batch,
            seed=self.seed,
            resolution=self.resolution,
            center_crop=True,
            cache_latents=True,
            random_flip=self.flip,
            caption_dropout_rate=self.caption_dropout,
            mixed_precision="no" if base.precision == "no" else base.precision,  # type: ignore[arg-type]
            checkpointing_steps=max(5, math.ceil(self.steps / CHECKPOINTS)),
            checkpoints_total_limit=1,
            resume_from_checkpoint="latest" if resume else None,
            report_to="jsonl",
            **(prior if self.class_prompt else {}),  # type: ignore[arg-type]
            **(sampled if self.sample_prompt else {}),  # type: ignore[arg-type]
        )
        return [word for flag in command_line(config) for word in flag]
