"""Each benchmark parses its options and, nightly, runs on toys, where its own assertions on the results hold."""

import importlib
import json
import sys
import time
from contextlib import nullcontext, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps

from benchmarks.measure import Run, options, python_calls, timed
from shira_diffusers.serving.requests import ImageRequest
from tests import tiny

SCRIPTS = sorted(
    path.stem for path in Path("benchmarks/scripts").glob("*.py") if path.stem not in ("__init__", "compiled")
)
TOYS = (
    "overwrite_vs_fuse", "switch", "fuse", "load_many", "cold_start", "drift", "inference", "per_picture", "size",
    "library_scale", "fleet", "serving_load", "serving_gpus", "training", "train_step_flow",
)  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_explains_its_options(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(f"benchmarks.scripts.{script}")
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert (
        module.__doc__ and module.__doc__.splitlines()[0] in said and f"python -m benchmarks.scripts.{script}" in said
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_refuses_an_option_that_it_does_not_have(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [script, "--no-such-option"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.scripts.{script}").main()
    assert ended.value.code == 2 and "--no-such-option" in capsys.readouterr().err


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What a script writes."""
    out = tmp_path / "figures.json"
    options = ["--toy", "--models", "Flux" if request.param == "train_step_flow" else "SD 1.5", "--out", str(out)]
    if request.param != "size":  # which is the same on every device
        options += ["--device", "cpu", "--budget", "600"]
    if request.param == "training":
        options += ["--batch", "1", "--autocast", "on"]
    if request.param == "train_step_flow":  # bitsandbytes may be missing
        options += ["--only", "frozen", "shira rand", "shira rand recompute", "shira struct", "lora"]
    monkeypatch.setattr(sys, "argv", [request.param, *options])
    with suppress(SystemExit):  # of training, which fails if a row does
        importlib.import_module(f"benchmarks.scripts.{request.param}").main()
    return json.loads(out.read_text())["rows"]


@pytest.mark.nightly
@pytest.mark.parametrize("rows", TOYS, indirect=True)
def test_no_case_fails(rows: list[dict[str, Any]]) -> None:
    assert len(rows) > 1
    assert not [row for row in rows if "failed" in row or "skipped" in row]
    warm = [row["python_calls"] for row in rows if "engine" in row]
    assert all(0 < calls < 5000 for calls in warm)
    moved = [row for row in rows if row.get("switches")]
    assert all(row["recompiles"] == row["recaptures"] == 0 and row["graphs"] for row in moved)


def test_a_case_that_fails_or_comes_too_late_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = options("").parse_args(["--device", "cpu", "--toy", "--out", str(tmp_path / "figures.json")])
    run = Run("some", args)

    def fail() -> dict[str, Any]:
        raise ValueError("no such layer")

    assert run.case(fail, method="other")["failed"] == "ValueError: no such layer"
    run.until = 0
    assert "skipped" in run.case(dict, method="late")
    assert len(json.loads(args.out.read_text())["rows"]) == 2


def test_python_calls_are_counted_and_c_calls_are_not() -> None:
    def one() -> None:
        len("abc")

    def three() -> None:
        one()
        one()

    before = sys.getprofile()
    assert (python_calls(one), python_calls(three)) == (1, 3)
    assert sys.getprofile() is before


def test_what_runs_around_a_call_is_not_timed() -> None:
    order: list[str] = []
    figures = timed(
        lambda: order.append("call"),
        repeats=2,
        warm_up=1,
        before=lambda: (order.append("before"), time.sleep(0.02)),
        after=lambda: (order.append("after"), time.sleep(0.02)),
    )
    assert order == ["before", "call", "after"] * 3
    assert figures["n"] == 2 and figures["median_ms"] < 20


def test_a_picture_of_other_bytes_than_alone_is_counted_as_wrong() -> None:
    from benchmarks.scripts.serving_load import Alone, summary
    from benchmarks.serving.clients import Answer

    alone = Alone(tiny.pipeline(), lambda _: nullcontext())
    one = ImageRequest(prompt=tiny.PROMPT, steps=2, width=tiny.SIZE, height=tiny.SIZE)
    answers = [Answer(one, "left", 0.1)]
    for batch in (1, 2):
        image = Image.frombytes("RGB", (tiny.SIZE, tiny.SIZE), alone.pixels(one, batch))
        for shown in (image, ImageOps.mirror(image)):
            png = BytesIO()
            shown.save(png, "PNG")
            answers.append(Answer(one, "200", 1.0, png.getvalue(), batch))
    found = summary(answers, 2.0, alone)
    assert (found["pictures"], found["wrong"], found["pictures_per_s"]) == (4, 2, 2.0)
    assert found["outcomes"] == {"left": 1, "200": 4} and found["batches"] == {"1": 2, "2": 2}


@pytest.mark.nightly
def test_a_compiled_unet_that_does_not_follow_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.scripts import compiled

    def stale(module: Any, inputs: Any) -> Any:
        first: list[Any] = []

        def run(*args: Any) -> Any:
            first.extend([] if first else [module(*args)])
            return first[0]

        return run

    monkeypatch.setattr(compiled, "compile_unet", lambda unet, case: unet.compile(backend=stale))
    with pytest.raises(AssertionError, match="move 1 does not reach the compiled UNet"):
        compiled.measure(compiled.TOY_CASES[0], options("").parse_args(["--device", "cpu", "--toy"]))


def test_captures_of_cuda_graphs_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.scripts.compiled import captures

    called = []
    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", lambda self, pool: called.append(pool), raising=False)
    before = torch.cuda.CUDAGraph.capture_begin
    with captures() as counted:
        torch.cuda.CUDAGraph.capture_begin(None, "pool")
    assert (counted["captures"], called) == (1, ["pool"])
    assert torch.cuda.CUDAGraph.capture_begin is before


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("how", "mode"), [("whole", "reduce-overhead"), ("regional", "default")])
def test_compiled_unets_follow_on_a_gpu(how: str, mode: str) -> None:
    from benchmarks.scripts import compiled

    args = options("").parse_args(["--device", "cuda", "--toy"])
    figures = compiled.measure(compiled.Case("SD 1.5", how, mode, switches=12), args)
    assert (figures["recompiles"], figures["recaptures"]) == (0, 0)
    assert (figures["captures"] > 0) == (mode == "reduce-overhead")
