"""Interference in words, by layer, and as a heat map that needs no script."""

from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from app.drawing.session import Session
from app.insight.effects import hint, opposing, pictures_of
from app.insight.interference import Comparer, Pair, stage_of
from app.page import interference_html
from app.settings.checks import SettingsError
from shira_diffusers.adapters.interference import Interference, interference_in_all
from tests import tiny


@pytest.fixture(scope="module")
def pair(session: Session) -> Pair:
    (pair,) = Comparer(session).compare(["bluefire", "paintings"])
    return pair


def test_the_figures_are_the_librarys(session: Session, pair: Pair) -> None:
    pipe = tiny.pipeline()
    first, second = tiny.adapter_for(pipe, 1), tiny.adapter_for(pipe, 2, dtype=torch.float16)
    assert (pair.whole, dict(pair.layers)) == interference_in_all(first, second)
    comparer = Comparer(session)
    assert comparer.compare(["bluefire", "paintings"])[0] is comparer.compare(["bluefire", "paintings"])[0]
    assert pair.as_dict()["overlap"] == pair.whole.overlap and pair.as_dict()["words"] == pair.words


def test_layers_are_in_the_order_of_the_model(pair: Pair) -> None:
    stages = list(dict.fromkeys(map(stage_of, pair.layers)))
    assert stages == ["text_encoder", "down", "mid", "up"]
    down = [name for name in pair.layers if ".down_blocks." in name]
    assert down.index("unet.down_blocks.0.resnets.0.conv1.weight") < down.index(
        "unet.down_blocks.1.resnets.0.conv1.weight"
    )


@pytest.mark.parametrize(
    ("overlap", "conflict", "said"),
    [
        (0.0, 0.0, ["a and b share no entries. How a mix looks depends on the styles", "1 each at guidance 2"]),
        (0.03, 0.5, ["share 3 % of their entries, half of them in opposite directions", "lower guidance"]),
        (0.4, 0.51, ["share 40 % of their entries, half of them", "they cancel"]),
        (0.4, 0.3, ["30 % of them in opposite directions", "they cancel"]),
        (1.0, 0.0, ["share 100 % of their entries, none of them", "twice as strong where they meet"]),
        (0.0004, 1.0, ["less than 0.1 %", "all of them"]),
    ],
)
def test_what_to_expect_is_said_in_words(overlap: float, conflict: float, said: list[str]) -> None:
    figures = Interference(overlap, conflict, awom=1.0, awor=0.9, l2=1.0)
    words = Pair("a", "b", figures, {"unet.x.weight": figures}).words
    assert all(part in words for part in [*said, "90 % empty (AWOR"]), words


def test_adapters_of_different_layers_do_not_meet() -> None:
    words = Pair("a", "b", Interference(0, 0, 0, 1, 1), {}).words
    assert words.startswith("a and b change different layers. How a mix looks depends on the styles")


def test_pairs_are_drawn_as_the_study_suggests_beside_each_alone(session: Session) -> None:
    settings = session.checked("a red cat", {"bluefire": 0.3}, 7, 50, 3.0)
    orders = pictures_of(settings, ["paintings", "bluefire"])
    assert list(orders) == [(), ("paintings",), ("bluefire",), ("paintings", "bluefire")]
    assert all((each.seed, each.steps, each.guidance) == (7, 20, 2.0) for each in orders.values())
    assert orders["paintings", "bluefire"].mix == {"bluefire": 1.0, "paintings": 1.0} and orders[()].mix == {}


def test_how_far_two_oppose_each_other_in_pictures(session: Session) -> None:
    """Nothing where both change the same; else as the definition says."""
    light, dark = (Image.new("RGB", (16, 16), (value,) * 3) for value in (160, 96))
    noise = session.generate("a red cat", {}, 1, 1).image
    measured = opposing(session.pipe, {(): light, ("a",): dark, ("b",): dark, ("c",): noise})
    assert measured["a", "b"] == 0 and measured["a", "c"] > 0
    vae, images = session.pipe.vae, session.pipe.image_processor
    with torch.no_grad():
        plain, a, c = (
            vae.encode(images.preprocess(each)).latent_dist.mode() * vae.config.scaling_factor
            for each in (light, dark, noise)
        )
    expected = (-(a - plain) * (c - plain)).clamp(min=0).mean()
    assert measured["a", "c"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(("value", "said"), [(0.05, "mix well"), (0.12, "now and then"), (99, "likely to be lost")])
def test_the_hint_says_what_the_study_supports(value: float, said: str) -> None:
    assert said in hint(value)[0] and "of the styles themselves, here on one" in hint(value)[1]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["bluefire"], "at least two"),
        ("bluefire", "at least two"),
        (None, "at least two"),
        (["bluefire", "nobody"], "no adapter named 'nobody'; there are 'bluefire', 'paintings'"),
        (["bluefire", {}], "no adapter named"),
        (["bluefire", "bluefire"], "each adapter once"),
        (["bluefire"] * 7, "at most 6"),
    ],
)
def test_choices_are_checked(session: Session, names: object, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Comparer(session).compare(names)  # type: ignore[arg-type]


class Balance(HTMLParser):
    """Collects tags that are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


@pytest.mark.parametrize("measure", list(interference_html.MEASURES))
def test_the_heat_map_has_a_cell_for_each_layer_and_a_table(pair: Pair, measure: str) -> None:
    odd = Pair("<b>a", 'b"', pair.whole, pair.layers)
    html = interference_html.heat_map([pair, odd], measure) + interference_html.summary([odd])
    assert html.count("<i ") == 2 * len(pair.layers) and html.count("<tr>") == 1 + 2 * len(pair.layers)
    assert "<b>" not in html and "&lt;b&gt;a" in html
    balance = Balance()
    balance.feed(html)
    assert not balance.open and not balance.wrong
