"""The model card of a run: ``README.md`` beside the adapter, as the Hub shows it."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError

from shira_diffusers.adapters.adapter import ShiraAdapter
from shira_diffusers.dreambooth.command_line import launch_command
from shira_diffusers.dreambooth.config import TrainingConfig
from shira_diffusers.dreambooth.published_settings import public_name
from shira_diffusers.errors import ShiraError, counted
from shira_diffusers.formats.shira_file import WEIGHTS_NAME

logger = logging.getLogger(__name__)

CARD_NAME = "README.md"
_TAG = "shira"
_TAGS = {
    "StableDiffusionPipeline": ("stable-diffusion",),
    "StableDiffusionXLPipeline": ("stable-diffusion", "stable-diffusion-xl"),
    "StableDiffusion3Pipeline": ("stable-diffusion", "sd3", "sd3-diffusers"),
    "FluxPipeline": ("flux", "flux-diffusers"),
}
_PAPER = "https://arxiv.org/abs/2406.13175"


# the last is the error of whatever HTTP client huggingface_hub uses
_FAILURES: tuple[type[Exception], ...] = (OSError, ValueError, RuntimeError, HfHubHTTPError.__bases__[0])


@dataclass(frozen=True, slots=True)
class Origin:
    """What a card says about a run beyond its settings.

    Args:
        pipeline: the class of the base.
        processes: on which it ran.
        repository: ``owner/name`` on the Hub, where the card goes; None for a local run.
    """

    pipeline: str = "StableDiffusionPipeline"
    processes: int = 1
    repository: str | None = None


def write_card(config: TrainingConfig, adapter: ShiraAdapter, pictures: Sequence[Path], origin: Origin) -> None:
    """Write the card into ``output_dir``. Another README is kept as it is; the licence of an earlier card stays.

    Args:
        config: the settings with ``seed``, from which the command is written, without a checkpoint to resume from. A
            card for a repository has names of folders in place of their paths.
        adapter: as trained; the card lists its metadata.
        pictures: of the validation, inside ``output_dir``.
        origin: the rest.
    """
    path = Path(config.output_dir, CARD_NAME)
    before = _read_data(path) if path.is_file() else {}
    if path.is_file() and _TAG not in (before.get("tags") or ()):
        logger.warning("%s is not the card of an adapter: it is kept as it is, and no card is written", path)
        return
    config = replace(config, resume_from_checkpoint=None)
    images = [picture.relative_to(config.output_dir).as_posix() for picture in pictures]
    data = _data(config, images, origin, {name: value for name, value in before.items() if name.startswith("license")})
    text = _text(config, adapter, images, origin, licensed="license" in before)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(path)


def _read_data(path: Path) -> dict[str, Any]:
    """What is written between the dashes on top; nothing if that cannot be read."""
    try:
        return dict(ModelCard.load(path).data.to_dict())
    except (ValueError, TypeError, yaml.YAMLError):
        return {}


def _data(config: TrainingConfig, images: Sequence[str], origin: Origin, licence: dict[str, Any]) -> ModelCardData:
    base, dataset = config.pretrained_model_name_or_path, config.dataset_name
    return ModelCardData(
        base_model=None if Path(base).exists() else base,  # the Hub takes ids only
        datasets=None if dataset is None or Path(dataset).exists() else [dataset],
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=[_TAG, "diffusers", "text-to-image", *_TAGS[origin.pipeline]],
        instance_prompt=config.instance_prompt,
        widget=[{"text": config.validation_prompt, "output": {"url": image}} for image in images] or None,
        **licence,
    )


def _text(
    config: TrainingConfig, adapter: ShiraAdapter, images: Sequence[str], origin: Origin, *, licensed: bool
) -> str:
    metadata, base = adapter.metadata, _shown(config.pretrained_model_name_or_path, origin.repository)
    title = origin.repository or Path(config.output_dir).resolve().name
    entries = f"{counted(adapter.nnz, 'entry')} ({100 * adapter.density:.3g} % of the adapted weights)"
    parts = [
        f"# {title}",
        f"A sparse high rank adapter ([SHiRA]({_PAPER})) for {_code(base)}, trained "
        f"with DreamBooth by shira_diffusers. It changes {entries} of {', '.join(adapter.component_names())}: mask "
        f"{_code(metadata['mask'])}, density {metadata['density']}.",
        f"Say {_code(config.instance_prompt)} in the prompt to call it up.",
    ]
    if images:
        shown = "\n".join(f"![validation picture {number}]({image})" for number, image in enumerate(images, 1))
        parts += [f"{_code(config.validation_prompt or '')}, with the adapter at strength 1:", shown]
    parts += ["## Use it", _fence("python", _usage(config, origin.repository))]
    parts += [
        "## How it was made",
        _fence("bash", launch_command(config, origin.processes, public=bool(origin.repository))),
        _table(metadata),
    ]
    if not licensed:
        parts += [
            "## Licence",
            "Not chosen yet: write `license: ...` between the dashes on top of this file. The licence of the base "
            "model and the rights to the training pictures bind you.",
        ]
    return "\n\n".join(parts) + "\n"


def _shown(path: str, repository: str | None) -> str:
    """A path as it is, or for a repository its name."""
    return public_name(path) if repository else path


def _usage(config: TrainingConfig, repository: str | None) -> str:
    base = _shown(config.pretrained_model_name_or_path, repository)
    revision = f", revision={config.revision!r}" if config.revision else ""
    return "\n".join(
        [
            "import shira_diffusers  # the library: adds load_shira to diffusers' pipelines",
            "from diffusers import DiffusionPipeline",
            "",
            f"pipe = DiffusionPipeline.from_pretrained({base!r}{revision})",
            f"pipe.load_shira({repository or config.output_dir!r})",
            f"image = pipe({config.validation_prompt or config.instance_prompt!r}).images[0]",
        ]
    )


def _table(metadata: Mapping[str, str]) -> str:
    rows = [f"| {name} | {_code(value).replace('|', chr(92) + '|')} |" for name, value in sorted(metadata.items())]
    return "\n".join(["| metadata of the file | |", "|---|---|", *rows])


def _ticks(text: str) -> str:
    """More backticks than the text has anywhere in a row."""
    return "`" * (1 + max(map(len, re.findall("`+", text)), default=0))


def _code(text: str) -> str:
    """Text of one line in which nothing is markup."""
    ticks = _ticks(text)
    space = " " if len(ticks) > 1 else ""
    return f"{ticks}{space}{' '.join(text.split())}{space}{ticks}"


def _fence(language: str, code: str) -> str:
    fence = max("```", _ticks(code))
    return f"{fence}{language}\n{code}\n{fence}"


def create_repository(config: TrainingConfig) -> str:
    """Create the repository unless it exists, before training, so that a missing permission fails early.

    Returns:
        Its id, ``owner/name``.

    Raises:
        ShiraError: the Hub cannot be reached or refuses.
    """
    wanted = config.hub_model_id or Path(config.output_dir).resolve().name
    try:
        return huggingface_hub.create_repo(wanted, token=config.hub_token, exist_ok=True).repo_id
    except _FAILURES as error:
        raise ShiraError(
            f"push_to_hub: cannot create the repository {wanted!r} on the Hub: {error}. Nothing was trained; log in "
            "with `hf auth login` or give --hub_token, check --hub_model_id, or drop --push_to_hub"
        ) from error


def upload(config: TrainingConfig, repository: str, pictures: Sequence[Path]) -> str:
    """Upload the adapter, its card and the validation pictures in one commit; checkpoints and logs stay here.

    Returns:
        The address of the commit.

    Raises:
        ShiraError: the Hub cannot be reached or refuses; all files are still in ``output_dir``.
    """
    names = [WEIGHTS_NAME, CARD_NAME, *(picture.relative_to(config.output_dir).as_posix() for picture in pictures)]
    try:
        commit = huggingface_hub.upload_folder(
            repo_id=repository,
            folder_path=config.output_dir,
            allow_patterns=names,
            commit_message="End of training",
            token=config.hub_token,
        )
    except _FAILURES as error:
        raise ShiraError(
            f"the adapter is trained and saved in {config.output_dir}, but it could not be uploaded to {repository!r}: "
            f"{error}. Upload it with `hf upload {repository} {config.output_dir} . --include {' '.join(names)}`"
        ) from error
    return commit.commit_url
