"""Train an adapter from a few pictures: ``shira train``, and train_dreambooth_shira.py, which is the same.

Importing it loads nothing, so that an interrupt while torch and diffusers are imported, which takes seconds, is quiet.
"""

import logging
import os
import sys
from collections.abc import Sequence


def train(flags: Sequence[str], program: str) -> int:
    """Read the flags and train; of several processes the first one reports.

    Args:
        flags: those of diffusers' DreamBooth scripts, see ``TrainingConfig``.
        program: what ``--help`` calls it.

    Returns:
        The exit status.
    """
    first = os.environ.get("RANK", "0") == "0"
    level = logging.INFO if first else logging.ERROR
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=level)
    try:
        return _train(flags, program, first)
    except KeyboardInterrupt:
        return 130  # the shell code of Ctrl-C; what was saved is already logged


def _train(flags: Sequence[str], program: str, first: bool) -> int:
    from shira_diffusers.cli.terminal import say_json
    from shira_diffusers.dreambooth.command_line import parse_config
    from shira_diffusers.dreambooth.train import train
    from shira_diffusers.errors import ShiraError
    from shira_diffusers.formats.inspect import inspect_adapter

    try:
        written = train(parse_config(flags, program))
        if first and "--json" in flags:
            found = inspect_adapter(written)
            say_json({"output": str(written), "entries": found.nnz, "bytes": found.size})
    except (ShiraError, OSError) as error:
        if first:
            sys.stderr.write(f"error: {error}\n")
        return 1
    return 0
