"""The soak test, short: each dtype an episode, errors at each operation of some calls, some mutated files."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline

from tests import tiny
from tests.soak.injection import SCENARIOS, Pair, bench, try_every
from tests.soak.mutation import Mutants
from tests.soak.operations import DTYPES, Difference, Walk, live_weights

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For all tests, since adapters are written once a process."""
    return tmp_path_factory.mktemp("soak")


@pytest.mark.parametrize("kind", DTYPES)
def test_random_operations(kind: str, folder: Path) -> None:
    walk = Walk(kind, folder)
    walk.episode(seed=1, number=0)
    assert all(tiny.same_bits(weight, walk.original[name]) for name, weight in live_weights(walk.pipe).items())


def test_a_difference_shows_how_to_replay_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DiffusionPipeline, "disable_shira", DiffusionPipeline.unload_shira)
    with pytest.raises(Difference, match=r"--episode fp32:0 --seed 1\n  0: [\s\S]*: disable\n"):
        Walk("fp32", folder).episode(seed=1, number=0)


@cache
def one_model() -> Pair:
    return Pair(tiny.linears(1)[:1])


@cache
def two_models() -> Pair:
    return Pair(tiny.linears(1)[:1], tiny.linears(2)[:1])


@pytest.mark.parametrize(
    ("name", "make", "after"),
    [
        ("load", one_model, False),
        ("set", two_models, False),
        ("remove", one_model, True),
        ("save", one_model, False),
        ("save the mix", one_model, True),
    ],
)
def test_an_error_at_each_tensor_operation(name: str, make: Callable[[], Pair], after: bool, tmp_path: Path) -> None:
    assert try_every(SCENARIOS[name], bench(make, tmp_path), after) > 3


def test_mutated_files(folder: Path) -> None:
    mutants = Mutants(folder)
    mutants.run(seed=1, count=300)
    assert min(mutants.outcomes["loads"], mutants.outcomes["load_shira refuses: AdapterFormatError"]) > 20
