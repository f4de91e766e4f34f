"""The simulated fleet agrees with what queues and caches are known to do."""

from argparse import Namespace
from math import exp, factorial

import pytest

from benchmarks.scripts.fleet import Method, parameters, simulate

FREE = Method(file_bytes=10**6, device_bytes=0, ready_ms=0, switch_ms=0, from_ram_ms=0, from_store_ms=0)
WORLD = parameters({"replicas": 1, "adapters": 1, "steps": 10, "step_ms": 100.0, "store_ms": 0.0})[0]


def test_one_replica_waits_as_an_m_d_1_queue() -> None:
    told = simulate(FREE, WORLD, Namespace(requests=90_000), 0.4, "any")

    def at_most(seconds: float) -> float:
        """The share of requests that wait no longer, for services of a second (Erlang, 1909)."""
        terms = [(0.4 * (k - seconds)) ** k / factorial(k) * exp(-0.4 * (k - seconds)) for k in range(int(seconds) + 1)]
        return 0.6 * sum(terms)

    assert told["p50_s"] == 1.0 and told["capacity"] == 1.0 and not told["overloaded"]
    assert at_most(told["p99_s"] - 1) == pytest.approx(0.99, abs=0.002)
    assert told["hits"]["active"] == 1.0 and told["store_mb_per_picture"] == 0


@pytest.mark.parametrize("routing", ["any", "warm", "cheapest"])
def test_each_miss_moves_a_file_and_each_switch_takes_its_time(routing: str) -> None:
    world = {**WORLD, "replicas": 4, "adapters": 50, "zipf": 0.0, "ram_gib": 10.5e6 / 2**30}
    told = simulate(Method(10**6, 0, 0, 1000.0, 0, 0), world, Namespace(requests=6000), 0.3, routing)
    active, ram = told["hits"]["active"], told["hits"]["RAM"]
    assert told["store_mb_per_picture"] == pytest.approx(1 - active - ram, abs=0.01)
    assert told["capacity"] == pytest.approx(4 / (2 - active), abs=0.05)
    if routing == "any":  # ten of 50 are there
        assert active + ram == pytest.approx(0.2, abs=0.03)
    else:
        assert active + ram > 0.4


def test_a_link_that_is_too_slow_limits_the_fleet() -> None:
    told = simulate(
        Method(2 * 10**9, 0, 0, 0, 0, 0),
        {**WORLD, "adapters": 1000, "zipf": 0.0, "store_gb_s": 1.0, "ram_gib": 0.0},
        Namespace(requests=3000),
        0.8,
        "any",
    )
    assert told["capacity"] == pytest.approx(0.5, rel=0.01) and told["overloaded"]


def test_parameters_are_what_was_measured_unless_given() -> None:
    world, methods = parameters({"steps": 4, "SHiRA": {"switch_ms": 0.5}})
    assert world["steps"] == 4 and methods["SHiRA"].switch_ms == 0.5
    assert 0 < methods["SHiRA"].ready_ms < methods["LoRA, hotswap"].switch_ms < methods["LoRA, fused"].switch_ms
    with pytest.raises(ValueError, match=r"no such parameters: \['step'\]; there are \['replicas'"):
        parameters({"step": 4})
