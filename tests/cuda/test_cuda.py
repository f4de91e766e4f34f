"""What only an NVIDIA GPU can show: the same bits as on a CPU, moves with adapters active, graphs that stay valid."""

import copy

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from shira_diffusers import AdapterMismatchError, Resident, ShiraAdapter, ShiraError, SparseDelta, build_masks
from shira_diffusers.integrations.pipelines import resident_of
from shira_diffusers.weights.sweep_triton import TritonSweep, _works, available, usable
from tests import reference, tiny

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MIXES: list[dict[str, float]] = [{"a": 1.0}, {"b": 0.7}, {"a": 0.3, "b": -1.2}, {"a": 0.3, "b": 1.5}, {}, {"b": 2.0}]


def adapters_of(model: UNet2DConditionModel) -> dict[str, ShiraAdapter]:
    return {
        "a": tiny.adapter_for(model, 1, dtype=torch.float16),
        "b": tiny.adapter_for(model, 2, only=("attn2", "conv1"), density=0.4),
    }


def resident_on_cuda(dtype: torch.dtype) -> tuple[UNet2DConditionModel, Resident, dict[str, ShiraAdapter]]:
    model = tiny.unet()
    adapters = adapters_of(model)
    model.to("cuda", dtype)
    resident = Resident(model)
    for name, adapter in adapters.items():
        resident.add(adapter, name)
    return model, resident, adapters


def on_cpu(model: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().cpu().clone() for name, parameter in model.named_parameters()}


def assert_mix(model: UNet2DConditionModel, base: dict, adapters: dict, mix: dict[str, float]) -> None:
    expected = reference.apply(base, adapters, mix)
    now = on_cpu(model)
    wrong = [name for name in expected if not tiny.same_bits(now[name], expected[name])]
    assert not wrong


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_switching_gives_the_bits_that_a_cpu_gives(dtype: torch.dtype, channels_last: bool) -> None:
    model, resident, adapters = resident_on_cuda(dtype)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    base = on_cpu(model)
    addresses = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    for mix in MIXES:
        resident.set(mix)
        resident.verify()
        assert_mix(model, base, adapters, mix)
    resident.clear()
    assert_mix(model, base, adapters, {})
    assert addresses == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


def test_without_triton_it_goes_weight_by_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shira_diffusers.weights.sweep_triton.available", lambda: False)
    model, resident, adapters = resident_on_cuda(torch.float16)
    base = on_cpu(model)
    for mix in MIXES:
        resident.set(mix)
        assert_mix(model, base, adapters, mix)


def test_triton_is_used_where_it_is_there() -> None:
    for dtype in DTYPES:
        assert available() and usable(torch.device("cuda", 0), dtype)
        _, resident, _ = resident_on_cuda(dtype)
        assert resident.engines == {}
        resident.set({"a": 1.0})
        assert resident.engines == {"": "triton"}


def test_a_compiler_that_fails_is_told_and_torch_takes_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_compiler(*args: object) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(TritonSweep, "_launch", no_compiler)
    _works.cache_clear()
    try:
        model, resident, adapters = resident_on_cuda(torch.float16)
        base = on_cpu(model)
        for mix in MIXES:
            resident.set(mix)
            assert_mix(model, base, adapters, mix)
        assert caplog.text.count("Failed to find C compiler") == 1
        resident.set({"a": 1.0})
        assert resident.engines == {"": "torch"}
    finally:
        _works.cache_clear()


@pytest.mark.parametrize("mix", [{"a": 1.0}, {"a": 0.3, "b": -1.2}])
def test_a_model_moved_and_cast_while_active_gets_its_base_back(mix: dict[str, float]) -> None:
    model, resident, adapters = resident_on_cuda(torch.float32)
    base = on_cpu(model)
    resident.set(mix)
    model.to("cpu")
    resident.set({"b": 0.5})
    assert_mix(model, base, adapters, {"b": 0.5})
    model.to("cuda")
    resident.set(mix)
    assert_mix(model, base, adapters, mix)
    model.half()
    resident.clear()
    assert_mix(model, {name: weight.half() for name, weight in base.items()}, adapters, {})


@pytest.mark.parametrize("mix", [{"a": 1.0}, {"a": 0.3, "b": -1.2}])
def test_weights_moved_one_by_one_while_active(mix: dict[str, float]) -> None:
    """As offloading does it: without the module's knowledge, so what we keep is elsewhere."""
    model, resident, adapters = resident_on_cuda(torch.float32)
    base = on_cpu(model)
    resident.set(mix)
    for device in ("cpu", "cuda"):
        for parameter in model.parameters():
            parameter.data = parameter.data.to(device)
        resident.verify()
        resident.set({"b": 0.5})
        assert_mix(model, base, adapters, {"b": 0.5})
        resident.set(mix)
        assert_mix(model, base, adapters, mix)
    for parameter in list(model.parameters())[::2]:
        parameter.data = parameter.data.cpu()
    resident.set({"b": 1.0})
    assert_mix(model, base, adapters, {"b": 1.0})
    resident.clear()
    assert_mix(model, base, adapters, {})


OFFLOADS = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(),
    "sequential": lambda pipe: pipe.enable_sequential_cpu_offload(),
    "group": lambda pipe: offload_groups(pipe, offload_type="leaf_level"),
    "blocks": lambda pipe: offload_groups(pipe, offload_type="block_level", num_blocks_per_group=1),
    "stream": lambda pipe: offload_groups(pipe, offload_type="leaf_level", use_stream=True),
}


def offload_groups(pipe: StableDiffusionPipeline, **how: object) -> None:
    pipe.to("cuda")
    pipe.unet.enable_group_offload(onload_device=torch.device("cuda"), offload_device=torch.device("cpu"), **how)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloading_to_the_host(offload: str) -> None:
    pipe = tiny.pipeline()
    for seed, name in enumerate("ab"):
        resident_of(pipe).add(tiny.adapter_for(pipe, seed), name)
    pipe.set_shira("b")
    OFFLOADS[offload](pipe)
    pipe.set_shira([])
    base = tiny.picture(pipe)
    pipe.set_shira("a")
    adapted = tiny.picture(pipe)
    assert not torch.allclose(adapted, base, atol=1e-3)
    for other in ("b", ["a", "b"], []):
        pipe.set_shira(other)
        tiny.picture(pipe)
    torch.testing.assert_close(tiny.picture(pipe), base, rtol=0, atol=1e-5)
    pipe.set_shira("a")
    torch.testing.assert_close(tiny.picture(pipe), adapted, rtol=0, atol=1e-5)
    pipe.unload_shira()
    torch.testing.assert_close(tiny.picture(pipe), base, rtol=0, atol=1e-5)


def test_a_foreign_write_on_cuda_is_noticed() -> None:
    model, resident, _ = resident_on_cuda(torch.float16)
    resident.set({"a": 1.0})
    name = model._shira.overwritten[0].plan.names[0]
    with torch.no_grad():
        model.get_parameter(name).add_(1)
    with pytest.raises(Exception, match="modified outside shira_diffusers"):
        resident.clear()


def test_a_weight_viewed_in_another_shape_is_refused_and_nothing_stays_written() -> None:
    model, resident, adapters = resident_on_cuda(torch.float16)
    resident.set({"a": 1.0})
    resident.set({})
    weight = model.get_parameter(next(iter(adapters["a"].deltas)))
    weight.data = weight.data.view(-1, 1)
    base = tiny.snapshot(model)
    with pytest.raises(AdapterMismatchError, match="another shape"):
        resident.set({"a": 1.0})
    tiny.assert_same_bits(model, base)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn])
@pytest.mark.parametrize("triton", [True, False])
def test_sums_out_of_range_are_refused(dtype: torch.dtype, triton: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not triton:
        monkeypatch.setattr("shira_diffusers.weights.sweep_triton.available", lambda: False)
    top = torch.finfo(dtype).max
    model = torch.nn.Linear(64, 64, bias=False)
    with torch.no_grad():
        model.weight.view(-1)[5] = top
    model.to("cuda", dtype)
    resident = Resident(model)
    indices = torch.arange(3000)
    for name, value in (("up", 0.5), ("other", 0.01)):
        values = torch.full((3000,), 0.001)
        values[5] = value * top
        resident.add(ShiraAdapter({"weight": SparseDelta(indices, values, (64, 64))}), name)
    resident.set({"other": -1.0})
    before = tiny.snapshot(model)
    for mix in ({"up": 1.0}, {"up": 1.0, "other": 0.5}, {"other": 20.0}):
        with pytest.raises(ShiraError, match="weight: 1 of 3,000 entries"):
            resident.set(mix)
        assert resident.active == {"other": -1.0}
        tiny.assert_same_bits(model, before)
        resident.verify()
    resident.set({"up": -1.0})
    assert model.weight.view(-1)[5].float().item() == pytest.approx(top / 2, rel=0.1)


def test_a_recorded_graph_sees_every_switch() -> None:
    model, resident, _ = resident_on_cuda(torch.float16)
    model.eval()
    sample = torch.randn(1, 4, 8, 8, device="cuda", dtype=torch.float16)
    text = torch.randn(1, 7, model.config.cross_attention_dim, device="cuda", dtype=torch.float16)
    time = torch.tensor(5, device="cuda")

    def forward() -> torch.Tensor:
        return model(sample, time, text).sample

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            forward()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = forward()
    seen = []
    for mix in MIXES:
        resident.set(mix)
        graph.replay()
        torch.testing.assert_close(replayed, forward(), rtol=1e-2, atol=1e-2)
        seen.append(replayed.clone())
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("mix", [{"a": 0.5}, {"b": 1.0}, {}, {"c": 1.0}])
def test_a_switch_is_one_launch(mix: dict[str, float]) -> None:
    parts = {"unet": tiny.unet(), "other": tiny.unet(seed=1)}
    model = torch.nn.ModuleDict(parts).to("cuda", torch.float16)
    resident = Resident(parts)
    for seed, name in enumerate("abc"):
        only = ("",) if name != "c" else ("unet.mid_block",)
        resident.add(tiny.adapter_for(model, seed, only=only), name)
    for warm in (mix, {"a": 1.0}, mix, {"a": 1.0}):
        resident.set(warm)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        resident.set(mix)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert [name for name in kernels if "Mem" not in name] == ["sweep"]


def test_runs_of_entries_on_cuda_give_the_same_bits() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Linear(96, 64)).to("cuda", torch.float16)
    resident = Resident(model)
    adapters = {}
    for seed, (name, family) in enumerate((("runs", "block_rand"), ("other", "block_rand"), ("single", "rand"))):
        masks = build_masks(model, family, 0.1, "all", seed=seed)
        deltas = {
            n: SparseDelta(mask.cpu(), torch.randn(mask.numel()), tuple(model.get_parameter(n).shape))
            for n, mask in masks.items()
        }
        adapters[name] = ShiraAdapter(deltas)
        resident.add(adapters[name], name)
    base = on_cpu(model)
    for names in (["runs"], ["other"], ["single"], ["runs"], ["runs", "other"], [], ["single"]):
        mix = dict.fromkeys(names, 0.7)
        resident.set(mix)
        assert_mix(model, base, adapters, mix)
    assert {plan.runs for mix in model._shira.remembered for plan in mix} == {True, False}


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_adapter_per_picture(dtype: torch.dtype) -> None:
    """By dense products, in one kernel per picture."""
    pipe = tiny.pipeline(dtype).to("cuda")
    for seed, name in enumerate("ab"):
        pipe.load_shira(tiny.adapter_for(pipe, seed, only=("",), size=0.1), name, activate=False)
    prompts, entries = ["a red cat", "a dog", "the moon"], ["a", None, {"b": 0.5}]
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to("cuda", dtype)
    options = {"cross_attention_kwargs": {"shira_adapters": entries}}
    together = tiny.picture(pipe, prompt=prompts, latents=latents, **options)
    for k, entry in enumerate(entries):
        with pipe.shira(entry or []):
            alone = tiny.picture(pipe, prompt=prompts[k], latents=latents[k : k + 1])
        limit = {torch.float32: 5e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
        # cuDNN's convolutions take TF32 for float32 by default
        assert float((together[k] - alone[0]).abs().max() / alone.abs().max()) < limit


def test_a_layer_in_the_place_of_one_that_lives_on_is_written_alone() -> None:
    model = tiny.linears()
    adapters = {name: tiny.adapter_for(model, seed, only=("",)) for seed, name in enumerate("ab")}
    resident = Resident(model.to("cuda"))
    base = on_cpu(model)
    for name, adapter in adapters.items():
        resident.add(adapter, name)
    for name in "abab":
        resident.set({name: 1.0})
    old, model[2] = model[2], copy.deepcopy(model[2])  # a switch sees this only after its launch
    before = tiny.snapshot(old)
    resident.set({"a": 1.0})
    tiny.assert_same_bits(old, before)
    assert_mix(model, base, adapters, {"a": 1.0})
    resident.clear()
    tiny.assert_same_bits(old, before)
    tiny.assert_same_bits(model, {name: weight.cuda() for name, weight in base.items()})
