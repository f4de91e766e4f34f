"""The soak test, short: each dtype an episode or two, errors at each operation of some calls, some mutated files."""

from pathlib import Path

import pytest

from tests import tiny
from tests.soak.injection import SCENARIOS, Pair, bench, try_every
from tests.soak.mutation import Mutants
from tests.soak.operations import DTYPES, Walk, live_weights

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For all tests, since adapters are written once a process."""
    return tmp_path_factory.mktemp("soak")


@pytest.mark.parametrize("kind", DTYPES)
def test_random_operations(kind: str, folder: Path) -> None:
    walk = Walk(kind, folder)
    for number in range(2):
        walk.episode(seed=1, number=number)
    fresh = live_weights(Walk(kind, folder / "fresh").pipe)
    now = live_weights(walk.pipe)
    assert all(tiny.same_bits(now[name], fresh[name]) for name in fresh)


def one_layer_each() -> Pair:
    return Pair(tiny.linears(1)[:1], tiny.linears(2)[:1])


@pytest.mark.parametrize(("name", "after"), [(name, k % 2 == 1) for k, name in enumerate(SCENARIOS)])
def test_an_error_at_each_tensor_operation(name: str, after: bool, tmp_path: Path) -> None:
    assert try_every(SCENARIOS[name], bench(one_layer_each, tmp_path), after) > 5


def test_mutated_files(folder: Path) -> None:
    mutants = Mutants(folder)
    mutants.run(seed=1, count=400)
    assert min(mutants.outcomes["loads"], mutants.outcomes["load_shira refuses: AdapterFormatError"]) > 20
