"""The arena of benchmarks/study: what it draws is what the pipeline draws, and its figures are what they say."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from app.insight import effects
from benchmarks import study
from benchmarks.study.arena import pack
from benchmarks.study.effects import adapter_effects
from benchmarks.study.flat import Layout, bind
from benchmarks.study.mixing import METHODS, always
from benchmarks.study.predictors import spearman
from benchmarks.study.sampling import Sampler
from benchmarks.study.stats import Table, area, best, interval, ratio, table, unpack
from benchmarks.study.training import Draws, Objective
from benchmarks.study.world import Lesson, Prompts, World, load_world, unseen_concepts
from examples.emoji.evaluate import GUIDANCE
from examples.emoji.judge_mixes import MixJudge
from examples.emoji.render import FONT

needs_font = pytest.mark.skipif(not FONT.exists(), reason="needs the Noto Color Emoji font")


@pytest.fixture(scope="module")
def world() -> World:
    return load_world(Path("assets"), None, None, torch.device("cpu"))


@pytest.fixture(scope="module")
def sampler(world: World) -> Sampler:
    layout = Layout.of(world.parts.unet)
    return Sampler(world, layout, layout.flat(world.parts.unet), MixJudge().eval().requires_grad_(False), 2, 3)


def prompts(world: World, words: list[str]) -> Prompts:
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return Prompts(world.text(words), torch.zeros(2, dtype=torch.long), noise)


WORDS = ["a picture of an owl on a teal background", "a picture of a rocket on a red background"]


@needs_font
@torch.no_grad()
def test_the_sampler_draws_what_the_pipeline_draws(world: World, sampler: Sampler) -> None:
    asked = prompts(world, WORDS)
    change = 0.002 * torch.randn(sampler._weights.shape, generator=torch.Generator().manual_seed(1))
    _, pictures = sampler.draw(asked, always(change))
    parts = copy.deepcopy(world.parts)
    layout = Layout.of(parts.unet)
    bind(parts.unet, layout, layout.flat(parts.unet) + change)
    drawn = parts.pipeline()(
        WORDS, num_inference_steps=3, guidance_scale=GUIDANCE, latents=asked.noise.clone(), output_type="pt"
    ).images
    assert (pictures - drawn).abs().mean() < 1e-3
    assert not torch.allclose(sampler.draw(asked, always(None))[1], drawn, atol=2e-2)


@needs_font
@torch.no_grad()
def test_composed_effects_of_one_adapter_are_that_adapter(world: World, sampler: Sampler) -> None:
    asked = prompts(world, WORDS)
    layout = Layout.of(world.parts.unet)
    change = 0.002 * torch.randn(sampler._weights.shape, generator=torch.Generator().manual_seed(1))
    alone = sampler.draw(asked, always(change))[1].clone()
    for method in ("effects", "mean_of_passes", "alternate", "sum"):
        mixed = sampler.draw(asked, METHODS[method]([change], [1.0], layout))[1]
        assert torch.allclose(mixed, alone, atol=2e-3), method


@needs_font
def test_splits_share_no_concept_and_show_none_that_was_taught(world: World) -> None:
    val, test = unseen_concepts("val", 96), unseen_concepts("test", 96)
    assert not set(val) & set(test)
    assert "fox" not in val + test and "alien" not in val + test


@needs_font
def test_effects_of_equal_and_of_opposite_adapters(world: World) -> None:
    layout = Layout.of(world.parts.unet)
    weights = layout.flat(world.parts.unet)
    seeded = torch.Generator().manual_seed(1)
    lesson = Lesson(torch.randn(2, 3, 4, 16, 16, generator=seeded), world.text([*WORDS, ""]))
    change = 1e-5 * torch.randn(weights.shape, generator=seeded)
    objective = Objective(world, layout, weights)
    changes = {"a": change, "twin": change.clone(), "opposite": -change}
    found = adapter_effects(objective, lesson, changes, Draws.make(0, 1, 2, world.device))
    assert found["a+twin"] == {"cosine": pytest.approx(1, abs=1e-4), "distance": 0.0, "opposing": 0.0}
    assert found["a+opposite"] == found["twin+opposite"]
    assert found["a+opposite"]["cosine"] < -0.99
    power = (found["a+opposite"]["distance"] / 2) ** 2
    assert found["a+opposite"]["opposing"] == pytest.approx(power, rel=0.05)


def test_answers_come_back_as_they_were_packed() -> None:
    answers = torch.tensor([False, False, True, True, False, True, False, False, True])
    assert unpack(pack(answers)).tolist() == answers.tolist()


def curve(seen: list[float], concept: list[float], prompts: int = 100) -> Table:
    cubes = [np.zeros((len(seen), 1, 1, prompts), bool) for _ in range(2)]
    for cube, rates in zip(cubes, (concept, seen), strict=True):
        for i, rate in enumerate(rates):
            cube[i, :, :, : round(rate * prompts)] = True
    return Table(tuple(range(len(seen))), ("a+b",), *cubes)


def test_area_is_what_the_curve_dominates() -> None:
    assert area(curve([0.5, 1.0], [1.0, 0.4])) == pytest.approx(0.5 * 1.0 + 0.5 * 0.4)
    assert area(curve([0.5, 0.4], [1.0, 0.9])) == pytest.approx(0.5)  # a dominated point adds nothing


def test_best_is_the_strength_that_keeps_most_and_lies_in_its_interval() -> None:
    answers = curve([0.2, 0.6, 1.0], [1.0, 0.9, 0.3])
    assert best(answers) == pytest.approx(0.6)
    low, high = interval(answers, best)
    assert low < 0.6 < high and high - low < 0.25


def test_ratio_to_itself_is_one_whatever_is_drawn_and_other_prompts_are_refused() -> None:
    answers = curve([0.2, 0.6, 1.0], [1.0, 0.9, 0.3])
    assert ratio(answers, answers, best) == pytest.approx((1, 1, 1))
    with pytest.raises(ValueError, match="prompts"):
        ratio(answers, curve([0.2], [1.0], prompts=50), best)


def test_equal_values_share_a_rank() -> None:
    assert spearman(np.array([1.0, 1.0, 2.0]), np.array([5.0, 5.0, 9.0])) == pytest.approx(1)
    assert spearman(np.array([1.0, 1.0, 1.0]), np.array([1.0, 2.0, 3.0])) == 0


def test_the_app_says_of_two_styles_what_the_results_say() -> None:
    """How often pairs are kept, by how far their styles oppose each other; the strength and guidance that keep most."""
    results = Path(study.__file__).parent / "results"
    opposing = {row["mix"]: row["opposing"] for row in json.loads((results / "effects.json").read_text())}
    file = json.loads((results / "fifth" / "steady-global-average@0.001-0.json").read_text())  # the trainer's default
    kept: dict[tuple[float, float, str], float] = {}
    for guidance, method in ((3.0, "sum"), (2.0, "guidance_2")):
        answers = table([file], method, lambda mix: mix.count("+") == 1 and "subject" not in mix)
        for strength, row in zip(answers.strengths, answers.kept.mean((2, 3)), strict=True):
            kept |= {(strength, guidance, mix): float(value) for mix, value in zip(answers.mixes, row, strict=True)}
    means = {at[:2]: np.mean([kept[*at[:2], mix] for mix in opposing]) for at in kept}
    assert max(means, key=means.__getitem__) == (effects.STRENGTH, effects.GUIDANCE)
    low = 0.0
    for high, pairs, share in effects.STUDY:
        shares = [kept[effects.STRENGTH, effects.GUIDANCE, mix] for mix in opposing if low <= opposing[mix] < high]
        assert pairs.startswith(f"{len(shares)} ")
        assert share == f"{100 * min(shares):.0f} to {100 * max(shares):.0f} %"
        low = high
