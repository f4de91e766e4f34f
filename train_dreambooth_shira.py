"""Train a SHiRA adapter for Stable Diffusion from a few pictures. See docs/training.md, or --help."""

import logging
import sys

from shira_diffusers import ShiraError
from shira_diffusers.training.flags import parse_config
from shira_diffusers.training.loop import train


def main() -> None:
    """Read the command line and train."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    try:
        train(parse_config())
    except (ShiraError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
