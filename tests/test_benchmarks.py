"""Each benchmark runs on toys, and its own assertions on the results hold."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = ("overwrite_vs_fuse", "switch", "fuse", "load_many", "drift", "inference")


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What a script writes."""
    out = tmp_path / "figures.json"
    options = ["--device", "cpu", "--toy", "--models", "SD 1.5", "--budget", "600", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [request.param, *options])
    importlib.import_module(f"benchmarks.{request.param}").main()
    return json.loads(out.read_text())["rows"]


@pytest.mark.parametrize("rows", SCRIPTS, indirect=True)
def test_no_case_fails(rows: list[dict[str, Any]]) -> None:
    assert len(rows) > 1
    assert not [row for row in rows if "failed" in row or "skipped" in row]


def test_a_case_that_fails_or_comes_too_late_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.harness import Run, options

    args = options("").parse_args(["--device", "cpu", "--toy", "--out", str(tmp_path / "figures.json")])
    run = Run("some", args)

    def fail() -> dict[str, Any]:
        raise ValueError("no such layer")

    assert run.case(fail, method="other")["failed"] == "ValueError: no such layer"
    run.until = 0
    assert "skipped" in run.case(dict, method="late")
    assert len(json.loads(args.out.read_text())["rows"]) == 2


def test_the_page_of_benchmarks_is_what_the_figures_give() -> None:
    from benchmarks.report import PAGE, page

    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m benchmarks.report"
