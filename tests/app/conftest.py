"""A tiny pipeline on disk, a shelf of adapters for it, and the app over them, served on a free port."""

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from app.access import protection
from app.session import Session
from app.studio import Studio
from app.ui import build, launch
from shira_diffusers import save_adapter
from tests import tiny

SUGGESTION = "a red cat"  # the tiny tokenizer spells: 16 tokens are 14 letters
SUGGESTIONS = (SUGGESTION, "a big dog", *(f"a {word} that is too long for a phone's width" for word in ("line", "row")))


@dataclass(frozen=True)
class Folders:
    base: Path
    adapters: Path


@pytest.fixture(scope="package", autouse=True)
def _one_core() -> Iterator[None]:
    """On tiny models, threads of torch that wait for each other cost more than they help."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Two adapters that fit, one of another model, and a file that is none."""
    root = tmp_path_factory.mktemp("app")
    folders = Folders(root / "tiny-diffusion", root / "adapters")
    pipe = tiny.pipeline()
    pipe.save_pretrained(folders.base)
    (folders.base / "suggestions.txt").write_text("\n\n".join(SUGGESTIONS))
    bluefire = tiny.adapter_for(pipe, 1).with_metadata(instance_prompt="sks fire", mask="rand")
    save_adapter(bluefire, folders.adapters / "bluefire.safetensors")
    save_adapter(tiny.adapter_for(pipe, 2, dtype=torch.float16), folders.adapters / "paintings")
    save_adapter(tiny.adapter_for(tiny.sdxl_pipeline(), 3), folders.adapters / "stranger.safetensors")
    (folders.adapters / "broken.safetensors").write_bytes(b"no adapter")
    return folders


@pytest.fixture(scope="module")
def studio(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    studio = Studio.open(str(folders.base), folders.adapters, tmp_path_factory.mktemp("data"))
    yield studio
    studio.close()


@pytest.fixture(scope="module")
def session(studio: Studio) -> Session:
    return studio.session


@pytest.fixture(scope="module")
def url(studio: Studio) -> Iterator[str]:
    """The address of the served app."""
    blocks = build(studio)
    yield launch(blocks, "127.0.0.1", free_port(), prevent_thread_lock=True, quiet=True, **protection(studio))
    blocks.close(verbose=False)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window."""
    from tests.app.browsing import chromium  # Playwright may be missing

    with chromium() as browser:
        yield browser


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
