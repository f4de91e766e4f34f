"""Entry point of the ``shira`` command: parses first, and loads torch and diffusers only for a command that needs them.

It stands outside the package because importing ``shira_diffusers`` adds methods to diffusers' pipelines, so loads
diffusers. What needs neither, the parser, ``inspect`` and ``diff``, is imported without running the package's
``__init__``; nobody's import machinery is touched.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

_LOADING = ("shira_diffusers", "shira_diffusers.formats")  # the packages whose ``__init__`` loads torch
_LIGHT = ("inspect", "diff")  # the commands that need no torch


def main(argv: Sequence[str] | None = None) -> int:
    """As ``shira_diffusers.cli.__main__.main``; an interrupt during its imports, which take seconds, is quiet too."""
    try:
        return _main(argv)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130


def _main(argv: Sequence[str] | None) -> int:
    with _bare_packages():
        version = import_module("shira_diffusers._version").__version__
        args = import_module("shira_diffusers.cli.arguments").parse(version, argv)
        if args.command in _LIGHT:
            command = getattr(import_module(f"shira_diffusers.cli.{args.command}"), args.command)
            light: int = import_module("shira_diffusers.cli.run").run(args, command)
            return light
    if args.command == "train":
        return train(args.flags, "shira train")
    from shira_diffusers.cli.__main__ import run

    return run(args)


def train(flags: Sequence[str], program: str) -> int:
    """As ``shira_diffusers.cli.train.train``."""
    with _bare_packages():
        start = import_module("shira_diffusers.cli.train").train
    status: int = start(flags, program)  # what it imports is the whole package
    return status


@contextmanager
def _bare_packages() -> Iterator[None]:
    """While this lasts, modules of the package are imported without its ``__init__``; as if never imported after.

    Where the package is loaded already, it is used as it is.
    """
    if "shira_diffusers" in sys.modules:
        yield
        return
    package = find_spec("shira_diffusers")
    assert package is not None and package.submodule_search_locations
    for name in _LOADING:
        bare = ModuleType(name)
        inner = name.split(".")[1:]
        bare.__path__ = ["/".join((place, *inner)) for place in package.submodule_search_locations]
        sys.modules[name] = bare
    try:
        yield
    finally:
        for name in [each for each in sys.modules if each.partition(".")[0] == "shira_diffusers"]:
            del sys.modules[name]


if __name__ == "__main__":
    raise SystemExit(main())
