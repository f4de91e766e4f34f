"""Find an adapter: a file, a folder, or a repository of the Hugging Face Hub."""

import os
import re
from pathlib import Path
from typing import TypedDict

import huggingface_hub
import huggingface_hub.constants
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from shira_diffusers.formats.find import PEFT_CONFIG, PEFT_WEIGHTS, WEIGHTS_NAME, find_local
from shira_diffusers.formats.paths import did_you_mean, is_hub_id

_HUB_ONLY = ("revision", "token", "cache_dir", "local_files_only", "force_download")  # keywords without a local meaning
_FILE_IN_REPOSITORY = re.compile(r"([^/]+/[^/]+)/(.+)")
_ADDRESS = re.compile(r"https?://[^/]+/([^/]+/[^/]+)(?:/(?:blob|resolve|tree)/([^/]+)/?(.*))?/?")


class HubOptions(TypedDict, total=False):
    """The keywords of diffusers' ``load_lora_weights`` that say where and how to look.

    ``low_cpu_mem_usage`` and ``use_safetensors`` change nothing here.
    """

    weight_name: str | None
    subfolder: str | None
    revision: str | None
    token: str | bool | None
    cache_dir: str | Path | None
    local_files_only: bool
    force_download: bool
    proxies: dict[str, str] | None
    low_cpu_mem_usage: bool
    use_safetensors: bool | None


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
    path = Path(os.path.expanduser(source) if re.match(r"~[/\\]", str(source)) else source)
    if str(source) and os.path.exists(path):  # unlike Path.exists, also for names that no file can have
        return find_local(path / subfolder if subfolder else path, weight_name)
    if not _is_on_hub(str(source), options):
        raise FileNotFoundError(_missing(str(source), path))
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


def _is_on_hub(source: str, options: HubOptions) -> bool:
    """Whether to ask the Hub for what is not here, which takes half a minute where there is no network.

    ``owner/name`` is taken for a mistyped path if the folder ``owner`` is here, unless a keyword is given that only the
    Hub has, or the repository is in the cache.
    """
    if not is_hub_id(source) or not os.path.isdir(os.path.dirname(source)):
        return is_hub_id(source)
    cache = Path(options.get("cache_dir") or huggingface_hub.constants.HF_HUB_CACHE)
    known = (cache / "--".join(("models", *source.split("/")))).is_dir()
    return known or any(options.get(name) is not None for name in _HUB_ONLY)


def _missing(source: str, path: Path) -> str:
    """What to say about a name that is nothing here, and is not looked for on the Hub."""
    shown = source if _ADDRESS.fullmatch(source) else path
    expected = "expected a .safetensors file, a folder or a Hub id owner/name"
    return f"no adapter at {shown}: {expected}{did_you_mean(path)}{_hub_hint(source)}"


def _hub_hint(source: str) -> str:
    """How to name what is on the Hub, for names that look as if it were meant."""
    if address := _ADDRESS.fullmatch(source):
        repo, revision, name = address.groups()
        options = {"weight_name": name, "revision": None if revision == "main" else revision}
        words = [repr(repo), *(f"{key}={value!r}" for key, value in options.items() if value)]
        return f"; for what is at this address, give {', '.join(words)}"
    if is_hub_id(source):
        owner = Path(source).parent
        return f"; the folder {owner} is here: for a repository of this name on the Hub, add revision='main'"
    inside = _FILE_IN_REPOSITORY.fullmatch(source)
    if inside and is_hub_id(inside[1]) and not os.path.isdir(os.path.dirname(inside[1])):
        return f"; for a file on the Hub, give {inside[1]!r}, weight_name={inside[2]!r}"
    return ""


def _unreachable(source: str | os.PathLike[str], error: Exception) -> OSError:
    return OSError(
        f"{source!r} is no file or folder here, and could not be read from the Hub: {str(error).rstrip('.')}. "
        f"Check the name, your connection, or the token for a private repository{did_you_mean(Path(source))}"
    )


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
        out_of_reach = isinstance(error, LocalEntryNotFoundError)  # then look in the cache only
        try:
            fetch(PEFT_CONFIG, local or out_of_reach)
            return fetch(PEFT_WEIGHTS, local or out_of_reach).parent
        except LocalEntryNotFoundError:
            raise error from None  # which says why the Hub could not be reached
