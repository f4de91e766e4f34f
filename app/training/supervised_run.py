"""``python -m app.training.supervised_run SCRIPT ARGUMENTS``: run a script, which ends with its starter.

The starter keeps the other end of standard input open; when it is gone, however it went, reading finds the end.
"""

import os
import runpy
import sys
import threading

NICENESS = 10  # pictures that are drawn beside a training go first
_ENDED = 143  # as by SIGTERM


def main() -> None:
    """Watch standard input and run the script."""
    threading.Thread(target=_end_with_starter, daemon=True).start()
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


def _end_with_starter() -> None:
    while os.read(0, 1):  # not sys.stdin, whose lock would be held as the interpreter ends
        pass
    os._exit(_ENDED)


if __name__ == "__main__":
    main()
