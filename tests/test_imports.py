"""The order of the wings: imports go down only, and each of a few jobs is done in one place.

The sources are parsed, never run. Imports inside functions and under ``TYPE_CHECKING`` count as any other.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "shira_diffusers"
# The wings from the ground up; a module imports from its own wing and from those before it.
WINGS = (
    "_version errors seeds atomic_write",
    "weights",
    "adapters",
    "masks",
    "engine",
    "formats",
    "edge",
    "training",
    "integrations",
    "library",
    "__init__",
    "dreambooth",
    "serving",
    "cli",
)
APP = (
    "settings",
    "history library",
    "drawing",
    "training insight",
    "studio",
    "server",
    "api",
    "page",
    "serve",
    "__main__",
)
TOP = ("app", "shira_command", "train_dreambooth_shira", "benchmarks")
SHELL = "train_dreambooth_shira"  # calls the command
KNOWS_DIFFUSERS = {"integrations", "dreambooth", "cli"}
WRITES_WEIGHTS = {"engine", "training", "weights"}

Sources = dict[str, str]  # dotted module -> its text


def read_sources() -> Sources:
    paths = [*ROOT.glob(f"{PACKAGE}/**/*.py"), *(p for top in TOP for p in [*ROOT.glob(f"{top}/**/*.py")])]
    paths += [ROOT / f"{top}.py" for top in TOP if (ROOT / f"{top}.py").is_file()]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text() for path in paths}


SOURCES = read_sources()


@cache
def imports_of(module: str, source: str) -> frozenset[str]:
    """Dotted names of what a module imports, relative imports resolved; ``from a import b`` gives ``a`` and ``a.b``."""
    return frozenset(_imports_of(module, source))


def _imports_of(module: str, source: str) -> Iterator[str]:
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


def wing_of(module: str) -> str:
    """The wing of a module of the library or of the app; of what stands above, its own name."""
    first, *rest = module.split(".")
    if first in (PACKAGE, "app"):
        return f"{first}.{rest[0]}"
    return first


def level_of(module: str) -> int:
    """How high a module stands: the library's wings, then the app's, then what uses both."""
    first, *rest = module.split(".")
    wings = [*(f"{PACKAGE}.{each}" for each in WINGS), *(f"app.{each}" for each in APP)]
    if first not in (PACKAGE, "app"):
        return len(wings) + (first == SHELL)
    if first == "app" and rest == ["__init__"]:
        return len(WINGS)
    levels = [
        level
        for level, wing in enumerate(wings)
        if wing.split(".")[0] == first and rest[0] in wing.partition(".")[2].split()
    ]
    assert levels, f"{module} stands in no wing: name its wing in WINGS or APP"
    return levels[0]


def upward_imports(sources: Sources) -> list[str]:
    return [
        f"{module} imports {target}, which stands above it or beside it"
        for module in sorted(sources)
        for target in sorted(own_imports(module, sources))
        if level_of(target) >= level_of(module) and wing_of(target) != wing_of(module)
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
    """The library's modules that import a name that fits."""
    return {
        module
        for module, source in sources.items()
        if module.split(".")[0] == PACKAGE and any(re.fullmatch(pattern, name) for name in imports_of(module, source))
    }


def needed_by(module: str, sources: Sources) -> set[str]:
    """All that a module imports, directly or not; of ours, without what packages' ``__init__`` import for others."""
    found: set[str] = set()
    todo = [module]
    while todo:
        for name in imports_of(todo[0], sources[todo[0]]):
            if name not in found and name in sources:
                todo.append(name)
            found.add(name)
        del todo[0]
    return found


def wings_of(modules: set[str]) -> set[str]:
    return {module.split(".")[1] for module in modules}


def test_imports_go_down_only() -> None:
    assert len(SOURCES) > 30
    assert not upward_imports(SOURCES)


def test_no_import_goes_in_a_circle() -> None:
    assert not find_cycle(SOURCES)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("shira_diffusers.adapters.delta", "from shira_diffusers.engine.resident import Resident"),
        ("shira_diffusers.masks.families", "import shira_diffusers.formats.shira_file"),
        ("shira_diffusers.weights.scatter", "from ..integrations import pipelines"),
        ("shira_diffusers.engine.state", "def f():\n    from ..formats.hub import find_adapter"),
        ("shira_diffusers.engine.resident", "from shira_diffusers import fuse"),
        ("shira_diffusers.integrations.pipelines", "from shira_diffusers import ShiraError"),
        ("shira_diffusers.training.tuner", "from shira_diffusers.dreambooth.config import Config"),
        ("shira_diffusers.training.tuner", "import app.drawing.session"),
        ("app.drawing.session", "from app.studio import Studio"),
        ("app.history.history", "from app.library.cards import Card"),  # a neighbour is not below
    ],
)
def test_an_upward_import_is_seen(module: str, line: str) -> None:
    found = upward_imports({**SOURCES, module: f"{SOURCES[module]}\n{line}\n"})
    assert any(fault.startswith(f"{module} imports") for fault in found)


def test_a_circle_inside_a_wing_is_seen() -> None:
    module = "shira_diffusers.dreambooth.config"
    line = "from shira_diffusers.dreambooth.command_line import parse_config"
    assert find_cycle({**SOURCES, module: f"{SOURCES[module]}\n{line}\n"})


def test_a_module_without_a_wing_is_seen() -> None:
    with pytest.raises(AssertionError, match="novelty stands in no wing"):
        upward_imports({**SOURCES, "shira_diffusers.novelty": "import shira_diffusers.errors"})


def test_few_know_diffusers_and_its_pipelines() -> None:
    assert wings_of(importers(r"diffusers(\..*)?", SOURCES)) <= KNOWS_DIFFUSERS


def test_the_edge_needs_neither_torch_nor_diffusers() -> None:
    needed = needed_by(f"{PACKAGE}.edge.resident", SOURCES)
    foreign = {name.partition(".")[0] for name in needed} & {"onnx", "onnxruntime", "numpy", "torch", "diffusers"}
    assert foreign == {"numpy", "onnxruntime"}
    assert "torch" in needed_by(f"{PACKAGE}.edge.export", SOURCES)


@pytest.mark.parametrize(
    ("key", "module"), [(r"\.(values|gaps|shape|base)\b(?!\.)", "format_1"), (r"^gaps$", "format_2")]
)
def test_one_module_knows_the_keys_of_each_version(key: str, module: str) -> None:
    holders = {name for name, source in SOURCES.items() if any(re.search(key, text) for text in text_of(source))}
    assert holders == {f"shira_diffusers.formats.{module}"}


def test_few_write_weights() -> None:
    assert wings_of(importers(r"shira_diffusers\.weights\.scatter\.(overwrite|put_bits)", SOURCES)) == WRITES_WEIGHTS
    as_module = re.compile(r"import (shira_diffusers\.weights\.)?scatter\b|scatter import \*")
    assert not [module for module, source in SOURCES.items() if as_module.search(source)]
    kernels = re.compile(r"\.(index_copy_|scatter_|masked_scatter_|put_|index_put_)\(")
    writers = {module for module, source in SOURCES.items() if kernels.search(source)}
    assert {each for each in writers if not each.startswith("benchmarks")} == {f"{PACKAGE}.weights.scatter"}


def test_nobody_writes_bits_into_a_state_that_is_not_a_copy() -> None:
    """The one ``overwrite`` of state.py writes into ``copy``, a clone."""
    calls = [node for node in ast.walk(ast.parse(SOURCES[f"{PACKAGE}.engine.state"])) if isinstance(node, ast.Call)]
    targets = [ast.unparse(call.args[0]) for call in calls if ast.unparse(call.func) == "overwrite"]
    assert targets == ["copy"]
