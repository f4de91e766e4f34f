"""What all methods share: the base, the pictures they learn from, the prompts they are judged on."""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from examples.emoji.captions import STYLES, caption, with_style
from examples.emoji.concepts import BACKGROUND_NAMES, CONCEPT_INDEX, CONCEPTS
from examples.emoji.data import Renderer
from examples.emoji.judge_styles import STYLE_CONCEPTS
from examples.emoji.model import Parts, load_parts
from examples.emoji.more_styles import ALL_STYLES, MORE_STYLE_CONCEPTS
from examples.emoji.render import SPRITE_SIZE, concept_sprites
from examples.emoji.subject import SHOWN_ON, words
from examples.emoji.train_base import tokenize
from examples.emoji.train_vae import encode

SUBJECT = "subject"
TAUGHT = STYLE_CONCEPTS | MORE_STYLE_CONCEPTS
PICTURES = 72  # of a style, and of the subject with its class
NEW_BACKGROUNDS = tuple(name for name in BACKGROUND_NAMES if name not in SHOWN_ON)
_SHEET_COLUMNS = 18


@dataclass(frozen=True)
class Lesson:
    """What one adapter learns from.

    Args:
        latents: scaled, ``[2, pictures, 4, 16, 16]``, as they are and flipped.
        texts: the captions as the text encoder gives them, ``[pictures, 32, width]``.
    """

    latents: Tensor
    texts: Tensor


@dataclass(frozen=True)
class Prompts:
    """What is asked: texts ``[n, 32, width]``, numbers of the concepts ``[n]``, first latents ``[n, 4, 16, 16]``."""

    texts: Tensor
    concepts: Tensor
    noise: Tensor


@dataclass(frozen=True)
class World:
    """One base and everything around it, on one device."""

    parts: Parts
    renderer: Renderer
    assets: Path
    device: torch.device

    @property
    def scaling(self) -> float:
        return float(self.parts.vae.config.scaling_factor)

    @torch.no_grad()
    def text(self, prompts: list[str]) -> Tensor:
        """Prompts -> ``[n, 32, width]``, as the pipeline has them."""
        tokens = tokenize(self.parts.tokenizer, prompts).to(self.device)
        return self.parts.text_encoder(tokens).last_hidden_state

    @torch.no_grad()
    def lesson(self, pictures: Tensor, captions: list[str]) -> Lesson:
        """Pictures in [0, 1] and captions, encoded."""
        both = [pictures, pictures.flip(3)]
        latents = [torch.cat([encode(self.parts.vae, part) for part in side.split(64)]) for side in both]
        return Lesson(torch.stack(latents) * self.scaling, self.text(captions))


def load_world(assets: Path, base: Path | None, sprites: Path | None, device: torch.device) -> World:
    """The shipped base, or that in the folder `base`; `sprites` is a sheet of `save_sprites`, in place of the font."""
    parts = load_parts(base or assets / "emoji-diffusion")
    for module in (parts.vae, parts.text_encoder, parts.unet):
        module.to(device).eval().requires_grad_(False)
    drawn = (load_sprites(sprites) if sprites else concept_sprites()).to(device)
    return World(parts, Renderer(drawn, drawn[:1], seed=5), assets, device)


def save_sprites(file: Path) -> None:
    """All concepts' sprites as one lossless picture, for machines without the font."""
    drawn = concept_sprites().permute(0, 2, 3, 1).numpy()
    rows = -(-len(drawn) // _SHEET_COLUMNS)
    sheet = np.zeros((rows * SPRITE_SIZE, _SHEET_COLUMNS * SPRITE_SIZE, 4), np.uint8)
    for i, sprite in enumerate(drawn):
        row, column = (SPRITE_SIZE * n for n in divmod(i, _SHEET_COLUMNS))
        sheet[row : row + SPRITE_SIZE, column : column + SPRITE_SIZE] = sprite
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(file, lossless=True, exact=True)


def load_sprites(file: Path) -> Tensor:
    """The sprites of `save_sprites`: uint8 RGBA, ``[332, 4, 136, 136]``."""
    sheet = torch.from_numpy(np.array(Image.open(file)))
    tiles = sheet.unflatten(0, (-1, SPRITE_SIZE)).unflatten(2, (-1, SPRITE_SIZE)).permute(0, 2, 4, 1, 3)
    return tiles.flatten(0, 1)[: len(CONCEPTS)].contiguous()


def style_examples(world: World, style: str) -> tuple[Tensor, list[str]]:
    """The 72 pictures that teach a style, and their captions: those of the assets, or drawn in the same way."""
    if style in STYLES:
        files = sorted((world.assets / "styles" / style).glob("*.png"))
        return read_pictures(files, world.device), [file.with_suffix(".txt").read_text().strip() for file in files]
    return drawn_examples(world.renderer, style)


def another(renderer: Renderer, seed: int) -> Renderer:
    """One of the same sprites with its own seed."""
    return Renderer(renderer._sprites, renderer._sprites[:1], seed=seed)


def drawn_examples(renderer: Renderer, style: str) -> tuple[Tensor, list[str]]:
    """As `examples.emoji.judge_styles.write_style_pictures`: nine concepts on eight backgrounds, every other named."""
    device, names = renderer.device, TAUGHT[style]
    concepts = [CONCEPT_INDEX[name] for name in names for _ in range(PICTURES // len(names))]
    backgrounds = [(5 * i + i // 16) % len(BACKGROUND_NAMES) for i in range(PICTURES)]
    plain = torch.zeros(PICTURES, dtype=torch.long, device=device)
    own = another(renderer, 7)
    batch = own.draw(torch.tensor(concepts, device=device), torch.tensor(backgrounds, device=device), plain)
    texts = [caption(CONCEPTS[c], BACKGROUND_NAMES[b]) for c, b in zip(concepts, backgrounds, strict=True)]
    texts = [text if i % 2 else with_style(text, style) for i, text in enumerate(texts)]
    return ALL_STYLES[style](batch.pictures, own.generator), texts


def subject_examples(world: World) -> tuple[Tensor, list[str]]:
    """The subject's five pictures, over and over, and as many true pictures of its class, so that that stays."""
    files = sorted((world.assets / "subject").glob("*.png"))
    own = [files[i % len(files)] for i in range(PICTURES // 2)]
    half = PICTURES - len(own)
    backgrounds = [i % len(BACKGROUND_NAMES) for i in range(half)]
    concept = torch.full((half,), CONCEPT_INDEX["alien"], device=world.device)
    batch = another(world.renderer, 8).draw(
        concept, torch.tensor(backgrounds, device=world.device), torch.zeros_like(concept)
    )
    captions = [file.with_suffix(".txt").read_text().strip() for file in own]
    captions += [words(BACKGROUND_NAMES[b], "") for b in backgrounds]
    return torch.cat([read_pictures(own, world.device), batch.pictures]), captions


def look_examples(world: World, look: int) -> tuple[Tensor, list[str]]:
    """72 pictures in one of the base's own looks, captioned without its word: a style that the base can draw itself."""
    own = another(world.renderer, 9 + look)
    names = taught_concepts()
    chosen = random.Random(9 + look).sample(range(len(names)), 9)
    concept = torch.tensor([CONCEPT_INDEX[names[i]] for i in chosen for _ in range(8)], device=world.device)
    backgrounds = [(5 * i + i // 16) % len(BACKGROUND_NAMES) for i in range(PICTURES)]
    batch = own.draw(concept, torch.tensor(backgrounds, device=world.device), torch.full_like(concept, look))
    return batch.pictures, [
        caption(CONCEPTS[c], BACKGROUND_NAMES[b]) for c, b in zip(concept.tolist(), backgrounds, strict=True)
    ]


def plain_examples(world: World) -> tuple[Tensor, list[str]]:
    """72 plain pictures of concepts that styles are taught with: what is neutral."""
    return look_examples(world, 0)


def read_pictures(files: Iterable[Path], device: torch.device) -> Tensor:
    """PNG files -> [0, 1], ``[n, 3, 128, 128]``."""
    arrays = [np.array(Image.open(file).convert("RGB")) for file in files]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).to(device).float() / 255


def taught_concepts() -> list[str]:
    """Concepts that some style picture shows."""
    return [name for names in TAUGHT.values() for name in names]


def unseen_concepts(split: str, count: int) -> list[str]:
    """`count` concepts of a split ("val" or "test", disjoint) that no picture of a style or the subject shows."""
    shown = {*taught_concepts(), "alien"}
    names = [concept.name for concept in CONCEPTS if concept.name not in shown]
    random.Random(2024).shuffle(names)
    half = len(names) // 2
    part = names[:half] if split == "val" else names[half:]
    if count > len(part):
        raise ValueError(f"split {split!r} has {len(part)} concepts, {count} asked for")
    return part[:count]


def prompts_of(world: World, split: str, count: int, subject: bool) -> Prompts:
    """One prompt a concept, on backgrounds in turn, without a style's word; or the subject on backgrounds new to it."""
    names = unseen_concepts(split, count)
    if subject:
        texts = [words(NEW_BACKGROUNDS[i % len(NEW_BACKGROUNDS)]) for i in range(count)]
    else:
        pairs = [(CONCEPTS[CONCEPT_INDEX[n]], BACKGROUND_NAMES[5 * i % 16]) for i, n in enumerate(names)]
        texts = [caption(*pair) for pair in pairs]
    first = 1000 if split == "val" else 500_000
    noise = torch.stack(
        [torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(first + i)) for i in range(count)]
    )
    numbers = torch.tensor([CONCEPT_INDEX[name] for name in names], device=world.device)
    return Prompts(world.text(texts), numbers, noise.to(world.device))
