"""What makes two runs the same one: base model, prompt and pictures, and the settings fixed by a checkpoint."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shira_diffusers.dreambooth.config import TrainingConfig
from shira_diffusers.dreambooth.pictures import Picture
from shira_diffusers.errors import ShiraError, counted, listing, verb

_SAMPLE = 2**16  # bytes from the middle of a weights file stand for it: hashing gigabytes would delay the start


@dataclass(frozen=True, slots=True)
class RunIdentity:
    """Identifies a run independently of paths, so that a moved run can be resumed.

    Args:
        learned: base model, prompt and pictures; if they differ, it is another run.
        held: the settings that cannot change in mid-run, since masks and optimizer state follow from them, and the
            seed, if known.
    """

    learned: Mapping[str, str] = field(default_factory=dict)
    held: Mapping[str, Any] = field(default_factory=dict)


def identity_of(config: TrainingConfig, pictures: Iterable[Picture]) -> RunIdentity:
    """Identify a run with these settings and pictures, which are read once more."""
    base = config.pretrained_model_name_or_path
    learned = {
        "base model": _folder_digest(Path(base)) if Path(base).is_dir() else f"{base} {config.revision or ''}".strip(),
        "instance_prompt": config.instance_prompt,
        "pictures": _pictures_digest(dict.fromkeys(pictures)),
    }
    return RunIdentity(learned, choices(config) | ({} if config.seed is None else {"seed": config.seed}))


def choices(config: TrainingConfig) -> dict[str, Any]:
    """Return the settings fixed by a checkpoint: the masks and the optimizer's state follow from them."""
    masks = ("mask_type", "mask_budget", "density", "mask_seed", "target_modules", "include_conv", "train_text_encoder")
    names = (*masks, "avoid_adapters", "use_dora", "resume_from_adapter", "average_from")
    return {**{name: getattr(config, name) for name in names}, "optimizer": config.optimizer.lower()}


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """List what is known of both and differs, one line each."""
    pairs = {name: (_plain(then[name]), _plain(now[name])) for name in now if name in then}
    return [f"{name} was {was!r}, got {got!r}" for name, (was, got) in pairs.items() if was != got]


def require_same_run(config: TrainingConfig, checkpoint: Mapping[str, Any]) -> None:
    """Refuse to resume with other masks, another optimizer or seed, or for fewer steps than are done.

    Raises:
        ShiraError: names the settings that differ.
    """
    then, now = dict(checkpoint["choice"]), choices(config)
    if config.seed is not None:
        then["seed"], now["seed"] = checkpoint["seed"], config.seed
    wrong = differences(then, now)
    if config.max_train_steps is not None and config.max_train_steps < checkpoint["step"]:
        done = checkpoint["step"]
        steps = f"{counted(done, 'step')} {verb(done, 'is', 'are')}"
        wrong.append(f"max_train_steps is {config.max_train_steps}, but {steps} done")
    if wrong:
        raise ShiraError(
            "a run resumes with the masks, the optimizer and the seed that it began with; give the same settings:"
            f"{listing(wrong)}"
        )


def _plain(value: Any) -> Any:
    """A list, as JSON has it, as a tuple."""
    return tuple(value) if isinstance(value, list) else value


def _pictures_digest(pictures: Iterable[Picture]) -> str:
    digest, count = hashlib.sha256(), 0
    for picture in pictures:
        content = picture.path.read_bytes() if picture.content is None else picture.content()
        for part in (picture.path.name.encode(), picture.prompt.encode(), content):
            digest.update(hashlib.sha256(part).digest())
        count += 1
    return f"{count} with captions, sha256 {digest.hexdigest()[:16]}"


def _folder_digest(folder: Path) -> str:
    """Of the models in a folder: the names and sizes of their files, and some bytes from the middle of each."""
    digest = hashlib.sha256()
    for path in sorted(p for pattern in ("*.safetensors", "*.bin", "*.json") for p in folder.glob(f"*/{pattern}")):
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(0, (size - _SAMPLE) // 2))
            digest.update(f"{path.parent.name}/{path.name} {size}".encode() + file.read(_SAMPLE))
    return f"folder, sha256 {digest.hexdigest()[:16]}"
