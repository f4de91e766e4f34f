"""Documents name what exists: the tree, the order of the wings, links, and versions that are pinned twice."""

import re
import tomllib
from pathlib import Path

import pytest

from docs import tree
from shira_diffusers import __version__
from tests.test_imports import APP, WINGS

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/*.md"))]
DOCUMENTS += [
    ROOT / "assets/README.md",
    *sorted(ROOT.glob("examples/*/README.md")),
    ROOT / "benchmarks/study/README.md",
]


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_the_tree_is_that_of_the_sources() -> None:
    assert text_of(tree.PAGE) == tree.updated(text_of(tree.PAGE)), "stale: run python docs/tree.py"


def test_a_new_module_is_seen_and_one_that_is_gone(tmp_path: Path) -> None:
    for name in (*tree.SCRIPTS, *(f"{top}/__init__.py" for top in tree.TOPS), "app/page/a.py", "app/page/b.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('"""Do a | b, see ``c.d``. More of it.\n\nIn: d."""\n')
    before = tree.updated("x", tmp_path)
    assert "### app/page/" in before
    assert "| [a.py](../app/page/a.py) | Do a \\| b, see `c.d`. |" in before
    (tmp_path / "app/page/b.py").unlink()
    (tmp_path / "app/page/c.py").write_text('"""Do c."""\n')
    after = tree.updated(before, tmp_path)
    assert "b.py" not in after
    assert after.count("| [c.py](../app/page/c.py) | Do c. |") == 1


def test_a_module_without_a_docstring_is_named(tmp_path: Path) -> None:
    (tmp_path / "mute.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"mute\.py has no docstring"):
        tree.summary(tmp_path / "mute.py")


@pytest.mark.parametrize(("heading", "wings"), [("The library", WINGS), ("The app", APP)])
def test_the_wings_stand_in_their_order(heading: str, wings: tuple[str, ...]) -> None:
    (block,) = re.findall(rf"^### {heading}\n.*?```text\n(.*?)```", text_of(tree.PAGE), re.DOTALL | re.MULTILINE)
    shown = [line.split("  ")[0].removesuffix("/") for line in block.splitlines() if not line.startswith(" ")]
    hidden = {"__init__", "_version", "__main__"}
    expected = [[name for name in wing.split() if name not in hidden] for wing in reversed(wings)]
    assert [line.split(", ") for line in shown] == [names for names in expected if names]


def anchors_of(document: Path) -> set[str]:
    """What GitHub makes of the headings: lower case, without punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.*)$", text_of(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#:\s]*)(#[^)\s]*)?\)", text_of(document))
    for file, anchor in links:
        target = (document.parent / file) if file else document
        assert target.exists(), f"{document.name} links {file}, which does not exist"
        assert not anchor or anchor[1:] in anchors_of(target), f"{document.name} links {file}{anchor}: no such heading"


def pins(pattern: str, text: str) -> dict[str, set[str]]:
    """Versions by package; several where a text does not agree with itself."""
    found: dict[str, set[str]] = {}
    for package, version in re.findall(pattern, text, re.MULTILINE):
        found.setdefault(package, set()).add(version)
    return found


def test_pre_commit_uses_the_versions_of_the_constraints() -> None:
    hooks = pins(r"([\w-]+)==([\w.]+)", text_of(ROOT / ".pre-commit-config.yaml"))
    tested = pins(r"^([\w-]+)==([\w.]+)$", text_of(ROOT / "constraints.txt"))
    assert hooks == {package: tested[package] for package in ("ruff",)}


def test_the_version_is_the_same_everywhere() -> None:
    assert tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]["version"] == __version__
