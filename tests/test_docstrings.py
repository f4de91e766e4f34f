"""Every public function that takes tensors says in its docstring which shapes they have."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "shira_diffusers"
SHAPE = re.compile(r"\((\.\.\.|[\w+*/ ]+)(, ?(\.\.\.|[\w+*/ ]+))*,?\)``|any shape|scalar|0-dimensional")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def public(name: str) -> bool:
    return not name.startswith("_")


def functions_of(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, Function]]:
    """The public functions of a module, and the public methods of its public classes."""
    for node in body:
        if isinstance(node, Function) and public(node.name):
            yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef) and public(node.name):
            yield from functions_of(node.body, f"{prefix}{node.name}.")


def said_of(argument: str, docstring: str) -> str:
    """The paragraph of an argument under ``Args``, or all of the docstring where it has none of its own."""
    found = re.search(rf"^ *(?:\w+, )*{argument}(?:, \w+)*: (.*?)(?=^ *\w[\w, ]*: |^\s*$|\Z)", docstring, re.M | re.S)
    return found[1] if found else docstring


def without_shapes(source: str) -> list[str]:
    """``function(argument)`` for each tensor whose shape is not documented."""
    missing = []
    for name, function in functions_of(ast.parse(source).body):
        signature = function.args
        for argument in (*signature.posonlyargs, *signature.args, *signature.kwonlyargs):
            takes = argument.annotation and re.search(r"\bTensor\b", ast.unparse(argument.annotation))
            if takes and not SHAPE.search(said_of(argument.arg, ast.get_docstring(function) or "")):
                missing.append(f"{name}({argument.arg})")
    return missing


def modules() -> list[str]:
    paths = (path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
    return sorted(str(path) for path in paths if all(map(public, path.parts)))


@pytest.mark.parametrize("module", modules())
def test_shapes_of_tensors_are_documented(module: str) -> None:
    assert not without_shapes((PACKAGE / module).read_text())


@pytest.mark.parametrize(
    ("docstring", "missing"),
    [
        ("Add ``values``, float32 ``(nnz,)``.", []),
        ("Add.\n\n    Args:\n        values: float32 ``(out, in)`` on\n            the CPU.\n    ", []),
        ("Add (in place) a tensor.", ["add(values)"]),
        ("Add to ``(n,)``.\n\n    Args:\n        values: what is added.\n    ", ["add(values)"]),
    ],
)
def test_a_missing_shape_is_seen(docstring: str, missing: list[str]) -> None:
    assert without_shapes(f'def add(values: Tensor) -> None:\n    """{docstring}"""\n') == missing
