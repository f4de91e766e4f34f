"""Find an adapter: a file, a folder, or a repository of the Hugging Face Hub."""

import os
from pathlib import Path
from typing import TypedDict

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from shira_diffusers.files import WEIGHTS_NAME, find_file
from shira_diffusers.interop import PEFT_CONFIG, PEFT_WEIGHTS, is_peft_folder


class HubOptions(TypedDict, total=False):
    """The keywords of diffusers' ``load_lora_weights`` that say where and how to look."""

    weight_name: str | None
    subfolder: str | None
    revision: str | None
    token: str | bool | None
    cache_dir: str | Path | None
    local_files_only: bool
    force_download: bool
    proxies: dict[str, str] | None


def find_adapter(source: str | os.PathLike[str], options: HubOptions) -> Path:
    """The file, or the PEFT folder, that ``source`` means; downloaded first where it is on the Hub.

    Args:
        source: a file, a folder, or a repository id ``owner/name``.
        options: ``weight_name`` and ``subfolder`` count for folders too, the rest for the Hub only.

    Raises:
        FileNotFoundError: a path, or a file on the Hub, that does not exist.
        OSError: the Hub cannot be reached or refuses.
    """
    weight_name, subfolder = options.get("weight_name"), options.get("subfolder") or ""
    path = Path(source)
    if os.path.exists(source):  # unlike Path.exists, also for names that no file can have
        return _local(path / subfolder if subfolder else path, weight_name)
    if not str(source) or path.suffix == ".safetensors" or path.is_absolute() or str(source).startswith((".", "~")):
        raise FileNotFoundError(f"no adapter at {path}: expected a .safetensors file, a folder or a Hub id owner/name")
    try:
        return _download(str(source), weight_name, subfolder, options)
    except LocalEntryNotFoundError as error:
        raise _unreachable(source, error) from error
    except EntryNotFoundError as error:
        wanted = weight_name or f"{WEIGHTS_NAME} or {PEFT_WEIGHTS}"
        raise FileNotFoundError(
            f"{source!r} on the Hub has no {subfolder + '/' if subfolder else ''}{wanted}; "
            f"give weight_name= (and subfolder=) as its file list shows ({error})"
        ) from error
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise _unreachable(source, error) from error


def _unreachable(source: str | os.PathLike[str], error: Exception) -> OSError:
    return OSError(
        f"{source!r} is no file or folder here, and could not be read from the Hub: {error}. "
        "Check the name, your connection, or the token for a private repository"
    )


def _local(path: Path, weight_name: str | None) -> Path:
    if weight_name and path.is_dir():
        path = path / weight_name
    if is_peft_folder(path) and not (path / WEIGHTS_NAME).is_file():
        return path
    return find_file(path)


def _download(repo: str, weight_name: str | None, subfolder: str, options: HubOptions) -> Path:
    local = options.get("local_files_only", False)

    def fetch(name: str, local: bool = local) -> Path:
        return Path(
            huggingface_hub.hf_hub_download(
                repo,
                name,
                subfolder=subfolder or None,
                revision=options.get("revision"),
                token=options.get("token"),
                cache_dir=options.get("cache_dir"),
                local_files_only=local,
                force_download=options.get("force_download", False),
            )
        )

    if weight_name:
        return fetch(weight_name)
    try:
        return fetch(WEIGHTS_NAME)
    except EntryNotFoundError as error:
        local |= isinstance(error, LocalEntryNotFoundError)  # the Hub is out of reach: look in the cache only
        fetch(PEFT_CONFIG, local)
        return fetch(PEFT_WEIGHTS, local).parent
