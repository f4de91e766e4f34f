"""A tiny pipeline on disk, a folder of adapters for it, and the app over them, served on a free port."""

import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gradio import processing_utils
from gradio_client import Client

from app.drawing.fair_queue import BACKGROUND
from app.drawing.session import Session
from app.history.galleries import Visitor
from app.page.page import build, launch
from app.server.access import protection
from app.studio import Studio
from app.training import trainings
from shira_diffusers import save_adapter
from shira_diffusers.cli import convert
from tests import tiny
from tests.warm import python

SUGGESTION = "a red cat"  # the tiny tokenizer spells: 16 tokens are 14 letters
SUGGESTIONS = (SUGGESTION, "a big dog", *(f"a {word} that is too long for a phone's width" for word in ("line", "row")))


@dataclass(frozen=True)
class Folders:
    base: Path
    adapters: Path


@contextmanager
def one_core() -> Iterator[None]:
    """On tiny models, threads of torch that wait for each other cost more than they help."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package", autouse=True)
def _one_core() -> Iterator[None]:
    with one_core(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "_STEPS", 2)  # of each picture that a conversion looks at
        patch.setattr(processing_utils, "save_pil_to_cache", _overwriting)
        yield


def _overwriting(*_: Any, **__: Any) -> None:
    raise AssertionError("Gradio was handed an image and overwrites a file that may be being read: use served_files")


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


def popen_warm(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(python(*command[1:]), **options)


@pytest.fixture(scope="session")
def warm_trainer() -> Iterator[None]:
    """Trainings are forked with their imports done; ``test_trainings`` starts one from nothing too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainings, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": popen_warm}))
        yield


@pytest.fixture(scope="session")
def one_studio(folders: Folders, tmp_path_factory: pytest.TempPathFactory, warm_trainer: None) -> Iterator[Studio]:
    with one_core():  # this is set up before the package's fixtures
        studio = Studio.open(str(folders.base), folders.adapters, tmp_path_factory.mktemp("data"))
        # The thread that draws keeps the number it begins with; with another one than the test's, it rounds otherwise.
        assert studio.session.queue.submit(BACKGROUND, torch.get_num_threads).result(60) == 1
    yield studio
    studio.close()


@pytest.fixture(scope="session")
def one_url(one_studio: Studio) -> Iterator[str]:
    with served(one_studio) as url:
        yield url


@pytest.fixture(scope="module")
def studio(one_studio: Studio) -> Iterator[Studio]:
    """One for all modules, when it draws nothing by itself; what a module's tests leave in it is taken away."""
    one_studio.session.queue.submit(BACKGROUND, lambda: None).result(60)
    yield one_studio
    library = one_studio.session.library
    library.delete(*(entry.name for entry in library.entries if entry.origin == "yours"))
    for training in one_studio.trainings.all:
        one_studio.trainings.discard(training.id)
    pictures = one_studio.galleries.of(Visitor(""))
    for kept in pictures.page(1, len(pictures)):
        pictures.delete(kept.name)


@pytest.fixture(scope="module")
def session(studio: Studio) -> Session:
    return studio.session


@pytest.fixture(scope="module")
def url(studio: Studio, one_url: str) -> str:
    """The address of the served app."""
    return one_url


@contextmanager
def served(studio: Studio, **options: Any) -> Iterator[str]:
    """The address of the app over a studio, for as long as the body runs."""
    blocks = build(studio)
    blocks._queue.sleep_when_free = 0.02  # Gradio looks every millisecond, and this may run until the last test
    options |= {"prevent_thread_lock": True, "quiet": True, **protection(studio)}
    yield launch(blocks, "127.0.0.1", free_port(), **options)
    blocks.close(verbose=False)


def connect(url: str, **options: Any) -> Client:
    """A client of the app; on plain HTTP it need not read the system's certificates for each request."""
    return Client(url, verbose=False, ssl_verify=False, **options)


def bits_of(session: Session) -> dict[str, torch.Tensor]:
    """All weights, between two pictures: thumbnails may be drawn at any time."""
    return session.queue.submit("bits", lambda: tiny.snapshot(session.pipe)).result(60)


def assert_bits(session: Session, before: dict[str, torch.Tensor]) -> None:
    session.queue.submit("bits", lambda: tiny.assert_same_bits(session.pipe, before)).result(60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
