"""The table of pipelines in docs/compatibility.md: three of its rows, and nightly all of it, are run again."""

import pytest

from shira_diffusers import ResidentStateError
from tests import compat_matrix
from tests.compat_matrix import DOCUMENT, FEATURES, Made


@pytest.mark.parametrize("pipeline", ["PixArt-Sigma", "Sana", "Wan"])
def test_a_row_is_what_running_it_gives(pipeline: str) -> None:
    line = next(line for line in DOCUMENT.read_text().splitlines() if line.startswith(f"| {pipeline} |"))
    written = [cell.split()[0] for cell in line.removeprefix(f"| {pipeline} |").strip(" |").split("|")]
    assert written == [compat_matrix.result(feature, pipeline).split()[0] for feature in FEATURES]


def refused(make: object) -> None:
    raise ResidentStateError("unet is on disk:\nload it")


def broken(make: object) -> None:
    raise AssertionError("other bits")


def missing(make: object) -> None:
    raise compat_matrix.NotApplicableError("No such thing.")


def test_cells_say_what_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat_matrix, "FEATURES", {"a": lambda make: None, "b": refused, "c": missing, "d": refused})
    notes: list[str] = []
    assert compat_matrix.row("Flux", notes) == "| Flux | yes | refused [1] | n/a [2] | refused [1] |"
    assert notes == ["unet is on disk: load it", "No such thing."]


def test_a_failure_is_no_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat_matrix, "FEATURES", {"a": broken})
    with pytest.raises(AssertionError, match="other bits"):
        compat_matrix.row("Flux", [])


def test_a_restore_that_misses_an_entry_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def made() -> Made:
        pipe, draw = compat_matrix.sd1()
        monkeypatch.setattr(type(pipe), "unload_shira", lambda self: self.set_shira("a", 0.1))
        return pipe, draw

    with pytest.raises(AssertionError, match="changed"):
        compat_matrix.restore(made)


@pytest.mark.nightly
def test_the_table_is_what_running_it_gives() -> None:
    text = DOCUMENT.read_text()
    assert text == compat_matrix.document(text, compat_matrix.block()), "run python -m tests.compat_matrix"
