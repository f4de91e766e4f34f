"""The model card of a run, and the run's files on a hub."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import ModelCard
from PIL import Image

from shira_diffusers import ShiraAdapter, ShiraError, SparseDelta, load_adapter, save_adapter
from shira_diffusers.dreambooth.command_line import command_line, parse_config
from shira_diffusers.dreambooth.config import TrainingConfig
from shira_diffusers.dreambooth.model_card import Origin, write_card
from shira_diffusers.dreambooth.published_settings import public_name
from shira_diffusers.dreambooth.train import train
from shira_diffusers.formats.shira_file import WEIGHTS_NAME
from tests import tiny
from tests.dreambooth.hub import TOKEN, Hub, serve


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Hub]]:
    with serve(monkeypatch, str(tmp_path / "cache")) as running:
        yield running


@pytest.fixture
def settings(base: Path, tmp_path: Path) -> dict[str, object]:
    (tmp_path / "pictures").mkdir()
    Image.effect_noise((16, 16), 90).save(tmp_path / "pictures" / "0.png")
    return {
        "pretrained_model_name_or_path": str(base), "instance_data_dir": str(tmp_path / "pictures"),
        "instance_prompt": "a sks cat", "output_dir": str(tmp_path / "sks-cat"), "resolution": 16,
        "max_train_steps": 1, "checkpointing_steps": 1, "report_to": "none", "validation_prompt": "a `red` sks cat",
        "num_validation_images": 2, "density": 0.05, "calibration_steps": 1,
    }  # fmt: skip


ADAPTER = ShiraAdapter(
    {"unet.weight": SparseDelta(torch.tensor([3]), torch.ones(1), (4, 5))}, {"mask": "wm", "density": "0.05"}
)


def config_for(folder: Path, **others: object) -> TrainingConfig:
    settings = {"pretrained_model_name_or_path": "org/base", "instance_data_dir": "x", "instance_prompt": "a sks cat"}
    return TrainingConfig(**settings | {"output_dir": str(folder)} | others)


def fence(card: str, language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)\n```", card, re.DOTALL)
    assert found
    return found[1]


# ---------------------------------------------------------------- a run's card


def test_the_card_of_a_run_holds_what_it_promises(settings: dict[str, object]) -> None:
    config = TrainingConfig(**settings)
    file = train(config)
    card = ModelCard.load(file.parent / "README.md")
    assert set(card.data.tags) == {"shira", "diffusers", "text-to-image", "stable-diffusion"}
    assert card.data.instance_prompt == "a sks cat"
    assert "base_model" not in card.data.to_dict()  # a folder is no id
    assert "license" not in card.data.to_dict()
    assert "## Licence" in card.text
    pictures = re.findall(r"!\[[^]]*\]\(([^)]*)\)", card.text)
    assert pictures == ["validation/step-000001-0.png", "validation/step-000001-1.png"]
    assert all((file.parent / picture).is_file() for picture in pictures)
    assert [entry["output"]["url"] for entry in card.data.widget] == pictures
    for name, value in load_adapter(file).metadata.items():
        assert f"| {name} | `{value}` |" in card.text
    ran = shlex.split(fence(card.text, "bash").replace("\\\n", " "))
    assert ran[:3] == ["accelerate", "launch", "train_dreambooth_shira.py"]
    told = settings | {"mixed_precision": "no", "seed": int(load_adapter(file).metadata["seed"])}  # drawn, and told
    again = parse_config(ran[3:])
    assert {name: getattr(again, name) for name in told} == told


def test_the_lines_of_python_run(settings: dict[str, object]) -> None:
    file = train(TrainingConfig(**settings))
    lines = fence((file.parent / "README.md").read_text(encoding="utf-8"), "python")
    lines = lines.replace(".images", ", num_inference_steps=1, height=16, width=16).images").replace("), num", ", num")
    names: dict[str, object] = {}
    exec(lines, names)
    assert names["pipe"].get_active_shira() == {"default_0": 1.0}  # type: ignore[attr-defined]
    assert isinstance(names["image"], Image.Image)


def test_an_id_of_the_hub_and_odd_words_stay_what_they_are(tmp_path: Path) -> None:
    config = config_for(tmp_path, revision="v1")
    config = replace(config, instance_prompt='a "sks": `cat` | # [dog]\n--- ')
    write_card(
        config,
        replace(ADAPTER, metadata={**ADAPTER.metadata, "odd": "a|b"}),
        [],
        Origin("StableDiffusionXLPipeline", 2, "me/x"),
    )
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "org/base"
    assert card.data.instance_prompt == config.instance_prompt
    assert "# me/x" in card.text
    assert "stable-diffusion-xl" in card.data.tags
    assert "accelerate launch --multi_gpu --num_processes 2 train_dreambooth_shira.py" in card.text
    assert "from_pretrained('org/base', revision='v1')" in card.text
    assert 'Say `` a "sks": `cat` | # [dog] --- `` in the prompt' in card.text
    assert r"| odd | `a\|b` |" in card.text


def test_a_licence_that_somebody_wrote_stays(tmp_path: Path) -> None:
    write_card(config_for(tmp_path), ADAPTER, [], Origin())
    card = ModelCard.load(tmp_path / "README.md")
    card.data.license = "openrail++"
    card.save(tmp_path / "README.md")
    write_card(config_for(tmp_path, density=0.5), ADAPTER, [], Origin())
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "openrail++"
    assert "## Licence" not in card.text
    assert "--density 0.5" in card.text


@pytest.mark.parametrize("text", ["# My project\n", "---\na: [\n---\n", "---\ntags: 3\n---\n"])
def test_a_readme_of_somebody_else_is_kept(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    write_card(config_for(tmp_path), ADAPTER, [], Origin())
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == text
    assert "it is kept as it is" in caplog.text


# ---------------------------------------------------------------- the hub


def test_a_run_that_is_pushed_can_be_loaded_by_its_name(
    settings: dict[str, object], hub: type[Hub], base: Path
) -> None:
    file = train(TrainingConfig(**settings | {"report_to": "tensorboard"}, push_to_hub=True, hub_token=TOKEN))
    names = {WEIGHTS_NAME, "README.md", "validation/step-000001-0.png", "validation/step-000001-1.png"}
    assert hub.files == {f"me/sks-cat/{name}": (file.parent / name).read_bytes() for name in names}
    assert hub.commits == ["End of training"]
    assert f"me/sks-cat/{WEIGHTS_NAME}" in hub.files
    assert "pipe.load_shira('me/sks-cat')" in hub.files["me/sks-cat/README.md"].decode()
    written = [path for path in file.parent.rglob("*") if path.is_file()]
    assert any("tfevents" in path.name for path in written)
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]
    pipe = StableDiffusionPipeline.from_pretrained(base)
    pipe.load_shira("me/sks-cat", "sks")
    assert pipe.list_shira() == {"sks": ["unet"]}


def test_what_is_published_names_folders_and_tells_not_where_they_are(
    settings: dict[str, object], hub: type[Hub], tmp_path: Path, base: Path
) -> None:
    avoided = save_adapter(tiny.adapter_for(tiny.unet()).prefixed("unet"), tmp_path / "other.safetensors")
    paths = {
        "class_data_dir": str(tmp_path / "class"), "with_prior_preservation": True, "class_prompt": "a cat",
        "num_class_images": 1, "pretrained_vae_model_name_or_path": str(base / "vae"), "mask_type": "rand",
        "avoid_adapters": (str(avoided),), "report_to": "tensorboard",
    }  # fmt: skip
    file = train(TrainingConfig(**settings | paths, push_to_hub=True, hub_token=TOKEN))
    published = {name.rpartition("/")[2]: content for name, content in hub.files.items()}
    card = published["README.md"].decode()
    places = (str(tmp_path), str(base.parent))
    assert not [place for place in places if place in card]
    assert not [place for place in places if place.encode() in published[WEIGHTS_NAME]]
    assert load_adapter(file).metadata["base_model"] == base.name
    ran = parse_config(shlex.split(fence(card, "bash").replace("\\\n", " "))[3:])
    assert (ran.instance_data_dir, ran.class_data_dir, ran.output_dir) == ("pictures", "class", "sks-cat")
    assert (ran.pretrained_vae_model_name_or_path, ran.avoid_adapters) == ("vae", ("other.safetensors",))
    assert f"from_pretrained('{base.name}')" in card
    logs = [path.read_bytes() for path in (file.parent / "logs").rglob("*") if path.is_file()]
    assert any(b"instance_data_dir" in log for log in logs)
    assert not [place for place in places for log in logs if place.encode() in log]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/home/me/sd15", "sd15"), ("/home/me/sd15/", "sd15"), ("../secret/sd15", "sd15"), ("~/sd15", "sd15"),
        ("C:\\Users\\me\\sd15", "sd15"), ("org/sd15", "org/sd15"), ("assets/sd15", "assets/sd15"), ("./out", "./out"),
        ("latest", "latest"), ("/", "/"),
    ],
)  # fmt: skip
def test_public_names(path: str, name: str) -> None:
    assert public_name(path) == name


def test_the_card_of_a_resumed_run_shows_the_command_of_the_whole(settings: dict[str, object]) -> None:
    train(TrainingConfig(**settings))
    file = train(TrainingConfig(**settings | {"max_train_steps": 2}, resume_from_checkpoint="latest"))
    command = fence((file.parent / "README.md").read_text(encoding="utf-8"), "bash")
    assert "--max_train_steps 2" in command and "--resume" not in command


def test_the_repository_may_have_another_name(settings: dict[str, object], hub: type[Hub]) -> None:
    train(TrainingConfig(**settings, push_to_hub=True, hub_token=TOKEN, hub_model_id="styles/cat"))
    assert {path.rpartition("/cat/")[0] for path in hub.files} == {"styles"}


def test_a_run_that_may_not_push_ends_before_it_trains(settings: dict[str, object], hub: type[Hub]) -> None:
    with pytest.raises(ShiraError, match=r"cannot create the repository 'sks-cat' on the Hub(.|\n)*--hub_token"):
        train(TrainingConfig(**settings, push_to_hub=True, hub_token="wrong"))
    assert not list(Path(str(settings["output_dir"])).rglob("*.safetensors"))


def test_a_hub_out_of_reach_is_told_before_training(
    settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ShiraError, match="cannot create the repository 'sks-cat' on the Hub"):
        train(TrainingConfig(**settings, push_to_hub=True, hub_token=TOKEN))


def test_an_upload_that_fails_leaves_the_adapter_and_says_where(settings: dict[str, object], hub: type[Hub]) -> None:
    hub.refuses.add("/commit/")
    output = settings["output_dir"]
    with pytest.raises(ShiraError, match=rf"saved in {output}, but(.|\n)*hf upload me/sks-cat {output}"):
        train(TrainingConfig(**settings, push_to_hub=True, hub_token=TOKEN))
    assert load_adapter(Path(str(output))).nnz
    assert not hub.files


def test_a_token_beside_wandb_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShiraError, match="hub_token with report_to wandb"):
        config_for(tmp_path, report_to="wandb", hub_token=TOKEN)


def test_a_token_is_not_shown(tmp_path: Path) -> None:
    config = config_for(tmp_path, hub_token=TOKEN)
    assert TOKEN not in repr(config)
    assert TOKEN not in str(command_line(config))


# ---------------------------------------------------------------- the command


def test_the_command_gives_the_settings_again(tmp_path: Path) -> None:
    config = config_for(
        tmp_path, target_modules=("to_q", "*attn2*"), random_flip=True, adam_epsilon=1e-9, snr_gamma=5.0, seed=3,
        instance_prompt="--odd", validation_prompt="'b'", lr_scheduler="cosine", mixed_precision="no",
    )  # fmt: skip
    assert parse_config([part for flag in command_line(config) for part in flag]) == config
    assert all(len(flag) <= 3 for flag in command_line(config))
    assert len(command_line(config)) < len(fields(config))
