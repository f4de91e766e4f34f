"""Settings are checked as a whole, and each is a flag."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from shira_diffusers import ShiraError
from shira_diffusers.dreambooth.command_line import parse_config
from shira_diffusers.dreambooth.config import TrainingConfig

NEEDED = {"pretrained_model_name_or_path": "base", "instance_data_dir": "pictures", "instance_prompt": "a sks cat"}
NEEDED_FLAGS = [part for name, value in NEEDED.items() for part in (f"--{name}", value)]


def test_flags_default_to_the_settings_defaults() -> None:
    assert parse_config(NEEDED_FLAGS) == TrainingConfig(**NEEDED)


def test_every_setting_is_a_flag_of_its_type() -> None:
    flags = []
    expected = {}
    for setting in fields(TrainingConfig):
        if setting.name in NEEDED or setting.name in OF_DATA_SETS or setting.name == "resume_from_adapter":
            continue
        flags.append(f"--{setting.name}")
        if setting.default is False:
            expected[setting.name] = True
            continue
        value = False if setting.default is True else CHANGED.get(setting.name, 3)
        expected[setting.name] = value
        flags += [str(part) for part in value] if isinstance(value, tuple) else [str(value)]
    config = parse_config([*NEEDED_FLAGS, *flags])
    assert {name: getattr(config, name) for name in expected} == expected


def test_a_data_set_in_place_of_a_folder() -> None:
    flags = [part for name, value in OF_DATA_SETS.items() for part in (f"--{name}", value)]
    config = parse_config(["--pretrained_model_name_or_path", "base", "--instance_prompt", "a sks cat", *flags])
    assert {name: getattr(config, name) for name in OF_DATA_SETS} == OF_DATA_SETS
    assert config.instance_data_dir is None


OF_DATA_SETS = {"dataset_name": "me/cats", "dataset_config_name": "small", "caption_column": "text"}
CHANGED = {
    "image_column": "photo", "cache_dir": "cache", "image_interpolation_mode": "box", "on_bad_image": "skip",
    "optimizer": "Prodigy", "prior_generation_precision": "bf16",
    "pretrained_vae_model_name_or_path": "vae",
    "revision": "main", "variant": "fp16", "output_dir": "out", "mask_type": "snip", "density": 0.5,
    "mask_budget": "global",
    "target_modules": ("to_q", "*attn2.to_*"), "avoid_adapters": ("a", "b"), "mixed_precision": "bf16",
    "learning_rate": 0.1, "lr_scheduler": "cosine", "lr_power": 2.0, "adam_beta1": 0.1, "adam_beta2": 0.2,
    "adam_weight_decay": 0.0, "adam_epsilon": 1e-3, "max_grad_norm": 2.0, "snr_gamma": 5.0,
    "prior_loss_weight": 0.5, "class_data_dir": "class", "class_prompt": "a cat", "validation_prompt": "a sks cat",
    "hub_model_id": "me/cat", "hub_token": "hf_x", "validation_scheduler": "DDPMScheduler",
    "resume_from_checkpoint": "latest", "report_to": "none", "logging_dir": "tracks", "caption_dropout_rate": 0.25,
    "weighting_scheme": "cosmap", "precondition_outputs": False,
    "average_from": 0.25,
}  # fmt: skip


def test_all_wrong_settings_are_in_one_error() -> None:
    wrong = {
        "density": 0.0, "resolution": 0, "learning_rate": -1.0, "adam_beta1": 1.0, "mask_type": "best",
        "with_prior_preservation": True, "class_prompt": "a cat", "caption_dropout_rate": 1.0,
        "snr_gamma": 0.0, "max_grad_norm": 0.0, "target_modules": ("attention", "conv1"), "max_train_steps": 0,
    }  # fmt: skip
    with pytest.raises(ShiraError) as caught:
        TrainingConfig(**NEEDED, **wrong)
    message = str(caught.value)
    assert message.startswith("training settings are wrong (11):")
    for name in (
        "density", "resolution", "learning_rate", "adam_beta1", "mask_type", "class_data_dir", "caption_dropout_rate",
        "snr_gamma", "max_grad_norm", "mixes the preset attention", "max_train_steps",
    ):  # fmt: skip
        assert name in message


def test_not_a_number_is_refused() -> None:
    with pytest.raises(ShiraError, match="learning_rate must not be negative, got nan"):
        TrainingConfig(**NEEDED, learning_rate=float("nan"))


@pytest.mark.parametrize("prompt", ["", " \t\n"])
def test_an_empty_prompt_is_refused(prompt: str) -> None:
    with pytest.raises(ShiraError) as caught:
        parse_config([*NEEDED_FLAGS[:4], "--instance_prompt", prompt])
    assert str(caught.value) == (
        "training settings are wrong (1):\n  - instance_prompt must say what the pictures show, such as 'a picture in "
        f"sks style', got {prompt!r}"
    )


def test_idle_class_settings_are_told() -> None:
    config = TrainingConfig(**NEEDED, class_prompt="a cat", class_data_dir="cats")
    assert config.idle == [
        f"--{name} has no effect without --with_prior_preservation" for name in ("class_data_dir", "class_prompt")
    ]
    assert not TrainingConfig(**NEEDED, with_prior_preservation=True, class_prompt="c", class_data_dir="d").idle


# ---------------------------------------------------------------- the command line


def test_help_has_each_flag_once_in_a_group_with_its_default_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_config(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    groups = re.split(r"\n(?=\S)", shown)
    titles = [group.splitlines()[0] for group in groups]
    for title, flag in {
        "base model:": "variant", "pictures and prompts:": "cache_latents", "which weights are trained:": "use_dora",
        "training and memory:": "seed", "optimizer and loss:": "snr_gamma", "prior preservation:": "class_prompt",
        "results, checkpoints and validation:": "output_dir", "trackers and the Hub:": "hub_token",
    }.items():  # fmt: skip
        assert f"\n  --{flag} " in groups[titles.index(title)], title
    flags = re.split(r"\n  (?=--)", shown)[1:]
    names = [flag.split()[0] for flag in flags]
    assert sorted(names) == sorted(["--json", *(f"--{setting.name}" for setting in fields(TrainingConfig))])
    assert all(flag.count("default") <= 1 for flag in flags)
    assert not re.search(r"default: (None|False)", shown)
    by_name = dict(zip(names, (" ".join(flag.split()) for flag in flags), strict=True))
    assert "(default: 0.02)" in by_name["--density"]
    assert "(default: a quarter of the run, at most 500)" in by_name["--checkpointing_steps"]
    assert "(required)" in by_name["--instance_prompt"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (NEEDED_FLAGS[:4], "the following arguments are required: --instance_prompt"),
        ([*NEEDED_FLAGS, "--density", "much"], "argument --density: invalid float value: 'much'"),
        ([*NEEDED_FLAGS, "--densty", "1"], "unrecognized arguments: --densty 1"),
    ],
    ids=["missing", "wrong", "unknown"],
)
def test_a_wrong_command_line_is_told_in_one_line(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_config(flags)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}; ") and line.endswith(" --help lists all flags")


def test_output_inside_the_base_is_refused(tmp_path: Path) -> None:
    settings = {**NEEDED, "pretrained_model_name_or_path": str(tmp_path)}
    with pytest.raises(ShiraError, match="never written to"):
        TrainingConfig(**settings, output_dir=str(tmp_path / "unet"))
    TrainingConfig(**settings, output_dir=str(tmp_path) + "-adapter")


def test_one_preset_or_several_patterns() -> None:
    assert TrainingConfig(**NEEDED, target_modules=("attention",)).targets == "attention"
    assert TrainingConfig(**NEEDED, target_modules=("to_q", "to_k")).targets == ("to_q", "to_k")
