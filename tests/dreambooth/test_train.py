"""Whole runs on a tiny Stable Diffusion: what they write, and that they can be repeated and resumed."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shira_diffusers import (
    AdapterMismatchError,
    ShiraAdapter,
    ShiraError,
    __version__,
    build_masks,
    load_adapter,
    save_adapter,
)
from shira_diffusers.dreambooth.base_model import load_base
from shira_diffusers.dreambooth.config import TrainingConfig
from shira_diffusers.dreambooth.data import collate
from shira_diffusers.dreambooth.loss import encode
from shira_diffusers.dreambooth.pictures import find_pictures
from shira_diffusers.dreambooth.prepare import prepare_examples
from shira_diffusers.dreambooth.sampling import class_pictures, sample
from shira_diffusers.dreambooth.train import train
from shira_diffusers.integrations.pipelines import resident_of
from shira_diffusers.masks.families import FAMILIES
from shira_diffusers.training.tuner import SparseTuner
from tests import tiny
from tests.warm import python

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(5):
        Image.effect_noise((20, 16 + number), 90).save(folder / f"{number}.png")
    (folder / "3.txt").write_text("a dog", encoding="utf-8")
    return folder


@pytest.fixture
def settings(base: Path, pictures: Path, tmp_path: Path) -> dict[str, object]:
    return {
        "pretrained_model_name_or_path": str(base),
        "instance_data_dir": str(pictures),
        "instance_prompt": "a sks cat",
        "output_dir": str(tmp_path / "out"),
        "resolution": 16,
        "train_batch_size": 2,
        "max_train_steps": 2,
        "learning_rate": 1e-2,
        "seed": 7,
        "report_to": "none",
        "calibration_steps": 1,
    }


def run(settings: dict[str, object], **others: object) -> ShiraAdapter:
    return load_adapter(train(TrainingConfig(**(settings | others))))


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# ---------------------------------------------------------------- what is written


def test_script_trains_both_models_and_leaves_the_base_alone(settings: dict[str, object], base: Path) -> None:
    """Also what cannot change within one process: mixed precision, and the trackers."""
    before = hashes(base)
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value)) if name != "report_to"]
    flags += ["--train_text_encoder", "--mixed_precision", "bf16", "--gradient_checkpointing", "--center_crop"]
    flags += ["--cache_latents", "--validation_prompt", "a dog", "--num_validation_images", "2"]
    done = subprocess.run(
        [sys.executable, "train_dreambooth_shira.py", *flags], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "ACCELERATE_USE_CPU": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert hashes(base) == before
    output = Path(str(settings["output_dir"]))
    adapter = load_adapter(output)
    assert adapter.component_names() == ["text_encoder", "unet"]
    assert all(bool(delta.values.any()) for delta in adapter.deltas.values())
    assert all(delta.values.dtype == torch.float16 for delta in adapter.deltas.values())
    assert {path.name for path in (output / "validation").iterdir()} == {"step-000002-0.png", "step-000002-1.png"}
    assert list((output / "logs").rglob("events.out.tfevents*"))
    assert "loss=" in done.stderr
    pipe = StableDiffusionPipeline.from_pretrained(base)
    assert resident_of(pipe).check(adapter) == "same"
    pipe.load_shira(output)
    assert set(pipe.list_shira()["default_0"]) == {"unet", "text_encoder"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--density", "3"], "error: training settings are wrong (1)"),
        (["--avoid_adapters", "none.safetensors"], "error: no adapter at none.safetensors"),
    ],
    ids=["settings", "file"],
)
def test_script_ends_with_one_line(settings: dict[str, object], wrong: list[str], message: str) -> None:
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    done = subprocess.run(
        python("train_dreambooth_shira.py", *flags, *wrong), cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "ACCELERATE_USE_CPU": "1"},
    )  # fmt: skip
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_trackers_and_pictures_of_a_run(settings: dict[str, object], capfd: pytest.CaptureFixture[str]) -> None:
    """Validation every second step, and at the end; figures of each step, with a rate of its own for the encoder."""
    options = {
        "report_to": "tensorboard", "validation_prompt": "a dog", "validation_steps": 2, "num_validation_images": 1,
        "max_train_steps": 5, "train_text_encoder": True, "text_encoder_lr": 1e-3,
    }  # fmt: skip
    run(settings, **options)
    output = Path(str(settings["output_dir"]))
    assert sorted(path.name for path in (output / "validation").iterdir()) == [
        f"step-00000{step}-0.png" for step in (2, 4, 5)
    ]
    told = EventAccumulator(str(output / "logs" / "dreambooth-shira"))
    told.Reload()
    figures = {name: [event.value for event in told.Scalars(name)] for name in told.Tags()["scalars"]}
    assert set(figures) == {"loss", "lr", "text_encoder_lr", "images_per_second", "peak_memory_gib"}
    assert [event.step for event in told.Scalars("loss")] == [1, 2, 3, 4, 5]
    assert figures["lr"] == pytest.approx([1e-2] * 5)
    assert figures["text_encoder_lr"] == pytest.approx([1e-3] * 5)
    assert all(0.05 < peak < 100 for peak in figures["peak_memory_gib"])
    assert all(speed > 0 for speed in figures["images_per_second"])
    shown = capfd.readouterr().err
    assert all(f"{name}=" in shown for name in ("loss", "lr", "images/s", "peak"))


@pytest.mark.parametrize(("precision", "same"), [(None, True), ("fp32", True), ("bf16", False)])
def test_class_pictures_are_generated_in_the_precision_asked_for(
    settings: dict[str, object], tmp_path: Path, precision: str | None, same: bool
) -> None:
    config = TrainingConfig(
        **settings, with_prior_preservation=True, class_data_dir=str(tmp_path / "class"), class_prompt="a cat",
        num_class_images=1, prior_generation_precision=precision,
    )  # fmt: skip
    made = class_pictures(config, torch.device("cpu"), seed=3)
    pipe = load_base(config, torch.device("cpu"))
    expected = next(sample(pipe, "a cat", range(1), 3, config))
    assert (Image.open(made[0].path).tobytes() == expected.tobytes()) is same


def test_metadata_tells_how_the_adapter_was_made(settings: dict[str, object], base: Path) -> None:
    adapter = run(settings, mask_type="rand", mask_seed=3, density=0.05, target_modules=("to_q", "conv1"))
    told = {
        "base_model": base.name, "mask": "rand", "density": "0.05", "mask_seed": "3", "targets": "to_q conv1",
        "instance_prompt": "a sks cat", "steps": "2", "learning_rate": "0.01", "resolution": "16", "seed": "7",
        "train_batch_size": "2", "library_version": __version__,
    }  # fmt: skip
    assert {key: adapter.metadata[key] for key in told} == told
    assert all(name.startswith("unet.") for name in adapter.deltas)
    expected = build_masks({"unet": tiny.unet()}, "rand", 0.05, ["to_q", "conv1"], seed=3)
    assert {n: d.indices.tolist() for n, d in adapter.deltas.items()} == {n: m.tolist() for n, m in expected.items()}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_mask_family_trains(settings: dict[str, object], family: str) -> None:
    adapter = run(settings, mask_type=family, density=0.1, max_train_steps=1, calibration_steps=2)
    assert adapter.metadata["mask"] == family
    assert all(bool(delta.values.any()) for delta in adapter.deltas.values())


def test_avoided_adapters_share_no_entry(settings: dict[str, object], tmp_path: Path) -> None:
    settings = settings | {"max_train_steps": 1, "mask_type": "wm"}
    first = run(settings)
    file = str(tmp_path / "out" / "pytorch_shira_weights.safetensors")
    second = run(settings, avoid_adapters=(file,), output_dir=str(tmp_path / "second"))
    assert first.deltas.keys() == second.deltas.keys()
    for name, delta in first.deltas.items():
        assert not set(delta.indices.tolist()) & set(second.deltas[name].indices.tolist())


def test_avoided_adapters_that_share_no_trained_weight(settings: dict[str, object], tmp_path: Path) -> None:
    settings = settings | {"max_train_steps": 1, "mask_type": "rand"}
    first = run(settings)
    encoder = save_adapter(tiny.adapter_for(tiny.text_encoder()).prefixed("text_encoder"), tmp_path / "a.safetensors")
    again = run(settings, avoid_adapters=(str(encoder),), output_dir=str(tmp_path / "again"))
    tiny.assert_same_adapter(again, first)
    other = save_adapter(first.part("unet"), tmp_path / "b.safetensors")
    with pytest.raises(AdapterMismatchError, match="cannot avoid adapters"):
        run(settings, avoid_adapters=(str(other),), output_dir=str(tmp_path / "other"))


def test_class_pictures_are_made_once_and_trained_on(settings: dict[str, object], tmp_path: Path) -> None:
    folder = tmp_path / "class"
    prior = {
        "with_prior_preservation": True, "class_data_dir": str(folder), "class_prompt": "a cat",
        "num_class_images": 3, "sample_batch_size": 2,
    }  # fmt: skip
    with_prior = run(settings, **prior)
    made = hashes(folder)
    assert len(made) == 3
    tiny.assert_same_adapter(run(settings, **prior), with_prior)
    assert hashes(folder) == made
    without = run(settings)
    assert not all(without.deltas[name] == with_prior.deltas[name] for name in without.deltas)


def test_class_pictures_beside_what_systems_leave_behind(settings: dict[str, object], tmp_path: Path) -> None:
    """A folder without pictures is an empty one, whatever else is in it."""
    folder = tmp_path / "class"
    for name in (".ipynb_checkpoints", "__MACOSX"):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / name / "left.png")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._x.png", "notes.txt"):
        (folder / name).write_bytes(b"no picture")
    config = TrainingConfig(
        **settings, with_prior_preservation=True, class_data_dir=str(folder), class_prompt="a cat", num_class_images=2
    )
    made = class_pictures(config, torch.device("cpu"), seed=3)
    assert [(picture.path.name, picture.prompt) for picture in made] == [
        ("class-00000.png", "a cat"),
        ("class-00001.png", "a cat"),
    ]


def test_v_prediction_base_trains(settings: dict[str, object], tmp_path: Path) -> None:
    pipe = tiny.pipeline()
    pipe.scheduler = DDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False
    )
    pipe.save_pretrained(tmp_path / "v")
    of_v = run(settings, pretrained_model_name_or_path=str(tmp_path / "v"), snr_gamma=5.0)
    of_epsilon = run(settings, snr_gamma=5.0)
    assert not all(of_v.deltas[name] == of_epsilon.deltas[name] for name in of_v.deltas)


def test_the_adapter_lowers_the_loss(settings: dict[str, object], base: Path) -> None:
    adapter = run(settings, max_train_steps=30, density=0.3, train_batch_size=5)
    pipe = load_base(TrainingConfig(**settings), torch.device("cpu"))
    pictures = find_pictures(str(settings["instance_data_dir"]), "a sks cat")
    examples, objective = prepare_examples(pipe, TrainingConfig(**settings), [pictures], seed=0)
    batch = collate([examples[(0, index)] for index in range(5)])

    def error() -> float:
        with torch.no_grad():
            return sum(float(objective.loss(batch, torch.Generator().manual_seed(seed))) for seed in range(10))

    before = error()
    resident = resident_of(pipe)
    resident.add(adapter, "it")
    resident.set({"it": 1.0})
    assert error() < 0.97 * before


# ---------------------------------------------------------------- repeated and resumed


def test_the_same_seed_gives_the_same_adapter(settings: dict[str, object], tmp_path: Path) -> None:
    options = {"random_flip": True, "mask_type": "grad", "calibration_steps": 2, "dataloader_num_workers": 1}
    first = run(settings, **options)
    torch.manual_seed(99)  # the global state does not matter
    tiny.assert_same_adapter(run(settings, **options | {"dataloader_num_workers": 0}), first)
    other = run(settings, **options | {"seed": 8})
    assert not all(delta == other.deltas.get(name) for name, delta in first.deltas.items())


@pytest.mark.parametrize("dora", [False, True], ids=["deltas", "dora"])
def test_resuming_equals_never_having_stopped(settings: dict[str, object], dora: bool) -> None:
    """Cosine schedule, accumulation, random crops, a stop in the middle of a pass over the data."""
    options = {
        "max_train_steps": 6, "checkpointing_steps": 3, "lr_scheduler": "cosine", "lr_warmup_steps": 1,
        "gradient_accumulation_steps": 2, "random_flip": True, "train_text_encoder": True,
        "use_dora": dora,
    }  # fmt: skip
    whole = run(settings, **options)
    checkpoints = Path(str(settings["output_dir"]))
    assert load_adapter(checkpoints / "checkpoint-3").metadata["steps"] == "3"
    assert not all(load_adapter(checkpoints / "checkpoint-3").deltas[n] == d for n, d in whole.deltas.items())
    tiny.assert_same_adapter(run(settings, **options, resume_from_checkpoint="checkpoint-3"), whole)


def test_checkpoints_are_limited_and_the_latest_is_found(settings: dict[str, object]) -> None:
    options = {"checkpointing_steps": 1, "checkpoints_total_limit": 2, "resume_from_checkpoint": "latest"}
    run(settings, **options, max_train_steps=3)  # there is none yet: starts anew
    output = Path(str(settings["output_dir"]))
    assert sorted(path.name for path in output.glob("*checkpoint*")) == ["checkpoint-2", "checkpoint-3"]
    run(settings, **options | {"seed": None}, max_train_steps=4)
    assert sorted(path.name for path in output.glob("*checkpoint*")) == ["checkpoint-3", "checkpoint-4"]
    assert load_adapter(output).metadata["seed"] == "7"  # that of the run it resumes
    with pytest.raises(ShiraError, match=r"no checkpoint 'checkpoint-9'; .* has checkpoint-3, checkpoint-4"):
        run(settings, resume_from_checkpoint="checkpoint-9")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"density": 0.03, "mask_seed": 1}, r"density was 0.02, got 0.03(.|\n)*mask_seed was 0, got 1"),
        ({"seed": 8}, "seed was 7, got 8"),
        ({"max_train_steps": 1}, "max_train_steps is 1, but 2 steps are done"),
    ],
    ids=["masks", "seed", "steps"],
)
def test_resuming_another_run_is_refused(settings: dict[str, object], changed: dict[str, object], message: str) -> None:
    run(settings, checkpointing_steps=2)
    before = hashes(Path(str(settings["output_dir"])))
    with pytest.raises(ShiraError, match=rf"seed that it began with(.|\n)*{message}"):
        run(settings | changed, resume_from_checkpoint="latest")
    assert hashes(Path(str(settings["output_dir"]))) == before


def test_epochs_are_passes_over_the_pictures(settings: dict[str, object]) -> None:
    adapter = run(settings, max_train_steps=None, num_train_epochs=2)
    assert adapter.metadata["steps"] == "6"  # 5 pictures, 2 a batch: 3 batches a pass


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("before", [True, False])
def test_training_keeps_off_cudnn_attention(settings: dict[str, object], before: bool) -> None:
    found: set[bool] = set()
    watch = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: found.add(torch.backends.cuda.cudnn_sdp_enabled())
    )
    usual = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(before)
        train(TrainingConfig(**settings))
        assert found == {False}
        assert torch.backends.cuda.cudnn_sdp_enabled() == before
    finally:
        watch.remove()
        torch.backends.cuda.enable_cudnn_sdp(usual)


def test_a_run_that_changes_nothing_says_so(settings: dict[str, object], caplog: pytest.LogCaptureFixture) -> None:
    train(TrainingConfig(**(settings | {"learning_rate": 0.0})))
    assert "all values of the adapter are 0" in caplog.text


def test_a_diverging_run_says_so_and_saves_nothing(settings: dict[str, object]) -> None:
    with pytest.raises(ShiraError, match=r"the loss is (nan|inf) at step 2: training diverged"):
        run(settings, learning_rate=1e30, max_train_steps=3)
    assert not list(Path(str(settings["output_dir"])).rglob("*.safetensors"))


def test_caching_random_crops_is_refused(settings: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(ShiraError, match=r"crop of .*0.png \(20 x 16\) is random: add center_crop"):
        run(settings, cache_latents=True)
    square = tmp_path / "square"
    square.mkdir()
    Image.effect_noise((20, 20), 90).save(square / "it.png")
    assert run(settings, cache_latents=True, instance_data_dir=str(square)).nnz


def test_cached_latents_are_those_of_the_pictures_mirrored_or_not(settings: dict[str, object]) -> None:
    config = TrainingConfig(**settings, center_crop=True, random_flip=True)
    pipe = load_base(config, torch.device("cpu"))
    pictures = find_pictures(config.instance_data_dir, "x")
    plain, _ = prepare_examples(pipe, config, [pictures], seed=3)
    cached, _ = prepare_examples(pipe, replace(config, cache_latents=True), [pictures], seed=3)
    variants = set()
    for position in range(12):
        pixels, moments = (examples[(position, 0)][0].view.tensor for examples in (plain, cached))
        torch.testing.assert_close(encode(pipe, pixels.unsqueeze(0)).squeeze(0), moments)
        variants.add(moments.sum((0, 1)).numpy().tobytes())
    assert len(variants) == 2


def test_convolutions_can_be_adapted_beside_the_targets(settings: dict[str, object]) -> None:
    alone = run(settings, target_modules=("to_q",), mask_type="wm")
    both = run(settings, target_modules=("to_q",), include_conv=True, mask_type="wm")
    added = {name: delta for name, delta in both.deltas.items() if name not in alone.deltas}
    assert alone.deltas.keys() < both.deltas.keys()
    assert added and all(len(delta.shape) == 4 for delta in added.values())
    pipe = StableDiffusionPipeline.from_pretrained(str(settings["pretrained_model_name_or_path"]))
    convolutions = [name for name, module in pipe.unet.named_modules() if isinstance(module, torch.nn.Conv2d)]
    assert added.keys() == {f"unet.{name}.weight" for name in convolutions}
    assert both.metadata["targets"] == "to_q and convolutions"


def test_recomputed_inputs_give_the_same_adapter(settings: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    kept = run(settings, mask_type="rand")
    asked: list[bool] = []

    class Watched(SparseTuner):
        def __init__(self, *args: Any, recompute: bool, **others: Any) -> None:
            asked.append(recompute)
            super().__init__(*args, recompute=recompute, **others)

    monkeypatch.setattr("shira_diffusers.dreambooth.train.SparseTuner", Watched)
    tiny.assert_same_adapter(kept, run(settings, mask_type="rand", recompute_inputs=True))
    assert asked == [True]


def test_a_run_with_dropped_captions_learns_something_else(settings: dict[str, object]) -> None:
    told, untold = (run(settings, caption_dropout_rate=rate) for rate in (0.0, 0.5))
    assert any(told.deltas[name] != untold.deltas[name] for name in told.deltas)


def test_other_pipelines_and_sizes_are_refused(settings: dict[str, object], tmp_path: Path) -> None:
    index = {"_class_name": "StableDiffusionInpaintPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(
        ShiraError, match="is a StableDiffusionInpaintPipeline, expected a StableDiffusionPipeline or a Stable"
    ):
        run(settings, pretrained_model_name_or_path=str(tmp_path / "other"))
    with pytest.raises(ShiraError, match="resolution must be a multiple of 2, got 17"):
        run(settings, resolution=17)


def test_fp16_on_a_cpu_is_refused(settings: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    AcceleratorState._reset_state(reset_partial_state=True)  # one process has one precision
    try:
        with pytest.raises(ShiraError, match="mixed_precision fp16 needs a GPU"):
            run(settings, mixed_precision="fp16")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    ("variable", "name"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
    ],
)
def test_plans_of_accelerate_that_have_no_meaning_here_are_refused(
    settings: dict[str, object], monkeypatch: pytest.MonkeyPatch, variable: str, name: str
) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(
        ShiraError, match=rf"accelerate is configured to use {name}, which cannot be used .*--multi_gpu"
    ):
        run(settings)


def test_a_precision_of_accelerate_that_is_not_there_is_told(
    settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    AcceleratorState._reset_state(reset_partial_state=True)  # one process has one precision
    try:
        with pytest.raises(
            ShiraError, match=r"accelerate does not start with its configuration: .*fp8.*accelerate config"
        ):
            run(settings)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_a_compiler_in_accelerates_configuration_is_told_to_have_no_effect(
    settings: dict[str, object], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = run(settings)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    tiny.assert_same_adapter(run(settings), plain)
    assert "accelerate's dynamo_backend INDUCTOR has no effect" in caplog.text


def test_validation_pictures_are_drawn_with_the_scheduler_asked_for(
    settings: dict[str, object], tmp_path: Path
) -> None:
    options = {"validation_prompt": "a dog", "num_validation_images": 1, "validation_steps": 1}
    own = run(settings, **options)
    drawn = {}
    for name in ("DPMSolverMultistepScheduler", "DDPMScheduler"):
        other = run(settings, **options, validation_scheduler=name, output_dir=str(tmp_path / name))
        tiny.assert_same_adapter(other, own)
        drawn[name] = (tmp_path / name / "validation" / "step-000002-0.png").read_bytes()
    pipe = StableDiffusionPipeline.from_pretrained(str(settings["pretrained_model_name_or_path"]))
    pipe.load_shira(tmp_path / "DDPMScheduler")
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    config = TrainingConfig(**settings)
    (expected,) = sample(pipe, "a dog", range(1), 7, config)
    made = Image.open(tmp_path / "DDPMScheduler" / "validation" / "step-000002-0.png")
    assert np.abs(np.asarray(expected, dtype=int) - np.asarray(made, dtype=int)).max() <= 3  # the file's fp16 values
    drawn["own"] = (tmp_path / "out" / "validation" / "step-000002-0.png").read_bytes()
    assert len(set(drawn.values())) == 3


@pytest.mark.parametrize(
    ("option", "message"),
    [
        pytest.param(
            {"report_to": "clearml"}, "report_to: expected an installed tracker .*got 'clearml'", id="tracker"
        ),
        pytest.param({"use_8bit_adam": True}, "pip install bitsandbytes", id="bitsandbytes"),
        pytest.param({"instance_data_dir": "/nowhere"}, "no folder of pictures at '/nowhere'", id="pictures"),
        pytest.param(
            {"pretrained_model_name_or_path": "/nowhere"}, "cannot load the base model '/nowhere', expected", id="base"
        ),
        pytest.param({"target_modules": ("to_nothing",)}, "match none of the", id="targets"),
    ],
)
def test_what_is_missing_is_named(settings: dict[str, object], option: dict[str, object], message: str) -> None:
    with pytest.raises(ShiraError, match=message):
        run(settings, **option)
