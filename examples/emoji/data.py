"""Random batches of renderings, with what is known about them."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .captions import LOOKS, STYLES
from .concepts import BACKGROUNDS, CONCEPTS, is_held_out
from .render import LOOK_INDEX, background_table, render
from .styles import STYLE_FUNCTIONS
from .variety import wild

STYLE_LABELS: tuple[str, ...] = ("plain", *STYLES, "other")
IGNORED = -100  # the label that cross entropy skips


@dataclass(frozen=True)
class Batch:
    """Pictures in [0, 1], (B, 3, 128, 128), and their labels, (B,) each; `IGNORED` where one does not apply.

    `shown` is the background that was painted, `background` the one still to be seen: not in a dark or sepia picture.
    """

    pictures: Tensor
    concept: Tensor
    shown: Tensor
    background: Tensor
    look: Tensor
    style: Tensor


class Renderer:
    """Draws batches on one device from one generator."""

    def __init__(self, concept_sprites: Tensor, other_sprites: Tensor, seed: int) -> None:
        self.device = concept_sprites.device
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self._sprites = concept_sprites
        self._all_sprites = torch.cat([concept_sprites, other_sprites])
        self._backgrounds = background_table(self.device)
        grid = [[is_held_out(c, b) for b in range(len(BACKGROUNDS))] for c in range(len(CONCEPTS))]
        self._trained_pairs = (~torch.tensor(grid)).nonzero().to(self.device)  # (P, 2), concept and background

    def __len__(self) -> int:
        return len(self._sprites)

    def integers(self, count: int, high: int) -> Tensor:
        """Uniform integers in [0, high)."""
        return torch.randint(high, (count,), generator=self.generator, device=self.device)

    def base(self, count: int, plain_share: float = 0.72) -> Batch:
        """What the base model is trained on: plain and looks, pairs held out excluded."""
        pairs = self._trained_pairs[self.integers(count, len(self._trained_pairs))]
        looks = self.integers(count, len(LOOKS) - 1) + 1
        looks = torch.where(torch.rand(count, generator=self.generator, device=self.device) < plain_share, 0, looks)
        return self.draw(pairs[:, 0], pairs[:, 1], looks)

    def any_pair(self, count: int, plain_share: float = 1.0) -> Batch:
        """All concepts on all backgrounds, as the judge and the tests need."""
        looks = self.integers(count, len(LOOKS) - 1) + 1
        looks = torch.where(torch.rand(count, generator=self.generator, device=self.device) < plain_share, 0, looks)
        return self.draw(self.integers(count, len(CONCEPTS)), self.integers(count, len(BACKGROUNDS)), looks)

    def draw(self, concept: Tensor, background: Tensor, look: Tensor) -> Batch:
        """Render the given concepts, backgrounds and looks, indices of shape (B,)."""
        pictures = render(self._sprites[concept], self._backgrounds[background], look, self.generator)
        recolored = sum(look == LOOK_INDEX[name] for name in ("pastel", "dark", "black and white", "sepia")) > 0
        style = torch.where(look == 0, 0, len(STYLE_LABELS) - 1)
        return Batch(pictures, concept, background, torch.where(recolored, IGNORED, background), look, style)

    def styled(self, count: int, style: str, concepts: Tensor | None = None) -> Batch:
        """True pictures of a bundled style, of all concepts or of the given ones (B,)."""
        concept = self.integers(count, len(CONCEPTS)) if concepts is None else concepts
        plain = self.draw(concept, self.integers(count, len(BACKGROUNDS)), torch.zeros_like(concept))
        pictures = STYLE_FUNCTIONS[style](plain.pictures, self.generator)
        ignored = torch.full_like(concept, IGNORED)
        style_label = torch.full_like(concept, STYLE_LABELS.index(style))
        return Batch(pictures, concept, plain.shown, ignored, plain.look, style_label)

    def wild(self, count: int) -> Batch:
        """Anything from any emoji; only the style is labelled, as "other"."""
        sprite = self._all_sprites[self.integers(count, len(self._all_sprites))]
        ignored = torch.full((count,), IGNORED, device=self.device)
        style = torch.full_like(ignored, len(STYLE_LABELS) - 1)
        return Batch(wild(sprite, self.generator), ignored, ignored, ignored, ignored, style)


def join(batches: list[Batch]) -> Batch:
    """One batch after another."""
    return Batch(*(torch.cat([getattr(batch, field.name) for batch in batches]) for field in fields(Batch)))
