"""Ctrl-C and SIGTERM let a run finish its step: it says how to go on, and then equals one that was never stopped."""

import logging
import os
import re
import shlex
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from shira_diffusers import load_adapter
from shira_diffusers.dreambooth.command_line import command_line, parse_config
from shira_diffusers.dreambooth.config import TrainingConfig
from shira_diffusers.dreambooth.interrupts import StopRequest
from shira_diffusers.dreambooth.train import train
from tests import tiny
from tests.warm import python

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def settings(run_settings: dict[str, object], tmp_path: Path) -> dict[str, object]:
    return run_settings | {"output_dir": str(tmp_path / "an out"), "report_to": "jsonl", "max_train_steps": 60}


def wait_for_a_step(output: Path) -> None:
    deadline = time.monotonic() + 120
    while not (output / "logs" / "steps.jsonl").is_file() and time.monotonic() < deadline:
        time.sleep(0.01)


def signal_soon(output: Path, number: int) -> threading.Thread:
    """Send a signal to this process when training has begun."""

    def send() -> None:
        wait_for_a_step(output)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


@pytest.mark.parametrize("workers", [0, 1])
def test_ctrl_c_saves_a_checkpoint_from_which_the_run_goes_on(
    settings: dict[str, object], tmp_path: Path, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    settings |= {"dataloader_num_workers": workers, "checkpointing_steps": 500}
    output = Path(str(settings["output_dir"]))
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    thread = signal_soon(output, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(TrainingConfig(**settings))
    thread.join()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    (checkpoint,) = output.glob("checkpoint-*")
    step = checkpoint.name.split("-")[1]
    assert 1 <= int(step) < 60 and load_adapter(checkpoint).metadata["steps"] == step
    told = next(r.getMessage() for r in caplog.records if "resume with" in r.getMessage())
    assert told.startswith(
        f"stopped after step {step} of 60, which is saved; resume with\naccelerate launch train_dream"
    )
    words = shlex.split(told.partition("\n")[2].replace("\\\n", " "))
    again = parse_config(words[3:])
    assert again == TrainingConfig(**settings, resume_from_checkpoint="latest")
    with caplog.at_level(logging.INFO):
        resumed = load_adapter(train(again))
    assert f"checkpoint-{step}: {step} step" in caplog.text
    whole = load_adapter(train(TrainingConfig(**settings | {"output_dir": str(tmp_path / "whole")})))
    tiny.assert_same_adapter(resumed, whole)


def test_sigterm_ends_with_the_shells_code(settings: dict[str, object]) -> None:
    output = Path(str(settings["output_dir"]))
    thread = signal_soon(output, signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        train(TrainingConfig(**settings))
    thread.join()
    assert ended.value.code == 143
    assert list(output.glob("checkpoint-*"))


def test_a_second_ctrl_c_stops_at_once() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # as a launcher sends both
        assert stop.number == signal.SIGTERM
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_ignored_signals_stay_so_and_other_threads_are_let_be() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.number == 0 and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)

    def enter() -> None:
        with StopRequest():
            seen.append(signal.getsignal(signal.SIGINT))

    seen: list[object] = []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_script_ends_without_a_traceback(settings: dict[str, object], number: int, code: int) -> None:
    settings |= {"max_train_steps": 100_000, "dataloader_num_workers": 1 if number == signal.SIGINT else 0}
    flags = [part for flag in command_line(TrainingConfig(**settings)) for part in flag]
    process = subprocess.Popen(
        python("train_dreambooth_shira.py", *flags), cwd=ROOT, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip
    wait_for_a_step(Path(str(settings["output_dir"])))
    os.killpg(process.pid, number)  # as a terminal does, to the loader's workers too
    _, told = process.communicate(timeout=120)
    assert process.returncode == code, told
    assert "Traceback" not in told
    (step,) = re.findall(r"stopped after step (\d+) of 100000, which is saved", told)
    assert (Path(str(settings["output_dir"])) / f"checkpoint-{step}" / "state.pt").is_file()
    assert "--resume_from_checkpoint latest" in told
