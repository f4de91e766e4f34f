"""Train a SHiRA adapter for Stable Diffusion from a few pictures. See docs/training.md, or --help."""

import logging
import os
import sys


def main() -> None:
    """Read the command line and train; of several processes the first one reports."""
    first = os.environ.get("RANK", "0") == "0"
    level = logging.INFO if first else logging.ERROR
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=level)
    try:
        run(first)
    except KeyboardInterrupt:
        sys.exit(130)  # the shell code of Ctrl-C; what was saved is already logged


def run(first: bool) -> None:
    """Import, which takes seconds, and train."""
    from shira_diffusers import ShiraError
    from shira_diffusers.dreambooth.command_line import parse_config
    from shira_diffusers.dreambooth.train import train

    try:
        train(parse_config())
    except (ShiraError, OSError) as error:
        sys.exit(f"error: {error}" if first else 1)


if __name__ == "__main__":
    main()
