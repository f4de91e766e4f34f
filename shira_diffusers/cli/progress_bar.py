"""Show how far a command is, where people see it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


@contextmanager
def progress_bar(**options: Any) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, if that is a terminal; what the body gets is called with steps done and all steps.

    Args:
        options: tqdm's, such as ``unit``.
    """
    with tqdm(disable=None, leave=False, **options) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
