"""The floors of the house: imports go down only, and each of a few jobs is done in one place.

The sources are parsed, never run. Imports inside functions and under ``TYPE_CHECKING`` count as any other.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "shira_diffusers"
# From the ground up; a module may import from lower floors only. A folder stands on one floor with all its modules.
FLOORS = (
    "_version callers commands errors terminal sheet kernels paths contents",
    "delta targets scales lorascale offloading locks gaps tensorfile tiers spares unions",
    "calibration probes decoding gaps_device hostmemory checksum",
    "masks devicedecoder",
    "adapter branch",
    "files fuse interference scatter",
    "locate launches tiles packed",
    "sites sweep sharing",
    "sweep_cuda",
    "state interop",
    "layout fitting hub gradients weights catalog",
    "switching store",
    "resident",
    "pipeline attention",
    "library",
    "__init__",
    "training",
    "inspection bases",
    "verification fusing demo",
    "cli",
)
TOP = (
    "app",
    "shira_command",
    "train_dreambooth_shira",
    "benchmarks",
)  # above the library; benchmarks measure the others too
KNOWS_PIPELINES = {"pipeline", "training", "bases"}
# state hands out copies of weights; training writes through sites
WRITES_WEIGHTS = {"weights", "sites", "state", "gradients"}

Sources = dict[str, str]  # dotted module -> its text


def read_sources() -> Sources:
    paths = [*ROOT.glob(f"{PACKAGE}/**/*.py"), *(p for top in TOP for p in [*ROOT.glob(f"{top}/**/*.py")])]
    paths += [ROOT / f"{top}.py" for top in TOP if (ROOT / f"{top}.py").is_file()]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text() for path in paths}


SOURCES = read_sources()


def imports_of(module: str, source: str) -> Iterator[str]:
    """Dotted names of what a module imports, relative imports resolved; ``from a import b`` gives ``a`` and ``a.b``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(module.split(".")[: -node.level]) if node.level else ""
            origin = ".".join(filter(None, (above, node.module)))
            yield origin
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def own_imports(module: str, sources: Sources) -> set[str]:
    """Those of a module's imports that are modules of ours."""
    names = set(imports_of(module, sources[module]))
    return {target for name in names for target in (name, f"{name}.__init__") if target in sources}


def unit_of(module: str) -> str:
    """What stands on a floor: a module of the library, or a folder."""
    first, *rest = module.split(".")
    return rest[0] if first == PACKAGE else first


def floor_of(module: str) -> int:
    unit = unit_of(module)
    if module.split(".")[0] != PACKAGE:
        return len(FLOORS) + (unit == "benchmarks")
    level = next((level for level, units in enumerate(FLOORS) if unit in units.split()), None)
    assert level is not None, f"{module} stands on no floor: give it one in FLOORS, as low as it can be"
    return level


def upward_imports(sources: Sources) -> list[str]:
    return [
        f"{module} (floor {floor_of(module)}) imports {target} (floor {floor_of(target)})"
        for module in sorted(sources)
        for target in sorted(own_imports(module, sources))
        if floor_of(target) >= floor_of(module) and unit_of(target) != unit_of(module)
    ]


def find_cycle(sources: Sources) -> list[str]:
    """Modules that import each other in a ring, or nothing."""
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> list[str]:
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module in done:
            return []
        rings = (visit(target, [*trail, module]) for target in sorted(own_imports(module, sources)))
        ring = next((ring for ring in rings if ring), [])
        done.add(module)
        return ring

    return next((ring for module in sorted(sources) if (ring := visit(module, []))), [])


def text_of(source: str) -> Iterator[str]:
    """All strings of a module, parts of f-strings too, but no docstrings."""
    tree = ast.parse(source)
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value


def importers(pattern: str, sources: Sources) -> set[str]:
    """The library's modules and folders that import a name that fits."""
    return {
        unit_of(module)
        for module, source in sources.items()
        if module.split(".")[0] == PACKAGE and any(re.fullmatch(pattern, name) for name in imports_of(module, source))
    }


def test_imports_go_down_only() -> None:
    assert len(SOURCES) > 30
    assert not upward_imports(SOURCES)


def test_no_import_goes_in_a_circle() -> None:
    assert not find_cycle(SOURCES)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("shira_diffusers.delta", "from shira_diffusers.resident import Resident"),
        ("shira_diffusers.masks", "import shira_diffusers.adapter"),
        ("shira_diffusers.fuse", "from shira_diffusers.files import decode"),  # a neighbour is not below
        ("shira_diffusers.scatter", "from . import pipeline"),
        ("shira_diffusers.state", "def f():\n    from .switching import run"),
        ("shira_diffusers.resident", "from shira_diffusers import fuse"),
        ("shira_diffusers.pipeline", "from shira_diffusers import ShiraError"),
        ("shira_diffusers.pipeline", "from shira_diffusers.training.tuner import SparseTuner"),
        ("shira_diffusers.training.tuner", "import app.session"),
    ],
)
def test_an_upward_import_is_seen(module: str, line: str) -> None:
    found = upward_imports({**SOURCES, module: f"{SOURCES[module]}\n{line}\n"})
    assert any(fault.startswith(f"{module} (") for fault in found)


def test_a_circle_inside_a_folder_is_seen() -> None:
    module = "shira_diffusers.training.config"
    line = "from shira_diffusers.training.flags import parse_config"
    assert find_cycle({**SOURCES, module: f"{SOURCES[module]}\n{line}\n"})


def test_a_module_without_a_floor_is_seen() -> None:
    with pytest.raises(AssertionError, match="novelty stands on no floor"):
        upward_imports({**SOURCES, "shira_diffusers.novelty": "import shira_diffusers.errors"})


def test_few_know_diffusers_and_its_pipelines() -> None:
    assert importers(r"diffusers(\..*)?", SOURCES) <= KNOWS_PIPELINES | {"attention"}
    assert importers(r"diffusers.*Pipeline\w*", SOURCES) <= KNOWS_PIPELINES


def test_only_files_knows_the_keys_on_disk() -> None:
    key = re.compile(r"\.(values|gaps|shape|base)\b(?!\.)")
    holders = {module for module, source in SOURCES.items() if any(key.search(text) for text in text_of(source))}
    assert holders == {"shira_diffusers.files"}


def test_one_module_writes_weights_at_inference() -> None:
    assert importers(r"shira_diffusers\.scatter\.overwrite", SOURCES) == WRITES_WEIGHTS
    as_module = re.compile(r"import (shira_diffusers\.)?scatter\b|scatter import \*")
    assert not [module for module, source in SOURCES.items() if as_module.search(source)]
    kernels = re.compile(r"\.(index_copy_|scatter_|masked_scatter_|put_|index_put_)\(")
    assert {unit_of(module) for module, source in SOURCES.items() if kernels.search(source)} == {"scatter"}
    assert importers(r"shira_diffusers\.scatter\.put_bits", SOURCES) == {"sweep", "sites"}


def test_nobody_writes_bits_into_a_state_that_is_not_a_copy() -> None:
    """The one ``overwrite`` of state.py writes into ``copy``, a clone."""
    calls = [node for node in ast.walk(ast.parse(SOURCES[f"{PACKAGE}.state"])) if isinstance(node, ast.Call)]
    targets = [ast.unparse(call.args[0]) for call in calls if ast.unparse(call.func) == "overwrite"]
    assert targets == ["copy"]
