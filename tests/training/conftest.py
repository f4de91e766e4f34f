"""Fixtures of the trainer's tests."""

from pathlib import Path

import pytest

from tests import tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.pipeline().save_pretrained(folder)
    return folder
