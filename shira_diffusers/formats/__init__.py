"""Adapters on disk: our file formats, PEFT's, LoRAs to convert, and where files come from (folders, the Hub).

In: paths, Hub ids, state dicts. Out: ``ShiraAdapter``, or one ``AdapterFormatError``; ``open_adapter`` is the one door.
Only ``format_1`` and ``format_2`` know our keys.
"""

from importlib.util import find_spec

if find_spec("torch") is not None:  # without it ``edge`` uses what needs NumPy only
    from shira_diffusers.formats.lora import convert_lora
    from shira_diffusers.formats.opened_adapter import OpenedAdapter, open_adapter
    from shira_diffusers.formats.shira_file import load_adapter, save_adapter

__all__ = ["OpenedAdapter", "convert_lora", "load_adapter", "open_adapter", "save_adapter"]
