"""Scores on any base: what is trained, drawn and compared is what diffusers, PEFT and transformers themselves make."""

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    Dinov2Config,
    Dinov2Model,
)

from benchmarks.study.__main__ import main
from benchmarks.study.score_tables import figures
from benchmarks.study.scorers import Scorer
from benchmarks.study.scores import LORA_FILE, Trial, run_scores, train_lora
from shira_diffusers import ShiraError, load_adapter
from shira_diffusers.dreambooth.loss import Objective
from shira_diffusers.dreambooth.train import train
from tests import reference, tiny

VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 8}
CROP = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
CONCEPTS = ["fox", "owl", "fox"]
BOTH = (("lora", 0.5), ("shira", 0.05))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of a base that predicts velocities, CLIP, DINO, and two styles of three pictures."""
    place = tmp_path_factory.mktemp("scores")
    pipe = tiny.pipeline()
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type="v_prediction")
    pipe.save_pretrained(place / "base")
    torch.manual_seed(0)
    config = {"text_config": tiny.text_config().to_dict(), "vision_config": VISION, "projection_dim": 32}
    CLIPModel(CLIPConfig(**config)).save_pretrained(place / "clip")
    CLIPProcessor(CLIPImageProcessor(**CROP), tiny.tokenizer()).save_pretrained(place / "clip")
    Dinov2Model(Dinov2Config(**VISION)).save_pretrained(place / "dino")
    BitImageProcessor(**CROP).save_pretrained(place / "dino")
    for style, dark in (("ink.1", 40), ("sun", 200)):
        (place / "styles" / style).mkdir(parents=True)
        for number in range(3):
            noise = np.random.default_rng(number + dark).integers(dark, dark + 50, (16, 20, 3), np.uint8)
            Image.fromarray(noise).save(place / "styles" / style / f"{number}.png")
    return place


@pytest.fixture(scope="module")
def trial(place: Path) -> Trial:
    folders = [str(place / name) for name in ("base", "clip", "dino", "styles")]
    little = {"steps": 2, "batch": 2, "drawing_steps": 2, "strengths": (0.5, 1.0)}
    return Trial(*folders, CONCEPTS, prompt="a", resolution=tiny.SIZE, **little)


@pytest.fixture(scope="module")
def results(trial: Trial, place: Path) -> Path:
    run_scores(trial, BOTH, [3], place / "work", place / "results", "cpu")
    return place / "results"


@pytest.fixture
def precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def rows(file: Path) -> dict[tuple[str, float], dict[str, object]]:
    return {("+".join(row["mix"]), row["strength"]): row for row in json.loads(file.read_text())["rows"]}


@torch.no_grad()
def test_scores_are_those_of_the_models_themselves(place: Path) -> None:
    picture, other = (Image.effect_noise((20, 16), sigma).convert("RGB") for sigma in (30, 90))
    scorer = Scorer(str(place / "clip"), str(place / "dino"), "cpu")
    got = scorer.score([picture], ["a fox", "an owl"], [1], {"sun": scorer.looks([other, picture])})
    clip, read = CLIPModel.from_pretrained(place / "clip"), CLIPProcessor.from_pretrained(place / "clip")
    logits = [
        clip(**read(text=[text], images=[picture], return_tensors="pt")).logits_per_image / clip.logit_scale.exp()
        for text in ("a fox", "an owl")
    ]
    assert got["clip_t"] == [pytest.approx(float(logits[1]), abs=1e-4)]
    assert got["named"] == [int(logits[1] > logits[0])]
    seen = [clip(**read(text=["a"], images=[p], return_tensors="pt")).image_embeds[0] for p in (picture, other)]
    assert got["clip_i"]["sun"] == [pytest.approx((1 + float(seen[0] @ seen[1])) / 2, abs=1e-4)]
    dino, read = Dinov2Model.from_pretrained(place / "dino"), AutoImageProcessor.from_pretrained(place / "dino")
    seen = [dino(**read(images=[p], return_tensors="pt")).pooler_output[0] for p in (picture, other)]
    cosine = float(torch.cosine_similarity(*seen, dim=0))
    assert got["dino"]["sun"] == [pytest.approx((1 + cosine) / 2, abs=1e-4)]


def test_both_methods_see_the_same_pictures_and_noise(
    trial: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: list[float] = []
    plain = Objective.loss

    def noted(self: Objective, *given: object) -> torch.Tensor:
        loss = plain(self, *given)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(Objective, "loss", noted)
    longer = replace(trial, steps=5)
    train_lora(longer.config("sun", ("lora", 0.0), 3, tmp_path))
    by_lora, losses = losses, []
    train(longer.config("sun", ("shira", 0.0), 3, tmp_path))
    assert by_lora == losses[-5:] and len(set(by_lora)) == 5  # those before choose the mask


def test_a_lora_is_the_mean_of_its_values_after_the_later_steps(trial: Trial, tmp_path: Path) -> None:
    longer = replace(trial, steps=4).config("sun", BOTH[0], 3, tmp_path / "mean")
    last, before = (
        replace(longer, average_from=1.0, max_train_steps=steps, output_dir=str(tmp_path / str(steps)))
        for steps in (4, 3)
    )
    mean, third, fourth = (load_file(train_lora(config)) for config in (longer, before, last))
    for name, value in mean.items():
        torch.testing.assert_close(value, (third[name] + fourth[name]) / 2)
        assert not torch.equal(third[name], fourth[name])


@pytest.mark.parametrize("kind", ["lora", "shira"])
@torch.no_grad()
def test_a_pair_is_the_base_with_both_changes_added(trial: Trial, place: Path, results: Path, kind: str) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(place / "base")
    scorer = Scorer(trial.clip, trial.dino, "cpu")
    folder = place / "styles"
    looks = {
        name: scorer.looks([Image.open(file) for file in sorted((folder / name).iterdir())])
        for name in ("ink.1", "sun")
    }

    def scored() -> dict[str, object]:
        noise = [torch.Generator().manual_seed(number) for number in range(3)]
        prompts = ["a fox", "a owl", "a fox"]
        pictures = pipe(prompts, generator=noise, num_inference_steps=2, height=tiny.SIZE, width=tiny.SIZE).images
        return scorer.score(pictures, ["a fox", "a owl"], [0, 1, 0], looks)

    kept = rows(next(results.glob(f"{kind}@*-3.json")))
    base = scored()
    assert_alike(kept["", 0.0], base)
    files = [next((place / "work").glob(f"{name}-{kind}-*/*.safetensors")) for name in ("ink.1", "sun")]
    weights = copy.deepcopy(dict(pipe.unet.named_parameters()))
    for file in files:
        for name, change in changes(file).items():
            weights[name] += 0.5 * change
    pipe.unet.load_state_dict(weights)
    pair = scored()
    assert_alike(kept["ink.1+sun", 0.5], pair)
    assert pair["dino"] != base["dino"]


def changes(file: Path) -> dict[str, torch.Tensor]:
    """What an adapter adds to the UNet's weights, dense."""
    if file.name != LORA_FILE:
        deltas = load_adapter(file).deltas
        return {n.removeprefix("unet."): reference.dense(d.indices, d.values, d.shape) for n, d in deltas.items()}
    state = load_file(file)
    names = [name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")]
    return {
        f"{n.removeprefix('unet.')}.weight": state[f"{n}.lora_B.weight"] @ state[f"{n}.lora_A.weight"] for n in names
    }


def assert_alike(kept: dict[str, object], scored: dict[str, object]) -> None:
    assert kept["named"] == scored["named"]
    assert kept["clip_t"] == pytest.approx(scored["clip_t"], abs=2e-3)
    for kind in ("clip_i", "dino"):
        assert kept[kind].keys() == scored[kind].keys()
        assert all(kept[kind][name] == pytest.approx(scored[kind][name], abs=2e-3) for name in kept[kind])


def test_a_result_goes_on_where_it_stopped_and_under_the_same_trial_only(
    trial: Trial, place: Path, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sorted(results.iterdir())
    assert [file.name for file in files] == ["lora@0.5-3.json", "shira@0.05-3.json"]
    whole = json.loads(files[1].read_text())
    assert len(whole["rows"]) == 1 + 3 * len(trial.strengths)
    files[1].write_text(json.dumps(whole | {"rows": whole["rows"][:4]}))
    made = {file: file.stat().st_mtime_ns for file in (place / "work").rglob("*.safetensors")}
    run_scores(trial, BOTH, [3], place / "work", results, "cpu")
    assert json.loads(files[1].read_text()) == whole
    assert {file: file.stat().st_mtime_ns for file in (place / "work").rglob("*.safetensors")} == made
    with pytest.raises(ShiraError, match=r"lora@0.5-3.json was made with another steps, guidance; .*--results"):
        run_scores(replace(trial, steps=9, guidance=1.0), BOTH, [3], place / "work", results, "cpu")
    assert json.loads(files[1].read_text()) == whole


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"clip": "dino"}, "--clip: expected .*type clip .*got .*dino': a model of type 'dinov2'"),
        ({"dino": "clip"}, "--dino: expected .*dinov2 or vit.*got .*clip': a model of type 'clip'"),
        ({"clip": "styles"}, "--clip: expected .*got .*styles"),
        ({"dino": "nowhere"}, "--dino: expected .*got .*nowhere"),
        ({"base": "clip"}, "cannot load the base model .*clip.*model_index.json"),
        ({"base": "nowhere"}, "cannot load the base model .*nowhere"),
        ({"styles_from": "styles/sun"}, "--styles-from: expected a folder of folders of pictures"),
        ({"styles_from": "base"}, "no pictures in .*scheduler"),
        ({"resolution": -1}, "resolution must be at least 1, got -1"),
    ],
)
def test_what_is_wrong_is_said_before_any_training(
    trial: Trial, place: Path, tmp_path: Path, wrong: dict[str, str | int], message: str
) -> None:
    given = replace(trial, **{name: str(place / to) if isinstance(to, str) else to for name, to in wrong.items()})
    with pytest.raises(ShiraError, match=message):
        run_scores(given, BOTH, [3], tmp_path / "work", tmp_path / "results", "cpu")
    assert not list(tmp_path.iterdir())


def test_a_mix_counts_as_the_style_that_it_is_least_like() -> None:
    base = {"mix": [], "strength": 0.0, "named": [1, 1], "clip_i": {"a": [0.2, 0.4], "b": [0.4, 0.2]}}
    pairs = [
        {"mix": ["a", "b"], "strength": 1.0, "named": [1, 0], "clip_i": {"a": [0.2, 0.9], "b": [0.5, 0.1]}},
        {"mix": ["a", "c"], "strength": 1.0, "named": [0, 0], "clip_i": {"a": [0.4, 0.3], "c": [0.6, 0.3]}},
    ]
    found = figures([{"rows": [base, pairs[0]]}, {"rows": pairs[1:]}])
    assert found.keys() == {(1, 0.0), (2, 0.0), (2, 1.0)}
    assert found[2, 1.0]["named"] == pytest.approx([0.5, 0])
    assert found[2, 1.0]["clip_i"] == pytest.approx([0.3, 0.2])
    assert found[1, 0.0]["clip_i"] == pytest.approx([0.3, 0.3])
    assert found[2, 0.0]["clip_i"] == pytest.approx([0.2, 0.2])


def test_the_command_prints_a_table_and_draws_the_curve(
    trial: Trial, tmp_path: Path, capsys: pytest.CaptureFixture[str], precision: None
) -> None:
    folders = ["--base", trial.base, "--clip", trial.clip, "--styles-from", trial.styles_from]
    places = ["--work", str(tmp_path / "work"), "--results", str(tmp_path), "--device", "cpu"]
    main(["scores", "--toy", *folders, *places, "--concepts", "owl", "--resolution", "16", "--lora-rates", "0.5"])
    lines = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    assert ["lora@0.5", "1", "1.00"] in lines and ["shira@0.0005", "2", "0.00"] in lines
    assert "lora@0.5, clip_i" in (tmp_path / "work" / "scores.svg").read_text()  # without a DINO, CLIP alone
    with pytest.raises(SystemExit):
        main(["scores", *folders, *places])
    assert "scores needs --base, --clip, --styles-from and --concepts" in capsys.readouterr().err
