"""Measure how much adapters of the library interfere, and say in words what to expect of their mix. No Gradio."""

import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from app.drawing.session import Session
from app.insight.effects import GUIDANCE, STRENGTH
from app.library.cards import Card
from app.settings.checks import SettingsError
from shira_diffusers.adapters.interference import Interference, interference_in_all

MAX_ADAPTERS = 6  # 15 pairs
REMEMBERED = 200  # pairs
_STAGES = ("conv_in", "time_embedding", "add_embedding", "down_blocks", "mid_block", "up_blocks", "conv_out")


@dataclass(frozen=True, slots=True)
class Pair:
    """Two adapters, their interference over all weights, and on each weight that both adapt, in the model's order."""

    first: str
    second: str
    whole: Interference
    layers: Mapping[str, Interference]

    @property
    def words(self) -> str:
        """What to expect of the mix, in two sentences or three."""
        return f"{_shared(self)} {_expectation(self.whole)}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        layers = {name: each.as_dict() for name, each in self.layers.items()}
        shared = {"first": self.first, "second": self.second, "words": self.words}
        return {**shared, **self.whole.as_dict(), "layers": layers}


class Comparer:
    """Compares the adapters of a session by name; what was compared before is remembered."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._known: OrderedDict[tuple[str, ...], Pair] = OrderedDict()  # by names and hashes
        self._working = threading.Lock()

    def compare(self, names: Sequence[str]) -> list[Pair]:
        """The pairs of some adapters, in their order.

        Raises:
            SettingsError: fewer than two, too many, unknown or repeated ones.
        """
        cards = {card.name: card for card in self._session.cards}
        if isinstance(names, str) or not isinstance(names, Sequence) or len(names) < 2:
            raise SettingsError("choose at least two adapters to compare")
        if len(names) > MAX_ADAPTERS:
            raise SettingsError(f"choose at most {MAX_ADAPTERS} adapters to compare, got {len(names)}")
        unknown = [name for name in names if not isinstance(name, str) or name not in cards]
        if unknown:
            raise SettingsError(
                f"no adapter named {str(unknown[0])[:60]!r}; there are {', '.join(map(repr, cards)) or 'none'}"
            )
        if len(set(names)) < len(names):
            raise SettingsError("choose each adapter once")
        with self._working:
            return [self._pair(cards[first], cards[second]) for first, second in combinations(names, 2)]

    def _pair(self, first: Card, second: Card) -> Pair:
        key = (first.name, first.sha256, second.name, second.sha256)
        if key not in self._known:
            adapters = (self._session.library.adapter(card.name) for card in (first, second))
            whole, layers = interference_in_all(*adapters)
            ordered = dict(sorted(layers.items(), key=lambda item: _place(item[0])))
            self._known[key] = Pair(first.name, second.name, whole, ordered)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return self._known[key]


def stage_of(layer: str) -> str:
    """The part of the model that a layer belongs to, for people: ``down``, ``text_encoder``, ..."""
    component, _, path = layer.partition(".")
    stage = path.partition(".")[0]
    short = {"down_blocks": "down", "mid_block": "mid", "up_blocks": "up"}.get(stage, "")
    return short if component == "unet" else component


def _place(layer: str) -> tuple[Any, ...]:
    """Sorts layers as data flows through them, numbers by value."""
    component, _, path = layer.partition(".")
    stage = path.partition(".")[0]
    at = _STAGES.index(stage) if stage in _STAGES else len(_STAGES)
    return component, at, [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"\.", path)]


def _shared(pair: Pair) -> str:
    whole = pair.whole
    if not pair.layers:
        return f"{pair.first} and {pair.second} change different layers."
    if not whole.overlap:
        return f"{pair.first} and {pair.second} share no entries."
    return (
        f"{pair.first} and {pair.second} share {_percent(whole.overlap)} of their entries, "
        f"{_part(whole.sign_conflict)} in opposite directions."
    )


def _expectation(whole: Interference) -> str:
    """What follows from the sums, and no more: in docs/study.md AWOM, overlap and sign conflict correlate at most 0.37
    with how often a mix shows both styles; how far the styles oppose each other in pictures, -0.79.
    """
    if whole.overlap < 0.1:
        text = ""
    elif whole.sign_conflict > 0.15:
        text = "Where they meet in opposite directions they cancel. "
    else:
        text = "They pull the same way, so added at 1.0 they are twice as strong where they meet. "
    return (
        f"{text}How a mix looks depends on the styles more than on these figures: start with {STRENGTH:g} each at "
        f"guidance {GUIDANCE:g}, and adjust by eye; where one is lost, a lower guidance brings more of it back than a "
        f"higher strength. Their products are {_percent(whole.awor)} empty (AWOR; 100 % is orthogonal)."
    )


def _percent(share: float) -> str:
    return (
        "less than 0.1 %" if 0 < share < 0.001 else f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.3g} %"
    )


def _part(share: float) -> str:
    """A share of shared entries in words where words are plain."""
    for value, word in ((0.0, "none of them"), (0.5, "half of them"), (1.0, "all of them")):
        if abs(share - value) < 0.02:
            return word
    return f"{_percent(share)} of them"
