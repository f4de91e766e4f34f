"""The command line: its defaults, and that what goes wrong at the start is one line."""

import socket
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from app.insight.lora_timing import Timings
from app.page import theme
from app.serve import ASSETS, main, parse
from app.settings.settings import Settings
from tests.app.conftest import Folders, free_port
from tests.warm import python


def test_the_defaults_are_the_bundled_model_on_this_machine_only() -> None:
    options = parse([])
    assert (options.host, options.port) == ("127.0.0.1", 7860)
    assert Path(options.base) == ASSETS / "emoji-diffusion"
    assert options.adapters == ASSETS / "adapters"
    assert (options.device, options.dtype) == ("cpu", "float32")
    assert ASSETS.parent == Path(__file__).parents[2]


@pytest.mark.parametrize("option", ["--base", "--adapters"])
def test_a_missing_folder_is_one_line(folders: Folders, tmp_path: Path, option: str) -> None:
    named = {"--base": str(folders.base), "--adapters": str(folders.adapters), "--data": str(tmp_path)}
    named[option] = str(tmp_path / "missing")
    with pytest.raises(SystemExit) as caught:
        main([word for pair in named.items() for word in pair])
    assert str(caught.value).startswith("error: no ")
    assert option in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--port", "0", "--port must be a number from 1 to 65535, got 0"),
        ("--port", "70000", "--port must be a number from 1 to 65535, got 70000"),
        ("--host", "192.0.2.1", "cannot listen at 192.0.2.1, port "),
        ("--host", "..", "cannot listen at .., port "),
        ("--max-upload-mb", "nan", "--max-upload-mb must be a number up to 1000000, got nan"),
        ("--max-upload-mb", "-5", "--max-upload-mb must be"),
        ("--history", "0", "--history must be"),
        ("--data", "/dev/null", "cannot write to /dev/null: "),
        ("--data", "/dev/null/x", "cannot write to /dev/null/x: "),
    ],
)
def test_an_option_that_cannot_work_is_one_line(tmp_path: Path, option: str, value: str, message: str) -> None:
    named = {"--data": str(tmp_path), "--port": str(free_port()), option: value}
    with pytest.raises(SystemExit) as caught:
        main([word for pair in named.items() for word in pair])
    assert str(caught.value).startswith(f"error: {message}") and "\n" not in str(caught.value)


def test_a_port_in_use_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(SystemExit) as caught:
        main(["--data", str(tmp_path), "--port", str(other.getsockname()[1])])
    assert "Address already in use; choose others with --host and --port" in str(caught.value)


def test_what_strangers_wrote_is_escaped() -> None:
    report = {"prompt": "<script>", "mix": {"<b>": 1.0}, "model": "<b>"}
    assert "<script>" not in theme.settings(report) and "<b>" not in theme.settings(report)
    assert "<i>" not in theme.refusals([("<i>", "<i>")])
    assert "<i>" not in theme.header("<i>", 1)


def test_of_many_files_that_were_left_out_the_first_are_told() -> None:
    told = theme.refusals((f"file {number}", "reason") for number in range(5))
    assert told.count("reason") == 3 and "and 2 more, see Library" in told
    assert "more" not in theme.refusals([("file", "reason")] * 3)


@pytest.mark.parametrize(
    ("milliseconds", "text"), [(0.0123, "0.012 ms"), (2.345, "2.3 ms"), (99.9, "100 ms"), (250.4, "250 ms")]
)
def test_times_have_a_sensible_number_of_digits(milliseconds: float, text: str) -> None:
    report = {
        "switch_ms": milliseconds,
        "entries_changed": 1234,
        "share_changed": 0.0123,
        "generation_s": 1.26,
        "seed": 7,
    }
    cells = theme.facts(report)
    assert f"<b>{text}</b>" in cells
    assert "<b>1.23 %</b>" in cells and "<b>1.3 s</b>" in cells
    assert "<b>1,234</b>" in cells
    assert f"<b>{text}</b>" in theme.lora(Timings(milliseconds, 33, 5))


def test_before_the_first_picture_there_are_no_figures() -> None:
    assert not any(digit in theme.facts(None) for digit in "0123456789")
    assert theme.lora(None) == ""


def test_a_picture_says_how_it_was_made() -> None:
    plain = Settings.checked("a <red> cat", {"x": 1.0, "y": 0.5}, seed=7, steps=2, guidance=2)
    assert theme.made(plain.as_dict()) == "<p>“a &lt;red&gt; cat” · x + y 0.5 · 2 steps · guidance 2</p>"
    more = replace(plain, mix={}, negative="a dog", width=24)
    assert theme.made(more.as_dict()) == (
        "<p>“a &lt;red&gt; cat” · without “a dog” · base · 2 steps · guidance 2 · width 24</p>"
    )


def test_without_what_the_app_needs_it_says_how_to_get_that() -> None:
    program = "import runpy, sys; sys.modules['gradio'] = None; runpy.run_module('app', run_name='__main__')"
    run = subprocess.run(python("-c", program), cwd=ASSETS.parent, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr == 'error: the app needs gradio, which is not installed; in a clone: pip install -e ".[app]"\n'


def test_a_file_of_users_that_is_missing_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"cannot read --auth-file .*: No such file or directory; expected lines USER"):
        main(["--auth-file", str(tmp_path / "none")])
