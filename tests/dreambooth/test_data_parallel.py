"""Several processes give what one gives with a larger batch, and exchange the sparse gradient alone."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image

from shira_diffusers import load_adapter
from shira_diffusers.dreambooth import train as loop
from shira_diffusers.dreambooth.config import TrainingConfig
from shira_diffusers.dreambooth.data import Batch
from shira_diffusers.dreambooth.data_parallel import WHOLE, Parts, Share, share_of
from shira_diffusers.dreambooth.loss import Objective
from shira_diffusers.dreambooth.train import train
from tests import tiny
from tests.warm import python

ROOT = Path(__file__).parents[2]


def test_shares_are_the_batch_once() -> None:
    assert share_of(5, 5, 0, 1) == WHOLE
    assert [share_of(6, 2, process, 3) for process in range(3)] == [
        Share(0, 2, 6, 2 / 6), Share(2, 4, 6, 2 / 6), Share(4, 6, 6, 2 / 6),
    ]  # fmt: skip
    assert [share_of(3, 2, process, 3) for process in range(3)] == [
        Share(0, 2, 3, 2 / 3), Share(2, 3, 3, 1 / 3), Share(0, 1, 3, 0.0),
    ]  # fmt: skip
    batches = [[1, 2, 3, 4], [5, 6, 7]]
    assert [list(Parts(batches, 2, process, 2)) for process in range(2)] == [[[1, 2], [5, 6]], [[3, 4], [7]]]


@pytest.mark.parametrize("prior", [False, True], ids=["instances", "with class"])
@pytest.mark.parametrize("total", [4, 3, 2])
def test_weighted_losses_of_shares_add_up(prior: bool, total: int) -> None:
    """Two examples a process, two processes; the second may have one, or none."""
    pipe = tiny.pipeline()
    extra = {"with_prior_preservation": True, "class_data_dir": "c", "class_prompt": "a cat"} if prior else {}
    config = TrainingConfig(
        pretrained_model_name_or_path="base", instance_data_dir="i", instance_prompt="a sks cat", snr_gamma=5.0,
        noise_offset=0.1, **extra,
    )  # fmt: skip
    objective = Objective(pipe, config, None, cached=False)
    groups = 2 if prior else 1
    pixels = torch.rand(groups * total, 3, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1
    prompts = [f"a {letter}" for letter in "abcdefgh"[: groups * total]]
    time_ids = torch.zeros(groups * total, 6)

    def loss(rows: list[int], share: Share) -> torch.Tensor:
        batch = Batch(pixels[rows], [prompts[row] for row in rows], time_ids[rows])
        return objective.loss(batch, torch.Generator().manual_seed(5), share).detach() * share.weight

    whole = loss(list(range(groups * total)), WHOLE)
    shares = [share_of(total, 2, process, 2) for process in range(2)]
    parts = [loss([g * total + k for g in range(groups) for k in range(s.start, s.end)], s) for s in shares]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=0)


LAUNCHED = """
import json, os, signal, sys
import torch
from shira_diffusers.dreambooth.command_line import parse_config
from shira_diffusers.dreambooth.train import train

sent = []
reduce = torch.distributed.all_reduce


def count(tensor, *rest, **named):
    sent.append(tensor.numel())
    if os.environ["RANK"] == os.environ.get("ENDED") and len(sent) == 5:
        os.kill(os.getpid(), signal.SIGTERM)
    return reduce(tensor, *rest, **named)


torch.distributed.all_reduce = count
train(parse_config(json.load(open(sys.argv[1]))))
if os.environ["RANK"] == "1":
    json.dump(sent, open(sys.argv[2], "w"))
"""


@pytest.mark.usefixtures("one_thread")
def test_two_processes_train_as_one_with_twice_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real launch: five pictures in batches of four, so that the second process is once left without an example."""
    tiny.pipeline().save_pretrained(tmp_path / "base")
    (tmp_path / "pictures").mkdir()
    for number in range(5):
        Image.effect_noise((20, 16 + number), 90).save(tmp_path / "pictures" / f"{number}.png")
    settings = {
        "pretrained_model_name_or_path": str(tmp_path / "base"), "instance_data_dir": str(tmp_path / "pictures"),
        "instance_prompt": "a sks cat", "resolution": 16, "max_train_steps": 3, "learning_rate": 1e-2, "seed": 7,
        "with_prior_preservation": True, "class_data_dir": str(tmp_path / "class"), "class_prompt": "a cat",
        "num_class_images": 2, "train_text_encoder": True, "text_encoder_lr": 1e-3, "mask_type": "grad",
        "calibration_steps": 2, "gradient_accumulation_steps": 2,
    }  # fmt: skip
    written = {
        "output_dir": str(tmp_path / "two"), "validation_prompt": "a cat", "num_validation_images": 1,
        "checkpointing_steps": 2, "train_batch_size": 2,
    }  # fmt: skip
    sent = exchanges(tmp_path, settings | written)
    two = load_adapter(tmp_path / "two")
    files = {path.relative_to(tmp_path / "two").parts[0] for path in (tmp_path / "two").rglob("*") if path.is_file()}
    assert files == {"pytorch_shira_weights.safetensors", "README.md", "checkpoint-2", "validation", "logs"}
    assert len(list((tmp_path / "class").iterdir())) == 2
    # a step sends the entries' gradients, and the loss with the wish to stop, nothing else
    assert sent == [two.nnz, 2] * 3

    settings |= {"report_to": "none"}
    alone = TrainingConfig(
        **settings | {"train_batch_size": 2, "output_dir": str(tmp_path / "g"), "max_train_steps": 1}
    )
    masks = {name: delta.indices for name, delta in load_adapter(train(alone)).deltas.items()}
    assert {n: d.indices.tolist() for n, d in two.deltas.items()} == {n: mask.tolist() for n, mask in masks.items()}

    monkeypatch.setattr(loop, "choose_masks", lambda *_: masks)  # those of batches of two
    one = load_adapter(train(TrainingConfig(**settings | {"train_batch_size": 4, "output_dir": str(tmp_path / "one")})))
    for name, delta in one.deltas.items():
        # Adam takes small gradients, and so their rounding, as large as any: a hundredth of the way at most
        torch.testing.assert_close(two.deltas[name].values, delta.values, rtol=0, atol=3e-4)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("ended", ["0", "1"])
def test_all_processes_stop_after_the_same_step(tmp_path: Path, ended: str) -> None:
    """One of them is sent SIGTERM during its third step."""
    tiny.pipeline().save_pretrained(tmp_path / "base")
    (tmp_path / "pictures").mkdir()
    Image.effect_noise((20, 16), 90).save(tmp_path / "pictures" / "0.png")
    settings = {
        "pretrained_model_name_or_path": str(tmp_path / "base"), "instance_data_dir": str(tmp_path / "pictures"),
        "instance_prompt": "a sks cat", "resolution": 16, "max_train_steps": 1000, "seed": 7, "train_batch_size": 1,
        "output_dir": str(tmp_path / "out"), "report_to": "none", "repeats": 2,
    }  # fmt: skip
    done = launch(tmp_path, settings, ENDED=ended)
    assert done.returncode != 0
    (checkpoint,) = (tmp_path / "out").iterdir()
    assert checkpoint.name == "checkpoint-4"
    assert load_adapter(checkpoint).metadata["steps"] == "4"
    assert "stopped after step 4 of 1000, which is saved; resume with\naccelerate launch --multi_gpu" in done.stderr
    assert "exitcode  : 143" in done.stderr


def exchanges(folder: Path, settings: dict[str, object]) -> list[int]:
    """Train on two processes; how many elements each of their exchanges had."""
    done = launch(folder, settings)
    assert done.returncode == 0, done.stderr
    sent: list[int] = json.loads((folder / "sent.json").read_text())
    return sent


def launch(folder: Path, settings: dict[str, object], **environment: str) -> subprocess.CompletedProcess[str]:
    """Train on two processes."""
    (folder / "launched.py").write_text(LAUNCHED)
    (folder / "flags.json").write_text(json.dumps(flags(settings)))
    return subprocess.run(
        [
            *python("-m", "accelerate.commands.launch"), "--multi_gpu", "--num_processes", "2",
            "--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no",
            "--no_python", *python(*(str(folder / name) for name in ("launched.py", "flags.json", "sent.json"))),
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip


def flags(settings: dict[str, object]) -> list[str]:
    parts = ([f"--{name}"] if value is True else [f"--{name}", str(value)] for name, value in settings.items())
    return [part for pair in parts for part in pair]
