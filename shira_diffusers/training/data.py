"""Pictures and prompts for DreamBooth; what is random depends on the seed and the position in the run alone."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from shira_diffusers.errors import ShiraError, listing
from shira_diffusers.masks import seeded

Draw = tuple[int, int]
"""The how-manieth example of the run, from 0, and which one of the data."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A training picture and its prompt."""

    path: Path
    prompt: str


def find_pictures(folder: str | Path, prompt: str) -> list[Picture]:
    """The pictures of a folder by name, each with the caption in the ``.txt`` of its name, or else ``prompt``.

    Raises:
        ShiraError: no such folder, no pictures in it, or pictures that cannot be opened; all are named.
    """
    place = Path(folder)
    if not place.is_dir():
        raise ShiraError(f"no folder of pictures at {str(folder)!r}; expected a folder, check the path")
    kinds = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    paths = sorted(p for p in place.iterdir() if p.suffix.lower() in kinds and not p.name.startswith("."))
    if not paths:
        raise ShiraError(f"no pictures in {str(folder)!r}; expected files such as .png, .jpg or .webp")
    broken = [f"{path}: {problem}" for path in paths if (problem := _problem(path))]
    if broken:
        raise ShiraError(f"{len(broken)} of {len(paths)} pictures cannot be opened; mend or remove:{listing(broken)}")
    return [Picture(path, _caption(path) or prompt) for path in paths]


def _problem(path: Path) -> str | None:
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return "not a picture" if isinstance(error, UnidentifiedImageError) else str(error)
    return None


def _caption(path: Path) -> str:
    file = path.with_suffix(".txt")
    return " ".join(file.read_text(encoding="utf-8").split()) if file.is_file() else ""


def read_picture(path: Path) -> Image.Image:
    """Open a picture of any mode as RGB, upright by its EXIF orientation, transparent parts white."""
    with Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith(("I", "F")):
            image = Image.fromarray(_to_8_bit(np.asarray(image, dtype=np.float32), image.mode))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def _to_8_bit(values: NDArray[np.float32], mode: str) -> NDArray[np.uint8]:
    """Pillow would clip wide grey levels at 255: scale them, 16-bit ones by their range, floats of 0 to 1 by theirs."""
    top = 65535.0 if mode.startswith("I") else 1.0 if values.max(initial=0) <= 1 else 255.0
    return np.clip(values * (255.0 / top), 0, 255).round().astype(np.uint8)


class View(NamedTuple):
    """A picture as a model sees it.

    Args:
        tensor: float32, pixels ``(3, h, w)`` in [-1, 1], or moments of latents.
        time_ids: what SDXL is told, float32 ``(6,)`` in pixels: height and width of the file's picture, top and left
            of the crop in the resized picture, height and width of the crop.
    """

    tensor: Tensor
    time_ids: Tensor


@dataclass(frozen=True, slots=True)
class Framing:
    """How a picture becomes a tensor: the shorter side resized to ``resolution``, cropped, perhaps mirrored."""

    resolution: int
    center_crop: bool
    random_flip: bool

    def __call__(self, image: Image.Image, generator: torch.Generator) -> View:
        """An RGB picture as float32 ``(3, resolution, resolution)`` in [-1, 1], and how it was framed."""
        side = self.resolution
        original = image.size
        scale = side / min(image.size)
        width, height = (max(side, round(length * scale)) for length in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        spare = ((width - side), (height - side))
        left, top = (s // 2 if self.center_crop else _below(s + 1, generator) for s in spare)
        image = image.crop((left, top, left + side, top + side))
        if self.random_flip and _below(2, generator):
            image = ImageOps.mirror(image)
            left = spare[0] - left  # as if it had been mirrored first
        time_ids = torch.tensor([original[1], original[0], top, left, side, side], dtype=torch.float32)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (h, w, 3) -> (3, h, w)
        return View(pixels.float() / 127.5 - 1.0, time_ids)


def _below(limit: int, generator: torch.Generator) -> int:
    return int(torch.randint(limit, (), generator=generator))


Reader = Callable[[Picture, int], View]
"""``reader(picture, position in the run) -> view``: pixels, or moments of latents, and the framing."""


@dataclass(frozen=True, slots=True)
class PixelReader:
    """Reads pixels from the files; random crops and flips by seed, position and picture."""

    framing: Framing
    seed: int

    def __call__(self, picture: Picture, position: int) -> View:
        """float32 ``(3, resolution, resolution)`` in [-1, 1], and how it was framed."""
        return self.framing(read_picture(picture.path), seeded(self.seed, f"framing:{position}:{picture.path.name}"))


@dataclass(frozen=True, slots=True)
class Batch:
    """Tensors ``[groups * n, ...]``, as many prompts, and time ids ``[groups * n, 6]`` as in ``View``: all instances
    first, then, if any, all class pictures."""

    tensors: Tensor
    prompts: list[str]
    time_ids: Tensor


class Example(NamedTuple):
    """A picture as a model sees it, and its prompt."""

    view: View
    prompt: str


class Examples(Dataset[list[Example]]):
    """One picture of each group an example; the smaller group is repeated. Indexed by ``Draw``.

    Args:
        groups: the instance's pictures and, with prior preservation, those of the class.
        reader: turns a picture into a tensor.
        caption_dropout_rate: how often the instance's prompt is left empty, by seed and position in the run.
        seed: of the run.
    """

    def __init__(
        self, groups: Sequence[Sequence[Picture]], reader: Reader, caption_dropout_rate: float = 0.0, seed: int = 0
    ) -> None:
        self._groups = groups
        self._reader = reader
        self._caption_dropout_rate = caption_dropout_rate
        self._seed = seed

    def __len__(self) -> int:
        return max(map(len, self._groups))

    def __getitem__(self, draw: Draw) -> list[Example]:
        position, index = draw
        chosen = [group[index % len(group)] for group in self._groups]
        prompts = [picture.prompt for picture in chosen]
        if self._drops_caption(position):
            prompts[0] = ""
        return [
            Example(self._reader(picture, position), prompt) for picture, prompt in zip(chosen, prompts, strict=True)
        ]

    def _drops_caption(self, position: int) -> bool:
        if not self._caption_dropout_rate:
            return False
        return float(torch.rand((), generator=seeded(self._seed, f"caption:{position}"))) < self._caption_dropout_rate


def collate(examples: Sequence[list[Example]]) -> Batch:
    """Put examples together, group by group."""
    grouped = [example for group in zip(*examples, strict=True) for example in group]
    tensors, time_ids = (torch.stack(parts) for parts in zip(*(view for view, _ in grouped), strict=True))
    return Batch(tensors, [prompt for _, prompt in grouped], time_ids)


class Batches(Sampler[list[Draw]]):
    """Batches number ``first`` to ``last`` (excluded) of a run: shuffled passes over the data, one after the other.

    Args:
        size: examples in the data.
        batch_size: the last batch of a pass may be smaller.
        seed: with the pass it fixes the order; so a run that resumes sees what it would have seen.
    """

    def __init__(self, size: int, batch_size: int, seed: int, first: int, last: int) -> None:
        self._size, self._batch_size, self._seed = size, batch_size, seed
        self._range = range(first, last)

    def __len__(self) -> int:
        return len(self._range)

    def __iter__(self) -> Iterator[list[Draw]]:
        order: list[int] = []
        ordered = -1
        for number in self._range:
            turn, place = divmod(number, batches_in(self._size, self._batch_size))
            if turn != ordered:
                order = torch.randperm(self._size, generator=seeded(self._seed, f"order:{turn}")).tolist()
                ordered = turn
            start = place * self._batch_size
            yield [(turn * self._size + start + k, i) for k, i in enumerate(order[start : start + self._batch_size])]


def batches_in(size: int, batch_size: int) -> int:
    """Batches in one pass over ``size`` examples."""
    return -(-size // batch_size)


def step_seed(seed: int, purpose: str, number: int) -> int:
    """A seed of its own for each purpose and number, for a generator on any device."""
    digest = hashlib.sha256(f"{seed}:{purpose}:{number}".encode()).digest()
    return int.from_bytes(digest[:7], "little")
