"""The examples with a tiny ViT, nightly a Llama: adapters learn, switching restores bits, fusing equals the oracle."""

from collections.abc import Callable

import pytest
import torch

from examples.any_module import llama, vit
from examples.any_module.compare import Result, Settings, Subject, bits, compare, table
from shira_diffusers import Resident
from tests import reference

TOY = Settings(base_steps=60, steps=60, shira_rate=1e-2, lora_rates=(1e-2,), batch=32, judged=500)


@pytest.fixture(
    scope="module",
    params=[pytest.param(llama.llama, marks=pytest.mark.nightly, id="llama"), pytest.param(vit.vit, id="vit")],
)
def result(request: pytest.FixtureRequest) -> Result:
    subject: Callable[[int], Subject] = request.param
    torch.manual_seed(0)
    return compare(subject(32), TOY)


def test_each_adapter_beats_the_base_on_its_task(result: Result) -> None:
    base = result.report["base"]
    for row in result.report["rows"].values():
        for task, accuracy in row["single"].items():
            assert accuracy > base[task] + 2


def test_switching_restores_the_bits_of_the_base(result: Result) -> None:
    for row in result.adapters:
        assert result.report["rows"][row]["base's bits restored"]
        assert result.report["rows"][row]["fused adapter has the same bits"]


def test_fused_weights_are_those_of_the_oracle(result: Result) -> None:
    before = bits(result.model)
    for pair in result.adapters.values():
        resident = Resident(result.model)
        for name, adapter in pair.items():
            resident.add(adapter, name)
        with resident.using(mix := dict.fromkeys(pair, 1.0)):
            expected, fused = reference.apply(before, pair, mix), bits(result.model)
        assert any(not torch.equal(fused[name], before[name]) for name in before)
        for name, weight in fused.items():
            assert torch.equal(weight, expected[name]), name
        resident.remove(*pair)
    for name, weight in bits(result.model).items():
        assert torch.equal(weight, before[name]), name


def test_second_adapters_share_entries_or_none(result: Result) -> None:
    for row, pair in result.adapters.items():
        first, second = pair.values()
        for name, delta in first.deltas.items():
            shared = torch.isin(second.deltas[name].indices, delta.indices)
            assert not shared.any() if row.endswith("apart") else shared.float().mean() > 0.9


def test_the_table_has_a_line_for_each_row(result: Result) -> None:
    lines = table(result.report).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["base", *result.adapters, "LoRA, rate 0.01"]
    assert len({line.count("|") for line in lines}) == 1
