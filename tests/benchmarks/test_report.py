"""Pages, tables and plots that are made from the results of benchmarks."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks.measure import RESULTS
from benchmarks.report import page as documents
from benchmarks.report.page import anchor, page, stale
from benchmarks.report.plots import PLOTS, digest, draw, panels
from benchmarks.report.results import Results, Source, ratio
from benchmarks.report.tables import number, short, size, spread
from benchmarks.report.targets import Target, counted, reasons, target_table

ORIGIN = {"date": "2030-01-01", "commit": "abc", "torch": "9", "gpu": None, "processor": "Fast One", "cores": 2}


def write(folder: Path, name: str, rows: list[dict[str, Any]], **about: Any) -> Results:
    (folder / f"{name}.json").write_text(json.dumps({"origin": ORIGIN, **about, "rows": rows}))
    return Results(folder)


def took(ms: float, n: int = 5) -> dict[str, float]:
    return {"median_ms": ms, "p10_ms": ms * 0.9, "p90_ms": ms * 1.1, "n": n}


def test_what_comes_from_the_results_is_not_stale() -> None:
    assert not stale(Results()), "run python -m benchmarks.report"


def test_no_result_is_of_toys() -> None:
    assert not [path.name for path in RESULTS.glob("*.json") if '"toy": true' in path.read_text()]


def test_another_figure_makes_documents_and_plots_stale(tmp_path: Path) -> None:
    results = shutil.copytree(RESULTS, tmp_path / "results")
    file = results / "switch_cuda.json"
    data = json.loads(file.read_text())
    row = next(row for row in data["rows"] if row.get("family") == "rand" and "resident" in row)
    row["resident"]["median_ms"] *= 2
    file.write_text(json.dumps(data))
    assert stale(Results(results)) == ["benchmarks.md", "README.md", "switch.svg", "switch-dark.svg"]
    (results / "training.json").unlink()
    assert "training.md" in stale(Results(results))


def test_a_document_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="without its marks"):
        documents.between("# Title", "| a |")
    assert documents.between(f"a\n{documents.BEGIN}\nold\n{documents.END}\nb", "new") == (
        f"a\n{documents.BEGIN}\n\nnew\n\n{documents.END}\nb"
    )


@pytest.mark.parametrize(
    ("measured", "verdict"), [({"a": took(10), "b": took(5)}, True), ({"a": took(9), "b": took(5)}, False), ({}, None)]
)
def test_a_target_is_read_from_the_rows(tmp_path: Path, measured: dict[str, Any], verdict: bool | None) -> None:
    results = write(tmp_path, "some_cpu", [{"model": "M", "over_limit": 3.0, "limit_ms": 4.0, **measured}])
    row = Source("some", "cpu", model="M")
    target = Target("a over b", "at least", 2, "x", ratio(row.value("a"), row.value("b")), "It takes {limit}.", row)
    assert target.met(results) is verdict
    text = target_table([target], results)
    assert {True: "| 2x | yes | 3x |", False: "| 1.8x | **no** | 3x |", None: "| not measured |"}[verdict] in text
    why = ["Missed: a over b. It takes 4 ms."]
    assert list(reasons([target], results)) == (why if verdict is False else [])
    assert counted([target], results).startswith(f"{int(verdict is True)} of 1 targets are met")


def test_the_largest_of_all_rows_and_steps(tmp_path: Path) -> None:
    results = write(
        tmp_path, "some_cpu", [{"changed": {"1": 0.0, "10": 0.5}}, {"changed": {"1": 0.1}}, {"skipped": "no"}]
    )
    assert Source("some", "cpu").largest("changed")(results) == 0.5
    assert Source("some", "cuda").largest("changed")(results) is None


def test_scripts_and_keys_that_the_report_does_not_know_are_shown(tmp_path: Path) -> None:
    rows = [{"method": method, "decode_ms": 1.5, "took_s": 9} for method in ("shira", "lora")]
    write(tmp_path, "new_thing_cpu", rows, note="twice")
    write(tmp_path, "fuse_cpu", [{"model": "M", "adapters": 2, "method": "shira", "slider": took(2), "warm_bytes": 10}])
    text = page(Results(tmp_path))
    assert "## New thing\n" in text and "python -m benchmarks.scripts.new_thing" in text
    assert "| Method | Decode, ms |" in text and "commit abc): Twice." in text
    assert "| Warm, bytes |" in text and "took" not in text.lower()


def test_a_cold_start_has_a_row_a_part(tmp_path: Path) -> None:
    labels = {"model": "M", "method": "library", "family": "rand", "density": 0.01, "entries": 9}
    rows = [{**labels, "file_bytes": 2000, "read": took(1), "new_part_ms": 2.5, "load_shira": took(4)}]
    text = page(write(tmp_path, "cold_start_cpu", rows))
    for line in ("| Part | M, rand, 1 % |", "| The file | 2 kB |", "| New part, ms | 2.50 |"):
        assert line in text
    assert "| **Total: `load_shira`, ms** | 4 (3.60\u20134.40) |" in text


def test_what_was_skipped_is_told(tmp_path: Path) -> None:
    rows = [{"model": "M", "method": "lora", "adapters": n, "skipped": "no time"} for n in (2, 4)]
    text = page(
        write(tmp_path, "fuse_cpu", [{"model": "M", "adapters": 2, "method": "shira", "slider": took(2)}, *rows])
    )
    assert "Not measured (no time): M, LoRA, 2; M, LoRA, 4." in text


def test_no_heading_of_a_table_is_a_raw_key() -> None:
    text = page(Results())
    heads = [
        line for line, below in zip(text.splitlines(), text.splitlines()[1:], strict=False) if below.startswith("| ---")
    ]
    assert len(heads) > 10
    assert not re.findall(r"\b(p10|p90|median_ms|\w+_ms|took_s)\b", " ".join(heads))


def test_links_of_the_page_lead_somewhere() -> None:
    assert anchor("Does 1 % of `a_b.c` change, once?") == "does-1--of-a_bc-change-once"  # as GitHub makes it
    text = page(Results())
    anchors = {anchor(line.removeprefix("## ")) for line in text.splitlines() if line.startswith("## ")}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) == anchors
    sources = re.findall(r'(?:srcset|src)="([^"]+)"', text)
    assert sources and all((documents.PLOT_FOLDER.parent / source).is_file() for source in sources)


@pytest.mark.parametrize("script", PLOTS)
def test_plots_are_the_same_bytes_for_the_same_results(script: str) -> None:
    shown = panels(script, Results())
    assert shown
    light, dark = draw(shown, ""), draw(shown, "-dark")
    assert light == draw(shown, "") != dark
    assert digest(shown) in light and digest(shown) in dark


def test_numbers_are_short_and_sensible() -> None:
    assert [number(x) for x in (0, 12345, 1449.5, 54.46, 3.7321, 0.617, 0.0504)] == [
        "0", "12,345", "1,450", "54.5", "3.73", "0.617", "0.0504",
    ]  # fmt: skip
    assert [short(x) for x in (4.5, 1.5, 100.0, 0.2)] == ["4.5", "1.5", "100", "0.2"]
    assert [size(x) for x in (129, 7_518_637, 2.5e9)] == ["129 B", "7.52 MB", "2.50 GB"]
    assert spread(took(2, n=1)) == "2" and spread(took(2.5)) == "2.50 (2.25\u20132.75)"
