"""The app's sessions and trainings on an NVIDIA GPU, with the bundled model; no page is served."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from app.studio import Studio
from app.training.pictures import sort_out
from app.training.recipe import Recipe
from shira_diffusers.cli.demo import ADAPTERS, ASSETS, BASE
from shira_diffusers.integrations.pipelines import models_of

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
PROMPT = "a picture of an owl on a teal background"
MIXES: tuple[dict[str, Any], ...] = (
    {},
    {"bluefire": 1.0},
    {"gold": 0.7, "paintings": 0.6},
    {"bluefire": {"unet": {"down": 0.2, "mid": 1.0, "up": 0.9}}, "gold": -0.3},
)


SECOND = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")


@pytest.fixture(
    scope="module",
    params=[
        ("cuda", "float16"),
        ("cuda", "bfloat16"),
        ("cuda", "float32"),
        pytest.param(("cuda:1", "float16"), marks=SECOND),
    ],
    ids="-".join,
)
def studio(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    data = tmp_path_factory.mktemp("data")
    device, dtype = request.param
    studio = Studio.open(str(BASE), ADAPTERS, data, device=device, dtype=dtype)
    yield studio
    studio.close()


def weights_of(studio: Studio) -> list[torch.Tensor]:
    def copies() -> list[torch.Tensor]:
        return [p.detach().clone() for model in models_of(studio.session.pipe).values() for p in model.parameters()]

    return studio.session.queue.submit("weights", copies).result(60)


def test_pictures_of_many_clients_are_what_each_gives_alone(studio: Studio) -> None:
    before = weights_of(studio)

    def draw(k: int, visit: str = "") -> bytes:
        return studio.session.generate(PROMPT, MIXES[k % len(MIXES)], k, 4, visit=visit).image.tobytes()

    alone = [draw(k) for k in range(8)]
    assert len(set(alone)) == 8
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            together = list(pool.map(lambda k: draw(k, f"visit {k}"), range(8)))
            assert together == alone
    assert studio.session.active == {}
    assert all(map(torch.equal, before, weights_of(studio)))


def test_a_drawing_that_is_stopped_leaves_the_base(studio: Studio) -> None:
    before = weights_of(studio)

    def stop(done: int, of: int) -> None:
        if done == 2:
            raise KeyError("stopped")

    with pytest.raises(KeyError, match="stopped"):
        studio.session.generate(PROMPT, MIXES[2], 1, 4, on_step=stop)
    assert all(map(torch.equal, before, weights_of(studio)))


def test_a_lora_s_fuse_is_measured_there(studio: Studio) -> None:
    measured = studio.measured.result(60)
    assert measured and 0 < measured.switch < 1000 and 0 < measured.fuse < 1000


def test_a_training_runs_there_and_its_adapter_draws(studio: Studio) -> None:
    steps = {"name": "moss", "prompt": "a picture of a sks alien", "steps": 10, "batch": 2, "mask": "rand"}
    recipe = Recipe.for_base(studio.trainings.base).changed(steps, ())
    pictures = sorted((ASSETS / "subject").glob("*.png"))
    training = studio.trainings.start(recipe, sort_out([(path.name, path) for path in pictures]))
    drawn = studio.session.generate(PROMPT, MIXES[1], 1, 4).image.tobytes()
    end = time.time() + 240
    while studio.trainings.running is not None:
        assert time.time() < end, "waited in vain"
        time.sleep(0.2)
    progress = studio.trainings.progress(training.id)
    assert (progress.training.state, progress.training.problem) == ("finished", "")
    assert "moss" in studio.session.adapter_names
    base = studio.session.generate(PROMPT, {}, 1, 4).image.tobytes()
    assert studio.session.generate(PROMPT, {"moss": 1.0}, 1, 4).image.tobytes() != base
    assert studio.session.generate(PROMPT, MIXES[1], 1, 4).image.tobytes() == drawn
