"""The ``shira`` command: what it says, its exit status, and what it leaves on the disk when it fails."""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, ShiraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from shira_diffusers import (
    MERGE_METHODS,
    ShiraAdapter,
    SparseDelta,
    __version__,
    fuse,
    load_adapter,
    save_adapter,
)
from shira_diffusers.adapters.base_probes import probe_base
from shira_diffusers.cli import arguments, verify
from shira_diffusers.cli import fuse as fuse_command
from shira_diffusers.cli.__main__ import main
from shira_diffusers.formats.shira_file import WEIGHTS_NAME, encode
from tests import tiny
from tests.cli.conftest import Run
from tests.warm import UNLOADED, python


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two float16 adapters of the tiny pipeline that know their base, and one of another architecture."""
    folder, pipe = tmp_path_factory.mktemp("adapters"), tiny.pipeline()
    written = {}
    for seed, name in enumerate(("bluefire", "gold")):
        plain = tiny.adapter_for(pipe, seed, dtype=torch.float16)
        metadata = {"base_model": "tiny", "mask": "rand", "instance_prompt": f"in {name} style"}
        adapter = ShiraAdapter(plain.deltas, metadata, probe_base(plain.deltas, tiny.weights_of(pipe)))
        written[name] = save_adapter(adapter, folder / f"{name}.safetensors")
    other = tiny.adapter_for(tiny.unet(block_out_channels=(32, 96))).prefixed("unet")
    written["wide"] = save_adapter(other, folder / "wide.safetensors")
    return written


def assert_fails(result: tuple[int, str, str], message: str) -> None:
    """Status 1 and exactly one line of error."""
    status, _, err = result
    assert status == 1, result
    assert re.fullmatch(rf"error: .*{message}.*\n", err), err


def broken_files(folder: Path, good: Path) -> dict[str, Path]:
    """What is no adapter, by the message that it must give."""
    paths = {name: folder / f"{name}.safetensors" for name in ("cut", "pickle", "lora", "empty", "later")}
    paths["cut"].write_bytes(good.read_bytes()[:-50])
    torch.save({"x": torch.ones(3)}, paths["pickle"])
    save_file({"unet.x.to_q.lora_A.weight": torch.ones(2, 2)}, paths["lora"], {"format": "pt"})
    paths["empty"].write_bytes(b"")
    save_file(load_file(good), paths["later"], {"format": "shira", "format_version": "3"})
    return {
        "no adapter at .*expected a .safetensors file or a folder": folder / "missing.safetensors",
        "no adapter at .*nowhere": folder / "nowhere",
        "damaged or truncated": paths["cut"],
        "a pickle, which is never loaded": paths["pickle"],
        "looks like a LoRA, load it with load_lora_weights": paths["lora"],
        "got 0 bytes": paths["empty"],
        "format version '3', expected '1' or '2'.*upgrade": paths["later"],
    }


def sha256_of_tensors(file: Path) -> str:
    """As docs/format.md defines it: of values, gaps and base, in this order."""
    tensors = {key: tensor.view(torch.uint8).numpy().tobytes() for key, tensor in load_file(file).items()}
    return hashlib.sha256(b"".join(tensors[key] for key in ("values", "gaps", "base"))).hexdigest()


def peft_folder(folder: Path) -> Path:
    model = get_peft_model(tiny.unet(), ShiraConfig(r=2, target_modules=["to_q", "to_v"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "shira_" in name:
                parameter.fill_(0.5)
    model.save_pretrained(folder)
    return folder


# -------------------------------------------------------------------- the command itself


def test_usage_errors(capsys: pytest.CaptureFixture[str], files: dict[str, Path], tmp_path: Path) -> None:
    for argv in (
        [],
        ["dance"],
        ["inspect"],
        ["verify", "x"],
        ["fuse", "x"],
        ["fuse", "x", "-o", "y", "--weights", "much"],
        ["fuse", "x", "-o", "y", "--method", "magic"],
        ["fuse", "x", "-o", "y", "--dtype", "int8"],
        ["demo", "--steps", "0"],
        ["demo", "--seed", "-1"],
        ["demo", "--steps", "many"],
    ):
        with pytest.raises(SystemExit) as left:
            main(argv)
        assert left.value.code == 2, argv
        assert "usage: shira" in capsys.readouterr().err


def test_strengths_in_the_wrong_place(capsys: pytest.CaptureFixture[str], files: dict[str, Path]) -> None:
    for argv, message in (
        (["fuse", f"{files['gold']}=0.5"], f"expected a file, got {files['gold']}=0.5; give strengths with --weights"),
        (["bake", "base", f"{files['gold']}=much"], f"a number for the strength of {files['gold']}, got 'much'"),
    ):
        with pytest.raises(SystemExit) as left:
            main([*argv, "-o", "x"])
        assert left.value.code == 2
        assert message in capsys.readouterr().err


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, expected in ((["--help"], "inspect"), (["fuse", "--help"], "--force"), (["--version"], __version__)):
        with pytest.raises(SystemExit) as left:
            main(argv)
        assert left.value.code == 0
        assert expected in capsys.readouterr().out


def test_the_installed_command(files: dict[str, Path], tmp_path: Path) -> None:
    """From another folder, in its own process: all of stderr is the one line."""
    shira = Path(sys.executable).with_name("shira")
    assert shira.is_file(), "install the package: pip install -e ."
    done = subprocess.run([shira, "inspect", "missing.safetensors"], cwd=tmp_path, capture_output=True, text=True)
    assert_fails((done.returncode, done.stdout, done.stderr), "no adapter at missing.safetensors")
    assert done.stdout == ""


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        python("-m", "shira_diffusers.cli", "--version"), cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"shira_diffusers {__version__}\n")


def test_an_interrupt_is_quiet(run: Run, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shira_diffusers.cli.inspect.inspect_adapter", interrupt)
    assert run("inspect", files["gold"]) == (130, "", "interrupted\n")


def test_a_reader_that_has_seen_enough(run: Run, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As in ``shira inspect FILE | head -1``: no trace on stderr."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as broken, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", broken)
        status, _, err = run("inspect", files["gold"])
    assert (status, err) == (1, "")


# -------------------------------------------------------------------- inspect


def test_inspect(run: Run, files: dict[str, Path]) -> None:
    status, out, err = run("inspect", files["gold"])
    adapter, size = load_adapter(files["gold"]), files["gold"].stat().st_size
    assert (status, err) == (0, "")
    parts = {part: sum(n.startswith(part) for n in adapter.deltas) for part in ("text_encoder", "unet")}
    head = f"""\
{files["gold"]}
  kind        SHiRA adapter, format version 2
  base model  tiny (a few values are kept, to recognise it)
  mask        rand
  density     {100 * adapter.density:.3f} %
  entries     {adapter.nnz:,} of {adapter.numel:,} in {len(adapter.deltas)} parameters \
(text_encoder {parts["text_encoder"]}, unet {parts["unet"]})
  values      float16
  size        {size:,} bytes, {size / adapter.nnz:.2f} bytes per entry
  checksum    SHA-256 of the tensors matches ({sha256_of_tensors(files["gold"])[:16]}...); it does not cover the header

metadata
  base_model       tiny
  density          {adapter.density:.6g}
  instance_prompt  in gold style
  library_version  {__version__}
  mask             rand

"""
    assert out.startswith(head), out
    for name, delta in adapter.deltas.items():
        row = rf"{100 * delta.density:.3f} % +{delta.nnz:,}  {' x '.join(map(str, delta.shape))} +{re.escape(name)}\n"
        assert re.search(row, out), name


def test_a_terminal_gets_a_short_table(run: Run, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    count = len(load_adapter(files["gold"]).deltas)
    assert count > 20
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    short, whole = run("inspect", files["gold"])[1], run("inspect", files["gold"], "--all")[1]
    assert short.endswith(f"\n... and {count - 20} more parameters; list them with --all\n")
    assert short.count(".weight") == 20
    assert whole.count(".weight") == count
    assert "--all" not in whole


def test_inspect_for_programs(run: Run, files: dict[str, Path]) -> None:
    status, out, err = run("inspect", files["gold"], "--json")
    told, adapter, size = json.loads(out), load_adapter(files["gold"]), files["gold"].stat().st_size
    assert (status, err) == (0, "")
    parameters = told.pop("parameters")
    assert told == {
        "path": str(files["gold"]),
        "kind": "SHiRA adapter",
        "format_version": "2",
        "base_model": "tiny",
        "mask": "rand",
        "density": adapter.density,
        "nnz": adapter.nnz,
        "numel": adapter.numel,
        "dtypes": ["float16"],
        "bytes": size,
        "bytes_per_entry": size / adapter.nnz,
        "tells_base": True,
        "sha256": sha256_of_tensors(files["gold"]),
        "metadata": dict(adapter.metadata),
    }
    assert parameters == [
        {"name": name, "shape": list(d.shape), "nnz": d.nnz, "density": d.density, "dtype": "float16"}
        for name, d in adapter.deltas.items()
    ]


def test_inspect_a_folder(run: Run, files: dict[str, Path], tmp_path: Path) -> None:
    save_adapter(load_adapter(files["gold"]), tmp_path)
    assert run("inspect", tmp_path)[1].startswith(str(tmp_path / WEIGHTS_NAME))


def test_inspect_an_adapter_of_peft(run: Run, tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "peft")
    status, out, _ = run("inspect", folder)
    values = {k: v for k, v in load_file(folder / "adapter_model.safetensors").items() if k.endswith("shira_weight")}
    assert status == 0
    assert "PEFT SHiRA adapter\n" in out
    assert "density     unknown: PEFT stores no shapes; run 'shira verify' with --base" in out
    assert f"entries     {sum(v.numel() for v in values.values()):,} in {len(values)} parameters\n" in out
    assert "mask        rand\n" in out
    assert re.search(r"\? +\d+  \? +mid_block.*attn1\.to_q\.weight\n", out)
    told = json.loads(run("inspect", folder / "adapter_model.safetensors", "--json")[1])
    assert told["density"] is None and told["numel"] is None and told["format_version"] is None
    get_peft_model(tiny.unet(), LoraConfig(target_modules=["to_q"])).save_pretrained(tmp_path / "lora")
    assert_fails(run("inspect", tmp_path / "lora"), "PEFT adapter of type 'LORA', expected 'SHIRA'")


def test_inspect_without_metadata(run: Run, tmp_path: Path) -> None:
    delta = SparseDelta(torch.empty(0, dtype=torch.int32), torch.empty(0), (4, 4))
    path = save_adapter(ShiraAdapter({"weight": delta}), tmp_path / "bare.safetensors")
    status, out, _ = run("inspect", path)
    assert status == 0
    assert "base model  unknown (no values are kept to recognise it)\n" in out
    assert "0 of 16 in 1 parameter" in out
    assert re.search(r"size +[\d,]+ bytes\n", out)


def test_metadata_cannot_steer_the_terminal(run: Run, files: dict[str, Path], tmp_path: Path) -> None:
    rude = load_adapter(files["gold"]).with_metadata(
        evil="\x1b[2Jcleared\nkind  a fake line", mask="\x07", ok="Grüße 火"
    )
    out = run("inspect", save_adapter(rude, tmp_path / "rude.safetensors"))[1]
    assert r"\x1b[2Jcleared\nkind  a fake line" in out
    assert "\x1b" not in out and "\x07" not in out
    assert "Grüße 火" in out


def test_inspect_what_is_no_adapter(run: Run, files: dict[str, Path], tmp_path: Path) -> None:
    for message, path in broken_files(tmp_path, files["gold"]).items():
        assert_fails(run("inspect", path), message)
    assert_fails(run("inspect", tmp_path), f"has no {WEIGHTS_NAME}")


def test_a_flipped_bit_in_the_values(run: Run, files: dict[str, Path], base: Path, tmp_path: Path) -> None:
    """inspect, verify, fuse and the demo refuse it; an older file without a checksum says that it has none."""
    content = bytearray(files["gold"].read_bytes())
    content[-1000] ^= 1  # in the gaps or values, which stay valid
    damaged = tmp_path / "styles" / "gold.safetensors"
    damaged.parent.mkdir()
    damaged.write_bytes(content)
    message = r"gold\.safetensors is damaged: the SHA-256 of its tensors is \w{64}, expected \w{64}.*get an intact copy"
    for argv in (
        ("inspect", damaged),
        ("verify", damaged, "--base", base),
        ("fuse", files["bluefire"], damaged, "-o", tmp_path / "fused.safetensors"),
        ("demo", "--base", base, "--adapters", damaged.parent, "-o", tmp_path / "sheet.png"),
    ):
        status, _, err = run(*argv)
        assert status == 1 and re.search(rf"error: .*{message}", err), err
    assert [path.name for path in tmp_path.iterdir()] == ["styles"]
    old = tmp_path / "old.safetensors"
    save_file(encode(load_adapter(files["gold"]))[0], old, {"format": "shira", "format_version": "1"})
    assert "checksum    none in this file" in run("inspect", old)[1]
    assert json.loads(run("inspect", old, "--json")[1])["sha256"] is None
    status, out, _ = run("verify", old, "--base", base)
    assert status == 0 and "checksum ok      none in this file" in out


# -------------------------------------------------------------------- verify


def test_verify(run: Run, files: dict[str, Path], base: Path) -> None:
    status, out, err = run("verify", files["gold"], "--base", base)
    adapter, pipe = load_adapter(files["gold"]), tiny.pipeline()
    everything = tiny.snapshot(pipe)
    share = 100 * adapter.nnz / sum(p.numel() for p in everything.values())
    count = len(adapter.deltas)
    assert (status, err) == (0, "")
    assert re.sub(r"[\d.]+ ms", "T ms", out) == (
        f"file     ok      SHiRA adapter, {adapter.nnz:,} entries in {count} parameters\n"
        f"checksum ok      SHA-256 of the tensors matches ({sha256_of_tensors(files['gold'])[:16]}...); "
        "it does not cover the header\n"
        f"names    ok      all {count} parameters in this StableDiffusionPipeline\n"
        f"shapes   ok      all {count} parameters shaped as in the base\n"
        "base     ok      same: it was trained on this base\n"
        f"apply    ok      {adapter.nnz:,} entries overwritten, {share:.3f} % of the pipeline, in T ms\n"
        f"restore  ok      all {len(everything)} parameters bit-equal after removal\n"
        f"{files['gold']} fits {base}\n"
    )


@pytest.mark.filterwarnings("error::UserWarning")
def test_verify_on_relatives_and_strangers(run: Run, files: dict[str, Path], tmp_path: Path) -> None:
    pipe = tiny.pipeline()
    with torch.no_grad():
        for part in (pipe.unet, pipe.text_encoder):
            for parameter in part.parameters():
                parameter.add_(0.1 * parameter.std().nan_to_num() * torch.randn_like(parameter))
    pipe.save_pretrained(tmp_path / "sibling")
    status, out, _ = run("verify", files["gold"], "--base", tmp_path / "sibling")
    assert status == 0
    assert "base     ok      sibling: it was trained on a relative" in out
    pipe.unet, pipe.text_encoder = tiny.unet(seed=77), tiny.text_encoder(seed=78)
    pipe.save_pretrained(tmp_path / "other")
    result = run("verify", files["gold"], "--base", tmp_path / "other")
    assert "base     FAILED  other: it was trained on another model" in result[1]
    assert "restore  ok" in result[1]
    assert_fails(result, r"gold\.safetensors does not fit .*other; use it with the model it was trained for")


def test_verify_without_base_values(run: Run, files: dict[str, Path], base: Path, tmp_path: Path) -> None:
    bare = save_adapter(ShiraAdapter(load_adapter(files["gold"]).deltas), tmp_path / "bare.safetensors")
    status, out, _ = run("verify", bare, "--base", base)
    assert status == 0
    assert "base     ok      unknown: the file keeps no base values" in out


def test_verify_other_names_and_shapes(run: Run, files: dict[str, Path], base: Path, tmp_path: Path) -> None:
    result = run("verify", files["wide"], "--base", base)
    assert_fails(result, f"{files['wide']} does not fit {base}; use it")
    assert re.search(
        r"names    ok .*\nshapes   FAILED  \d+ of \d+ parameters are not shaped as in the base:\n", result[1]
    )
    assert re.search(r"\n {17}- unet\.\S+: expected \(64, 64\), got \(96, 96\)\n", result[1])
    assert "apply" not in result[1]
    odd = SparseDelta(torch.tensor([1]), torch.ones(1), (2, 2))
    strange = save_adapter(ShiraAdapter({"unet.nowhere.weight": odd, "prior.weight": odd}), tmp_path / "s.safetensors")
    result = run("verify", strange, "--base", base)
    assert_fails(result, "does not fit")
    assert "names    FAILED  2 of 2 parameters are not in this StableDiffusionPipeline:\n" in result[1]
    assert "- unet.nowhere.weight: no such parameter in UNet2DConditionModel\n" in result[1]
    assert "- prior.weight: no component 'prior', there are vae, text_encoder, unet\n" in result[1]


def test_verify_sees_bits_that_do_not_return(
    run: Run, files: dict[str, Path], base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify.Resident, "clear", lambda self: None)
    result = run("verify", files["gold"], "--base", base)
    count = len(load_adapter(files["gold"]).deltas)
    assert f"restore  FAILED  {count} of " in result[1]
    assert "parameters are not bit-equal after removal:\n" in result[1]
    assert_fails(result, "does not fit")


def test_verify_an_adapter_of_peft(run: Run, base: Path, tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "peft")
    for source in (folder, folder / "adapter_model.safetensors"):
        status, out, err = run("verify", source, "--base", base)
        assert (status, err) == (0, "")
        assert "file     ok      PEFT SHiRA adapter" in out
        assert "restore  ok" in out


def test_verify_what_cannot_be_read(run: Run, files: dict[str, Path], base: Path, tmp_path: Path) -> None:
    for message, path in broken_files(tmp_path, files["gold"]).items():
        assert_fails(run("verify", path, "--base", base), message)


def test_verify_on_what_is_no_base(run: Run, files: dict[str, Path], base: Path, tmp_path: Path) -> None:
    good = files["gold"]
    assert_fails(
        run("verify", good, "--base", tmp_path / "nowhere"), "no base pipeline at .*nowhere: expected a diffusers"
    )
    assert_fails(run("verify", good, "--base", "./nowhere"), r"no base pipeline at \./nowhere")
    assert_fails(run("verify", good, "--base", tmp_path), "cannot load a pipeline from .*model_index.json")
    for damage, content in {"model_index.json": "{", "unet/diffusion_pytorch_model.safetensors": "junk"}.items():
        folder = tmp_path / damage.replace("/", "_")
        tiny.pipeline().save_pretrained(folder)
        (folder / damage).write_text(content)
        assert_fails(run("verify", good, "--base", folder), "cannot load a pipeline from")
    folder = tmp_path / "unknown"
    tiny.pipeline().save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "unet": ["diffusers", "NoSuchModel"]}))
    assert_fails(run("verify", good, "--base", folder), "cannot load a pipeline from")


# -------------------------------------------------------------------- fuse


def test_fuse(run: Run, files: dict[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "new" / "both.safetensors"
    status, out, err = run("fuse", files["bluefire"], files["gold"], "-o", target, "--weights", "0.8", "-0.5")
    assert (status, err) == (0, "")
    written = load_adapter(target)
    expected = fuse([load_adapter(files["bluefire"]), load_adapter(files["gold"])], [0.8, -0.5])
    assert dict(written.deltas) == dict(expected.deltas)
    assert json.loads(written.metadata["mix"]) == {"bluefire": 0.8, "gold": -0.5}
    assert written.metadata["method"] == "sum"
    assert written.metadata["instance_prompt"] == "in bluefire style, in gold style"
    count = len(written.deltas)
    assert out == f"wrote {target}: {written.nnz:,} entries in {count} parameters, {target.stat().st_size:,} bytes\n"


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_fuse_rounds_once(run: Run, files: dict[str, Path], tmp_path: Path, name: str) -> None:
    run("fuse", files["bluefire"], files["gold"], "-o", tmp_path, "--dtype", name)
    expected = fuse([load_adapter(files["bluefire"]), load_adapter(files["gold"])]).astype(getattr(torch, name))
    assert dict(load_adapter(tmp_path / WEIGHTS_NAME).deltas) == dict(expected.deltas)


def test_fuse_does_not_replace_unasked(run: Run, files: dict[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "c.safetensors"
    target.write_bytes(b"mine")
    assert_fails(run("fuse", files["gold"], "-o", target), "exists, expected a new file; .*--force")
    assert target.read_bytes() == b"mine"
    assert run("fuse", files["gold"], "-o", target, "--force")[0] == 0
    assert load_adapter(target).nnz == load_adapter(files["gold"]).nnz
    save_adapter(load_adapter(files["gold"]), tmp_path / "folder")
    assert_fails(run("fuse", files["gold"], "-o", tmp_path / "folder"), f"{WEIGHTS_NAME} exists")


def test_a_failing_fuse_writes_nothing(run: Run, files: dict[str, Path], tmp_path: Path) -> None:
    inputs, outputs = tmp_path / "in", tmp_path / "out"
    inputs.mkdir()
    outputs.mkdir()
    huge = SparseDelta(torch.tensor([1, 3]), torch.tensor([1e6, 1.0]), (2, 2))
    large = save_adapter(ShiraAdapter({"unet.x.weight": huge}), inputs / "large.safetensors")
    good, target, peft = files["gold"], outputs / "c.safetensors", peft_folder(inputs / "peft")
    attempts: list[tuple[str, list[object]]] = [
        *((message, [good, path]) for message, path in broken_files(inputs, good).items()),
        (
            "expected one weight per file, got 3 weights for 2 files",
            [good, files["bluefire"], "--weights", "1", "1", "1"],
        ),
        ("weights must be finite", [good, "--weights", "nan"]),
        ("adapters of different models cannot be fused; .*differ in shape: unet", [good, files["wide"]]),
        (
            "of 1 parameter are too large for torch.float16; choose .*--dtype float32.*: 1 of 2 values, up to 1e",
            [large, "--dtype", "float16"],
        ),
        ("is a PEFT adapter, .*pipe.save_shira", [good, peft]),
        ("is a PEFT adapter, .*pipe.save_shira", [good, peft / "adapter_model.safetensors"]),
    ]
    for message, argv in attempts:
        assert_fails(run("fuse", *argv, "-o", target), message)
        assert list(outputs.iterdir()) == [], message
    several = run("fuse", good, files["wide"], "-o", target)[2]
    assert several.count("; unet.") > 3 and "  - " not in several
    (tmp_path / "file").write_text("")
    assert_fails(run("fuse", good, "-o", tmp_path / "file" / "c.safetensors"), "file")
    (tmp_path / "d.safetensors").mkdir()
    assert_fails(run("fuse", good, "-o", tmp_path / "d.safetensors", "--force"), "directory")
    assert not list(tmp_path.glob(".*"))


def test_fuse_remarks_on_other_bases(run: Run, files: dict[str, Path], tmp_path: Path) -> None:
    other = save_adapter(load_adapter(files["gold"]).with_metadata(base_model="b/c"), tmp_path / "gold.safetensors")
    status, _, err = run("fuse", files["gold"], other, "-o", tmp_path / "both.safetensors")
    assert (status, err) == (0, "note: the adapters name different bases: 'b/c', 'tiny'\n")
    mix = json.loads(load_adapter(tmp_path / "both.safetensors").metadata["mix"])
    assert list(mix) == [f"1: {files['gold']}", f"2: {other}"]


LIGHT = """
import sys, shira_command
try:
    shira_command.main(sys.argv[1:])
except SystemExit as end:
    print(end.code)
print(sorted({"torch", "diffusers", "transformers", "numpy"} & sys.modules.keys()))
"""


@pytest.mark.parametrize(
    ("argv", "status"),
    [(["--version"], 0), (["--help"], 0), (["fuse", "--help"], 0), ([], 2), (["inspect"], 2), (["fly"], 2)],
)
def test_help_and_usage_errors_load_no_torch(argv: list[str], status: int) -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT, *argv], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == [str(status), "[]"]
    assert argv != ["--version"] or done.stdout.startswith(f"shira_diffusers {__version__}\n")


@pytest.mark.parametrize("kind", ["version 1", "version 2", "PEFT folder", "PEFT file", "damaged", "missing"])
def test_inspect_loads_no_torch(kind: str, files: dict[str, Path], run: Run, tmp_path: Path) -> None:
    """And tells what it tells inside a program that has."""
    file = tmp_path / "a.safetensors"
    if kind.startswith("PEFT"):
        file = peft_folder(tmp_path)
        file = file / "adapter_model.safetensors" if kind == "PEFT file" else file
    elif kind == "version 1":
        tensors, header = encode(load_adapter(files["gold"]))
        save_file(tensors, file, header)
    elif kind != "missing":
        file.write_bytes(files["gold"].read_bytes()[: -50 if kind == "damaged" else None])
    for flag in ("--json", "--all"):
        argv = [sys.executable, "-c", LIGHT.replace("    shira", "    status = shira"), "inspect", str(file), flag]
        done = subprocess.run(argv, capture_output=True, text=True, check=True)
        *told, loaded = done.stdout.splitlines()
        assert loaded == "['numpy']"
        _, out, err = run("inspect", file, flag)
        assert (told, done.stderr) == (out.splitlines(), err)


def test_looking_without_torch_leaves_no_trace(files: dict[str, Path]) -> None:
    """In a program that imports the package after."""
    program = (
        f"{UNLOADED}\n"
        "import shira_command\n"
        "shira_command.main(sys.argv[1:])\n"
        "assert not [name for name in sys.modules if name.startswith('shira_diffusers')]\n"
        "import shira_diffusers\n"
        "assert shira_command.main(sys.argv[1:]) == 0 and shira_diffusers.load_adapter(sys.argv[2]).nnz\n"
        "assert sys.modules['shira_diffusers'] is shira_diffusers\n"
    )
    subprocess.run(python("-c", program, "inspect", str(files["gold"])), capture_output=True, check=True)


def test_the_entry_point_runs_commands(files: dict[str, Path]) -> None:
    command = [sys.executable, "-m", "shira_command", "inspect", "--json", str(files["gold"])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["kind"] == "SHiRA adapter"


@pytest.mark.parametrize(("module", "command"), [("torch", "verify"), ("numpy", "inspect"), ("argparse", "fuse")])
def test_an_interrupt_during_imports_is_quiet(module: str, command: str, tmp_path: Path) -> None:
    (tmp_path / f"{module}.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    argv = [sys.executable, "-m", "shira_command", command, "a", *(["--base", "b"] if command == "verify" else [])]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(argv, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_the_parser_knows_all_choices() -> None:
    assert set(arguments.METHODS) == MERGE_METHODS.keys()
    assert set(arguments.DTYPES) == fuse_command.DTYPES.keys()


@pytest.mark.parametrize("command", arguments.EXAMPLES)
def test_help_has_examples_that_parse(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = capsys.readouterr().out
    for line in arguments.EXAMPLES[command]:
        assert f"  {line}\n" in shown
        program, *argv = shlex.split(line)
        assert program == "shira"
        assert arguments.parser("1").parse_args(argv).command == command


def test_one_weight_is_for_all_adapters(run: Run, files: dict[str, Path], tmp_path: Path) -> None:
    both = (files["bluefire"], files["gold"])
    assert run("fuse", *both, "--weights", "0.5", "-o", tmp_path / "one.safetensors")[0] == 0
    assert run("fuse", *both, "--weights", "0.5", "0.5", "-o", tmp_path / "two.safetensors")[0] == 0
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
