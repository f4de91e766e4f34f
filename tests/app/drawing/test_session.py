"""A session draws what the pipeline alone would draw, byte for byte, whoever else draws, and leaves nothing active."""

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from app.drawing.session import Session, series_of, strip_of
from app.settings.checks import SettingsError
from app.settings.picture import Picture
from shira_diffusers import ShiraError, load_adapter
from tests import tiny
from tests.app.conftest import SUGGESTION, SUGGESTIONS, Folders, assert_bits, bits_of

MIX = {"bluefire": 1.0, "paintings": 0.5}


def draw(session: Session, mix: dict[str, float], seed: int = 3, steps: int = 2, **options: Any) -> Picture:
    return session.generate(SUGGESTION, mix, seed, steps, **options)


def bytes_of(picture: Picture) -> bytes:
    return picture.image.tobytes()


@pytest.fixture
def bits(session: Session) -> dict[str, torch.Tensor]:
    return bits_of(session)


# ---------------------------------------------------------------- one picture


@pytest.mark.parametrize("mix", [{}, {"bluefire": -0.5}, MIX], ids=["base", "one", "two"])
def test_a_picture_is_what_the_pipeline_draws(session: Session, folders: Folders, mix: dict[str, float]) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(folders.base)
    pipe.load_shira(folders.adapters / "bluefire.safetensors", "bluefire")
    pipe.load_shira(folders.adapters / "paintings", "paintings")
    pipe.set_shira(list(mix), list(mix.values()))
    options = {"num_inference_steps": 2, "guidance_scale": 4.5, "generator": torch.Generator().manual_seed(3)}
    expected = pipe(SUGGESTION, **options).images[0]
    assert bytes_of(draw(session, mix, guidance=4.5)) == expected.tobytes()


def test_a_style_changes_the_picture_and_strength_0_does_not(session: Session) -> None:
    base = draw(session, {})
    assert bytes_of(draw(session, {"bluefire": 1.0})) != bytes_of(base)
    off = draw(session, {"bluefire": 0.0})
    assert bytes_of(off) == bytes_of(base)
    assert off.report["entries_changed"] == 0
    assert off.report["mix"] == {"bluefire": 0.0}


def test_the_report_tells_all_that_is_needed_to_draw_it_again(session: Session, folders: Folders) -> None:
    picture = session.generate(f" {SUGGESTION}\n", MIX, None, 2.0)  # type: ignore[arg-type]
    report = json.loads(json.dumps(dict(picture.report)))
    assert (report["model"], report["prompt"], report["mix"]) == ("tiny-diffusion", SUGGESTION, MIX)
    assert (report["steps"], report["guidance"]) == (2, 3.0)
    again = session.generate(**{key: report[key] for key in ("prompt", "mix", "seed", "steps", "guidance")})
    assert bytes_of(again) == bytes_of(picture)


def test_the_report_tells_what_switching_took(session: Session, folders: Folders) -> None:
    report = draw(session, MIX).report
    files = [folders.adapters / "bluefire.safetensors", folders.adapters / "paintings"]
    deltas = [load_adapter(file).deltas for file in files]
    entries = sum(torch.cat([each[name].indices for each in deltas]).unique().numel() for name in deltas[0])
    total = sum(p.numel() for p in tiny.snapshot(session._pipe).values())
    assert report["entries_changed"] == entries > 0
    assert report["share_changed"] == entries / total
    assert 0 < report["switch_ms"] < 1000 * report["generation_s"] + 1000
    assert draw(session, {}).report["entries_changed"] == 0


# ---------------------------------------------------------------- nothing stays


def test_nothing_is_active_before_and_after(session: Session, bits: dict[str, torch.Tensor]) -> None:
    seen: list[dict[str, Any]] = []
    draw(session, MIX, on_step=lambda done, of: seen.append(session.active))
    assert seen == [{}, MIX, MIX]
    assert session.active == {}
    assert_bits(session, bits)


@pytest.mark.parametrize("at", [0, 1, 2], ids=["before", "amid", "at the end"])
def test_a_generation_that_ends_early_leaves_nothing_active(
    session: Session, bits: dict[str, torch.Tensor], at: int
) -> None:
    before = bytes_of(draw(session, {}))

    def fail(done: int, of: int) -> None:
        if done == at:
            raise InterruptedError("stop")

    with pytest.raises(InterruptedError):
        draw(session, MIX, on_step=fail)
    assert session.active == {}
    assert_bits(session, bits)
    assert bytes_of(draw(session, {})) == before


def test_progress_starts_at_0_and_ends_at_all(session: Session) -> None:
    seen: list[tuple[int, int]] = []
    draw(session, {}, steps=3, on_step=lambda done, of: seen.append((done, of)))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


# ---------------------------------------------------------------- several at once


def test_pictures_drawn_at_once_are_those_drawn_alone(session: Session, bits: dict[str, torch.Tensor]) -> None:
    orders: list[dict[str, Any]] = [
        {"mix": mix, "seed": seed} for seed in (1, 2) for mix in ({}, {"bluefire": 1.0}, {"paintings": 2.0}, MIX)
    ]
    alone = [bytes_of(draw(session, **order)) for order in orders]
    assert len(set(alone)) == len(alone)
    start = threading.Barrier(len(orders))

    def draw_at_once(order: dict[str, Any]) -> bytes:
        start.wait()
        return bytes_of(draw(session, **order))

    with ThreadPoolExecutor(len(orders)) as pool:
        assert list(pool.map(draw_at_once, orders)) == alone
    assert_bits(session, bits)


def test_one_that_fails_does_not_disturb_the_next_in_turn(session: Session) -> None:
    alone = bytes_of(draw(session, {"bluefire": 1.0}))
    others: list[bytes] = []
    other = threading.Thread(target=lambda: others.append(bytes_of(draw(session, {"bluefire": 1.0}))))

    def fail(done: int, of: int) -> None:
        if done == 1:
            other.start()  # waits for its turn
            raise InterruptedError

    with pytest.raises(InterruptedError):
        draw(session, {"paintings": 1.0}, on_step=fail)
    other.join(30)
    assert others == [alone]


def test_waiting_for_a_turn_is_not_counted_as_switching(session: Session) -> None:
    draw(session, {"bluefire": 1.0})
    reports: list[Any] = []
    other = threading.Thread(target=lambda: reports.append(draw(session, {"bluefire": 1.0}).report))

    def dawdle(done: int, of: int) -> None:
        if done == 1:
            other.start()
            time.sleep(0.5)

    draw(session, {"paintings": 1.0}, on_step=dawdle)
    other.join(30)
    assert reports[0]["switch_ms"] < 400


# ---------------------------------------------------------------- the strip


def draw_strip(session: Session, seed: int | None = 3) -> dict[str, Picture]:
    return {
        label: session.submit(each).result() for label, each in series_of(session.checked(SUGGESTION, MIX, seed, 2))
    }


def test_a_strip_shows_the_base_each_style_and_the_mix(session: Session) -> None:
    strip = draw_strip(session)
    assert list(strip) == ["base", "bluefire", "paintings", "mix"]
    for label, mix in {"base": {}, "bluefire": {"bluefire": 1.0}, "paintings": {"paintings": 0.5}, "mix": MIX}.items():
        assert bytes_of(strip[label]) == bytes_of(draw(session, mix))


def test_a_strip_shares_one_seed_even_if_that_is_drawn(session: Session) -> None:
    assert len({picture.report["seed"] for picture in draw_strip(session, None).values()}) == 1


@pytest.mark.parametrize(
    ("mix", "labels"),
    [
        ({}, ["base"]),
        ({"a": 1.0}, ["base", "a"]),
        ({"a": 1.0, "b": 0.0}, ["base", "a"]),
        ({"a": 1.0, "b": -1.0}, ["base", "a", "b", "mix"]),
        ({"mix": 1.0, "base": 1.0}, ["base", "mix", "base", "mix"]),  # styles may have these names
    ],
)
def test_labels_of_a_strip(mix: dict[str, float], labels: list[str]) -> None:
    assert [label for label, _ in strip_of(mix)] == labels


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda s: s.generate("", {}), "prompt must say what to draw"),
        (lambda s: s.generate("a cat", {"gold": 1.0}), "no style named 'gold'; there are 'bluefire', 'paintings'"),
        (lambda s: s.generate("a cat", {"stranger": 1.0}), "no style named 'stranger'"),
        (lambda s: s.generate("abcdefghijklmno", {}), "prompt is too long: the model reads 16 tokens, got 17"),
        (lambda s: s.generate("a cat", {}, -2), "seed must be a whole number"),
        (lambda s: series_of(s.checked("a cat", {})), "nothing to compare"),
        (lambda s: series_of(s.checked("a cat", {"bluefire": 0.0})), "nothing to compare"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_drawn(
    session: Session, act: Callable[[Session], object], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        act(session)


def test_the_longest_prompt_is_read(session: Session) -> None:
    session.generate("abcdefghijklmn", {}, 1, 1)


def test_opening_tells_what_is_missing(folders: Folders, tmp_path: Path) -> None:
    base, missing = str(folders.base), str(tmp_path / "missing")
    with pytest.raises(ShiraError, match=r"no folder of adapters at .*missing; name one with --adapters"):
        Session.open(base, Path(missing))
    with pytest.raises(ShiraError, match=r"no base pipeline at .*missing: .*; name one with --base"):
        Session.open(missing, folders.adapters)
    with pytest.raises(ShiraError, match="cannot load a pipeline from"):
        Session.open(str(folders.adapters), folders.adapters)
    with pytest.raises(ShiraError, match="cannot use the device 'quantum'; name another with --device"):
        Session.open(base, folders.adapters, device="quantum")


def test_opening_takes_the_dtype(folders: Folders) -> None:
    session = Session.open(str(folders.base), folders.adapters, dtype="bfloat16")
    assert session._pipe.unet.dtype == torch.bfloat16
    assert session.suggestions == SUGGESTIONS
    assert [card.name for card in session.cards] == ["bluefire", "paintings"]


def test_checking_settings_does_not_disturb_a_picture_that_is_being_drawn(session: Session) -> None:
    """Counting tokens changes how a tokenizer pads; the pipeline's own must not be touched."""
    done = threading.Event()

    def check() -> None:
        while not done.is_set():
            session.checked("a red cat", {})

    threads = [threading.Thread(target=check) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(25):
            session.generate("a big dog", {}, 1, 1)
    finally:
        done.set()
        for thread in threads:
            thread.join()


def test_a_picture_under_way_ends_at_its_next_step_when_the_session_is_closed(folders: Folders) -> None:
    session, steps = Session.open(str(folders.base), folders.adapters), []

    def close(done: int, of: int) -> None:
        steps.append(done)
        if done == 1:
            session.close()

    with pytest.raises(ShiraError, match="the app is ending"):
        draw(session, {"bluefire": 1.0}, steps=50, on_step=close)
    assert steps == [0, 1] and session.active == {}
    with pytest.raises(ShiraError, match="the app is ending"):
        draw(session, {})
