"""Fixtures of the command's tests: a tiny base on disk, and commands run in this process."""

from collections.abc import Callable
from pathlib import Path

import pytest

from shira_diffusers.cli.__main__ import main
from tests import tiny

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny pipeline, to be read only."""
    folder = tmp_path_factory.mktemp("bases") / "tiny"
    tiny.pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process: status, stdout, stderr."""

    def run_it(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([str(word) for word in argv])
        out, err = capsys.readouterr()
        return status, out, err

    return run_it
