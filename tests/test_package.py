"""The wheel: it holds all that `shira train` needs, and its page's links lead somewhere without the repository."""

import re
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no build folder is left in the repository."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "shira_command.py"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for path in (ROOT / "shira_diffusers").rglob("*"):
        if path.is_file() and path.suffix in (".py", ".typed"):
            target = source / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, source]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = out.glob("*.whl")
    return found


def test_what_is_in_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entries,) = (each for each in names if each.endswith("/entry_points.txt"))
        assert "shira = shira_command:main" in archive.read(entries).decode()
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "shira_diffusers").rglob("*.py")}
    assert {name for name in names if ".dist-info/" not in name} == {
        *modules, "shira_command.py", "shira_diffusers/py.typed"
    }  # fmt: skip


def test_the_page_of_the_package(wheel: Path) -> None:
    """No link of the README, which are relative, is left: without a repository they have nowhere to lead."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (each for each in archive.namelist() if each.endswith("/METADATA"))
        head, _, page = archive.read(name).decode().partition("\n\n")
    assert "Classifier: Development Status" in head and "Project-URL: Paper, https://" in head
    assert "Description-Content-Type: text/markdown" in head
    assert page.startswith("# shira_diffusers")
    links = re.findall(r"\]\(([^)\s]+)\)", page)
    assert links and all(link.startswith("https://") for link in links)
    assert "<img" not in page and "![" not in page and "Coming from LoRA" in page


def test_links_of_the_page() -> None:
    page = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["package_page"]
    text = '![a](b/c.png) [d](e.md#f) [g](https://h.i) <img src="j.png" alt="[k](l)"> [m](#n) `x[0](y)`'
    assert page(text.rpartition(" ")[0], "https://r", "v1") == (
        "![a](https://r/raw/v1/b/c.png) [d](https://r/blob/v1/e.md#f) [g](https://h.i) "
        '<img src="https://r/raw/v1/j.png" alt="[k](https://r/blob/v1/l)"> [m](#n)'
    )
    plain = '![a](b/c.png)x [d](e.md#f) [g](https://h.i) <img src="j.png" alt="k">[m](#n) `x[0]`'
    assert page(plain, None, "v1") == "x d [g](https://h.i) [m](#n) `x[0]`"


@pytest.mark.nightly
def test_the_trainer_runs_without_the_repository(wheel: Path, tmp_path: Path) -> None:
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", tmp_path / "site", wheel]
    subprocess.run(install, check=True, capture_output=True)
    program = (
        "import sys, runpy, shira_command\n"
        "assert shira_command.__file__.startswith(sys.argv[1])\n"
        "sys.argv[:] = ['shira', 'train', '--help']\n"
        "sys.exit(shira_command.main())\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "site")}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: shira train --pretrained_model_name_or_path")
    assert (tmp_path / "site" / "bin" / "shira").is_file()
