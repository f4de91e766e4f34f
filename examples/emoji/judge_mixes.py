"""A judge for mixes: what a picture shows, and for each style, and the subject, whether it is to be seen.

One yes/no head a style, since a mix shows several. Trained on renderings of single styles, of compositions in every
order and of plain pictures, mostly after the autoencoder's round trip, never on generated pictures.
"""

import itertools
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from .concepts import CONCEPTS
from .data import IGNORED, Renderer
from .judge import Judge, load_weights
from .more_styles import ALL_STYLES
from .subject import BLORP, SIBLINGS, Look, creature, subject_pictures
from .train_judge import train_on_pool
from .train_vae import round_trip
from .training import Run

SUBJECT = "subject"
SIGHTS: tuple[str, ...] = (*ALL_STYLES, SUBJECT)
"""The yes/no heads, in order."""


@dataclass(frozen=True)
class Seen:
    """Pictures, (B, 3, 128, 128), as uint8 or in [0, 1]; their concepts, (B,); what is to be seen, (B, sights)."""

    pictures: Tensor
    concept: Tensor
    sights: Tensor


class MixJudge(nn.Module):
    """Pictures in [0, 1], (B, 3, 128, 128) -> logits of the concepts, (B, 332), and of the sights, (B, 7)."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Judge((32, 64, 128, 192)).trunk
        self.concept = nn.Linear(384, len(CONCEPTS))
        self.sights = nn.Linear(384, len(SIGHTS))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(4 * pictures - 2)
        pooled = torch.cat([features.mean((2, 3)), features.amax((2, 3))], dim=1).float()
        return self.concept(pooled), self.sights(pooled)


def composed(renderer: Renderer, pictures: Tensor, names: tuple[str, ...]) -> Tensor:
    """Pictures after one style and then the next."""
    for name in names:
        pictures = ALL_STYLES[name](pictures, renderer.generator)
    return pictures


def seen(renderer: Renderer, names: tuple[str, ...], count: int, look: Look | None = None) -> Seen:
    """True pictures of styles one after another; of the concepts, or of a creature of this look."""
    if look is None:
        batch = renderer.any_pair(count)
        pictures, concept = batch.pictures, batch.concept
    else:
        backgrounds = renderer.integers(count, 16)
        pictures = subject_pictures(creature(look).to(renderer.device), backgrounds, renderer.generator)
        concept = torch.full((count,), IGNORED, device=renderer.device)
    sights = torch.tensor([name in names for name in SIGHTS], device=renderer.device).float().repeat(count, 1)
    sights[:, -1] = float(look == BLORP)
    return Seen(composed(renderer, pictures, names), concept, sights)


def variety(renderer: Renderer, rng: random.Random, each: int) -> list[Seen]:
    """Plain pictures and looks, single styles, pairs in both orders, some triples, creatures in some styles.

    `each` pictures of every ordered pair; in all 86 times as many.
    """
    styles = tuple(ALL_STYLES)
    plain = renderer.any_pair(15 * each, 0.6)
    parts = [Seen(plain.pictures, plain.concept, torch.zeros(15 * each, len(SIGHTS), device=renderer.device))]
    parts += [seen(renderer, (style,), 4 * each) for style in styles]
    parts += [seen(renderer, pair, each) for pair in itertools.permutations(styles, 2)]
    parts += [seen(renderer, tuple(rng.sample(styles, 3)), each) for _ in range(6)]
    for _ in range(6):
        names = tuple(rng.sample(styles, rng.choice((0, 1, 1, 2))))
        parts.append(seen(renderer, names, each if names else 2 * each, BLORP))
        parts.append(seen(renderer, names, each, rng.choice(SIBLINGS)))
    return parts


@torch.no_grad()
def mix_pool(vae: AutoencoderKL, renderer: Renderer, rounds: int, each: int, seed: int = 0) -> Seen:
    """Pictures as uint8, rendered once; three rounds of four after the round trip."""
    rng, chunks = random.Random(seed), []
    for i in range(rounds):
        parts = variety(renderer, rng, each)
        pictures = torch.cat([part.pictures for part in parts])
        if i % 4:
            pictures = torch.cat([round_trip(vae, some) for some in pictures.split(256)])
        labels = [torch.cat([getattr(part, field) for part in parts]) for field in ("concept", "sights")]
        chunks.append(Seen((pictures * 255).round().to(torch.uint8), *labels))
    return Seen(*(torch.cat([getattr(chunk, field) for chunk in chunks]) for field in Seen.__dataclass_fields__))


def train_mix_judge(judge: MixJudge, pool: Seen, seconds: float, file: Path, *, batch: int) -> Run:
    """Train in place for `seconds`; the result is the weights' moving average."""

    def loss(pictures: Tensor, chosen: Tensor) -> Tensor:
        concept, sights = judge(pictures)
        named = F.cross_entropy(concept.float(), pool.concept[chosen], ignore_index=IGNORED, label_smoothing=0.05)
        wanted = pool.sights[chosen] * 0.96 + 0.02
        return named + F.binary_cross_entropy_with_logits(sights.float(), wanted) * 2

    return train_on_pool(judge, pool.pictures, loss, seconds, file, batch=batch)


def load_mix_judge(file: Path, device: str | torch.device = "cpu") -> MixJudge:
    """A judge in float32, ready to use; `judge.save_judge` writes it."""
    return load_weights(MixJudge(), file, device)


@torch.no_grad()
def proof(judge: MixJudge, vae: AutoencoderKL, renderer: Renderer, count: int) -> dict[str, dict[str, float]]:
    """How often the judge is right on fresh true pictures after the round trip, `count` of each composition.

    By composition ("gold > mosaic": gold first): "concept", "seen" (all its styles said to be there) and "unseen"
    (none other said to be there); "plain", single styles, pairs in every order, and "subject" in each style.
    """
    styles = tuple(ALL_STYLES)
    wanted: list[tuple[tuple[str, ...], Look | None]] = [((), None), *(((style,), None) for style in styles)]
    wanted += [(pair, None) for pair in itertools.permutations(styles, 2)]
    wanted += [((), BLORP), *(((style,), BLORP) for style in styles)]
    figures = {}
    for names, look in wanted:
        key = " > ".join(names) or "plain"
        figures[key if look is None else f"{SUBJECT}: {key}"] = _right(judge, vae, seen(renderer, names, count, look))
    return figures


def _right(judge: MixJudge, vae: AutoencoderKL, true: Seen) -> dict[str, float]:
    said = [judge(round_trip(vae, part)) for part in true.pictures.split(256)]
    concept = torch.cat([part[0] for part in said]).argmax(1) == true.concept
    sights, wanted = torch.cat([part[1] for part in said]) > 0, true.sights > 0
    seen_all, none_else = (sights | ~wanted).all(1), (~sights | wanted).all(1)
    rights = {"seen": seen_all, "unseen": none_else} | ({} if int(true.concept[0]) < 0 else {"concept": concept})
    return {name: round(float(right.float().mean()), 4) for name, right in rights.items()}
