"""What diffusers, accelerate, PEFT and torch.compile do to weights that are overwritten in place.

Each test holds a pipeline with an adapter against a twin whose weights were computed densely and written before
anything was configured: the pictures must be equal to the bit, during and after.
"""

import copy
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import accelerate
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMInverseScheduler,
    DiffusionPipeline,
    FirstBlockCacheConfig,
    StableDiffusionDiffEditPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from diffusers.training_utils import EMAModel
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from transformers import CLIPTextModel

from shira_diffusers import Resident, ResidentStateError, ShiraAdapter
from shira_diffusers.formats.shira_file import encode
from tests import reference, tiny
from tests.warm import python

Configure = Callable[[DiffusionPipeline], object]
CPU = torch.device("cpu")


def load(pipe: DiffusionPipeline, adapter: ShiraAdapter, name: str, **options: object) -> None:
    pipe.load_shira(encode(adapter)[0], name, **options)


def write_densely(pipe: DiffusionPipeline, adapters: dict[str, ShiraAdapter], scales: dict[str, float]) -> None:
    expected = reference.apply(tiny.snapshot(pipe), adapters, scales)
    with torch.no_grad():
        for part, module in tiny.modules_of(pipe).items():
            for name, parameter in module.named_parameters():
                parameter.copy_(expected[f"{part}.{name}"])


def dense_picture(
    configure: Configure, adapters: dict[str, ShiraAdapter], scales: dict[str, float], make: Callable = tiny.pipeline
) -> Tensor:
    twin = make()
    write_densely(twin, adapters, scales)
    configure(twin)
    return tiny.picture(twin)


def assert_adapts_and_restores(
    configure: Configure,
    make: Callable[[], DiffusionPipeline] = tiny.pipeline,
    stages: tuple[str, ...] = ("before", "during", "after"),
    **options: object,
) -> None:
    """Configure before, during and after adapters are active; every picture equals that of a dense twin."""
    like = make()
    adapters = {name: tiny.adapter_for(like, seed, **options) for seed, name in enumerate("ab")}
    mixes: list[dict[str, float]] = [{"a": 1.0}, {"b": 0.5}, {"a": 0.3, "b": 1.0}]
    base = dense_picture(configure, adapters, {}, make)
    pictures = [dense_picture(configure, adapters, mix, make) for mix in mixes]
    assert not any(torch.equal(picture, base) for picture in pictures)
    for configured in stages:
        pipe = make()
        if configured == "before":
            configure(pipe)
        for name, adapter in adapters.items():
            load(pipe, adapter, name, activate=False)
        pipe.set_shira("b", 2.0)
        if configured == "during":
            configure(pipe)
        if configured == "after":
            pipe.disable_shira()
            configure(pipe)
        for mix, expected in zip(mixes, pictures, strict=True):
            pipe.set_shira(list(mix), list(mix.values()))
            assert torch.equal(tiny.picture(pipe), expected), f"configured {configured}, {mix}"
        pipe.unload_shira()
        assert torch.equal(tiny.picture(pipe), base), f"configured {configured}"


class ReadsWeights:
    """A processor of the user's own, which reads ``.weight`` of the projections."""

    def __call__(
        self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: object
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            hidden_states @ attn.to_q.weight.T,
            context @ attn.to_k.weight.T,
            context @ attn.to_v.weight.T,
        )
        query, key, value = (attn.head_to_batch_dim(part) for part in (query, key, value))
        mixed = attn.batch_to_head_dim(attn.get_attention_scores(query, key) @ value)
        return attn.to_out[0](mixed)


PROCESSORS = {
    "default": AttnProcessor(),
    "sdpa": AttnProcessor2_0(),
    "sliced": SlicedAttnProcessor(1),
    "custom": ReadsWeights(),
}


@pytest.mark.parametrize("processor", PROCESSORS.values(), ids=PROCESSORS.keys())
def test_attention_processors(processor: object) -> None:
    assert_adapts_and_restores(lambda pipe: pipe.unet.set_attn_processor(processor))


def test_freeu() -> None:
    assert_adapts_and_restores(lambda pipe: pipe.enable_freeu(0.9, 0.2, 1.2, 1.4))


def test_perturbed_attention() -> None:
    def make() -> StableDiffusionPAGPipeline:
        return StableDiffusionPAGPipeline(**tiny.pipeline().components, pag_applied_layers="mid")

    assert_adapts_and_restores(lambda pipe: pipe.set_progress_bar_config(disable=True), make)


def test_sdxl_with_two_text_encoders() -> None:
    assert_adapts_and_restores(
        lambda pipe: None, tiny.sdxl_pipeline, components=("unet", "text_encoder", "text_encoder_2")
    )


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_sd3_joint_attention(fused: bool) -> None:
    def configure(pipe: DiffusionPipeline) -> None:
        if fused:
            pipe.transformer.fuse_qkv_projections()

    assert_adapts_and_restores(configure, tiny.sd3_pipeline, only=("to_", "add_", "ff"), components=("transformer",))


def test_fused_projections() -> None:
    assert_adapts_and_restores(lambda pipe: pipe.fuse_qkv_projections(), components=("unet", "text_encoder", "vae"))


@pytest.mark.parametrize("make", [tiny.sd3_transformer, tiny.flux_transformer, tiny.wan_transformer])
@pytest.mark.parametrize("fused_while_active", [False, True])
def test_every_fused_weight_and_bias(make: Callable[[], nn.Module], fused_while_active: bool) -> None:
    model, twin, plain = make(), make(), make()
    adapter = tiny.adapter_for_all(model)
    twin.load_state_dict(reference.apply(tiny.snapshot(model), {"a": adapter}, {"a": 1.0}), strict=False)
    for one in (twin, plain) if fused_while_active else (twin, plain, model):
        one.fuse_qkv_projections()
    resident = Resident(model)
    resident.add(adapter, "a")
    resident.set({"a": 1.0})
    if fused_while_active:
        model.fuse_qkv_projections()
    tiny.assert_same_bits(model, tiny.snapshot(twin))
    resident.clear()
    tiny.assert_same_bits(model, tiny.snapshot(plain))


def test_fusing_and_unfusing_projections_while_active(pipe: StableDiffusionPipeline) -> None:
    adapter = tiny.adapter_for(pipe)
    base, adapted = tiny.picture(pipe), dense_picture(lambda pipe: None, {"a": adapter}, {"a": 1.0})
    load(pipe, adapter, "a")
    pipe.fuse_qkv_projections()
    pipe.unfuse_qkv_projections()
    assert torch.equal(tiny.picture(pipe), adapted)
    pipe.unload_shira()
    assert torch.equal(tiny.picture(pipe), base)
    pipe.fuse_qkv_projections()
    assert torch.equal(tiny.picture(pipe), dense_picture(lambda pipe: pipe.fuse_qkv_projections(), {}, {}))


def test_channels_last() -> None:
    assert_adapts_and_restores(lambda pipe: pipe.unet.to(memory_format=torch.channels_last))


def test_model_cpu_offload() -> None:
    assert_adapts_and_restores(lambda pipe: pipe.enable_model_cpu_offload(device="cpu"))


@pytest.mark.parametrize("parts", [("unet",), ("unet", "text_encoder", "vae")])
def test_accelerate_cpu_offload(parts: tuple[str, ...]) -> None:
    """Of the denoiser alone, and of all parts, as ``enable_sequential_cpu_offload`` does."""
    assert_adapts_and_restores(lambda pipe: offload_to_cpu(pipe, parts), stages=("before", "after"))


def offload_to_cpu(pipe: DiffusionPipeline, parts: tuple[str, ...]) -> None:
    for part in parts:
        accelerate.cpu_offload(getattr(pipe, part), CPU)


def sequentially(pipe: DiffusionPipeline) -> None:
    """What ``enable_sequential_cpu_offload`` does; itself it gives accelerate the device "cpu:0", which fails."""
    pipe.remove_all_hooks()
    for model in tiny.modules_of(pipe).values():
        accelerate.cpu_offload(model, CPU, offload_buffers=len(model._parameters) > 0)


def in_part(pipe: DiffusionPipeline) -> None:
    """Some blocks are offloaded; the device is given as an object, since the string "cpu" offloads nothing."""
    blocks = dict.fromkeys((name for name, _ in pipe.unet.named_children()), CPU)
    accelerate.dispatch_model(pipe.unet, blocks | {"mid_block": "cpu", "up_blocks": "cpu"}, main_device=CPU)


OFFLOADS: dict[str, Configure] = {
    "cpu_offload": lambda pipe: offload_to_cpu(pipe, ("unet", "text_encoder", "vae")),
    "sequential": sequentially,
    "sequential, twice": lambda pipe: (sequentially(pipe), sequentially(pipe)),
    "sequential, and back": lambda pipe: (sequentially(pipe), pipe.remove_all_hooks()),
    "dispatch_model": in_part,
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential, then model": lambda pipe: (sequentially(pipe), pipe.enable_model_cpu_offload(device="cpu")),
    "model, then sequential": lambda pipe: (pipe.enable_model_cpu_offload(device="cpu"), sequentially(pipe)),
    "a state dict given": lambda pipe: accelerate.cpu_offload(pipe.unet, CPU, state_dict=pipe.unet.state_dict()),
    "of a block, a state dict given": lambda pipe: accelerate.cpu_offload(
        pipe.unet.mid_block, CPU, state_dict=part_of(pipe.unet.state_dict(), "mid_block.")
    ),
    "by hooks": lambda pipe: accelerate.hooks.attach_align_device_hook(
        pipe.unet, CPU, offload=True, weights_map=pipe.unet.state_dict()
    ),
    "off and on, a state dict given": lambda pipe: [
        (
            accelerate.hooks.remove_hook_from_module(pipe.unet, recurse=True),
            accelerate.cpu_offload(pipe.unet, CPU, state_dict=pipe.unet.state_dict()),
            tiny.picture(pipe),
        )
        for _ in range(2)
    ],
    "saved and loaded": lambda pipe: pipe.unet.load_state_dict(pipe.unet.state_dict()),
    "saved and loaded by assignment": lambda pipe: pipe.unet.load_state_dict(pipe.unet.state_dict(), assign=True),
}


def part_of(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS.keys())
def test_offload_while_active(pipe: StableDiffusionPipeline, offload: Configure) -> None:
    """Consumers of ``state_dict()``, such as accelerate: the picture stays, and the base comes back to the bit."""
    adapter = tiny.adapter_for(pipe)
    base, bits = tiny.picture(pipe), tiny.snapshot(pipe)
    load(pipe, adapter, "a")
    adapted = tiny.picture(pipe)
    offload(pipe)
    assert pipe.get_active_shira() == {"a": 1.0}
    assert torch.equal(tiny.picture(pipe), adapted)
    pipe.set_shira("a", 0.5)
    assert torch.equal(tiny.picture(pipe), dense_picture(lambda pipe: None, {"a": adapter}, {"a": 0.5}))
    pipe.unload_shira()
    assert torch.equal(tiny.picture(pipe), base)
    for model in tiny.modules_of(pipe).values():
        accelerate.hooks.remove_hook_from_module(model, recurse=True)
    tiny.assert_same_bits(pipe, bits)


@pytest.mark.parametrize("offload", [accelerate.cpu_offload, accelerate.hooks.attach_align_device_hook])
def test_offload_of_a_module_while_active(offload: Callable) -> None:
    """Without a pipeline nothing looks after it at a generation."""
    model = tiny.linears()[:1]
    rows = torch.randn(3, 12)
    base, bits = model(rows), tiny.snapshot(model)
    resident = Resident(model)
    resident.add(tiny.adapter_for(model, only=("",)), "a")
    resident.set({"a": 1.0})
    adapted = model(rows)
    assert not torch.equal(adapted, base)
    for _ in range(2):
        offload(model, CPU, offload=True) if offload is not accelerate.cpu_offload else offload(model, CPU)
        assert model[0].weight.is_meta
        assert torch.equal(model(rows), adapted)
        resident.verify()
        accelerate.hooks.remove_hook_from_module(model, recurse=True)
        assert torch.equal(model(rows), adapted)
    resident.clear()
    tiny.assert_same_bits(model, bits)


def test_offload_with_a_lora_loaded_meanwhile(pipe: StableDiffusionPipeline, lora_folder: Path) -> None:
    """``load_lora_weights`` takes accelerate's hooks off and puts new ones on."""
    adapter = tiny.adapter_for(pipe)
    base = tiny.picture(pipe)
    load(pipe, adapter, "a")
    sequentially(pipe)
    pipe.enable_sequential_cpu_offload = lambda: sequentially(pipe)
    pipe.load_lora_weights(lora_folder)
    expected = dense_picture(lambda pipe: pipe.load_lora_weights(lora_folder), {"a": adapter}, {"a": 1.0})
    assert pipe.unet.conv_in.weight.is_meta
    assert torch.equal(tiny.picture(pipe), expected)
    pipe.unload_lora_weights()
    pipe.unload_shira()
    assert torch.equal(tiny.picture(pipe), base)


def to_disk(model: nn.Module, folder: Path) -> None:
    accelerate.disk_offload(model, str(folder), CPU)


def in_part_to_disk(model: nn.Module, folder: Path) -> None:
    blocks = dict.fromkeys((name for name, _ in model.named_children()), "cpu")
    accelerate.dispatch_model(model, blocks | {"mid_block": "disk"}, main_device=CPU, offload_dir=str(folder))


@pytest.mark.parametrize("offload", [to_disk, in_part_to_disk])
def test_disk_offload_while_active_is_refused(
    pipe: StableDiffusionPipeline, tmp_path: Path, offload: Callable[[nn.Module, Path], None]
) -> None:
    base = tiny.snapshot(pipe)
    plain = tiny.picture(pipe)
    load(pipe, tiny.adapter_for(pipe, components=("unet",)), "a")
    before = tiny.picture(pipe)
    with pytest.raises(
        ResidentStateError, match=r"UNet2DConditionModel cannot be offloaded to disk.*\(a\).*bake_shira"
    ):
        offload(pipe.unet, tmp_path)
    assert not list(tmp_path.iterdir())
    assert torch.equal(tiny.picture(pipe), before)
    pipe.disable_shira()
    tiny.assert_same_bits(pipe, base)
    offload(pipe.unet, tmp_path)
    assert torch.equal(tiny.picture(pipe), plain)


def test_a_picture_from_a_base_on_disk_is_refused_while_active(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    """accelerate asks nobody where the folder is full already; taking its hooks off brings the weights back."""
    base = tiny.snapshot(pipe)
    accelerate.utils.offload_state_dict(str(tmp_path), tiny.unet().state_dict())
    load(pipe, tiny.adapter_for(pipe, components=("unet",)), "a")
    before = tiny.picture(pipe)
    to_disk(pipe.unet, tmp_path)
    for act in (lambda: tiny.picture(pipe), pipe.disable_shira):
        with pytest.raises(ResidentStateError, match=r"offloaded to disk.*remove_hook_from_module"):
            act()
    accelerate.hooks.remove_hook_from_module(pipe.unet, recurse=True)
    pipe.set_shira("a")
    assert torch.equal(tiny.picture(pipe), before)
    pipe.unload_shira()
    tiny.assert_same_bits(pipe, base)


def test_an_offload_looks_at_weights_that_others_wrote(pipe: StableDiffusionPipeline) -> None:
    load(pipe, tiny.adapter_for(pipe, components=("unet",)), "a")
    accelerate.cpu_offload(pipe.unet, CPU, state_dict=tiny.unet(seed=5).state_dict())
    with pytest.raises(ResidentStateError, match=r"outside shira_diffusers[\s\S]*bake_shira"):
        tiny.picture(pipe)


def test_the_parameters_themselves_are_the_live_ones(pipe: StableDiffusionPipeline) -> None:
    """``keep_vars``, as ``torch.jit`` and the ONNX export ask, gives Parameters."""
    load(pipe, tiny.adapter_for(pipe), "a")
    kept = pipe.unet.state_dict(keep_vars=True)
    assert all(kept[name] is parameter for name, parameter in pipe.unet.named_parameters())


def test_transformers_save_the_base_of_an_offloaded_model(tmp_path: Path) -> None:
    """``save_pretrained`` reads meta tensors from accelerate's map, past the state dict."""
    model = tiny.text_encoder()
    base = tiny.snapshot(model)
    resident = Resident(model)
    resident.add(tiny.adapter_for(model), "a")
    resident.set({"a": 1.0})
    accelerate.dispatch_model(
        model, {name: "cpu" for name, _ in model.named_children()}, main_device=CPU, force_hooks=True
    )
    model.save_pretrained(tmp_path)
    tiny.assert_same_bits(CLIPTextModel.from_pretrained(tmp_path), base)
    resident.verify()


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload(kind: str) -> None:
    def configure(pipe: DiffusionPipeline) -> None:
        blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        pipe.unet.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type=kind, **blocks)

    assert_adapts_and_restores(configure)


def test_disk_offload_is_refused(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    adapter = tiny.adapter_for(pipe, components=("unet",))
    accelerate.disk_offload(pipe.unet, str(tmp_path), CPU)
    with pytest.raises(ResidentStateError, match=r"offloaded to disk.*offload to the CPU instead"):
        load(pipe, adapter, "a")
    assert pipe.list_shira() == {}


def test_group_offload_to_disk_is_refused(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    adapter = tiny.adapter_for(pipe, components=("unet",))
    pipe.unet.enable_group_offload(
        onload_device=CPU, offload_device=CPU, offload_type="leaf_level", offload_to_disk_path=str(tmp_path)
    )
    with pytest.raises(ResidentStateError, match=r"group-offloaded to disk.*without offload_to_disk_path"):
        load(pipe, adapter, "a")


def test_fp8_storage(pipe: StableDiffusionPipeline) -> None:
    """Layerwise casting: the oracle is computed from the weights in float8."""
    adapter = tiny.adapter_for(pipe, components=("unet",))
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    base, before = tiny.snapshot(pipe), tiny.picture(pipe)
    assert any(weight.dtype == torch.float8_e4m3fn for weight in base.values())
    load(pipe, adapter, "a")
    expected = reference.apply(base, {"a": adapter}, {"a": 1.0})
    assert all(tiny.same_bits(now, expected[name]) for name, now in tiny.snapshot(pipe).items())
    assert not torch.equal(tiny.picture(pipe), before)
    pipe.unload_shira()
    tiny.assert_same_bits(pipe, base)
    assert torch.equal(tiny.picture(pipe), before)


def test_fp8_storage_begun_while_active(pipe: StableDiffusionPipeline) -> None:
    plain = tiny.pipeline()
    plain.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    load(pipe, tiny.adapter_for(pipe, components=("unet",)), "a")
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    tiny.picture(pipe)
    pipe.unload_shira()
    tiny.assert_same_bits(pipe, tiny.snapshot(plain))


def test_pipeline_casts_while_active(pipe: StableDiffusionPipeline) -> None:
    adapter = tiny.adapter_for(pipe)
    plain = tiny.snapshot(tiny.pipeline().to(torch.float16).to(torch.bfloat16))
    load(pipe, adapter, "a")
    pipe.to(torch.float16)
    pipe.to(torch.bfloat16)
    pipe.set_shira("a", 0.5)
    expected = reference.apply(plain, {"a": adapter}, {"a": 0.5})
    assert all(tiny.same_bits(now, expected[name]) for name, now in tiny.snapshot(pipe).items())
    pipe.unload_shira()
    tiny.assert_same_bits(pipe, plain)


def test_from_pipe_casts_shared_modules(dtype: torch.dtype) -> None:
    """``from_pipe`` casts to float32 unless told otherwise, and both pipelines see it."""
    pipe = tiny.pipeline(dtype)
    plain = tiny.snapshot(tiny.pipeline(dtype).to(torch.float32))
    load(pipe, tiny.adapter_for(pipe), "a")
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert other.unet is pipe.unet
    assert other.get_active_shira() == {"a": 1.0}
    other.unload_shira()
    assert pipe.list_shira() == {}
    tiny.assert_same_bits(pipe, plain)


def test_weights_mapped_from_a_file_leave_the_file_alone(tmp_path: Path) -> None:
    tiny.unet().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    content = file.read_bytes()
    model = UNet2DConditionModel.from_pretrained(tmp_path)
    base = tiny.snapshot(model)
    resident = Resident(model)
    resident.add(tiny.adapter_for(model), "a")
    resident.set({"a": 1.0})
    assert file.read_bytes() == content
    resident.clear()
    tiny.assert_same_bits(model, base)
    assert file.read_bytes() == content


def test_save_pretrained_while_active_saves_the_base(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    base = tiny.snapshot(pipe)
    load(pipe, tiny.adapter_for(pipe, components=("unet", "text_encoder", "vae")), "a")
    active = tiny.snapshot(pipe)
    pipe.unet.save_pretrained(tmp_path / "unet")
    pipe.text_encoder.save_pretrained(tmp_path / "text_encoder")
    pipe.vae.save_pretrained(tmp_path / "vae")
    tiny.assert_same_bits(pipe, active)
    saved = {
        "unet": UNet2DConditionModel.from_pretrained(tmp_path / "unet"),
        "text_encoder": CLIPTextModel.from_pretrained(tmp_path / "text_encoder"),
        "vae": AutoencoderKL.from_pretrained(tmp_path / "vae"),
    }
    for part, module in saved.items():
        for name, parameter in module.named_parameters():
            assert torch.equal(parameter, base[f"{part}.{name}"]), f"{part}.{name}"


def test_saving_a_fused_model_while_active_saves_the_base(pipe: StableDiffusionPipeline) -> None:
    plain = tiny.pipeline()
    plain.fuse_qkv_projections()
    load(pipe, tiny.adapter_for(pipe), "a")
    pipe.fuse_qkv_projections()
    saved, base = pipe.unet.state_dict(), plain.unet.state_dict()
    assert saved.keys() == base.keys()
    assert all(torch.equal(saved[name], base[name]) for name in base)


def test_saving_an_offloaded_model_while_active_saves_the_base(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    base = tiny.snapshot(pipe.unet)
    load(pipe, tiny.adapter_for(pipe), "a")
    accelerate.cpu_offload(pipe.unet, CPU)
    try:
        pipe.unet.save_pretrained(tmp_path)
    except (NotImplementedError, RuntimeError):  # diffusers refuses meta tensors: nothing wrong was saved
        return
    saved = UNet2DConditionModel.from_pretrained(tmp_path)
    assert all(torch.equal(parameter, base[name]) for name, parameter in saved.named_parameters())


def test_a_controlnet_made_while_active_does_not_disturb(pipe: StableDiffusionPipeline) -> None:
    """It copies adapted weights, as documented; the pipeline it came from is unharmed."""
    before = tiny.picture(pipe)
    load(pipe, tiny.adapter_for(pipe), "a")
    ControlNetModel.from_unet(pipe.unet, conditioning_channels=3, load_weights_from_unet=True)
    pipe.unload_shira()
    assert torch.equal(tiny.picture(pipe), before)


def test_load_state_dict_while_active_is_detected(pipe: StableDiffusionPipeline) -> None:
    load(pipe, tiny.adapter_for(pipe), "a")
    fresh = tiny.unet(seed=5)
    pipe.unet.load_state_dict(fresh.state_dict())
    for act in (lambda: tiny.picture(pipe), pipe.disable_shira, pipe.unload_shira, lambda: pipe.set_shira("a", 0.5)):
        with pytest.raises(ResidentStateError, match=r"modified outside shira_diffusers[\s\S]*bake_shira"):
            act()
        tiny.assert_same_bits(pipe.unet, tiny.snapshot(fresh))
    pipe.bake_shira()
    pipe.unload_shira()
    tiny.assert_same_bits(pipe.unet, tiny.snapshot(fresh))


def test_saving_what_others_wrote_while_active_is_refused(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    """An EMA's weights, for instance: with the base's old bits among them, the file would be a mix of two models."""
    load(pipe, tiny.adapter_for(pipe), "a")
    average = EMAModel(tiny.unet(seed=5).parameters())
    average.store(pipe.unet.parameters())
    average.copy_to(pipe.unet.parameters())
    with pytest.raises(
        ResidentStateError,
        match=r"outside shira_diffusers[\s\S]*the base of UNet2DConditionModel is not known[\s\S]*bake_shira",
    ):
        pipe.save_pretrained(tmp_path)
    average.restore(pipe.unet.parameters())
    pipe.unet.save_pretrained(tmp_path)
    saved = UNet2DConditionModel.from_pretrained(tmp_path)
    tiny.assert_same_bits(saved, tiny.snapshot(tiny.unet()))


@pytest.fixture
def lora_folder(tmp_path: Path) -> Path:
    model = tiny.unet()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v", "conv1"], init_lora_weights="gaussian"))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(model))
    return tmp_path


@pytest.mark.parametrize("lora_first", [True, False], ids=["LoRA first", "SHiRA first"])
def test_lora_beside_shira(pipe: StableDiffusionPipeline, lora_folder: Path, lora_first: bool) -> None:
    adapter = tiny.adapter_for(pipe)
    base = tiny.snapshot(pipe)

    def with_lora(pipe: DiffusionPipeline) -> None:
        pipe.load_lora_weights(lora_folder, adapter_name="lora")

    both = dense_picture(with_lora, {"a": adapter}, {"a": 1.0})
    lora_only = dense_picture(with_lora, {}, {})
    assert not torch.equal(both, lora_only)
    if lora_first:
        with_lora(pipe)
    load(pipe, adapter, "a")
    if not lora_first:
        with_lora(pipe)
    assert torch.equal(tiny.picture(pipe), both)
    pipe.disable_shira()
    assert torch.equal(tiny.picture(pipe), lora_only)
    pipe.enable_shira()
    assert torch.equal(tiny.picture(pipe), both)
    pipe.unload_lora_weights()
    assert torch.equal(tiny.picture(pipe), dense_picture(lambda pipe: None, {"a": adapter}, {"a": 1.0}))
    pipe.unload_shira()
    tiny.assert_same_bits(pipe, base)


def test_a_model_of_get_peft_model(pipe: StableDiffusionPipeline) -> None:
    adapter = tiny.adapter_for(pipe)
    base = tiny.snapshot(pipe.unet)
    unet = pipe.unet
    pipe.unet = get_peft_model(unet, LoraConfig(r=2, target_modules=["to_q", "conv1"]))
    load(pipe, adapter, "a")
    assert pipe.list_shira() == {"a": ["text_encoder", "unet"]}
    expected = reference.apply(base, {"a": adapter.part("unet")}, {"a": 1.0})
    pipe.unet = pipe.unet.unload()
    tiny.assert_same_bits(pipe.unet, expected)
    pipe.unload_shira()
    tiny.assert_same_bits(unet, base)


def test_lora_methods_are_untouched(pipe: StableDiffusionPipeline, lora_folder: Path) -> None:
    load(pipe, tiny.adapter_for(pipe), "a")
    pipe.load_lora_weights(lora_folder, adapter_name="lora")
    assert pipe.get_active_adapters() == ["lora"]
    pipe.set_adapters("lora", 0.5)
    pipe.disable_lora()
    pipe.enable_lora()
    assert pipe.get_active_shira() == {"a": 1.0}
    pipe.delete_adapters("lora")
    assert pipe.list_shira() == {"a": ["text_encoder", "unet"]}


def test_fusing_a_lora_while_active_is_detected(pipe: StableDiffusionPipeline, lora_folder: Path) -> None:
    load(pipe, tiny.adapter_for(pipe), "a")
    pipe.load_lora_weights(lora_folder)
    pipe.fuse_lora()
    bits = tiny.snapshot(pipe)
    for act in (pipe.disable_shira, lambda: pipe.set_shira("a", 0.1), pipe.unload_shira):
        with pytest.raises(ResidentStateError, match=r"LoRA fused into its weight.*unfuse_lora"):
            act()
        tiny.assert_same_bits(pipe, bits)
    assert pipe.get_active_shira() == {"a": 1.0}


def test_the_base_comes_back_after_a_lora_was_fused_while_active(
    pipe: StableDiffusionPipeline, lora_folder: Path
) -> None:
    """By what the errors say."""
    base = tiny.snapshot(pipe)
    saved = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
    load(pipe, tiny.adapter_for(pipe), "a")
    pipe.load_lora_weights(lora_folder)
    pipe.fuse_lora()
    with pytest.raises(ResidentStateError, match=r"unfuse_lora\(\) first.*unload_lora_weights\(\).*load_state_dict"):
        pipe.unload_shira()
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    bits = tiny.snapshot(pipe)
    with pytest.raises(ResidentStateError, match=r"load the base's weights again with load_state_dict \(unfuse_lora"):
        pipe.unload_shira()
    tiny.assert_same_bits(pipe, bits)
    pipe.unet.load_state_dict(saved)
    pipe.unload_shira()
    tiny.assert_same_bits(pipe, base)


def test_a_fused_lora_is_refused(pipe: StableDiffusionPipeline, lora_folder: Path) -> None:
    adapter = tiny.adapter_for(pipe)
    pipe.load_lora_weights(lora_folder)
    pipe.fuse_lora()
    with pytest.raises(ResidentStateError, match="LoRA fused into its weight"):
        load(pipe, adapter, "a")
    assert pipe.list_shira() == {}
    pipe.unfuse_lora()
    load(pipe, adapter, "a")


def test_baking_before_quantizing(pipe: StableDiffusionPipeline) -> None:
    """What costs nothing at each step."""
    from optimum.quanto import freeze, qint8, quantize

    def quantized(pipe: DiffusionPipeline) -> None:
        quantize(pipe.unet, weights=qint8)
        freeze(pipe.unet)

    adapter = tiny.adapter_for(pipe)
    load(pipe, adapter, "a")
    pipe.bake_shira()
    quantized(pipe)
    assert torch.equal(tiny.picture(pipe), dense_picture(quantized, {"a": adapter}, {"a": 1.0}))


@pytest.fixture
def dynamo() -> Callable[[], int]:
    """A count of the graphs that were compiled since the test began."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def compile_whole(model: nn.Module, backend: str) -> nn.Module:
    return torch.compile(model, backend=backend)


def compile_in_place(model: nn.Module, backend: str) -> nn.Module:
    model.compile(backend=backend)
    return model


def compile_regions(model: nn.Module, backend: str) -> nn.Module:
    """Each transformer block on its own."""
    for path, module in list(model.named_modules()):
        if type(module).__name__ == "BasicTransformerBlock":
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, torch.compile(module, backend=backend))
    return model


@pytest.mark.parametrize(
    ("compile_model", "backend"),
    [(compile_whole, "eager"), (compile_in_place, "eager"), (compile_regions, "aot_eager")],
    ids=["whole", "in place", "regional"],
)
def test_switching_compiles_nothing_new(
    compile_model: Callable[[nn.Module, str], nn.Module], backend: str, dynamo: Callable[[], int]
) -> None:
    model = tiny.unet()
    adapters = {name: tiny.adapter_for(model, seed) for seed, name in enumerate("ab")}
    base = tiny.snapshot(model)
    before = tiny.run_unet(model)
    compiled = compile_model(model, backend)
    assert torch.allclose(tiny.run_unet(compiled), before, atol=1e-5)
    before = tiny.run_unet(compiled)
    graphs = dynamo()
    assert graphs
    resident = Resident({"unet": compiled})
    for name, adapter in adapters.items():
        resident.add(adapter.prefixed("unet"), name)
    for scales in ({"a": 1.0}, {"b": 0.5}, {"a": 0.2, "b": 1.0}, {}):
        resident.set(scales)
        twin = tiny.unet()
        twin.load_state_dict(reference.apply(base, adapters, scales))
        assert torch.allclose(tiny.run_unet(compiled), tiny.run_unet(twin), atol=1e-4)
    assert torch.equal(tiny.run_unet(compiled), before)
    assert dynamo() == graphs, "a switch made a new graph"


def test_a_compiled_pipeline(pipe: StableDiffusionPipeline, dynamo: Callable[[], int]) -> None:
    adapter = tiny.adapter_for(pipe)
    pipe.unet = compile_regions(pipe.unet, "eager")
    before = tiny.picture(pipe)
    graphs = dynamo()
    load(pipe, adapter, "a")
    expected = dense_picture(lambda pipe: None, {"a": adapter}, {"a": 1.0})
    assert torch.allclose(tiny.picture(pipe), expected, rtol=1e-3, atol=1e-3)
    pipe.set_shira("a", 0.5)
    pipe.unload_shira()
    assert torch.equal(tiny.picture(pipe), before)
    assert dynamo() == graphs


@pytest.mark.parametrize("where", ["config", "options", "region", "in place", "repeated blocks", "forward"])
def test_freezing_is_refused(pipe: StableDiffusionPipeline, where: str) -> None:
    adapter = tiny.adapter_for(pipe)
    options = {} if where == "config" else {"options": {"freezing": True}}
    if where == "region":
        pipe.unet.mid_block = torch.compile(pipe.unet.mid_block, **options)
    elif where == "in place":
        pipe.unet.compile(**options)
    elif where == "repeated blocks":
        pipe.unet.compile_repeated_blocks(**options)
    elif where == "forward":
        pipe.unet.forward = torch.compile(pipe.unet.forward, **options)
    else:
        pipe.unet = torch.compile(pipe.unet, **options)
    with (
        torch._inductor.config.patch(freezing=where == "config"),
        pytest.raises(ResidentStateError, match=r"freezing.*has no effect; compile with"),
    ):
        load(pipe, adapter, "a")
    assert pipe.list_shira() == {}


def test_two_pipelines_of_one_unet_see_one_state(pipe: StableDiffusionPipeline) -> None:
    other = StableDiffusionPipeline(**(tiny.pipeline().components | {"unet": pipe.unet}), requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    base, others_base = tiny.picture(pipe), tiny.picture(other)
    load(pipe, tiny.adapter_for(pipe, 1, components=("unet",)), "a")
    load(other, tiny.adapter_for(pipe, 2, components=("unet",)), "b")
    assert pipe.get_active_shira() == other.get_active_shira() == {"b": 1.0}
    pipe.set_shira(["a", "b"])
    other.unload_shira()
    assert pipe.list_shira() == {}
    assert torch.equal(tiny.picture(pipe), base)
    assert torch.equal(tiny.picture(other), others_base)


def make_pictures_while_switching(generating: DiffusionPipeline, switching: DiffusionPipeline) -> list[Tensor]:
    """Pictures of one thread while another one switches ``a`` on and off without a pause."""
    pictures: list[Tensor] = []
    done = threading.Event()

    def generate() -> None:
        for _ in range(12):
            pictures.append(tiny.picture(generating))
        done.set()

    thread = threading.Thread(target=generate)
    thread.start()
    while not done.wait(0.003):
        switching.set_shira("a" if not switching.get_active_shira() else [])
    thread.join()
    return pictures


def assert_none_is_torn(pictures: list[Tensor], whole: list[Tensor]) -> None:
    torn = [picture for picture in pictures if not any(torch.equal(picture, one) for one in whole)]
    assert len(pictures) == 12
    assert not torn, f"{len(torn)} of {len(pictures)} pictures are torn"


def test_no_picture_is_torn_by_a_switch_in_another_thread(pipe: StableDiffusionPipeline) -> None:
    base = tiny.picture(pipe)
    load(pipe, tiny.adapter_for(pipe), "a")
    adapted = tiny.picture(pipe)
    assert_none_is_torn(make_pictures_while_switching(pipe, pipe), [base, adapted])


FIRST_ADAPTER = """
import threading
from shira_diffusers.formats.shira_file import encode
from tests import tiny

pipe = tiny.pipeline()
base, begun, pictures = tiny.picture(pipe), threading.Event(), []

def slowly(pipe, step, timestep, tensors):
    begun.set()
    loading.join(0.5)
    return tensors

def load():
    begun.wait()
    pipe.load_shira(encode(tiny.adapter_for(pipe))[0], "a")

loading = threading.Thread(target=load)
loading.start()
picture = tiny.picture(pipe, on_step=slowly)
loading.join()
assert pipe.get_active_shira() == {"a": 1.0}
assert picture.equal(base), "torn"
"""


def test_no_picture_is_torn_by_the_first_adapter_of_a_process() -> None:
    subprocess.run(python("-c", FIRST_ADAPTER), check=True, cwd=Path(__file__).parents[2])


class Calls:
    def __call__(self, *args: object, **options: object) -> object:
        return StableDiffusionPipeline.__call__.__wrapped__(self, *args, **options)


@pytest.mark.parametrize("inherited", [False, True], ids=["its own call", "a mixin's call"])
def test_no_picture_of_a_sharing_pipeline_is_torn(pipe: StableDiffusionPipeline, inherited: bool) -> None:
    """A pipeline of another class, on which no adapter was ever loaded, but whose UNet has them."""
    body = {} if inherited else {"__call__": Calls.__call__}
    bases = (Calls, StableDiffusionPipeline) if inherited else (StableDiffusionPipeline,)
    other = type("Quiet", bases, body)(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    base = tiny.picture(pipe)
    load(pipe, tiny.adapter_for(pipe), "a")
    adapted = tiny.picture(pipe)
    assert_none_is_torn(make_pictures_while_switching(other, pipe), [base, adapted])


INVERSION = {"num_inference_steps": 2, "image": torch.zeros(1, 3, tiny.SIZE, tiny.SIZE)}
RUN_MODELS = {
    "encode_prompt": {
        "prompt": "a cat",
        "device": CPU,
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": True,
    },
    "generate_mask": {"source_prompt": "a cat", "target_prompt": "a dog", "num_maps_per_mask": 1, **INVERSION},
    "invert": {"prompt": "a cat", "inpaint_strength": 1.0, **INVERSION},
}


@pytest.mark.parametrize(("method", "options"), RUN_MODELS.items(), ids=RUN_MODELS)
def test_other_methods_that_run_models_are_not_torn(method: str, options: dict) -> None:
    """A switch that another thread begins at the first forward waits until the method has ended."""
    parts = tiny.pipeline().components
    del parts["image_encoder"]
    pipe = StableDiffusionDiffEditPipeline(
        **parts, inverse_scheduler=DDIMInverseScheduler(), requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    load(pipe, tiny.adapter_for(pipe), "a")
    switching = threading.Thread(target=pipe.disable_shira)
    waited = []

    def switch_meanwhile(*_: object) -> None:
        if not waited:
            switching.start()
            switching.join(0.2)
            waited.append(switching.is_alive())

    pipe.text_encoder.register_forward_hook(switch_meanwhile)
    getattr(pipe, method)(**options)
    switching.join()
    assert waited == [True]
    assert pipe.get_active_shira() == {}


def test_a_with_block_is_alone(pipe: StableDiffusionPipeline) -> None:
    """Two threads, each with a mix of its own around its picture."""
    load(pipe, tiny.adapter_for(pipe, 1), "a")
    load(pipe, tiny.adapter_for(pipe, 2), "b")
    expected, got = {}, {}
    for name in "ab":
        pipe.set_shira(name)
        expected[name] = tiny.picture(pipe)

    def work(name: str) -> None:
        for i in range(5):
            with pipe.shira(name):
                got[name, i] = tiny.picture(pipe)

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 10
    assert all(torch.equal(picture, expected[name]) for (name, _), picture in got.items())
    assert pipe.get_active_shira() == {"b": 1.0}


def test_a_switch_from_a_step_callback(pipe: StableDiffusionPipeline) -> None:
    load(pipe, tiny.adapter_for(pipe), "a")
    adapted = tiny.picture(pipe)

    def switch(pipe: DiffusionPipeline, step: int, timestep: int, tensors: dict) -> dict:
        if step == 0:
            pipe.disable_shira()
        return tensors

    switched = tiny.picture(pipe, on_step=switch)
    assert not torch.equal(switched, adapted)
    assert not torch.equal(switched, tiny.picture(pipe))


def test_a_switch_resets_the_first_block_cache() -> None:
    """With a threshold that always reuses, what the cache holds from before a switch must not be used after it."""

    def run(model: nn.Module) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        with model.cache_context("cond"), torch.no_grad():
            return model(
                hidden_states=torch.randn(1, 4, 4, generator=generator),
                encoder_hidden_states=torch.randn(1, 5, 32, generator=generator),
                pooled_projections=torch.randn(1, 32, generator=generator),
                timestep=torch.tensor([0.5]),
                img_ids=torch.zeros(4, 3),
                txt_ids=torch.zeros(5, 3),
            ).sample

    model, twin = tiny.flux_transformer(), tiny.flux_transformer()
    adapter = tiny.adapter_for(model, only=("single_transformer_blocks",))
    for one in (model, twin):
        one.enable_cache(FirstBlockCacheConfig(threshold=1e9))
        Resident(one).add(adapter, "a")
    Resident(twin).set({"a": 1.0})
    expected = run(twin)
    run(model)
    Resident(model).set({"a": 1.0})
    assert torch.equal(run(model), expected)


def test_deepcopy_of_a_pipeline_part(pipe: StableDiffusionPipeline) -> None:
    base = tiny.snapshot(pipe.unet)
    load(pipe, tiny.adapter_for(pipe), "a")
    twin = copy.deepcopy(pipe.unet)
    pipe.unload_shira()
    Resident({"unet": twin}).clear()
    tiny.assert_same_bits(pipe.unet, base)
    tiny.assert_same_bits(twin, base)
