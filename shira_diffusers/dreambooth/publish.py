"""Put a trained adapter on the Hugging Face Hub."""

from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError

from shira_diffusers.dreambooth.config import TrainingConfig
from shira_diffusers.dreambooth.model_card import CARD_NAME
from shira_diffusers.errors import ShiraError
from shira_diffusers.formats.shira_file import WEIGHTS_NAME

# the last is the error of whatever HTTP client huggingface_hub uses
_FAILURES: tuple[type[Exception], ...] = (OSError, ValueError, RuntimeError, HfHubHTTPError.__bases__[0])


def create_repository(config: TrainingConfig) -> str:
    """Create the repository unless it exists, before training, so that a missing right is told at once.

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
            f"push_to_hub: there can be no repository {wanted!r} on the Hub: {error}. Nothing was trained; log in with "
            "`hf auth login` or give --hub_token, check --hub_model_id, or drop --push_to_hub"
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
