"""The ComfyUI node: its patched weights have the bits of a resident pipeline, and nothing is patched after an error.

Runs against a stand-in of ComfyUI's patcher, and against ComfyUI itself where COMFYUI names its folder.
"""

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from shira_diffusers import AdapterMismatchError, ShiraAdapter, SparseDelta, fuse, save_adapter
from tests import original_layout, tiny
from tests.examples import comfyui_stand_in

NODE = Path(__file__).parents[2] / "examples" / "comfyui"
CPU = torch.device("cpu")
UNET_CONFIG = {
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [0, 1],
    "transformer_depth_output": [0, 0, 1, 1],
    "transformer_depth_middle": 1,
}


class Comfy:
    """ComfyUI, or its stand-in: the node's module, the class of patchers, and the folder of models."""

    def __init__(self, patcher: type, models: Path) -> None:
        self.patcher, self.models = patcher, models
        spec = importlib.util.spec_from_file_location(
            "shira_node", NODE / "__init__.py", submodule_search_locations=[str(NODE)]
        )
        assert spec is not None and spec.loader is not None
        self.module = importlib.util.module_from_spec(spec)
        sys.modules["shira_node"] = self.module
        spec.loader.exec_module(self.module)

    @property
    def node(self) -> Any:
        return self.module.NODE_CLASS_MAPPINGS["LoadShira"]()

    def keep(self, adapter: ShiraAdapter, name: str = "a.safetensors") -> str:
        save_adapter(adapter, self.models / "shira" / name)
        return name

    def model(self, pipe: DiffusionPipeline) -> Any:
        tree = original_layout.unet_weights(pipe.unet)
        model = module_of({key.removeprefix("model."): weight for key, weight in tree.items()})
        model.model_config = SimpleNamespace(unet_config=UNET_CONFIG)
        model.diffusers_names = [name for name, _ in pipe.unet.named_parameters()]
        model.layers_per_block = 1
        return self.patcher(model, CPU, CPU)

    def clip(self, pipe: DiffusionPipeline) -> Any:
        return Clip(
            self.patcher(module_of(original_layout.clip_weights(pipe.text_encoder, "clip_l.transformer.")), CPU, CPU)
        )


class Clip:
    """The part of ``comfy.sd.CLIP`` that the node uses: it hands patches on to a patcher."""

    def __init__(self, patcher: Any) -> None:
        self.patcher, self.cond_stage_model = patcher, patcher.model

    def clone(self) -> "Clip":
        return Clip(self.patcher.clone())

    def add_patches(self, patches: Any, strength_patch: float = 1.0, strength_model: float = 1.0) -> Any:
        return self.patcher.add_patches(patches, strength_patch, strength_model)


def module_of(weights: dict[str, torch.Tensor]) -> nn.Module:
    root = nn.Module()
    for key, weight in weights.items():
        *path, leaf = key.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        module.register_parameter(leaf, nn.Parameter(weight, requires_grad=False))
    return root


@pytest.fixture(params=["stand-in", "ComfyUI"])
def ui(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Comfy]:
    before = set(sys.modules)
    if request.param == "stand-in":
        for name, module in comfyui_stand_in.modules(tmp_path).items():
            monkeypatch.setitem(sys.modules, name, module)
        yield Comfy(comfyui_stand_in.ModelPatcher, tmp_path)
    else:
        if "COMFYUI" not in os.environ:
            pytest.skip("COMFYUI names no folder of ComfyUI")
        monkeypatch.syspath_prepend(os.environ["COMFYUI"])
        monkeypatch.setattr(sys, "argv", ["main.py", "--cpu"])
        import comfy.options

        comfy.options.enable_args_parsing()
        import folder_paths
        from comfy.model_patcher import ModelPatcher

        monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
        monkeypatch.setattr(folder_paths, "folder_names_and_paths", {})
        yield Comfy(ModelPatcher, tmp_path)
    for name in set(sys.modules) - before:
        if name.startswith("shira_node"):
            del sys.modules[name]


def expected(pipe: DiffusionPipeline, adapter: ShiraAdapter, unet: float, encoder: float = 1.0) -> None:
    pipe.load_shira(adapter, "a", activate=False)
    parts = pipe.list_shira()["a"]
    pipe.set_shira("a", {part: unet if part == "unet" else encoder for part in parts})


def assert_patched(pipe: DiffusionPipeline, model: Any, clip: Any = None) -> None:
    model.patch_model()
    found, wanted = dict(model.model.named_parameters()), original_layout.unet_weights(pipe.unet)
    assert all(torch.equal(found[key.removeprefix("model.")], weight) for key, weight in wanted.items())
    model.unpatch_model()
    if clip is not None:
        clip.patcher.patch_model()
        found = dict(clip.patcher.model.named_parameters())
        wanted = original_layout.clip_weights(pipe.text_encoder, "clip_l.transformer.")
        assert all(torch.equal(found[key], weight) for key, weight in wanted.items())
        clip.patcher.unpatch_model()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_patched_weights_are_those_of_a_resident_pipeline(ui: Comfy, dtype: torch.dtype) -> None:
    """Linear and convolution, of the UNet and of the text encoder; the base returns after."""
    pipe = tiny.pipeline(dtype)
    adapter = tiny.adapter_for(pipe, dtype=torch.float16)
    model, clip = ui.model(pipe), ui.clip(pipe)
    before = tiny.snapshot(model.model), tiny.snapshot(clip.patcher.model)
    patched, encoders = ui.node.load(model, ui.keep(adapter), 0.7, -1.5, clip)
    assert patched is not model and not model.patches and not clip.patcher.patches
    assert len(patched.patches) + len(encoders.patcher.patches) == len(adapter.deltas)
    expected(pipe, adapter, 0.7, -1.5)
    assert any(not torch.equal(a, b) for a, b in zip(tiny.snapshot(pipe).values(), before[0].values(), strict=False))
    assert_patched(pipe, patched, encoders)
    tiny.assert_same_bits(model.model, before[0])
    tiny.assert_same_bits(clip.patcher.model, before[1])


def test_without_text_encoders(ui: Comfy) -> None:
    pipe = tiny.pipeline()
    adapter = tiny.adapter_for(pipe, components=("unet",))
    patched, clip = ui.node.load(ui.model(pipe), ui.keep(adapter), 1.0, 1.0)
    assert clip is None
    expected(pipe, adapter, 1.0)
    assert_patched(pipe, patched)


def test_several_nodes_in_a_row(ui: Comfy) -> None:
    """Each adds to the one before; in float32 up to the last bit, since the sums are rounded in another order."""
    pipe = tiny.pipeline()
    pair = [tiny.adapter_for(pipe, seed, components=("unet",)) for seed in (0, 1)]
    model = ui.model(pipe)
    for number, adapter in enumerate(pair):
        model, _ = ui.node.load(model, ui.keep(adapter, f"{number}.safetensors"), 0.5, 1.0)
    expected(pipe, fuse(pair, 0.5), 1.0)
    model.patch_model()
    found = dict(model.model.named_parameters())
    for key, weight in original_layout.unet_weights(pipe.unet).items():
        torch.testing.assert_close(found[key.removeprefix("model.")].data, weight, rtol=1e-6, atol=1e-6)


def test_what_does_not_fit_patches_nothing(ui: Comfy) -> None:
    pipe = tiny.pipeline()
    both, odd = tiny.adapter_for(pipe), SparseDelta(torch.tensor([0]), torch.ones(1), (2, 2))
    model, clip = ui.model(pipe), ui.clip(pipe)
    count = sum(name.startswith("text_encoder") for name in both.deltas)
    with pytest.raises(AdapterMismatchError, match=f"{count} of {len(both.deltas)} weights: connect clip"):
        ui.node.load(model, ui.keep(both), 1.0, 1.0)
    to_q = next(name for name in both.deltas if name.endswith("to_q.weight"))
    for name, message in (
        ("unet.nowhere.weight", "unet.nowhere.weight: not in this model"),
        ("vae.conv.weight", "vae.conv.weight: not in this model"),
        (to_q, r"expected \(64, 64\), got \(2, 2\)"),
    ):
        wrong = ui.keep(ShiraAdapter({**both.deltas, name: odd}), f"{len(name)}.safetensors")
        with pytest.raises(AdapterMismatchError, match=f"weights differ; use it with the model.*{message}"):
            ui.node.load(model, wrong, 1.0, 1.0, clip)
    assert not model.patches and not clip.patcher.patches


def test_the_interface(ui: Comfy) -> None:
    """What ComfyUI asks of a node."""
    ui.keep(tiny.adapter_for(tiny.unet()), "bluefire.safetensors")
    node = ui.module.NODE_CLASS_MAPPINGS["LoadShira"]
    asked = node.INPUT_TYPES()
    assert list(asked["required"]) == ["model", "adapter", "strength_model", "strength_clip"]
    assert asked["required"]["adapter"] == (["bluefire.safetensors"],)
    assert asked["required"]["strength_model"][0] == "FLOAT" and asked["optional"] == {"clip": ("CLIP",)}
    assert node.RETURN_TYPES == ("MODEL", "CLIP") and callable(getattr(node, node.FUNCTION))
    assert ui.module.NODE_DISPLAY_NAME_MAPPINGS.keys() == ui.module.NODE_CLASS_MAPPINGS.keys()


def test_a_part_of_a_joint_weight(ui: Comfy) -> None:
    """As of the joint q, k and v of Flux: a target with its rows, and with a permutation of the difference."""
    nodes = sys.modules["shira_node.nodes"]
    model = ui.patcher(module_of({"diffusion_model.qkv.weight": torch.zeros(6, 4)}), CPU, CPU)
    patch = nodes.SparseDifference({"q"}, [torch.tensor([0, 5]), torch.tensor([1.0, 2.0])])
    key = "diffusion_model.qkv.weight"
    model.add_patches({(key, (0, 2, 2)): patch, (key, (0, 4, 2), lambda both: both.flip(0)): patch}, 0.5)
    weight = model.patch_model().get_parameter(key)
    assert weight.nonzero().tolist() == [[2, 0], [3, 1], [4, 1], [5, 0]]
    assert weight[3, 1] == weight[4, 1] == 1.0 and weight[2, 0] == weight[5, 0] == 0.5
    assert nodes._shape_at((key, (0, 2, 2)), {key: (6, 4)}) == (2, 4)
    assert nodes.target_of("transformer.a.to_q.weight", {"transformer.a.to_q": (key, (0, 2, 2))}, {}) == (
        key,
        (0, 2, 2),
    )


def test_the_real_unet_gives_our_outputs(ui: Comfy) -> None:
    """ComfyUI's own UNet, patched through the node, against diffusers' with the adapter in its weights."""
    if ui.patcher is comfyui_stand_in.ModelPatcher:
        pytest.skip("the stand-in has no UNet")
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from comfy.ops import disable_weight_init

    pipe = tiny.pipeline()
    pipe.unet = tiny.unet(norm_num_groups=32)  # as many as ComfyUI's always has
    model = nn.Module()
    model.diffusion_model = UNetModel(
        image_size=8, in_channels=4, model_channels=32, out_channels=4, num_res_blocks=[1, 1], channel_mult=[1, 2],
        num_heads=8, context_dim=32, use_spatial_transformer=True, transformer_depth=[0, 1],
        transformer_depth_output=[0, 0, 1, 1], transformer_depth_middle=1, dtype=torch.float32, legacy=False,
        operations=disable_weight_init,
    )  # fmt: skip
    model.model_config = SimpleNamespace(unet_config=UNET_CONFIG)
    weights = original_layout.unet_weights(pipe.unet)
    model.load_state_dict({key.removeprefix("model."): weight for key, weight in weights.items()})
    adapter = tiny.adapter_for(pipe, components=("unet",))
    patched, _ = ui.node.load(ui.patcher(model, CPU, CPU), ui.keep(adapter), 0.8, 1.0)
    patched.patch_model()
    expected(pipe, adapter, 0.8)
    generator = torch.Generator().manual_seed(0)
    sample, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 32, generator=generator)
    with torch.no_grad():
        found = model.diffusion_model(sample, torch.tensor([10.0]), context=text)
        wanted = pipe.unet(sample, 10, text).sample
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
