"""Run a command: errors become one line on stderr and an exit status. Loads neither torch nor diffusers."""

import argparse
import os
import sys
from collections.abc import Callable

from shira_diffusers.cli.terminal import note, one_line
from shira_diffusers.errors import ShiraError


def run(args: argparse.Namespace, command: Callable[[argparse.Namespace], None]) -> int:
    """Run a command that was parsed and return its exit status."""
    try:
        command(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ShiraError, OSError) as error:
        note(f"error: {one_line(error)}")
        return 1
    except KeyboardInterrupt:
        note("interrupted")
        return 130
    return 0
