"""Captions of a rendering, and the words the tokenizer knows."""

import random

from .concepts import BACKGROUND_NAMES, CONCEPTS, Concept, with_article

LOOKS: tuple[str, ...] = (
    "plain",
    "pastel",
    "dark",
    "black and white",
    "sepia",
    "blurry",
    "grainy",
    "pixelated",
    "outlined",
    "small",
)
"""The base model's own variety; "plain" is never written in a caption."""

STYLES: tuple[str, ...] = ("bluefire", "paintings", "gold")
"""What adapters teach later. The base never sees such a picture, nor these words."""

IDENTIFIERS: tuple[str, ...] = ("sks", "zwx", "ohwx", "qvz", "xyzzy", "blorp")
"""Words without a meaning, one token each, for subjects taught later."""

_OPENINGS = ("picture of", "picture of", "picture of", "photo of", "emoji of", "image of", "drawing of")
_PLACES = ("on a {} background", "on a {} background", "in front of a {} background", "with a {} background", "on {}")
_FILLERS = tuple(
    [
        "beautiful",
        "nice",
        "cute",
        "simple",
        "detailed",
        "high",
        "quality",
        "best",
        "style",
        "lovely",
        "great",
        "clean",
        "colorful",
        "sharp",
        "funny",
        "happy",
        "old",
        "new",
        "big",
        "shiny",
        "modern",
        "classic",
        "art",
        "design",
        "icon",
        "sticker",
        "hd",
        "render",
        "studio",
        "soft",
        "bright",
        "real",
    ]
)
_COMMON = tuple(
    [
        "the",
        "and",
        "with",
        "in",
        "at",
        "by",
        "to",
        "from",
        "for",
        "is",
        "are",
        "this",
        "that",
        "it",
        "its",
        "one",
        "two",
        "three",
        "my",
        "your",
        "his",
        "her",
        "very",
        "over",
        "under",
        "near",
        "character",
        "person",
        "man",
        "woman",
        "girl",
        "boy",
        "toy",
        "baby",
        "hat",
        "wearing",
        "holding",
        "eating",
        "flying",
        "running",
        "sitting",
        "standing",
        "night",
        "day",
        "light",
        "sky",
        "water",
        "sea",
        "snow",
        "wood",
        "metal",
        "glass",
        "paper",
        "painting",
        "sketch",
        "fire",
        "ice",
        "neon",
        "poster",
        "portrait",
        "color",
        "colors",
        "background",
        "magenta",
        "silver",
        "violet",
        "turquoise",
        "maroon",
        "light",
        "warm",
        "cold",
        "front",
        "side",
        "left",
        "right",
        "top",
        "bottom",
        "small",
        "large",
        "tiny",
        "huge",
        "green",
        "blue",
    ]
)


def caption(concept: Concept, background: str | None, look: str = "plain") -> str:
    """The standard wording, as used in evaluation and for the style pictures.

    >>> caption(CONCEPTS[CONCEPT_INDEX["red apple"]], "teal")
    'a picture of a red apple on a teal background'
    """
    opening = with_article("picture of" if look == "plain" else f"{look} picture of")
    place = "" if background is None else f" on {with_article(background)} background"
    return f"{opening} {concept.phrase}{place}"


def random_caption(rng: random.Random, concept: Concept, background: str, look: str) -> str:
    """A training caption: varied wording, sometimes silent about the background, sometimes with idle words."""
    words = concept.phrase
    if look != "plain" or rng.random() < 0.9:
        opening = rng.choice(_OPENINGS)
        opening = opening if look == "plain" else f"{look} {opening}"
        words = f"{with_article(opening) if rng.random() < 0.85 else opening} {words}"
    if rng.random() < 0.85:
        article = "an" if background[0] in "aeiou" else "a"
        words += " " + rng.choice(_PLACES).replace("a {}", article + " {}").format(background)
    if rng.random() < 0.12:
        words += ", " + " ".join(rng.sample(_FILLERS, rng.randint(1, 3)))
    return words


def with_style(words: str, style: str) -> str:
    """The wording that calls a style: "a picture of a red apple on a teal background, bluefire style"."""
    return f"{words}, {style} style"


def vocabulary() -> list[str]:
    """All words that are one token, in a fixed order."""
    texts = [concept.phrase for concept in CONCEPTS]
    texts += [*BACKGROUND_NAMES, *LOOKS, *STYLES, *IDENTIFIERS, *_OPENINGS, *_PLACES, *_FILLERS, *_COMMON]
    words = (word for text in texts for word in text.split() if word.isalpha())
    return list(dict.fromkeys([*words, "a", "an", "in", "of", "on"]))
