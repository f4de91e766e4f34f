"""Entry point of the ``shira`` command: parses first, and loads torch and diffusers only for a command that runs.

It stands outside the package because importing anything from ``shira_diffusers`` adds methods to diffusers'
pipelines, so loads diffusers; nobody's import machinery is touched.
"""

from collections.abc import Sequence
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType


def main(argv: Sequence[str] | None = None) -> int:
    """As ``shira_diffusers.cli.__main__.main``."""
    args = _alone("cli/arguments").parser(_alone("_version").__version__).parse_args(argv)
    from shira_diffusers.cli.__main__ import run

    return run(args)


def _alone(name: str) -> ModuleType:
    """A module of the package that needs the standard library only, loaded without the package."""
    package = find_spec("shira_diffusers")
    assert package is not None and package.submodule_search_locations
    path = Path(package.submodule_search_locations[0], f"{name}.py")
    spec = spec_from_file_location(f"_shira_{name.strip('_')}", path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    raise SystemExit(main())
