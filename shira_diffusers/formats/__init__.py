"""Adapters on disk: our file formats, PEFT's, and where files come from (folders, the Hub).

In: paths, Hub ids, state dicts. Out: ``ShiraAdapter``, or one ``AdapterFormatError``. Only ``shira_file.py`` knows
our keys.
"""

from shira_diffusers.formats.shira_file import load_adapter, save_adapter

__all__ = ["load_adapter", "save_adapter"]
