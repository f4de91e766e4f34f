"""``shira bake``, ``export-peft``, ``diff`` and ``train``: what they say, as text and as JSON, and how they fail."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import PeftModel
from PIL import Image

from shira_diffusers import Resident, ShiraAdapter, SparseDelta, load_adapter, save_adapter
from shira_diffusers.adapters.base_probes import probe_base
from shira_diffusers.adapters.interference import interference
from shira_diffusers.cli.__main__ import main
from shira_diffusers.formats.compare import compare_adapters
from shira_diffusers.formats.shira_file import encode
from tests import tiny
from tests.cli.conftest import Run
from tests.warm import UNLOADED, python

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def adapters() -> dict[str, ShiraAdapter]:
    """Of Linear layers only, with components and without; one of convolutions too."""
    pipe = tiny.pipeline()
    linear = ("to_q", "to_v", "q_proj")
    first = tiny.adapter_for(pipe, 0, only=linear, density=0.05)
    return {
        "first": first.with_metadata(mask="rand"),
        "second": tiny.adapter_for(pipe, 1, only=("to_q", "to_k"), density=0.5, dtype=torch.bfloat16),
        "unet": tiny.adapter_for(pipe, 2, only=("to_q",), density=0.05, components=("unet",)),
        "convolutions": tiny.adapter_for(pipe, 3, only=("to_q", "conv1"), density=0.05, components=("unet",)),
        "bare": tiny.adapter_for(pipe.unet, 4, only=("to_q",), density=0.05),
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, adapters: dict[str, ShiraAdapter]) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: save_adapter(adapter, folder / f"{name}.safetensors") for name, adapter in adapters.items()}


def assert_fails(result: tuple[int, str, str], message: str) -> None:
    status, out, err = result
    assert (status, out) == (1, "")
    assert err.startswith("error: ") and message in err and err.count("\n") == 1, err


# -------------------------------------------------------------------- bake


def test_bake(run: Run, files: dict[str, Path], adapters: dict[str, ShiraAdapter], base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    status, told, err = run("bake", base, f"{files['second']}=-0.5", files["first"], "-o", out)
    assert (status, err) == (0, "")
    count = len(adapters["first"].deltas.keys() | adapters["second"].deltas.keys())
    assert told == f"wrote {out}: {count} weights in 2 files changed by second -0.5, first 1\n"
    pipe = tiny.pipeline()
    pipe.load_shira(adapters["first"], "first")
    pipe.load_shira(adapters["second"], "second")
    pipe.set_shira({"first": 1.0, "second": -0.5})
    tiny.assert_same_bits(StableDiffusionPipeline.from_pretrained(out), tiny.snapshot(pipe))
    assert_fails(run("bake", base, files["first"], "-o", out), f"{out} exists, expected a new folder")


def test_bake_for_programs_and_remarks(run: Run, adapters: dict[str, ShiraAdapter], base: Path, tmp_path: Path) -> None:
    deltas = adapters["unet"].deltas
    probes = probe_base(deltas, tiny.weights_of(tiny.pipeline()))
    other = ShiraAdapter(deltas, {}, {name: probe.flip(0) + 1 for name, probe in probes.items()})
    file = save_adapter(other, tmp_path / "a=b.safetensors")
    (tmp_path / "base").mkdir()
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    (tmp_path / "base" / weights.name).write_bytes(weights.read_bytes())
    (tmp_path / "base" / "model.bin").write_bytes(b"x")
    status, told, err = run("bake", base, file, "--json", "-o", tmp_path / "out")
    assert status == 0
    assert json.loads(told) == {
        "output": str(tmp_path / "out"),
        "mix": {"a=b": 1.0},
        "weights": len(deltas),
        "files": ["unet/diffusion_pytorch_model.safetensors"],
        "left_out": [],
        "strangers": ["a=b"],
    }
    assert err == f"note: adapter a=b was trained on another model than {base}; expect poor pictures\n"
    bare = save_adapter(other.part("unet"), tmp_path / "bare.safetensors")
    assert (
        "note: left out model.bin, weights without the mix\n"
        in run("bake", tmp_path / "base", bare, "-o", tmp_path / "o")[2]
    )


def test_bake_fails_in_one_line(run: Run, files: dict[str, Path], base: Path, tmp_path: Path) -> None:
    assert_fails(run("bake", base, tmp_path / "none", "-o", tmp_path / "out"), "no adapter at")
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    assert_fails(run("bake", base, tmp_path / "loop.safetensors", "-o", tmp_path / "out"), "no adapter at")
    (tmp_path / "loop.safetensors").unlink()
    assert_fails(run("bake", base, files["bare"], "-o", tmp_path / "out"), "no such tensor")
    for strength in ("nan", "inf"):
        message = f"the weight of adapter 'first' must be a finite number, got {strength}\n"
        assert_fails(run("bake", base, f"{files['first']}={strength}", "-o", tmp_path / "out"), message)
    assert_fails(run("bake", tmp_path / "x", files["first"], "-o", tmp_path / "out"), "no checkpoint at")
    assert not any(tmp_path.iterdir())


# -------------------------------------------------------------------- export-peft


def test_export_peft(run: Run, files: dict[str, Path], adapters: dict[str, ShiraAdapter], tmp_path: Path) -> None:
    """One model alone goes into the folder, several into folders of their own."""
    alone, bare, both = (tmp_path / name for name in ("alone", "bare", "both"))
    count = len(adapters["unet"].deltas)
    assert run("export-peft", files["unet"], "-o", alone) == (0, f"wrote {alone}: {count} layers of unet, r = 2\n", "")
    assert run("export-peft", files["bare"], "-o", bare) == (0, f"wrote {bare}: {count} layers, r = 2\n", "")
    status, told, err = run("export-peft", files["first"], "--json", "-o", both)
    assert (status, err) == (0, "")
    assert [fact["component"] for fact in json.loads(told)["written"]] == ["text_encoder", "unet"]
    for name, folder in (("unet", alone), ("bare", bare), ("first", both / "unet")):
        model = PeftModel.from_pretrained(tiny.unet(), folder)
        resident = Resident(ours := tiny.unet())
        resident.add(adapters[name] if name == "bare" else adapters[name].part("unet"), name)
        resident.set({name: 1.0})
        assert torch.equal(tiny.run_unet(model), tiny.run_unet(ours)), name
    encoder, words = tiny.text_encoder(), torch.tensor([[52, 3, 7, 53]])
    resident = Resident(encoder)
    resident.add(adapters["first"].part("text_encoder"), "first")
    resident.set({"first": 1.0})
    model = PeftModel.from_pretrained(tiny.text_encoder(), both / "text_encoder")
    with torch.no_grad():
        assert torch.equal(model(words).last_hidden_state, encoder(words).last_hidden_state)


def test_export_peft_of_convolutions(run: Run, files: dict[str, Path], tmp_path: Path) -> None:
    file, out = files["convolutions"], tmp_path / "out"
    assert_fails(
        run("export-peft", file, "-o", out), "weights of this adapter are of other layers; leave them out (shira"
    )
    assert not any(tmp_path.iterdir())
    status, told, err = run("export-peft", file, "--partial", "--json", "-o", out)
    left_out = json.loads(told)["left_out"]
    assert status == 0 and left_out and all(".conv1.weight" in name for name in left_out)
    assert err.splitlines() == [f"note: left out {name}, which is no Linear layer's" for name in left_out]


def test_names_that_begin_like_a_component(run: Run, tmp_path: Path) -> None:
    delta = SparseDelta(torch.tensor([0]), torch.ones(1), (8, 8))
    file = save_adapter(ShiraAdapter({"transformer.h.0.weight": delta}), tmp_path / "gpt.safetensors")
    for flag, of in (("--bare", ""), ("--partial", " of transformer")):
        out = tmp_path / flag
        assert run("export-peft", file, flag, "-o", out)[1] == f"wrote {out}: 1 layer{of}, r = 1\n"


def test_export_peft_of_other_components(run: Run, tmp_path: Path) -> None:
    """An autoencoder is one that PEFT takes; of names that no component is known for nothing is written."""
    pipe = tiny.pipeline()
    adapter = tiny.adapter_for(pipe, only=("to_q",), density=0.05, components=("unet", "vae"))
    file, out = save_adapter(adapter, tmp_path / "a.safetensors"), tmp_path / "out"
    told = json.loads(run("export-peft", file, "--json", "-o", out)[1])["written"]
    assert [fact["component"] for fact in told] == ["unet", "vae"]
    model = PeftModel.from_pretrained(tiny.autoencoder(), out / "vae")
    pipe.load_shira(adapter)
    picture = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(model(picture).sample, pipe.vae(picture).sample)
    others = adapter.part("unet").prefixed("unet").deltas | adapter.part("vae").prefixed("movq").deltas
    file = save_adapter(ShiraAdapter(others), tmp_path / "b.safetensors")
    assert_fails(
        run("export-peft", file, "-o", tmp_path / "no"),
        "begin with unet and others with movq, expected components of unet, ",
    )
    assert not (tmp_path / "no").exists()
    assert run("export-peft", file, "--bare", "-o", tmp_path / "bare")[0] == 0


# -------------------------------------------------------------------- diff


def test_diff(run: Run, files: dict[str, Path], adapters: dict[str, ShiraAdapter]) -> None:
    one, other = adapters["first"], adapters["second"]
    status, told, err = run("diff", files["first"], files["second"], "--json")
    found, expected = json.loads(told), interference(one, other)
    assert (status, err) == (0, "")
    assert found["files"] == [str(files["first"]), str(files["second"])]
    assert found["components"] == [["text_encoder", "unet"], ["unet"]]
    assert found["only"] == [sorted(one.deltas.keys() - other.deltas), sorted(other.deltas.keys() - one.deltas)]
    assert found["metadata"] == {
        "density": [f"{one.density:.6g}", f"{other.density:.6g}"],
        "mask": ["rand", None],
    }
    assert not found["same_weights"]
    whole = found["whole"]
    assert whole["entries"] == [one.nnz, other.nnz]
    assert whole["overlap"] == expected.overlap > 0
    assert whole["sign_conflict"] == expected.sign_conflict > 0
    assert whole["distance"] == pytest.approx(expected.l2, rel=1e-12)
    norms = [sum(float(d.values.double().square().sum()) for d in each.deltas.values()) ** 0.5 for each in (one, other)]
    assert whole["norms"] == pytest.approx(norms, rel=1e-12)
    assert found["weights"].keys() == one.deltas.keys() & other.deltas.keys()


def test_diff_for_people(run: Run, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    status, told, err = run("diff", files["first"], files["second"])
    assert (status, err) == (0, "")
    lines = told.splitlines()
    assert lines[:4] == [f"A  {files['first']}", f"B  {files['second']}", "", "result      other weights"]
    assert any(line.endswith("attn1.to_v.weight (only in A)") for line in lines)
    assert any(line.endswith("attn1.to_k.weight (only in B)") for line in lines)
    assert "mask      rand" in told
    monkeypatch.setattr("shira_diffusers.cli.diff.SHORTENED", 2)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert "more weights; list them with --all\n" in run("diff", files["first"], files["second"])[1]


def test_diff_of_equal_weights(
    run: Run, files: dict[str, Path], adapters: dict[str, ShiraAdapter], tmp_path: Path
) -> None:
    """Whatever the dtype, the version of the format and the metadata."""
    from safetensors.torch import save_file

    tensors, header = encode(adapters["second"].astype(torch.float32).with_metadata(mask="struct"))
    save_file(tensors, tmp_path / "old.safetensors", header)
    found = compare_adapters(files["second"], tmp_path / "old.safetensors")
    assert found.same_weights and list(found.metadata) == ["mask"]
    assert "result      the same weights\n" in run("diff", files["second"], tmp_path / "old.safetensors")[1]


def test_diff_counts_by_hand(run: Run, tmp_path: Path) -> None:
    def adapter(indices: list[int], values: list[float], shape: tuple[int, int] = (2, 4)) -> SparseDelta:
        return SparseDelta(torch.tensor(indices), torch.tensor(values), shape)

    one = {"u.a": adapter([0, 2, 5], [1.0, 2.0, -3.0]), "u.b": adapter([1], [1.0]), "u.c": adapter([1], [2.0])}
    other = {"u.a": adapter([2, 5, 7], [2.0, 3.0, 4.0]), "u.b": adapter([1], [1.0], (4, 2))}
    paths = [save_adapter(ShiraAdapter(d), tmp_path / f"{i}.safetensors") for i, d in enumerate((one, other))]
    found = compare_adapters(*paths).as_dict()
    weight = found["weights"]["u.a"]
    assert (weight["entries"], weight["shared"], weight["equal"]) == ([3, 3], 2, 1)
    assert (weight["overlap"], weight["sign_conflict"]) == (2 / 3, 0.5)
    assert weight["distance"] == pytest.approx((1 + 36 + 16) ** 0.5)
    assert found["shapes"] == {"u.b": ((2, 4), (4, 2))}
    assert found["only"] == (["u.c"], [])
    assert found["whole"]["entries"] == [5, 4]
    assert found["whole"]["distance"] == pytest.approx((53 + 1 + 1 + 4) ** 0.5)
    assert "u.b (2 x 4 in A, 4 x 2 in B)" in run("diff", *paths)[1]


def test_diff_fails_in_one_line(run: Run, files: dict[str, Path], tmp_path: Path) -> None:
    peft, cut = tmp_path / "peft", tmp_path / "cut.safetensors"
    run("export-peft", files["unet"], "-o", peft)
    cut.write_bytes(files["unet"].read_bytes()[:-3])
    assert_fails(run("diff", files["first"], peft), "is PEFT's, which stores no shapes to compare")
    assert_fails(run("diff", cut, files["first"]), "damaged or truncated")
    assert_fails(run("diff", files["first"], tmp_path / "none"), "no adapter at")


# -------------------------------------------------------------------- loading only what is needed

LIGHT = """
import sys, shira_command
try:
    status = shira_command.main(sys.argv[1:])
except SystemExit as end:
    status = end.code
print(status, sorted({"torch", "diffusers", "transformers"} & sys.modules.keys()))
"""


def test_diff_and_help_load_no_torch(files: dict[str, Path]) -> None:
    for argv in (["diff", files["first"], files["second"]], ["bake", "--help"], ["export-peft", "--help"], ["--help"]):
        command = [sys.executable, "-c", LIGHT, *map(str, argv)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "0 []", done.stderr


# -------------------------------------------------------------------- train


@pytest.mark.parametrize(
    ("command", "program"),
    [
        (["-c", f"{UNLOADED}\nimport shira_command\nshira_command.main(sys.argv[1:])", "train"], "shira train"),
        (["train_dreambooth_shira.py"], "train_dreambooth_shira.py"),
    ],
    ids=["shira train", "script"],
)
def test_train_is_the_script(command: list[str], program: str) -> None:
    done = subprocess.run(python(*command, "--help"), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: {program} --pretrained_model_name_or_path BASE")
    assert "--instance_prompt" in done.stdout and "--json" in done.stdout
    assert f"examples:\n  {program} --pretrained_model_name_or_path ./my-model" in done.stdout


def test_train_ends_with_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Wrong flags end with 2 and the program's name, wrong settings with 1."""
    with pytest.raises(SystemExit) as left:
        main(["train", "--fly"])
    assert left.value.code == 2
    assert "shira train --help lists all flags\n" in capsys.readouterr().err
    flags = ["--pretrained_model_name_or_path", "x", "--instance_data_dir", str(tmp_path), "--instance_prompt", "a dog"]
    assert main(["train", *flags, "--density", "3"]) == 1
    assert "error: training settings are wrong (1)" in capsys.readouterr().err


def test_train_for_programs(run: Run, base: Path, tmp_path: Path) -> None:
    Image.new("RGB", (tiny.SIZE, tiny.SIZE), "red").save(tmp_path / "red.png")
    flags = ["--pretrained_model_name_or_path", base, "--instance_data_dir", tmp_path, "--instance_prompt", "a dog"]
    flags += ["--resolution", tiny.SIZE, "--max_train_steps", 1, "--output_dir", tmp_path / "out"]
    status, told, _ = run("train", *flags, "--json")
    written = tmp_path / "out" / "pytorch_shira_weights.safetensors"
    expected = {"output": str(written), "entries": load_adapter(written).nnz, "bytes": written.stat().st_size}
    assert (status, json.loads(told)) == (0, expected)
    assert "json" not in (tmp_path / "out" / "README.md").read_text()


def test_train_is_among_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert "train an adapter from a few pictures" in shown


def test_serve_for_programs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard output holds the address alone, once the service is ready."""

    def serve(
        given: dict[str, str], host: str, port: int, report: Callable[[str], object], ready: Callable[[str], object]
    ) -> None:
        assert given == {"cuda_graphs": True}
        report("ready to start")
        ready(f"http://{host}:{port}")

    monkeypatch.setattr("shira_diffusers.cli.serve.run", serve)
    status, told, err = run("serve", "--json", "--port", 8123, "--cuda-graphs")
    assert (status, json.loads(told)) == (0, {"address": "http://127.0.0.1:8123"})
    assert err == "ready to start\nready at http://127.0.0.1:8123\n"
