"""Report what an adapter file holds, without a model and without torch: ``shira inspect``."""

from pathlib import Path

from shira_diffusers.formats.adapter_file import AdapterFile
from shira_diffusers.formats.header import read_header


def inspect_adapter(path: Path) -> AdapterFile:
    """Read a file, or the one in a folder; PEFT's SHiRA adapters too, as far as is known without a model.

    Returns:
        What it holds, checked.

    Raises:
        FileNotFoundError: there is no such file.
        AdapterFormatError: anything else than an intact adapter.
    """
    file = read_header(path)
    file.check()
    return file
