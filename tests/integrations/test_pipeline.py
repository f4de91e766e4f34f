"""The public methods of a pipeline, and that on every error nothing has changed."""

import hashlib
import http.server
import inspect
import json
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    WanPipeline,
)
from peft import LoraConfig, ShiraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModelWithProjection

import shira_diffusers
from shira_diffusers import (
    AdapterFormatError,
    AdapterMismatchError,
    ResidentStateError,
    ShiraAdapter,
    ShiraError,
    SparseDelta,
    load_adapter,
    save_adapter,
)
from shira_diffusers.formats.shira_file import WEIGHTS_NAME, encode
from shira_diffusers.integrations.pipelines import resident_of
from tests import reference, tiny


@cache
def adapters() -> dict[str, ShiraAdapter]:
    like = tiny.pipeline()
    return {"bluefire": tiny.adapter_for(like, 1), "paintings": tiny.adapter_for(like, 2, dtype=torch.float16)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return save_adapter(adapters()["bluefire"], tmp_path / "bluefire.safetensors")


@pytest.fixture
def second(tmp_path: Path) -> Path:
    return save_adapter(adapters()["paintings"], tmp_path / "paintings.safetensors")


@pytest.fixture
def loaded(pipe: StableDiffusionPipeline, file: Path, second: Path) -> StableDiffusionPipeline:
    """Two adapters, the first active."""
    pipe.load_shira(second, "paintings", activate=False)
    pipe.load_shira(file, "bluefire")
    return pipe


def assert_unchanged(pipe: DiffusionPipeline, act: Callable[[], object], error: type[Exception], message: str) -> None:
    """``act`` raises, and weights, mix and adapters are what they were."""
    bits, mix, adapters = tiny.snapshot(pipe), pipe.get_active_shira(), pipe.list_shira()
    with pytest.raises(error, match=message):
        act()
    tiny.assert_same_bits(pipe, bits)
    assert pipe.get_active_shira() == mix
    assert pipe.list_shira() == adapters


def oracle(pipe: DiffusionPipeline, base: dict, scales: dict) -> bool:
    expected = reference.apply(base, adapters(), scales)
    return all(tiny.same_bits(now, expected[name]) for name, now in tiny.snapshot(pipe).items())


# -------------------------------------------------------------------- loading


def test_the_first_lines_of_a_notebook(pipe: StableDiffusionPipeline, file: Path, second: Path) -> None:
    before, base = tiny.picture(pipe), tiny.snapshot(pipe)
    pipe.load_shira(str(file), "bluefire")
    assert pipe.get_active_shira() == {"bluefire": 1.0}
    assert oracle(pipe, base, {"bluefire": 1.0})
    fire = tiny.picture(pipe)
    assert not torch.equal(fire, before)
    pipe.load_shira(second, "paintings")
    assert pipe.get_active_shira() == {"paintings": 1.0}
    pipe.set_shira(["bluefire", "paintings"], [0.7, 0.5])
    assert oracle(pipe, base, {"bluefire": 0.7, "paintings": 0.5})
    assert pipe.list_shira() == {
        "bluefire": ["text_encoder", "unet"],
        "paintings": ["text_encoder", "unet"],
    }
    pipe.set_shira("bluefire")
    assert torch.equal(tiny.picture(pipe), fire)
    pipe.unload_shira()
    assert torch.equal(tiny.picture(pipe), before)
    assert pipe.list_shira() == {}
    tiny.assert_same_bits(pipe, base)


def test_public_names() -> None:
    for name in shira_diffusers.__all__:
        assert getattr(shira_diffusers, name) is not None
    methods = ["load", "set", "get_active", "list", "disable", "enable", "delete", "unload", "save", "bake"]
    for name in [*(f"{method}_shira" for method in methods), "shira", "fuse_report"]:
        assert callable(getattr(DiffusionPipeline, name)), name
    assert issubclass(ShiraError, ValueError)
    assert {AdapterFormatError, AdapterMismatchError, ResidentStateError} <= set(ShiraError.__subclasses__())


def test_the_docs_list_all_methods() -> None:
    page = (Path(__file__).parents[2] / "docs" / "coming_from_lora.md").read_text()
    methods = page.partition("## All methods")[2]
    for method in shira_diffusers.integrations.pipelines.METHODS:
        assert f"{method.__name__}(" in methods, method.__name__


def test_the_strengths_in_the_docs(pipe: StableDiffusionPipeline) -> None:
    """With the blocks of the real UNets."""
    page = (Path(__file__).parents[2] / "docs" / "coming_from_lora.md").read_text()
    code = page.partition("## Strengths")[2].partition("```python\n")[2].partition("```")[0]
    pipe.unet = tiny.unet(layers_per_block=2)
    for name in "ab":
        pipe.load_shira(tiny.adapter_for(pipe), name)
    exec(compile(code, "coming_from_lora.md", "exec"), {"pipe": pipe})
    assert pipe.get_active_shira() == {"a": 0.8, "b": {"unet": 0.5}}


def test_installing_twice_changes_nothing() -> None:
    before = {name: value for name, value in vars(DiffusionPipeline).items()}
    shira_diffusers.integrations.pipelines.install()
    assert dict(vars(DiffusionPipeline)) == before


def test_the_call_of_a_pipeline_keeps_its_signature(loaded: StableDiffusionPipeline) -> None:
    assert "num_inference_steps" in inspect.signature(type(loaded).__call__).parameters
    assert type(loaded).__call__.__doc__


def test_a_pipeline_of_the_users_own(pipe: StableDiffusionPipeline, file: Path) -> None:
    """One that diffusers' ``components`` refuses, since its ``__init__`` takes another name than it registers."""

    class Own(DiffusionPipeline):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.register_modules(unet=model)

        def __call__(self) -> torch.Tensor:
            return tiny.run_unet(self.unet)

    own = Own(pipe.unet)
    with pytest.raises(ValueError, match="incorrectly"):
        _ = own.components
    before = own()
    adapter = load_adapter(file).part("unet").prefixed("unet")
    own.load_shira(encode(adapter)[0], "a")
    assert own.list_shira() == {"a": ["unet"]}
    assert not torch.equal(own(), before)
    own.unload_shira()
    assert torch.equal(own(), before)


def test_a_pipeline_that_registers_nothing() -> None:
    class Bare(DiffusionPipeline):
        def __call__(self) -> int:
            return 1

    assert Bare()() == 1
    assert Bare().list_shira() == {}


def test_sources(pipe: StableDiffusionPipeline, file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    save_adapter(load_adapter(file), folder)
    named = tmp_path / "named" / "inner"
    named.mkdir(parents=True)
    save_adapter(load_adapter(file), named / "x.safetensors")
    save_adapter(load_adapter(file), named / "y.safetensors")
    base = tiny.snapshot(pipe)
    sources = [
        ((file,), {}),
        ((str(file),), {}),
        ((folder,), {}),
        ((folder / WEIGHTS_NAME,), {}),
        ((tmp_path / "named",), {"subfolder": "inner", "weight_name": "y.safetensors"}),
        ((named,), {"weight_name": "x.safetensors"}),
        ((encode(load_adapter(file))[0],), {}),
        ((load_adapter(file),), {}),
    ]
    for args, options in sources:
        pipe.load_shira(*args, "bluefire", **options)
        assert oracle(pipe, base, {"bluefire": 1.0}), args
        pipe.unload_shira()


def test_automatic_names(pipe: StableDiffusionPipeline, file: Path) -> None:
    for _ in range(3):
        pipe.load_shira(file)
    assert list(pipe.list_shira()) == ["default_0", "default_1", "default_2"]
    assert pipe.get_active_shira() == {"default_2": 1.0}
    pipe.delete_shira("default_1")
    pipe.load_shira(file)
    assert set(pipe.list_shira()) == {"default_0", "default_1", "default_2"}


def test_loading_without_activating(loaded: StableDiffusionPipeline, second: Path) -> None:
    before = tiny.snapshot(loaded)
    loaded.load_shira(second, "third", activate=False)
    assert loaded.get_active_shira() == {"bluefire": 1.0}
    assert "third" in loaded.list_shira()
    tiny.assert_same_bits(loaded, before)


def test_loading_with_a_scale(pipe: StableDiffusionPipeline, file: Path) -> None:
    base = tiny.snapshot(pipe)
    pipe.load_shira(file, "bluefire", scale={"unet": {"down": 0.2}, "text_encoder": 0.0})
    assert oracle(pipe, base, {"bluefire": {"unet": {"down": 0.2}, "text_encoder": 0.0}})


def test_a_scale_of_what_is_not_activated(loaded: StableDiffusionPipeline, second: Path) -> None:
    before, mix = tiny.snapshot(loaded), loaded.get_active_shira()
    with pytest.warns(UserWarning, match=r"scale=0\.5 has no effect with activate=False; give it to set_shira\('x'"):
        loaded.load_shira(second, "x", scale=0.5, activate=False)
    assert loaded.get_active_shira() == mix
    tiny.assert_same_bits(loaded, before)


def test_a_name_in_use(loaded: StableDiffusionPipeline, second: Path) -> None:
    assert_unchanged(loaded, lambda: loaded.load_shira(second, "bluefire"), ValueError, "'bluefire' is in use")


def test_a_bad_name_or_scale(loaded: StableDiffusionPipeline, second: Path) -> None:
    assert_unchanged(loaded, lambda: loaded.load_shira(second, ""), ShiraError, "not empty")
    assert_unchanged(loaded, lambda: loaded.load_shira(second, "x", scale="strong"), ShiraError, "finite number")
    assert_unchanged(loaded, lambda: loaded.load_shira(second, "x", scale=torch.inf), ShiraError, "finite number")


def test_unknown_keywords_and_proxies(loaded: StableDiffusionPipeline, second: Path) -> None:
    assert_unchanged(loaded, lambda: loaded.load_shira(second, "x", wieght_name="y"), TypeError, "wieght_name")
    proxies = {"https": "http://proxy"}
    assert_unchanged(loaded, lambda: loaded.load_shira(second, "x", proxies=proxies), ShiraError, "HTTPS_PROXY")


def test_keywords_of_load_lora_weights(
    pipe: StableDiffusionPipeline, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = tiny.snapshot(pipe)
    pipe.load_shira(file, "bluefire", low_cpu_mem_usage=True, use_safetensors=True, hotswap=False)
    assert oracle(pipe, base, {"bluefire": 1.0})
    assert "low_cpu_mem_usage has no effect" in caplog.text
    told = "use_safetensors=False: adapters are safetensors files"
    assert_unchanged(pipe, lambda: pipe.load_shira(file, "x", use_safetensors=False), ShiraError, told)


def test_what_cannot_be_hotswapped(loaded: StableDiffusionPipeline, second: Path, tmp_path: Path) -> None:
    for name in (None, "nobody"):
        assert_unchanged(
            loaded,
            lambda n=name: loaded.load_shira(second, n, hotswap=True),
            ShiraError,
            f"expected its name as adapter_name, got {name!r}; loaded are 'paintings', 'bluefire'",
        )
    for options in ({"scale": 0.5}, {"activate": False}):
        message = "leaves the mix as it is, got scale=.* and activate=.*call set_shira"
        act = partial(loaded.load_shira, second, "bluefire", hotswap=True, **options)
        assert_unchanged(loaded, act, ShiraError, message)
    other = save_adapter(tiny.adapter_for(tiny.unet(block_out_channels=(32, 96))).prefixed("unet"), tmp_path / "other")
    act = partial(loaded.load_shira, other, "bluefire", hotswap=True)
    assert_unchanged(loaded, act, AdapterMismatchError, "adapter does not fit")
    assert_unchanged(loaded, lambda: loaded.load_shira(second, "bluefire"), ShiraError, "replace it with hotswap=True")


def test_what_is_no_adapter(loaded: StableDiffusionPipeline, tmp_path: Path) -> None:
    missing = tmp_path / "missing.safetensors"
    for source in (missing, str(missing), "./nowhere", "~/nowhere"):
        assert_unchanged(loaded, lambda s=source: loaded.load_shira(s, "x"), FileNotFoundError, "no adapter at")
    assert_unchanged(loaded, lambda: loaded.load_shira(tmp_path, "x"), FileNotFoundError, r"got bluefire.*paintings")
    assert_unchanged(loaded, lambda: loaded.load_shira({}, "x"), AdapterFormatError, "no tensors")
    assert_unchanged(loaded, lambda: loaded.load_shira(3, "x"), AdapterFormatError, "got int")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"nothing of the kind")
    assert_unchanged(loaded, lambda: loaded.load_shira(damaged, "x"), AdapterFormatError, "text that begins 'noth")
    torch.save({"a": torch.ones(1)}, tmp_path / "pickle.bin")
    assert_unchanged(loaded, lambda: loaded.load_shira(tmp_path / "pickle.bin", "x"), AdapterFormatError, "pickle")


def test_state_dicts_of_other_things(loaded: StableDiffusionPipeline) -> None:
    good = encode(tiny.adapter_for(loaded, 3))[0]
    key = next(key for key in good if key.endswith("values"))
    for state, message in [
        ({**good, key: good[key].tolist()}, f"{key}': list"),
        ({**good, key: good[key].to("meta")}, f"{key}': a tensor of layout torch.strided on meta"),
        ({**good, key: good[key].to_sparse()}, f"{key}': a tensor of layout torch.sparse_coo"),
        ({**good, 3: torch.ones(1)}, "3: a tensor"),
        ({"unet": good}, "'unet': dict"),
    ]:
        assert_unchanged(loaded, lambda s=state: loaded.load_shira(s, "x"), AdapterFormatError, message)


def test_names_that_no_file_can_have(loaded: StableDiffusionPipeline) -> None:
    for source in ("", "a\0b", "a" * 5000, "b" * 5000 + "/a", "a/\0", "~\0", "~" * 300):
        assert_unchanged(loaded, lambda s=source: loaded.load_shira(s, "x"), FileNotFoundError, "no adapter at")
    too_long = "a/" + "b" * 97
    assert_unchanged(loaded, lambda: loaded.load_shira(too_long, "x"), FileNotFoundError, "no adapter at")


def test_a_lora_is_sent_to_its_own_loader(loaded: StableDiffusionPipeline, tmp_path: Path) -> None:
    model = tiny.unet()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    model.save_lora_adapter(tmp_path / "lora")
    assert_unchanged(
        loaded, lambda: loaded.load_shira(tmp_path / "lora", "x"), AdapterFormatError, "load it with load_lora_weights"
    )
    state = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert_unchanged(loaded, lambda: loaded.load_shira(state, "x"), AdapterFormatError, "load_lora_weights")


def test_what_fits_nothing_or_only_in_part(loaded: StableDiffusionPipeline, tmp_path: Path) -> None:
    good = tiny.adapter_for(loaded, 3)
    odd = SparseDelta(torch.tensor([1]), torch.ones(1), (2, 2))
    name = next(iter(good.deltas))
    misfits = {
        "1 of .* parameters belongs to no component": ShiraAdapter({**good.deltas, "transformer.x.weight": odd}),
        "2 of .* parameters differ": ShiraAdapter({**good.deltas, name: odd, "unet.nowhere.weight": odd}),
        "1 of 1 parameter differs": ShiraAdapter({"unet.nowhere.weight": odd}),
        "unet.conv_in: no such parameter in UNet": ShiraAdapter({**good.deltas, "unet.conv_in": odd}),
        "unet.: no such parameter in UNet": ShiraAdapter({**good.deltas, "unet": odd}),
        "text_encoder.: no such parameter in CLIP": ShiraAdapter({**good.deltas, "text_encoder": odd}),
        "no component of this model, which has vae, text_encoder, unet": ShiraAdapter({"weight": odd}),
        r"of a bare module is named by adapter.prefixed\('unet'\)": tiny.adapter_for(loaded.unet),
    }
    for number, (message, adapter) in enumerate(misfits.items()):
        path = save_adapter(adapter, tmp_path / f"{number}.safetensors")
        assert_unchanged(loaded, lambda p=path: loaded.load_shira(p, "x"), AdapterMismatchError, message)


def test_a_weight_that_two_components_share() -> None:
    """Each would save the other's bits as the base."""
    pipe = tiny.sdxl_pipeline()
    adapter = tiny.adapter_for(pipe, only=("fc1",), components=("text_encoder", "text_encoder_2"))
    layers = [layer for layer in pipe.text_encoder.modules() if hasattr(layer, "fc1")]
    others = [layer for layer in pipe.text_encoder_2.modules() if hasattr(layer, "fc1")]
    others[0].fc1.weight = layers[0].fc1.weight
    message = r"1 of 4 parameters differ[\s\S]*layers.0.mlp.fc1.weight: one tied weight with text_encoder"
    assert_unchanged(pipe, lambda: pipe.load_shira(encode(adapter)[0]), AdapterMismatchError, message)
    pipe.load_shira(encode(adapter.part("text_encoder").prefixed("text_encoder"))[0])


def test_an_adapter_of_another_model(loaded: StableDiffusionPipeline, tmp_path: Path) -> None:
    other = tiny.unet(block_out_channels=(32, 96))
    adapter = tiny.adapter_for(other).prefixed("unet").with_metadata(base_model="somebody/other")
    path = save_adapter(adapter, tmp_path / "other.safetensors")
    assert_unchanged(
        loaded,
        lambda: loaded.load_shira(path, "x"),
        AdapterMismatchError,
        r"trained on 'somebody/other'[\s\S]*expected \(64, 64\), got \(96, 96\)",
    )


@pytest.mark.parametrize("prefix", ["with", "without"])
def test_text_encoder_names_of_both_transformers(pipe: StableDiffusionPipeline, prefix: str) -> None:
    """transformers 5.6 dropped ``text_model.`` from CLIPTextModel's names; files may have it or not."""
    adapter = tiny.adapter_for(pipe, components=("text_encoder",))
    short = {name: name.replace("text_encoder.text_model.", "text_encoder.") for name in adapter.deltas}
    long = {name: text.replace("text_encoder.", "text_encoder.text_model.") for name, text in short.items()}
    base = tiny.snapshot(pipe)
    pipe.load_shira(encode(adapter.renamed(long if prefix == "with" else short))[0], "a")
    expected = reference.apply(base, {"a": adapter}, {"a": 1.0})
    assert all(tiny.same_bits(now, expected[name]) for name, now in tiny.snapshot(pipe).items())
    pipe.unload_shira()
    tiny.assert_same_bits(pipe, base)


# -------------------------------------------------------------------- mixing


def test_weights_of_a_mix(loaded: StableDiffusionPipeline) -> None:
    loaded.disable_shira()
    base = tiny.snapshot(loaded)
    by_component = {"unet": 0.5, "text_encoder": 2}
    by_block = {"unet": {"down": 0.0, "mid": 1.5, "up": -0.5}}
    cases = [
        ("bluefire", None, {"bluefire": 1.0}),
        ("bluefire", 0.3, {"bluefire": 0.3}),
        (["bluefire"], [0.3], {"bluefire": 0.3}),
        (["paintings", "bluefire"], 0.5, {"paintings": 0.5, "bluefire": 0.5}),
        (["paintings", "bluefire"], (0.5, None), {"paintings": 0.5, "bluefire": 1.0}),
        ("bluefire", by_component, {"bluefire": by_component}),
        (["bluefire", "paintings"], [by_block, 0.1], {"bluefire": by_block, "paintings": 0.1}),
        (["bluefire", "paintings"], by_block, {"bluefire": by_block, "paintings": by_block}),
        ([], None, {}),
    ]
    for names, weights, scales in cases:
        loaded.set_shira(names, weights)
        assert loaded.get_active_shira() == scales
        assert oracle(loaded, base, scales), (names, weights)


def test_weights_of_numpy_and_torch(loaded: StableDiffusionPipeline) -> None:
    loaded.disable_shira()
    base = tiny.snapshot(loaded)
    for weight in (np.float32(0.5), np.float64(0.5), np.array(0.5), torch.tensor(0.5)):
        loaded.set_shira("bluefire", {"unet": {"down": weight}, "text_encoder": weight})
        assert loaded.get_active_shira() == {"bluefire": {"unet": {"down": 0.5}, "text_encoder": 0.5}}
        assert oracle(loaded, base, {"bluefire": {"unet": {"down": 0.5}, "text_encoder": 0.5}})
        loaded.set_shira("bluefire", weight)
        assert type(loaded.get_active_shira()["bluefire"]) is float
    for weights in (np.array([2, 1]), torch.tensor([2.0, 1.0])):
        loaded.set_shira(["bluefire", "paintings"], weights)
        assert oracle(loaded, base, {"bluefire": 2.0, "paintings": 1.0})


def test_what_the_caller_does_to_a_scale_later_changes_no_mix(loaded: StableDiffusionPipeline) -> None:
    given = {"unet": {"down": 0.5}}
    loaded.set_shira("bluefire", given)
    bits = tiny.snapshot(loaded)
    given["unet"]["down"] = 9.0
    loaded.get_active_shira()["bluefire"]["unet"]["down"] = 9.0
    assert loaded.get_active_shira() == {"bluefire": {"unet": {"down": 0.5}}}
    loaded.disable_shira()
    loaded.enable_shira()
    tiny.assert_same_bits(loaded, bits)


def test_bad_mixes(loaded: StableDiffusionPipeline) -> None:
    for names, weights, message in [
        ("nobody", None, "no adapter named 'nobody', loaded are"),
        (["bluefire", "bluefire"], None, "named once"),
        (["bluefire", "paintings"], [1.0], "got 1 weight for 2 adapters"),
        ("bluefire", "1.0", "finite number"),
        ("bluefire", torch.nan, "finite number"),
        ("bluefire", True, "finite number"),
        ("bluefire", np.bool_(True), "finite number"),
        ("bluefire", 1e39, "finite number"),  # infinite in float32
        ("bluefire", 10**400, r"finite number[\s\S]*00\.\.\."),
        ("bluefire", 10**5000, "finite number"),
        ("bluefire", torch.ones(2), "got 2 weights for 1 adapter"),
        (None, None, "expected the name of an adapter or a list of names, got None"),
        ([["bluefire"]], None, "expected the name of an adapter or a list of names"),
        ("bluefire", {"transformer": 1.0}, "'transformer': no such component"),
        ("bluefire", {"unet": {"middle": 1.0}}, "unet.'middle': no such block"),
    ]:
        assert_unchanged(loaded, lambda n=names, w=weights: loaded.set_shira(n, w), ShiraError, message)
    assert_unchanged(
        loaded, lambda: loaded.set_shira("bluefire", method="votes"), ShiraError, "unknown merge method 'votes'"
    )


@pytest.fixture
def unet_only(loaded: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """Beside the two adapters a third, which changes the UNet only."""
    adapter = tiny.adapter_for(loaded, 4, components=("unet",))
    loaded.load_shira(adapter, "unet_only", activate=False)
    return loaded


def test_a_mapping_gives_names_and_weights(loaded: StableDiffusionPipeline) -> None:
    loaded.disable_shira()
    base = tiny.snapshot(loaded)
    by_component = {"unet": 0.5, "text_encoder": {}}
    for mix in (
        {"bluefire": 0.25},
        {"paintings": 0.5, "bluefire": {"unet": {"down": 0.2}}},
        {"bluefire": None},
        {"bluefire": by_component},
        {"bluefire": np.float32(0.5)},
        {},
    ):
        scales = {name: 1.0 if scale is None else scale for name, scale in mix.items()}
        loaded.set_shira(mix)
        assert loaded.get_active_shira() == scales
        assert oracle(loaded, base, scales), mix
        loaded.set_shira("paintings")
        with loaded.shira(mix):
            assert loaded.get_active_shira() == scales
            assert oracle(loaded, base, scales), mix
        resident_of(loaded).set(mix)
        assert oracle(loaded, base, scales), mix
    loaded.set_shira({"bluefire": 0.25, "paintings": 0.5})
    loaded.delete_shira({"bluefire": 0.25})
    assert oracle(loaded, base, {"paintings": 0.5})
    loaded.delete_shira(loaded.get_active_shira())
    assert loaded.list_shira() == {}
    tiny.assert_same_bits(loaded, base)


def test_names_and_weights_in_other_containers(loaded: StableDiffusionPipeline) -> None:
    mix = {"paintings": 0.5, "bluefire": 0.25}
    loaded.set_shira(mix.keys(), mix.values())
    assert loaded.get_active_shira() == mix
    with pytest.raises(ShiraError, match="a set of names has no order"):
        loaded.set_shira(set(mix), [0.1, 0.9])
    assert loaded.get_active_shira() == mix
    loaded.set_shira(set(mix), 0.5)
    assert loaded.get_active_shira() == dict.fromkeys(mix, 0.5)
    for names in (["paintings"], {"bluefire": 1.0}):
        resident_of(loaded).remove(names)
    assert loaded.list_shira() == {}


def test_weights_beside_a_mapping_are_refused(loaded: StableDiffusionPipeline) -> None:
    message = r"expected strengths once, got \{'bluefire': 0\.5\} and adapter_weights=1\.0; leave adapter_weights out"

    def use() -> None:
        with loaded.shira({"bluefire": 0.5}, 1.0):
            pytest.fail("the block was entered")

    assert_unchanged(loaded, lambda: loaded.set_shira({"bluefire": 0.5}, 1.0), ShiraError, message)
    assert_unchanged(loaded, use, ShiraError, message)
    for bad, told in [
        ({"nobody": 0.5}, "no adapter named 'nobody'"),
        ({3: 0.5}, "expected the name of an adapter"),
        ({"bluefire": "strong"}, "finite number"),
        ({"bluefire": [0.5]}, "finite number"),
    ]:
        assert_unchanged(loaded, lambda b=bad: loaded.set_shira(b), ShiraError, told)
    for bad in ("bluefire", ["bluefire"], None):
        assert_unchanged(
            loaded, lambda b=bad: resident_of(loaded).set(b), ShiraError, r"expected the mix as \{name: strength\}, got"
        )


def test_a_strength_for_a_component_that_the_adapter_lacks(unet_only: StableDiffusionPipeline, file: Path) -> None:
    pipe, scale = unet_only, {"unet": 0.5, "text_encoder": 0.5}
    message = r"components of \['unet'\][\s\S]*'text_encoder': no such component in this adapter"
    resident = resident_of(pipe)
    adapter = resident.adapter("unet_only")

    def use() -> None:
        with pipe.shira("unet_only", scale):
            pytest.fail("the block was entered")

    for act in (
        lambda: pipe.set_shira("unet_only", scale),
        lambda: pipe.set_shira(["bluefire", "unet_only"], scale),
        lambda: pipe.set_shira({"bluefire": 1.0, "unet_only": scale}),
        lambda: pipe.load_shira(adapter, "x", scale=scale),
        lambda: pipe.fuse_report({"bluefire": 1.0, "unet_only": scale}),
        lambda: pipe.save_shira("nowhere", {"unet_only": scale}),
        lambda: resident.set({"unet_only": scale}),
        use,
    ):
        assert_unchanged(pipe, act, ShiraError, message)
    assert_unchanged(pipe, lambda: pipe.set_shira("bluefire", {"vae": 0.5}), ShiraError, "'vae': no such component")
    with shira_diffusers.AdapterLibrary(file.parent, device="cpu") as library:
        save_adapter(adapter, file.parent / "thin.safetensors")
        bits = tiny.snapshot(pipe)
        with pytest.raises(ShiraError, match=message):
            library.set(pipe, {"thin": scale})
        tiny.assert_same_bits(pipe, bits)
        assert pipe.get_active_shira() == {"bluefire": 1.0}
    pipe.set_shira(["bluefire", "unet_only"], [scale, {"unet": 0.5}])


def test_disable_enable_delete(loaded: StableDiffusionPipeline) -> None:
    loaded.set_shira(["bluefire", "paintings"], [1.0, 0.5])
    mixed = tiny.snapshot(loaded)
    loaded.disable_shira()
    base = tiny.snapshot(loaded)
    assert loaded.get_active_shira() == {}
    assert list(loaded.list_shira()) == ["paintings", "bluefire"]
    loaded.enable_shira()
    tiny.assert_same_bits(loaded, mixed)
    loaded.delete_shira("bluefire")
    assert loaded.get_active_shira() == {"paintings": 0.5}
    assert oracle(loaded, base, {"paintings": 0.5})
    assert_unchanged(loaded, lambda: loaded.delete_shira(["paintings", "x"]), ShiraError, "no adapter named 'x'")
    loaded.delete_shira(["paintings"])
    tiny.assert_same_bits(loaded, base)
    assert loaded.list_shira() == {}


def test_adapters_are_listed_while_others_load_and_delete(pipe: StableDiffusionPipeline) -> None:
    resident, names = resident_of(pipe), [f"n{number}" for number in range(200)]
    adapter = tiny.adapter_for(pipe, only=("mid_block.attentions.0.proj_in",))
    for name in names:
        resident.add(adapter, name)
    done, interval = threading.Event(), sys.getswitchinterval()

    def ask() -> None:
        while not done.is_set():
            found = pipe.list_shira()
            found.pop("x", None)
            assert found == {name: ["unet"] for name in names}

    sys.setswitchinterval(1e-6)
    with ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(ask) for _ in range(2)]
        try:
            for _ in range(100):
                resident.add(adapter, "x")
                resident.remove("x")
        finally:
            done.set()
            sys.setswitchinterval(interval)
        for one in asking:
            one.result()


def test_a_failing_delete_deletes_nothing(loaded: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded.set_shira(["bluefire", "paintings"])
    count = 0
    write = torch.Tensor.scatter_

    def fails_late(*args: object) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == writes:
            raise RuntimeError("power cut")
        return write(*args)

    writes = 0
    monkeypatch.setattr(torch.Tensor, "scatter_", fails_late)
    loaded.delete_shira(["bluefire", "paintings"])
    total = count
    monkeypatch.undo()
    assert total
    loaded.load_shira(encode(tiny.adapter_for(loaded, 1))[0], "bluefire")
    loaded.load_shira(encode(tiny.adapter_for(loaded, 2))[0], "paintings")
    loaded.set_shira(["bluefire", "paintings"])
    count, writes = 0, total
    monkeypatch.setattr(torch.Tensor, "scatter_", fails_late)
    assert_unchanged(loaded, lambda: loaded.delete_shira(["bluefire", "paintings"]), RuntimeError, "power cut")


def test_unload_twice_and_without_adapters(pipe: StableDiffusionPipeline) -> None:
    base = tiny.snapshot(pipe)
    for act in (pipe.unload_shira, pipe.disable_shira, pipe.enable_shira, pipe.bake_shira, pipe.unload_shira):
        act()
    tiny.assert_same_bits(pipe, base)
    assert pipe.get_active_shira() == pipe.list_shira() == {}


def test_a_mix_for_a_while(loaded: StableDiffusionPipeline) -> None:
    before, bits = tiny.picture(loaded), tiny.snapshot(loaded)
    with loaded.shira("paintings", 0.8) as inside:
        assert inside is loaded
        assert loaded.get_active_shira() == {"paintings": 0.8}
        assert not torch.equal(tiny.picture(loaded), before)
        with loaded.shira(["bluefire", "paintings"], [0.1, {"unet": 0.2}]):
            assert loaded.get_active_shira() == {"bluefire": 0.1, "paintings": {"unet": 0.2}}
        assert loaded.get_active_shira() == {"paintings": 0.8}
    assert loaded.get_active_shira() == {"bluefire": 1.0}
    with pytest.raises(KeyError), loaded.shira("paintings"):
        raise KeyError
    tiny.assert_same_bits(loaded, bits)
    assert torch.equal(tiny.picture(loaded), before)

    def use_unknown() -> None:
        with loaded.shira("nobody"):
            pytest.fail("the block was entered")

    assert_unchanged(loaded, use_unknown, ShiraError, "no adapter named 'nobody'")


def test_an_interrupted_generation_restores(loaded: StableDiffusionPipeline) -> None:
    bits = tiny.snapshot(loaded)

    def interrupt(*_: object) -> dict:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), loaded.shira("paintings"):
        tiny.picture(loaded, on_step=interrupt)
    tiny.assert_same_bits(loaded, bits)
    loaded.set_shira("paintings")  # no lock is left behind


def test_baking(loaded: StableDiffusionPipeline) -> None:
    picture, bits = tiny.picture(loaded), tiny.snapshot(loaded)
    loaded.bake_shira()
    assert loaded.get_active_shira() == {}
    assert list(loaded.list_shira()) == ["paintings", "bluefire"]
    loaded.unload_shira()
    tiny.assert_same_bits(loaded, bits)
    assert torch.equal(tiny.picture(loaded), picture)


# -------------------------------------------------------------------- saving and comparing


def test_saving_an_adapter_and_a_mix(loaded: StableDiffusionPipeline, file: Path, tmp_path: Path) -> None:
    saved = loaded.save_shira(tmp_path / "one", "paintings")
    assert saved == tmp_path / "one" / WEIGHTS_NAME
    paintings = load_adapter(tmp_path / "paintings.safetensors")
    assert load_adapter(saved).deltas == paintings.deltas
    loaded.set_shira(["bluefire", "paintings"], [0.5, {"unet": {"up": 0.3}}])
    mixed = tiny.snapshot(loaded)
    loaded.save_shira(tmp_path / "mix")
    loaded.unload_shira()
    loaded.load_shira(tmp_path / "mix")
    tiny.assert_same_bits(loaded, mixed)
    assert json.loads(load_adapter(tmp_path / "mix").metadata["mix"])["bluefire"] == 0.5


def test_saving_what_is_not_there(loaded: StableDiffusionPipeline, tmp_path: Path) -> None:
    with pytest.raises(ShiraError, match="no adapter named 'x'"):
        loaded.save_shira(tmp_path / "none", "x")
    loaded.disable_shira()
    with pytest.raises(ShiraError, match="no adapter is active"):
        loaded.save_shira(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_the_report(loaded: StableDiffusionPipeline, file: Path) -> None:
    loaded.load_shira(file, "third", activate=False)
    report = loaded.fuse_report(["bluefire", "paintings"])
    assert "<td>bluefire</td><td>paintings</td>" in report._repr_html_()
    assert "<table>" in loaded.get_active_shira()._repr_html_()
    assert list(report) == [("bluefire", "paintings")]
    assert set(report["bluefire", "paintings"]) >= {"overlap", "sign_conflict", "awom", "awor"}
    everything = loaded.fuse_report()
    assert len(everything) == 3
    assert everything["bluefire", "third"]["overlap"] == 1.0
    for names, message in [
        (["bluefire"], "at least two"),
        ("bluefire", "at least two"),
        (["bluefire", "x"], "no adapter named 'x'"),
    ]:
        assert_unchanged(loaded, lambda n=names: loaded.fuse_report(n), ShiraError, message)


def test_the_report_of_a_drawn_picture(loaded: StableDiffusionPipeline) -> None:
    """Each adapter alone changes the latents that the base draws from the same noise."""
    mix = {"bluefire": 0.5, "paintings": -2.0}
    call = {"prompt": [tiny.PROMPT, "an owl"], "num_inference_steps": 2, "height": tiny.SIZE, "width": tiny.SIZE}
    loaded.set_shira("paintings", 0.25)
    before, bits = loaded.get_active_shira(), tiny.snapshot(loaded)

    def latents(one: dict[str, float]) -> torch.Tensor:
        loaded.set_shira(one)
        seeded = torch.Generator().manual_seed(0)
        return loaded(**call, generator=seeded, output_type="latent").images

    report = loaded.fuse_report(mix, **call)["bluefire", "paintings"]
    assert loaded.get_active_shira() == before
    tiny.assert_same_bits(loaded, bits)
    plain = latents({})
    a, b = (latents({name: scale}) - plain for name, scale in mix.items())
    against = torch.where(a * b < 0, (a * b).abs(), 0.0)
    assert report["opposing"] == pytest.approx(float(against.double().mean())) and report["opposing"] > 0
    assert report["cosine"] == pytest.approx(float((a * b).sum() / (a.norm() * b.norm())), rel=1e-4)
    assert loaded.fuse_report(mix)["bluefire", "paintings"].items() <= report.items()
    first, again = (
        loaded.fuse_report(mix, **call, generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)])
        for _ in range(2)
    )
    assert first == again and first["bluefire", "paintings"]["opposing"] != report["opposing"]
    message = "takes no output_type; leave it out"
    loaded.set_shira("paintings", 0.25)
    assert_unchanged(loaded, lambda: loaded.fuse_report(mix, **call, output_type="pil"), ShiraError, message)


def test_the_report_of_a_mix(loaded: StableDiffusionPipeline) -> None:
    """Adapters are compared at their strengths."""
    plain = loaded.fuse_report()["paintings", "bluefire"]
    assert loaded.fuse_report({"paintings": 1.0, "bluefire": None})["paintings", "bluefire"] == plain
    mix = {"paintings": 0.5, "bluefire": {"unet": -0.5, "text_encoder": -0.5}}
    mixed = loaded.fuse_report(mix)["paintings", "bluefire"]
    assert mixed["overlap"] == plain["overlap"]
    assert mixed["awom"] == pytest.approx(0.25 * plain["awom"])
    assert mixed["sign_conflict"] == pytest.approx(1 - plain["sign_conflict"])


def test_saving_another_mix_than_the_active_one(loaded: StableDiffusionPipeline, tmp_path: Path) -> None:
    mix = {"bluefire": 0.5, "paintings": {"unet": 0.3}}
    with loaded.shira(mix):
        mixed = tiny.snapshot(loaded)
    loaded.save_shira(tmp_path / "mix", mix)
    loaded.save_shira(tmp_path / "both", ["bluefire", "paintings"])
    assert loaded.get_active_shira() == {"bluefire": 1.0}
    loaded.unload_shira()
    base = tiny.snapshot(loaded)
    loaded.load_shira(tmp_path / "mix")
    tiny.assert_same_bits(loaded, mixed)
    loaded.unload_shira()
    loaded.load_shira(tmp_path / "both")
    assert oracle(loaded, base, {"bluefire": 1.0, "paintings": 1.0})
    for nothing in ({}, []):
        with pytest.raises(ShiraError, match="there is no mix to fuse"):
            loaded.save_shira(tmp_path / "none", nothing)


# -------------------------------------------------------------------- pipelines that share models


def test_from_pipe_sees_the_same_state(loaded: StableDiffusionPipeline) -> None:
    other = StableDiffusionImg2ImgPipeline.from_pipe(loaded)
    assert other.get_active_shira() == {"bluefire": 1.0}
    other.set_shira("paintings")
    assert loaded.get_active_shira() == {"paintings": 1.0}
    other.delete_shira("paintings")
    assert list(loaded.list_shira()) == ["bluefire"]
    base = tiny.snapshot(tiny.pipeline())
    tiny.assert_same_bits(loaded, base)


@pytest.mark.parametrize("replaced", ["unet", "text_encoder"])
def test_a_model_that_was_replaced_lacks_its_part_of_an_adapter(
    loaded: StableDiffusionPipeline, file: Path, tmp_path: Path, replaced: str
) -> None:
    setattr(loaded, replaced, tiny.unet(seed=5) if replaced == "unet" else tiny.text_encoder(seed=5))
    message = rf"a model lacks an adapter .*hotswap=True(.|\n)*{replaced}: expected 'paintings', got none"
    for act in (
        lambda: loaded.set_shira({"paintings": 0.5}),
        lambda: loaded.shira("paintings").__enter__(),
        lambda: loaded.save_shira(tmp_path, ["paintings"]),
    ):
        assert_unchanged(loaded, act, ResidentStateError, message)
    loaded.disable_shira()
    base = tiny.snapshot(loaded)
    assert_unchanged(loaded, loaded.enable_shira, ResidentStateError, "a model lacks an adapter .*hotswap=True")
    loaded.load_shira(file, "bluefire", hotswap=True)
    loaded.set_shira("bluefire")
    assert oracle(loaded, base, {"bluefire": 1.0})
    loaded.delete_shira("paintings")
    loaded.unload_shira()
    tiny.assert_same_bits(loaded, base)


@pytest.mark.parametrize(("replaced", "left"), [("unet", "text_encoder"), ("text_encoder", "unet")])
def test_an_adapter_is_active_on_the_models_that_have_it(
    loaded: StableDiffusionPipeline, file: Path, replaced: str, left: str
) -> None:
    loaded.set_shira(["bluefire", "paintings"], [0.5, {left: 0.25}])
    before = getattr(loaded, replaced)
    setattr(loaded, replaced, tiny.unet(seed=5) if replaced == "unet" else tiny.text_encoder(seed=5))
    assert loaded.get_active_shira() == {"bluefire": {left: 0.5}, "paintings": {left: 0.25}}
    setattr(loaded, replaced, before)
    assert loaded.get_active_shira() == {"bluefire": 0.5, "paintings": {left: 0.25}}
    setattr(loaded, replaced, tiny.unet(seed=5) if replaced == "unet" else tiny.text_encoder(seed=5))
    loaded.load_shira(file, "bluefire", hotswap=True)
    assert loaded.get_active_shira()["bluefire"] == 0.5


def test_a_mix_that_was_set_before_a_pipeline_was_saved(loaded: StableDiffusionPipeline, tmp_path: Path) -> None:
    base = tiny.snapshot(tiny.pipeline())
    loaded.save_pretrained(tmp_path / "pipeline")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    tiny.assert_same_bits(again, base)
    assert again.list_shira() == {}
    assert loaded.get_active_shira() == {"bluefire": 1.0}


# -------------------------------------------------------------------- PEFT


def peft_shira(model: nn.Module) -> None:
    """Give PEFT's SHiRA layers values, as training does."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "shira_" in name:
                parameter.normal_()


@pytest.fixture(params=["get_peft_model", "save_lora_adapter"])
def peft_folder(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, nn.Module]:
    """A folder that PEFT wrote, and the model with that adapter, unmerged."""
    config, folder = ShiraConfig(r=2, target_modules=["to_q", "to_v", "ff.net.2"]), tmp_path / "peft"
    if request.param == "get_peft_model":
        model = get_peft_model(tiny.unet(), config)
        peft_shira(model)
        model.save_pretrained(folder)
        return folder, model.base_model.model
    model = tiny.unet()
    model.add_adapter(config)
    peft_shira(model)
    model.save_lora_adapter(folder)
    return folder, model


def test_an_adapter_of_peft(pipe: StableDiffusionPipeline, peft_folder: tuple[Path, nn.Module]) -> None:
    folder, model = peft_folder
    expected, before = tiny.run_unet(model), tiny.run_unet(pipe.unet)
    assert not torch.allclose(expected, before, atol=1e-3)
    pipe.load_shira(folder, "peft")
    assert pipe.list_shira() == {"peft": ["unet"]}
    assert torch.allclose(tiny.run_unet(pipe.unet), expected, atol=1e-4)
    pipe.unload_shira()
    assert torch.equal(tiny.run_unet(pipe.unet), before)
    file = next(folder.glob("*.safetensors"))
    for source in (file, load_file(file)):
        pipe.load_shira(source)
        assert torch.allclose(tiny.run_unet(pipe.unet), expected, atol=1e-4)
        pipe.unload_shira()


def test_an_adapter_of_peft_for_a_text_encoder(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    def read(encoder: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return encoder(torch.arange(1, 9)[None]).last_hidden_state

    model = get_peft_model(tiny.text_encoder(), ShiraConfig(r=2, target_modules=["q_proj", "fc2"]))
    peft_shira(model)
    model.save_pretrained(tmp_path / "peft")
    before, expected = read(pipe.text_encoder), read(model)
    assert not torch.allclose(expected, before, atol=1e-3)
    for source in (tmp_path / "peft", load_file(tmp_path / "peft" / "adapter_model.safetensors")):
        pipe.load_shira(source, "peft")
        assert pipe.list_shira() == {"peft": ["text_encoder"]}
        assert torch.allclose(read(pipe.text_encoder), expected, atol=1e-4)
        pipe.unload_shira()
    assert torch.equal(read(pipe.text_encoder), before)
    with shira_diffusers.AdapterLibrary(tmp_path, device="cpu") as library:
        library.set(pipe, {"peft": 1.0})
        assert torch.allclose(read(pipe.text_encoder), expected, atol=1e-4)


def two_transformers() -> WanPipeline:
    """Wan 2.2 in small: two transformers of one shape."""
    parts = {name: None for name in ("tokenizer", "text_encoder", "vae")}
    return WanPipeline(
        transformer=tiny.wan_transformer(),
        transformer_2=tiny.wan_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **parts,
    )


def peft_state(model: nn.Module, folder: Path, targets: Sequence[str], rank: int = 2) -> dict[str, torch.Tensor]:
    """Write a PEFT folder for a model; its tensors."""
    model = get_peft_model(model, ShiraConfig(r=rank, target_modules=list(targets)))
    peft_shira(model)
    model.save_pretrained(folder)
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("source", ["folder", "file", "state dict"])
def test_an_adapter_of_peft_for_the_second_transformer(tmp_path: Path, source: str) -> None:
    pipe = two_transformers()
    state = peft_state(tiny.wan_transformer(), tmp_path / "peft", ["attn1.to_q", "ffn.net.2"])
    given = {"folder": tmp_path / "peft", "file": tmp_path / "peft" / "adapter_model.safetensors", "state dict": state}
    given = given[source]
    message = r"fits several models: transformer, transformer_2; name the right one.*component='transformer_2'\)"
    assert_unchanged(pipe, lambda: pipe.load_shira(given), ShiraError, message)
    before = tiny.snapshot(pipe)
    pipe.load_shira(given, "a", component="transformer_2")
    assert pipe.list_shira() == {"a": ["transformer_2"]}
    now = tiny.snapshot(pipe)
    changed = [name for name, weight in before.items() if not torch.equal(weight, now[name])]
    assert changed
    assert all(name.startswith("transformer_2.") for name in changed)
    pipe.load_shira(given, "b", component="transformer")
    assert pipe.list_shira() == {"a": ["transformer_2"], "b": ["transformer"]}
    saved = pipe.save_shira(tmp_path / "ours", "a")  # which says what it is for
    pipe.load_shira(saved, "c")
    tiny.assert_same_bits(pipe, now)
    pipe.unload_shira()
    tiny.assert_same_bits(pipe, before)
    pipe.transformer = None  # one model left
    pipe.load_shira(given, "a")
    assert pipe.list_shira() == {"a": ["transformer_2"]}


def test_one_model_under_two_names_is_one(tmp_path: Path) -> None:
    pipe = two_transformers()
    pipe.transformer_2 = pipe.transformer
    pipe.load_shira(peft_state(tiny.wan_transformer(), tmp_path / "peft", ["attn1.to_q"]), "a")
    assert pipe.list_shira() == {"a": ["transformer"]}


def test_adapters_of_peft_for_both_text_encoders(tmp_path: Path) -> None:
    """SDXL's have layers of the same names: shapes tell them apart where they differ."""
    pipe = tiny.sdxl_pipeline()
    small = peft_state(tiny.text_encoder(), tmp_path / "small", ["q_proj", "fc1"])
    message = "fits several models: text_encoder, text_encoder_2;"
    assert_unchanged(pipe, lambda: pipe.load_shira(small), ShiraError, message)
    library = shira_diffusers.AdapterLibrary(tmp_path, device="cpu")
    assert_unchanged(pipe, lambda: library.set(pipe, {"small": 1.0}), ShiraError, message)
    library.close()
    pipe.load_shira(small, component="text_encoder_2")
    assert pipe.list_shira() == {"default_0": ["text_encoder_2"]}
    pipe.unload_shira()

    torch.manual_seed(3)
    config = tiny.text_config()
    config.hidden_size, config.intermediate_size = 48, 50
    pipe.text_encoder_2 = CLIPTextModelWithProjection(config)
    twin = CLIPTextModelWithProjection(config)
    large = peft_state(twin, tmp_path / "large", ["q_proj", "fc1"])
    for state, component in [(small, "text_encoder"), (large, "text_encoder_2")]:
        pipe.load_shira(state, "a")
        assert pipe.list_shira() == {"a": [component]}
        pipe.unload_shira()
    odd = {k: v[:3] if k.endswith("weight") else v[:, :3].contiguous() for k, v in small.items()}  # of any size
    assert_unchanged(pipe, lambda: pipe.load_shira(odd), ShiraError, message)


def test_bad_components(loaded: StableDiffusionPipeline, file: Path, tmp_path: Path) -> None:
    state = peft_state(tiny.unet(), tmp_path / "peft", ["to_q"])
    message = "component='transformer' is no model of this pipeline, which has vae, text_encoder, unet"
    for source in (state, file, load_adapter(file)):
        assert_unchanged(loaded, lambda s=source: loaded.load_shira(s, component="transformer"), ShiraError, message)
    mismatch = "layers are not in CLIPTextModel"
    assert_unchanged(loaded, lambda: loaded.load_shira(state, component="text_encoder"), AdapterMismatchError, mismatch)
    told = "component='unet', but the adapter's own names are for text_encoder, unet; leave component out"
    assert_unchanged(loaded, lambda: loaded.load_shira(file, component="unet"), ShiraError, told)


def test_an_adapter_of_a_bare_module_for_a_component(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    base, bare = tiny.snapshot(pipe), tiny.adapter_for(pipe.unet, 6)
    expected = reference.apply(base, {"a": bare.prefixed("unet")}, {"a": 1.0})
    path = save_adapter(bare, tmp_path / "bare.safetensors")
    for source in (bare, path, encode(bare)[0], bare.prefixed("unet")):
        pipe.load_shira(source, component="unet")
        tiny.assert_same_bits(pipe, expected)
        pipe.unload_shira()


def test_masks_of_peft_by_our_names(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    peft_state(tiny.unet(), tmp_path, ["to_q"])
    pipe.load_shira(tmp_path, "a")
    assert resident_of(pipe).adapter("a").metadata["mask"] == "rand"
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "mask_type": "my_mask"}))
    pipe.load_shira(tmp_path, "b")
    assert resident_of(pipe).adapter("b").metadata["mask"] == "my_mask"


def test_damaged_adapters_of_peft(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    model = get_peft_model(tiny.unet(), ShiraConfig(r=2, target_modules=["to_q"]))
    model.save_pretrained(tmp_path)
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    good, settings = load_file(weights), json.loads(config.read_text())
    key = next(k for k in good if k.endswith("shira_indices"))
    twice = good[key].clone()
    twice[:, 1] = twice[:, 0]
    cases = {
        "indices are missing": {k: v for k, v in good.items() if k != key},
        "duplicate": {**good, key: twice},
        "out of range": {**good, key: good[key] + 1000},
        "fractions or NaN": {**good, key: good[key].float() + 0.5},
        "indices are torch.float32": {**good, key: good[key].float() * torch.nan},
        "entries are out of range": {**good, key: torch.full_like(good[key], torch.inf, dtype=torch.float32)},
        "its values are missing": {k: v for k, v in good.items() if k != key.replace("indices", "weight")},
        r"indices \(1, ": {**good, key: good[key][:1].contiguous()},
        r"save it again without modules_to_save:[\s\S]*unknown key": {
            **good,
            "base_model.model.x.lora_A.weight": torch.ones(2, 2),
        },
        "not finite|NaN": {**good, key.replace("indices", "weight"): good[key][0].float() * torch.nan},
    }
    for message, tensors in cases.items():
        save_file(tensors, weights)
        assert_unchanged(pipe, lambda: pipe.load_shira(tmp_path, "x"), AdapterFormatError, message)
    save_file({**good, **{"base_model.model.nowhere.shira_weight": torch.ones(2), "x": torch.ones(1)}}, weights)
    assert_unchanged(pipe, lambda: pipe.load_shira(tmp_path, "x"), ShiraError, "x: unknown key")
    save_file({k.replace("attn1", "attn7"): v for k, v in good.items()}, weights)
    assert_unchanged(pipe, lambda: pipe.load_shira(tmp_path, "x"), AdapterMismatchError, "layers are not in UNet2D")
    save_file(good, weights)
    config.write_text(json.dumps({**settings, "peft_type": "LORA"}))
    assert_unchanged(pipe, lambda: pipe.load_shira(tmp_path, "x"), AdapterFormatError, "load_lora_weights")
    for text in ("{", "[" * 100_000):
        config.write_text(text)
        assert_unchanged(pipe, lambda: pipe.load_shira(tmp_path, "x"), AdapterFormatError, "is not JSON")
    config.write_text(json.dumps(settings))
    weights.unlink()
    assert_unchanged(pipe, lambda: pipe.load_shira(tmp_path, "x"), AdapterFormatError, "safe_serialization=True")


def test_indices_saved_on_windows_are_float(pipe: StableDiffusionPipeline) -> None:
    weight = pipe.unet.mid_block.attentions[0].proj_in.weight
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    base = pipe.unet.get_parameter(f"{layer}.weight").detach().clone()
    indices = torch.tensor([[3.0, 0.0], [5.0, 2.0]])
    pipe.load_shira({f"{layer}.shira_weight": torch.tensor([2.0, 1.0]), f"{layer}.shira_indices": indices})
    base[3, 5] += 2
    base[0, 2] += 1
    assert torch.equal(pipe.unet.get_parameter(f"{layer}.weight"), base)
    assert weight is pipe.unet.mid_block.attentions[0].proj_in.weight


# -------------------------------------------------------------------- the Hub


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hugging Face Hub as a download of one file needs."""

    files: dict[str, bytes]
    asked: list[tuple[str, str | None]]

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        token = self.headers.get("Authorization")
        self.asked.append((self.path, token))
        repo, _, rest = self.path.lstrip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        if (repo == "me/private" and token != "Bearer secret") or not repo.startswith("me/"):
            return self._refuse(401, "RepoNotFound" if repo != "me/private" else "GatedRepo")
        content = self.files.get(f"{repo}/{revision}/{name}")
        if content is None:
            return self._refuse(404, "EntryNotFound")
        self.send_response(200)
        self.send_header("X-Repo-Commit", hashlib.sha1(revision.encode()).hexdigest())
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Hub]]:
    """A hub on this machine, in the place of huggingface.co."""
    handler = type("LocalHub", (Hub,), {"files": {}, "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    template = address + "/{repo_id}/resolve/{revision}/{filename}"  # what HF_ENDPOINT sets at import
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield handler
    server.shutdown()
    server.server_close()
    thread.join()


def test_loading_from_the_hub(pipe: StableDiffusionPipeline, hub: type[Hub], file: Path, second: Path) -> None:
    base = tiny.snapshot(pipe)
    hub.files = {
        f"me/styles/main/{WEIGHTS_NAME}": file.read_bytes(),
        "me/styles/v2/inner/paintings.safetensors": second.read_bytes(),
        f"me/private/main/{WEIGHTS_NAME}": file.read_bytes(),
    }
    pipe.load_shira("me/styles", "bluefire")
    assert oracle(pipe, base, {"bluefire": 1.0})
    options = {"weight_name": "paintings.safetensors", "subfolder": "inner", "revision": "v2"}
    pipe.load_shira("me/styles", "paintings", **options)
    assert oracle(pipe, base, {"paintings": 1.0})
    pipe.unload_shira()
    pipe.load_shira("me/private", "bluefire", token="secret")
    assert oracle(pipe, base, {"bluefire": 1.0})
    pipe.unload_shira()
    asked = len(hub.asked)
    pipe.load_shira("me/styles", "bluefire", local_files_only=True)
    assert oracle(pipe, base, {"bluefire": 1.0})
    assert len(hub.asked) == asked
    pipe.load_shira("me/styles", "again", force_download=True, cache_dir=file.parent / "elsewhere")
    assert any((file.parent / "elsewhere").rglob(WEIGHTS_NAME))


def test_an_adapter_of_peft_from_the_hub(pipe: StableDiffusionPipeline, hub: type[Hub], tmp_path: Path) -> None:
    model = get_peft_model(tiny.unet(), ShiraConfig(r=2, target_modules=["to_q"]))
    peft_shira(model)
    model.save_pretrained(tmp_path / "peft")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        hub.files[f"me/peft/main/{name}"] = (tmp_path / "peft" / name).read_bytes()
    expected = tiny.run_unet(model.base_model.model)
    for options in ({}, {"local_files_only": True}, {"weight_name": "adapter_model.safetensors"}):
        pipe.load_shira("me/peft", **options)
        assert torch.allclose(tiny.run_unet(pipe.unet), expected, atol=1e-4)
        pipe.unload_shira()


def test_what_the_hub_does_not_have(loaded: StableDiffusionPipeline, hub: type[Hub]) -> None:
    hub.files = {"me/styles/main/other.safetensors": b""}
    for source, options, error, message in [
        ("me/styles", {}, FileNotFoundError, f"'me/styles' on the Hub has no {WEIGHTS_NAME} or adapter_model"),
        ("me/styles", {"weight_name": "x.safetensors"}, FileNotFoundError, "has no x.safetensors; give weight_name="),
        ("you/nothing", {}, OSError, "could not be read from the Hub"),
        ("me/private", {}, OSError, "the token for a private repository"),
        ("not a/repo/id", {}, FileNotFoundError, "no adapter at not a/repo/id"),
        ("me/other", {"local_files_only": True}, OSError, "could not be read from the Hub"),
    ]:
        assert_unchanged(
            loaded, lambda s=source, o=options: loaded.load_shira(s, "x", token=False, **o), error, message
        )


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A working folder with ``styles/gold.safetensors``, and a Hub that must not be asked."""

    def ask(*_: object, **__: object) -> str:
        raise AssertionError("asked the Hub")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", ask)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    save_adapter(tiny.adapter_for(tiny.pipeline(), 1), tmp_path / "styles" / "gold.safetensors")
    save_adapter(tiny.adapter_for(tiny.pipeline(), 1), tmp_path / "styles" / "bluefire")
    return tmp_path


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("styles/gols.safetensors", r"did you mean styles/gold\.safetensors\?"),
        ("styles/GOLD", r"did you mean styles/gold\.safetensors\?.*on the Hub, add revision='main'"),
        ("styles/blufire", r"did you mean styles/bluefire\?"),
        ("style/gold.safetensors", r"did you mean styles/gold\.safetensors\?"),
        ("style/gold.safetensor", r"did you mean styles\?"),
        ("nowhere/gold.safetensor", "no adapter at nowhere/gold.safetensor: expected"),
        ("nowhere/gold.SAFETENSORS", "no adapter at"),
        ("nowhere/gold.bin", "no adapter at"),
        ("styles", r"styles has no pytorch_shira_weights.safetensors; .*got gold\.safetensors"),
        ("style", r"did you mean styles\?"),
        ("./styles/gol", r"did you mean styles/gold\.safetensors\?"),
        ("~/styles/gol.safetensors", r"did you mean .+/styles/gold\.safetensors\?"),
        ("~nobody-at-all/gold.safetensors", "no adapter at ~nobody"),
        ("../gold", "no adapter at"),
        ("/nowhere/gold", "no adapter at /nowhere/gold: expected a .safetensors file"),
        ("styles\\gold", "no adapter at"),
        ("styles/", r"got gold\.safetensors"),
        ("styles/else", "the folder styles is here: for a repository of this name on the Hub, add revision='main'"),
        ("me/styles/gold.safetensors", "for a file on the Hub, give 'me/styles', weight_name='gold.safetensors'"),
        (
            "https://huggingface.co/me/styles/blob/v2/inner/gold.safetensors",
            "at https://hugg.*give 'me/styles', weight_name='inner/gold.safetensors', revision='v2'",
        ),
        ("https://huggingface.co/me/styles", "for what is at this address, give 'me/styles'$"),
    ],
)
def test_a_mistyped_path_is_answered_at_once(no_hub: Path, source: str, message: str) -> None:
    """Without the Hub, which takes half a minute when it cannot be reached; and with names that are much alike."""
    pipe = tiny.pipeline()
    if source in ("styles/", "styles"):
        save_adapter(tiny.adapter_for(pipe, 1), no_hub / "styles" / "other.safetensors")
    assert_unchanged(pipe, lambda: pipe.load_shira(source, "x"), FileNotFoundError, message)


def test_a_home_folder_is_found(no_hub: Path) -> None:
    pipe = tiny.pipeline()
    pipe.load_shira("~/styles/gold.safetensors", "gold")
    assert pipe.get_active_shira() == {"gold": 1.0}


@pytest.mark.parametrize(
    "options", [{"revision": "main"}, {"token": False}, {"cache_dir": "c"}, {"local_files_only": True}, None]
)
def test_a_folder_of_the_owners_name_does_not_hide_the_hub(
    no_hub: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object] | None
) -> None:
    """Where a keyword says that the Hub is meant, or the repository is in the cache."""
    asked: list[str] = []

    def ask(repo: str, name: str, **_: object) -> str:
        asked.append(repo)
        return str(no_hub / "styles" / "gold.safetensors")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", ask)
    if options is None:
        (no_hub / "cache" / "models--styles--x").mkdir(parents=True)
    tiny.pipeline().load_shira("styles/x", **(options or {}))
    tiny.pipeline().load_shira("me/styles.v1.5")
    assert asked == ["styles/x", "me/styles.v1.5"]


def test_no_network(loaded: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for options in ({}, {"weight_name": "x.safetensors"}):
        assert_unchanged(
            loaded,
            lambda o=options: loaded.load_shira("me/styles", "x", **o),
            OSError,
            "'me/styles' is no file or folder here, and could not be read from the Hub.*your connection",
        )
