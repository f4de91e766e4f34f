"""OnnxResident beside Resident: the same bits of every weight, whatever is done, and sessions that follow."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shira_diffusers import (
    AdapterFormatError,
    AdapterMismatchError,
    Resident,
    ResidentStateError,
    ShiraAdapter,
    ShiraError,
    SparseDelta,
    load_adapter,
)
from shira_diffusers.adapters.base_probes import probe_base
from shira_diffusers.edge import OnnxResident, session
from shira_diffusers.edge.adapter import read_adapter
from shira_diffusers.edge.exported import ExportedWeights
from tests import tiny
from tests.edge.conftest import DTYPES, one_thread

Open = Callable[..., OnnxResident]
Save = Callable[..., Path]
Export = Callable[[str], Path]
COMPONENTS = ("unet", "text_encoder")


def weights_of(resident: OnnxResident) -> dict[str, Tensor]:
    """Every weight as diffusers has it."""
    found = {}
    for part, model in resident._models.items():
        for name, array in model.weights.tensors.items():
            found[f"{part}.{name}"] = torch.from_numpy(array.T if name in model.weights.transposed else array)
    return found


def copied(resident: OnnxResident) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in weights_of(resident).items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    different = [name for name, weight in found.items() if not tiny.same_bits(weight, expected[name])]
    assert not different, f"differ: {different}"


def unet_feeds(dtype: str = "fp32") -> dict[str, Any]:
    chance, half = np.random.default_rng(0), {"fp32": np.float32, "fp16": np.float16}[dtype]
    sample, text = chance.standard_normal((1, 4, 8, 8)), chance.standard_normal((1, 16, 32))
    return {"sample": sample.astype(half), "timestep": np.array([10]), "encoder_hidden_states": text.astype(half)}


def zeros_of_each_sign(pipe: Any) -> ShiraAdapter:
    """Deltas of 0 and -0, and of what underflows, on biases of 0: the signs of zeros count too."""
    name = "unet.conv_in.bias"
    bias = dict(pipe.unet.named_parameters())["conv_in.bias"]
    values = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 6e-8, -6e-8, 3e-8])
    return ShiraAdapter({name: SparseDelta(torch.arange(7), values, tuple(bias.shape))})


def run_merged(edge: OnnxResident, folder: Path, feeds: dict[str, Any]) -> Any:
    """What a session computes that is built by ONNX Runtime alone, from a file of the weights as they are now."""
    weights = edge._models["unet"].weights
    shutil.copytree(weights.folder, folder)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: -weights.memory.nbytes] + weights.memory.tobytes())
    options = one_thread()
    options.log_severity_level = 3
    return ort.InferenceSession(str(folder / "model.onnx"), options).run(None, feeds)[0]


SCALES: tuple[Any, ...] = (
    1.0,
    -0.3,
    0,
    None,
    0.1,
    {"unet": 0.7},
    {"unet": {"down": 0.2, "mid": 1.5}},
    {"text_encoder": 0.4, "unet": {"up": [0.5, -1.0], "down": {"block_1": 2}}},
)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_sequence_gives_the_bits_of_resident(opened: Open, saved: Save, dtype: str) -> None:
    pipe, edge = tiny.pipeline(DTYPES[dtype]), opened(dtype, list(COMPONENTS))
    with torch.no_grad():
        for resident_bias in (pipe.unet.conv_in.bias, weights_of(edge)["unet.conv_in.bias"]):
            resident_bias[:7] = torch.tensor([0.0, -0.0, -0.0, 0.0, -0.0, 0.0, 1.0])
    before, chance = copied(edge), random.Random(0)
    other = Resident({part: getattr(pipe, part) for part in COMPONENTS})
    adapters = {
        "half": tiny.adapter_for(pipe, 1, dtype=torch.float16),
        "bf16": tiny.adapter_for(pipe, 2, dtype=torch.bfloat16, density=0.05),
        "full": tiny.adapter_for(pipe, 3, only=("",), size=1e-3),
        "zero": zeros_of_each_sign(pipe),
    }
    files = {name: saved(adapter, name) for name, adapter in adapters.items()}

    def both(act: Callable[[Any], object]) -> None:
        act(edge)
        act(other)

    for name, adapter in adapters.items():
        edge.add(files[name], name)
        other.add(adapter, name)
    for _ in range(40):
        known = edge.names
        fitting = {n: SCALES[:5] if n == "zero" else SCALES for n in known}
        mix = {n: chance.choice(fitting[n]) for n in chance.sample(known, chance.randint(0, len(known)))}
        action = chance.choice(["set"] * 5 + ["disable", "enable", "clear", "remove", "using"])
        if action == "set":
            both(lambda one, mix=mix: one.set(mix))
        elif action == "remove" and known:
            name = chance.choice(known)
            both(lambda one, name=name: one.remove(name))
            edge.add(files[name], name)
            other.add(adapters[name], name)
        elif action == "using":
            with edge.using(mix), other.using(mix):
                assert_same(weights_of(edge), tiny.snapshot(pipe))
        elif action != "remove":
            both(lambda one, action=action: getattr(one, action)())
        assert (edge.active, set(edge.names)) == (other.active, set(other.names))
        assert_same(weights_of(edge), tiny.snapshot(pipe))
    edge.clear()
    assert_same(weights_of(edge), before)
    assert edge.components["half"] == list(COMPONENTS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_session_computes_with_the_active_mix(opened: Open, saved: Save, tmp_path: Path, dtype: str) -> None:
    """As one that is built from the merged weights does, to the bit, and as torch does up to rounding."""
    edge, pipe = opened(dtype), tiny.pipeline()
    adapters = [tiny.adapter_for(pipe, seed, size=0.1) for seed in (1, 2)]
    for name, adapter in zip("ab", adapters, strict=True):
        edge.add(saved(adapter, name), name)
        pipe.load_shira(adapter, name, activate=False)
    the_same = edge.sessions["unet"]
    (base,) = edge.run("unet", unet_feeds(dtype))
    for mix in ({"a": 1.0}, {"a": 0.5, "b": -0.7}, {"b": 1.0}):
        edge.set(mix)
        pipe.set_shira(list(mix), list(mix.values()))
        (found,) = edge.run("unet", unet_feeds(dtype))
        assert edge.sessions["unet"] is the_same
        assert np.array_equal(found, run_merged(edge, tmp_path / "-".join(mix), unet_feeds(dtype)))
        given = [torch.from_numpy(each) for each in unet_feeds().values()]
        with torch.no_grad():
            expected = pipe.unet(*given).sample
        assert torch.allclose(torch.from_numpy(found).float(), expected, atol=1e-5 if dtype == "fp32" else 3e-2)
        assert not np.array_equal(found, base)
    edge.clear()
    assert np.array_equal(edge.run("unet", unet_feeds(dtype))[0], base)


def test_files_on_disk_stay_as_they_are(opened: Open, exported: Export, saved: Save) -> None:
    file = exported("fp32") / "unet" / "model.safetensors"
    before = file.read_bytes()
    edge = opened()
    edge.add(saved(tiny.adapter_for(tiny.pipeline())), "a")
    edge.set({"a": 1})
    assert file.read_bytes() == before


# ---------------------------------------------------------------- sessions that do not follow are refused


def with_constants(folder: Path, tmp_path: Path) -> Path:
    """The exported UNet as exporters write it: weights are constants, not the defaults of inputs."""
    shutil.copytree(folder / "unet", tmp_path / "constant" / "unet")
    file = str(tmp_path / "constant" / "unet" / "model.onnx")
    model = onnx.load(file, load_external_data=False)
    kept = [each for each in model.graph.input if each.name in ("sample", "timestep", "encoder_hidden_states")]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    onnx.save(model, file)
    return tmp_path / "constant"


def test_constant_weights_do_not_follow_and_are_refused(exported: Export, tmp_path: Path) -> None:
    folder = with_constants(exported("fp32"), tmp_path)
    weights = ExportedWeights(folder / "unet")
    stale = session.LiveSession(weights, one_thread, ["CPUExecutionProvider"])
    before = stale.run(unet_feeds())
    convolutions = [array for array in weights.tensors.values() if array.ndim == 4]
    for array in convolutions:
        array *= 2
    assert np.array_equal(stale.run(unet_feeds())[0], before[0])  # silently without effect
    with pytest.raises(ResidentStateError, match=r"208 of 208 weights of .*model\.onnx are constants.*CPUExecution"):
        OnnxResident(folder, ["unet"])


def test_prepacking_and_folding_cannot_reach_the_weights(exported: Export, saved: Save) -> None:
    def eager() -> ort.SessionOptions:
        options = one_thread()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "0")
        return options

    edge = OnnxResident(exported("fp32"), ["unet"], session_options=eager)
    (base,) = edge.run("unet", unet_feeds())
    for name, array in edge._models["unet"].weights.tensors.items():  # each weight by itself
        first = array.reshape(-1)[0].copy()
        array.reshape(-1)[0] = np.nan
        assert not np.array_equal(edge.run("unet", unet_feeds())[0], base), name
        array.reshape(-1)[0] = first
    assert np.array_equal(edge.run("unet", unet_feeds())[0], base)


def test_one_stale_weight_is_enough(exported: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session that computes with a copy of a single weight."""
    plain = session.LiveSession.__init__

    def copying(self: Any, weights: Any, *rest: Any) -> None:
        name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
        live = weights.tensors
        weights.tensors = {**live, name: live[name].copy()} if name in live else live
        plain(self, weights, *rest)
        weights.tensors = live

    monkeypatch.setattr(session.LiveSession, "__init__", copying)
    with pytest.raises(ResidentStateError, match=r"1 of 208 weights .*are copied(.|\n)*attn1\.to_q\.weight$"):
        OnnxResident(exported("fp32"), ["unet"])


def test_the_test_leaves_every_bit(opened: Open) -> None:
    assert_same(weights_of(opened("fp16")), tiny.snapshot(tiny.pipeline(torch.float16)))


# ---------------------------------------------------------------- bad input changes nothing


@pytest.fixture
def edge(opened: Open, saved: Save) -> OnnxResident:
    """Two adapters, one of them active."""
    found = opened("fp16", list(COMPONENTS))
    for seed, name in enumerate("ab"):
        found.add(saved(tiny.adapter_for(tiny.pipeline(), seed), name), name)
    found.set({"a": 0.5})
    return found


def wide(pipe: Any) -> ShiraAdapter:
    """Sums in the text encoder that float16 cannot hold; in the UNet, which comes later, none."""
    plain = tiny.adapter_for(pipe, 5)
    name = next(name for name in plain.deltas if name.startswith("unet"))
    delta = plain.deltas[name]
    return ShiraAdapter({**plain.deltas, name: SparseDelta(delta.indices, delta.values * 1e6, delta.shape)})


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ({"b": 1, "c": 1}, "no adapter named 'c', loaded are 'a', 'b'"),
        ({"a": float("nan")}, "the weight of adapter 'a' must be a finite number"),
        ({"a": {"vae": 1}}, "'vae': no such component in this adapter"),
        ({"a": {"unet": {"down": [1, 2]}}}, r"expected 1 numbers"),
        (["a"], "expected the mix as"),
    ],
)
def test_a_wrong_mix_changes_nothing(edge: OnnxResident, mix: Any, message: str) -> None:
    before = copied(edge)
    with pytest.raises(ShiraError, match=message):
        edge.set(mix)
    assert edge.active == {"a": 0.5}
    assert_same(weights_of(edge), before)


def test_sums_out_of_range_are_refused_and_all_components_put_back(edge: OnnxResident, saved: Save) -> None:
    edge.add(saved(wide(tiny.pipeline()), "wide"), "wide")
    before = copied(edge)
    for mix in ({"wide": 1}, {"a": 1, "wide": 1}):
        with pytest.raises(ShiraError, match=r"1 weight would become infinite or NaN.*range of float16(.|\n)*unet\."):
            edge.set(mix)
        assert edge.active == {"a": 0.5}
        assert_same(weights_of(edge), before)
    edge.clear()
    assert_same(weights_of(edge), tiny.snapshot(tiny.pipeline(torch.float16)))


def test_weights_modified_by_others_are_named(edge: OnnxResident) -> None:
    model = edge._models["unet"]
    position = int(model.adapters["a"].positions[0])
    kept = model.weights.memory[position]
    model.weights.memory[position] = 123
    before = copied(edge)
    for act in (edge.clear, edge.disable, lambda: edge.set({"b": 1}), lambda: edge.remove("a")):
        with pytest.raises(ResidentStateError, match=r"1 weight was modified outside shira_diffusers(.|\n)*unet\.down"):
            act()
        assert (edge.active, edge.names) == ({"a": 0.5}, ["a", "b"])
        assert_same(weights_of(edge), before)
    model.weights.memory[position] = kept
    edge.clear()
    assert_same(weights_of(edge), tiny.snapshot(tiny.pipeline(torch.float16)))


def test_an_error_inside_using_brings_the_mix_back(edge: OnnxResident) -> None:
    before = copied(edge)
    with pytest.raises(ZeroDivisionError), edge.using({"b": 1}):
        assert edge.active == {"b": 1}
        raise ZeroDivisionError
    assert edge.active == {"a": 0.5}
    assert_same(weights_of(edge), before)


def test_an_adapter_removed_inside_using_stays_removed(edge: OnnxResident) -> None:
    base = tiny.snapshot(tiny.pipeline(torch.float16))
    edge.set({"a": 0.5, "b": 1})
    with edge.using({"b": 1}):
        only_b = copied(edge)
        edge.remove("a")
    assert (edge.active, edge.names) == ({"b": 1}, ["b"])
    assert_same(weights_of(edge), only_b)
    edge.disable()
    with edge.using({"b": 0.5}):
        edge.remove("b")
    edge.enable()
    assert (edge.active, edge.names) == ({}, [])
    assert_same(weights_of(edge), base)


def test_disable_and_enable_are_idempotent(edge: OnnxResident) -> None:
    mixed = copied(edge)
    for _ in range(2):
        edge.disable()
        assert edge.active == {}
    for _ in range(2):
        edge.enable()
        assert edge.active == {"a": 0.5}
        assert_same(weights_of(edge), mixed)


def test_adapters_that_do_not_fit_are_refused(edge: OnnxResident, saved: Save, tmp_path: Path) -> None:
    pipe = tiny.pipeline()
    own = tiny.adapter_for(pipe)
    name, delta = next((n, d) for n, d in own.deltas.items() if n.startswith("unet"))
    misshapen = {**own.deltas, name: SparseDelta(delta.indices, delta.values, (*delta.shape, 1))}
    doubled = tiny.adapter_for(pipe, only=("q_proj",))
    twice = ShiraAdapter({**doubled.deltas, **doubled.part("text_encoder").prefixed("text_encoder.text_model").deltas})
    cases: list[tuple[ShiraAdapter, str]] = [
        (
            ShiraAdapter(misshapen, {"base_model": "x"}),
            r"1 of \d+ parameters differs; it was trained on 'x'.*\n.*expected",
        ),
        (own.renamed({name: "unet.lost.weight"}), "lost.weight: no such parameter"),
        (tiny.adapter_for(pipe.vae).prefixed("vae"), "no such parameter in the exported models, which are"),
        (twice, "means the same parameter as another name"),
    ]
    before, names = copied(edge), edge.names
    for k, (adapter, message) in enumerate(cases):
        with pytest.raises(AdapterMismatchError, match=message):
            edge.add(saved(adapter, f"wrong{k}"), "new")
    with pytest.raises(ShiraError, match="adapter name 'a' is in use"):
        edge.add(saved(own, "again"), "a")
    with pytest.raises(ShiraError, match="must be a string that is not empty"):
        edge.add(saved(own, "again"), "")
    with pytest.raises(FileNotFoundError, match="no adapter at"):
        edge.add(tmp_path / "nothing.safetensors", "new")
    assert edge.names == names
    assert_same(weights_of(edge), before)


def test_names_of_both_kinds_of_text_encoder_fit(opened: Open, saved: Save) -> None:
    edge, own = opened("fp32", ["text_encoder"]), tiny.adapter_for(tiny.text_encoder())
    expected = {}
    for prefix in ("text_encoder", "text_encoder.text_model"):
        edge.add(saved(own.prefixed(prefix), prefix), prefix)
        edge.set({prefix: 1})
        expected[prefix] = copied(edge)
    assert_same(*expected.values())


def test_another_base_gives_a_warning_whatever_is_active(opened: Open, saved: Save) -> None:
    edge, pipe = opened("fp16", list(COMPONENTS)), tiny.pipeline()
    plain = tiny.adapter_for(pipe)
    fitting = ShiraAdapter(plain.deltas, plain.metadata, probe_base(plain.deltas, tiny.weights_of(pipe)))
    other = {name: torch.randn_like(weight) for name, weight in tiny.weights_of(pipe).items()}
    strange = ShiraAdapter(plain.deltas, plain.metadata, probe_base(plain.deltas, other))
    edge.add(saved(fitting, "fitting"), "fitting")
    edge.set({"fitting": 1})
    edge.add(saved(fitting, "again"), "again")
    with pytest.warns(UserWarning, match="was trained on another model than this one; it was trained on 'tiny'"):
        edge.add(saved(strange, "strange"), "strange")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"transposed": 3}, r"model.json is damaged \(TypeError: 'int' object is not iterable\); export"),
        ({"blocks": None}, r"model.json is damaged \(AttributeError"),
        ({"inputs": {}}, r"do not belong together \(KeyError: 'sample'\); export the model again"),
        (
            {"inputs": {"sample": [1, 1, 8, 8], "timestep": [1], "encoder_hidden_states": [1, 16, 32]}},
            r"together \(\w+: ",
        ),
        ("weight", "do not belong together .the weights lack conv_in.bias.; export the model again"),
    ],
    ids=["transposed", "blocks", "inputs", "shapes", "weight"],
)
def test_files_of_different_exports_are_refused(
    exported: Export, tmp_path: Path, damage: dict[str, Any] | str, message: str
) -> None:
    """Without a weight of its own the graph would read other bytes of the file in its place."""
    folder = tmp_path / "export" / "unet"
    shutil.copytree(exported("fp32") / "unet", folder)
    if isinstance(damage, dict):
        about = json.loads((folder / "model.json").read_text())
        (folder / "model.json").write_text(json.dumps(about | damage))
    else:
        state = load_file(folder / "model.safetensors")
        del state["conv_in.bias"]
        save_file(state, folder / "model.safetensors")
    with pytest.raises(ShiraError, match=message):
        OnnxResident(tmp_path / "export", session_options=one_thread)


def test_wrong_arguments_are_refused(exported: Export) -> None:
    for components in ("unet", []):
        with pytest.raises(ShiraError, match="expected a list of some of text_encoder, unet, vae as components, got"):
            OnnxResident(exported("fp32"), components)
    with pytest.raises(ShiraError, match="expected a function that makes session_options anew"):
        OnnxResident(exported("fp32"), ["unet"], session_options=ort.SessionOptions())


def test_a_model_that_is_not_open_cannot_run(opened: Open) -> None:
    with pytest.raises(ShiraError, match=r"^no component named 'vae', expected one of 'text_encoder', 'unet'$"):
        opened("fp32", ["text_encoder", "unet"]).run("vae", {})


def test_what_is_no_export_is_refused(tmp_path: Path, exported: Export) -> None:
    with pytest.raises(ShiraError, match=r"no exported models in .*expected a folder that shira export-onnx wrote"):
        OnnxResident(tmp_path)
    with pytest.raises(ShiraError, match=r"nothing is not an exported model.*write it with shira export-onnx"):
        OnnxResident(exported("fp32"), ["nothing"])
    folder = tmp_path / "unet"
    folder.mkdir()
    for name in ("model.json", "model.safetensors"):
        (folder / name).write_bytes((exported("fp32") / "unet" / name).read_bytes())
    (folder / "model.onnx").write_bytes(b"no model")
    with pytest.raises(ShiraError, match=r"ONNX Runtime [\d.]+ cannot load .*model\.onnx"):
        OnnxResident(tmp_path)
    (folder / "model.json").write_text('{"format": "shira-onnx", "format_version": "9"}')
    with pytest.raises(ShiraError, match=r"is of format .*'9'.*export the model again"):
        OnnxResident(tmp_path)


# ---------------------------------------------------------------- files read without torch


@pytest.mark.parametrize("file", sorted(Path("tests/formats/golden").glob("*.safetensors")), ids=lambda path: path.stem)
def test_a_file_is_read_as_torch_reads_it(file: Path) -> None:
    found, expected = read_adapter(file), load_adapter(file)
    assert list(found.deltas) == list(expected.deltas) and found.metadata == expected.metadata
    for name, delta in expected.deltas.items():
        own = found.deltas[name]
        assert own.shape == delta.shape
        assert torch.equal(torch.from_numpy(own.indices), delta.indices)
        assert tiny.same_bits(torch.from_numpy(own.values.to_float32()), delta.values.float())
    assert found.base_probes.keys() == expected.base_probes.keys()
    for name, probe in expected.base_probes.items():
        assert tiny.same_bits(torch.from_numpy(found.base_probes[name].to_float32()), probe.float())


def test_a_damaged_file_is_refused(saved: Save) -> None:
    file = saved(tiny.adapter_for(tiny.unet()))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(AdapterFormatError):
        read_adapter(file)
