"""``shira export-onnx``: what it writes and says, and that failures write nothing."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from shira_diffusers.cli.__main__ import main
from shira_diffusers.edge import OnnxResident
from tests import tiny


def test_a_pipeline_is_exported(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export-onnx", str(base), str(tmp_path / "out"), "--dtype", "fp16", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["folder"], told["dtype"]) == (str(tmp_path / "out"), "fp16")
    assert set(told["bytes"]) == {"unet", "text_encoder", "vae"}
    unet = OnnxResident(tmp_path / "out", ["unet"])._models["unet"].weights
    bias = tiny.pipeline(torch.float16).unet.conv_in.bias
    assert tiny.same_bits(torch.from_numpy(unet.tensors["conv_in.bias"]), bias.detach())


def test_failures_write_nothing(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*argv: object) -> str:
        assert main(["export-onnx", *map(str, argv)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line

    (tmp_path / "old").mkdir()
    assert "old exists, expected a new folder" in fails("no-such-model", tmp_path / "old")
    assert "no base pipeline at" in fails(tmp_path / "none", tmp_path / "new")
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.delitem(sys.modules, "shira_diffusers.edge.export")
    assert "onnx" in (line := fails(base, tmp_path / "new")) and "pip install 'shira-diffusers[export]'" in line
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_what_was_written_is_told(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []

    @contextmanager
    def recorded(**_: object) -> Iterator[Callable[[int, int], None]]:
        yield lambda *at: seen.append(at)

    monkeypatch.setattr("shira_diffusers.cli.export_onnx.progress_bar", recorded)
    assert main(["export-onnx", str(base), str(tmp_path / "out")]) == 0
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert f"wrote {tmp_path / 'out'} (fp32): text_encoder" in capsys.readouterr().out
