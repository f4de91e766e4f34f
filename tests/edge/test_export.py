"""What ``export_onnx`` writes: names, bits, and models that compute what diffusers computes."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file

from shira_diffusers import ShiraError
from shira_diffusers.edge import OnnxResident
from shira_diffusers.edge.export import export_onnx
from tests import tiny
from tests.edge.conftest import DTYPES

Export = Callable[[str], Path]
Open = Callable[..., OnnxResident]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("component", ["unet", "text_encoder", "vae"])
def test_each_weight_has_its_name_and_bits(exported: Export, dtype: str, component: str) -> None:
    folder = exported(dtype) / component
    weights, about = load_file(folder / "model.safetensors"), json.loads((folder / "model.json").read_text())
    model = tiny.modules_of(tiny.pipeline(DTYPES[dtype]))[component]
    of_encoder = ("encoder.", "quant_conv.") if component == "vae" else ("nothing",)
    parameters = {name: own for name, own in model.named_parameters() if not name.startswith(of_encoder)}
    assert weights.keys() == parameters.keys()
    assert about["transposed"] and set(about["transposed"]) < set(weights)
    for name, own in parameters.items():
        found = weights[name].T if name in about["transposed"] else weights[name]
        assert tiny.same_bits(found, own), name


def test_the_graph_holds_no_weights_and_transposes_none(exported: Export) -> None:
    graph = onnx.load(str(exported("fp32") / "unet" / "model.onnx"), load_external_data=False).graph
    names = set(load_file(exported("fp32") / "unet" / "model.safetensors"))
    assert {each.name for each in graph.initializer} == names
    assert all(each.data_location == onnx.TensorProto.EXTERNAL for each in graph.initializer)
    assert {each.name for each in graph.input} == names | {"sample", "timestep", "encoder_hidden_states"}
    assert not [node for node in graph.node if node.op_type == "Transpose" and node.input[0] in names]


@pytest.mark.parametrize(("dtype", "close"), [("fp32", 1e-5), ("fp16", 2e-2)])
@pytest.mark.parametrize(("batch", "side"), [(1, 8), (3, 16)])
def test_models_compute_what_diffusers_computes(opened: Open, dtype: str, close: float, batch: int, side: int) -> None:
    resident, pipe = opened(dtype), tiny.pipeline()
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(batch, 4, side, side, generator=generator)
    ids, times = torch.randint(0, 54, (batch, 16), generator=generator), torch.full((batch,), 321)
    with torch.no_grad():
        text = pipe.text_encoder(ids)[0]
        noise, picture = pipe.unet(sample, times, text).sample, pipe.vae.decode(sample).sample
    half = {"fp32": np.float32, "fp16": np.float16}[dtype]
    feeds = {
        "sample": sample.numpy().astype(half),
        "timestep": times.numpy(),
        "encoder_hidden_states": text.numpy().astype(half),
    }
    for component, given, expected in (
        ("text_encoder", {"input_ids": ids.numpy()}, text),
        ("unet", feeds, noise),
        ("vae", {"latents": sample.numpy().astype(half)}, picture),
    ):
        (found,) = resident.run(component, given)
        assert found.dtype == half
        assert torch.allclose(torch.from_numpy(found).float(), expected, atol=close * expected.abs().max().item())


def test_blocks_are_those_of_the_unet(exported: Export) -> None:
    about = json.loads((exported("fp32") / "unet" / "model.json").read_text())
    assert about["blocks"] == {"down": [1, 1], "mid": [1], "up": [2, 2]}


def test_what_cannot_be_exported_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ShiraError, match=r"StableDiffusionXLPipeline.*expected a StableDiffusionPipeline"):
        export_onnx(tiny.sdxl_pipeline(), tmp_path / "xl")
    with pytest.raises(ShiraError, match=r"torch\.bfloat16, expected all in float32 or all in float16"):
        export_onnx(tiny.pipeline(torch.bfloat16), tmp_path / "bf16")
    pipe = tiny.pipeline()
    pipe.vae.half()
    with pytest.raises(ShiraError, match=r"torch\.float16, torch\.float32, expected all"):
        export_onnx(pipe, tmp_path / "mixed")
    (tmp_path / "old").mkdir()
    with pytest.raises(ShiraError, match="exists, expected a new folder"):
        export_onnx(pipe, tmp_path / "old")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_an_export_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.pipeline()
    monkeypatch.setattr(type(pipe.tokenizer), "save_pretrained", lambda *_: 1 / 0)
    before = pipe.text_encoder.config._attn_implementation
    with pytest.raises(ZeroDivisionError):
        export_onnx(pipe, tmp_path / "new")
    assert not list(tmp_path.iterdir())
    assert pipe.text_encoder.config._attn_implementation == before
