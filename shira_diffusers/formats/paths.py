"""Interpret names of files and folders as people type them: local or on the Hub, similar names, hidden ones.

It knows neither adapters nor the Hub; its answers come at once, without a look at any network.
"""

import difflib
import os
import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

SUFFIX = ".safetensors"
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".gguf", ".sft", ".onnx", ".msgpack", ".h5")
_OTHER_FILES = (".json", ".yaml", ".txt", ".md", ".zip", ".tar", ".gz", ".7z", ".rar", ".png", ".webp", ".jpg")
# the Hub's own rule, with an owner: letters, digits, "_", "-" and ".", none of the last two at the ends
_HUB_ID = re.compile(r"(?!.*(--|\.\.|\.git$))\b[\w\-.]{1,96}\b/\b[\w\-.]{1,96}\b")
# what systems and tools leave behind; what else is hidden begins with a dot, such as .DS_Store and ._x.png
_SIDE = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "$recycle.bin", "lost+found"}
_ALIKE = 0.6  # difflib's ratio from which on two names may be meant for each other
_LOOKED_AT = 5000  # entries of a folder; comparing takes some 20 microseconds per entry


def is_hub_id(source: str) -> bool:
    """Whether a name can be a repository ``owner/name`` on the Hub, judged by the name alone.

    Not if it is absolute, begins with ``.`` or ``~``, has no slash or more than one, or ends as files do, with
    ``.safetensors`` misspelled or not.
    """
    return _HUB_ID.fullmatch(source) is not None and not _ends_as_a_file(source)


def _ends_as_a_file(source: str) -> bool:
    ending = Path(source).suffix.lower()
    return ending in OTHER_WEIGHTS + _OTHER_FILES or bool(difflib.get_close_matches(ending, [SUFFIX], cutoff=0.7))


def did_you_mean(path: Path) -> str:
    """What to add to the message that a path does not exist: ``"; did you mean A or B?"``, or nothing."""
    found = [str(each) for each in similar(path)]
    return f"; did you mean {' or '.join(found)}?" if found else ""


def similar(path: Path, most: int = 3) -> list[Path]:
    """Files of weights and folders whose names are much like that of a path that does not exist, the most alike first.

    They are looked for in the last of its folders that exists. Case and ``.safetensors`` do not count. The path itself,
    which may be a link to nothing, is not among them.
    """
    folder = next((parent for parent in path.parents if os.path.isdir(parent)), Path())
    missing, *rest = path.relative_to(folder).parts if path.parts else ("",)
    try:
        names = [entry.name for entry in islice(shown_in(folder), _LOOKED_AT) if _is_candidate(entry)]
    except OSError:  # a folder that is not ours
        return []
    found = [each for name in _alike(missing, names) if (each := folder / name) != path][:most]
    return [whole if rest and os.path.exists(whole := each.joinpath(*rest)) else each for each in found]


def _alike(name: str, names: Iterable[str]) -> list[str]:
    wanted = _plain(name)
    ratios = {other: difflib.SequenceMatcher(None, wanted, _plain(other)).ratio() for other in names}
    return sorted((other for other, ratio in ratios.items() if ratio >= _ALIKE), key=lambda other: -ratios[other])


def _plain(name: str) -> str:
    return name.casefold().removesuffix(SUFFIX)


def _is_candidate(entry: Path) -> bool:
    return entry.suffix.lower() in (SUFFIX, *OTHER_WEIGHTS) or entry.is_dir()


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or left behind by a system or tool."""
    return name.startswith(".") or name.casefold() in _SIDE


def shown_in(folder: Path) -> list[Path]:
    """What a folder holds, sorted, but for hidden entries; nothing where there is no such folder."""
    names = sorted(name for name in os.listdir(folder) if not is_hidden(name)) if folder.is_dir() else []
    return [folder / name for name in names]
