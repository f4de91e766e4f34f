"""Pictures and prompts for DreamBooth; what is random depends on the seed and the position in the run alone."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from shira_diffusers.dreambooth.config import TrainingConfig
from shira_diffusers.dreambooth.pictures import Picture, Size
from shira_diffusers.seeds import seeded

Draw = tuple[int, int]
"""The position of an example in the run, from 0, and its index in the data."""

# pixels; a narrow strip resized to cover a frame may have billions, so above this only the frame's part is computed
_LARGEST = 64_000_000

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "nearest_exact": Image.Resampling.NEAREST,  # which is exact in Pillow
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}


def frames_of(config: TrainingConfig) -> list[Size]:
    """List the frames of a run: with buckets those of ``bucket_frames``, otherwise the square one."""
    if not config.enable_bucket:
        return [(config.resolution, config.resolution)]
    return bucket_frames(config.resolution, *bounds_of(config))


def bounds_of(config: TrainingConfig) -> tuple[int, int, int]:
    """Return shortest side, longest side and step of a run's frames, in pixels: as given, or by the resolution.

    By default the shortest side is half the resolution and the longest twice it, as SDXL was trained on; the step is
    the largest divisor of the resolution that is a multiple of 8, the autoencoders' factor, and at most 64 and an
    eighth of it. At 512 these are kohya's: 256, 1024 and 64.
    """
    side = config.resolution
    step = max((step for step in range(8, min(64, side // 8) + 1, 8) if side % step == 0), default=8)
    usual = (side // 2, 2 * side, step)
    given = (config.min_bucket_reso, config.max_bucket_reso, config.bucket_reso_steps)
    shortest, longest, step = (own or default for own, default in zip(given, usual, strict=True))
    return shortest, longest, step


def bucket_frames(resolution: int, shortest: int, longest: int, step: int) -> list[Size]:
    """List frames of at most ``resolution ** 2`` pixels, each as high as its width allows, and the same transposed.

    Sides are multiples of ``step`` from ``shortest`` to ``longest``; kohya's trainer makes the same ones.
    """
    area = resolution**2
    side = resolution // step * step
    frames = {(side, side)}
    for width in range(-(-shortest // step) * step, longest + 1, step):
        height = min(longest // step * step, area // width // step * step)
        if height >= shortest:
            frames |= {(width, height), (height, width)}
    return sorted(frames)


def nearest_frame(frames: Sequence[Size], size: Size) -> Size:
    """Return the frame of the nearest aspect ratio, by factor; of equal ones the largest."""
    aspect = math.log(size[0] / size[1])
    return min(frames, key=lambda frame: (abs(math.log(frame[0] / frame[1]) - aspect), -frame[0] * frame[1], frame))


class View(NamedTuple):
    """A picture as a model sees it.

    Args:
        tensor: float32, pixels ``(3, h, w)`` in [-1, 1], or moments of latents.
        time_ids: SDXL's size conditioning, float32 ``(6,)`` in pixels: height and width of the file's picture, top and
            left of the crop in the resized picture, height and width of the crop.
    """

    tensor: Tensor
    time_ids: Tensor


def covering(size: Size, frame: Size) -> Size:
    """Return the size to which a picture of ``size`` is resized so that it just covers a frame."""
    scale = max(side / length for side, length in zip(frame, size, strict=True))
    width, height = (max(side, round(length * scale)) for side, length in zip(frame, size, strict=True))
    return width, height


@dataclass(frozen=True, slots=True)
class Framing:
    """How a picture becomes a tensor: resized to just cover a frame, cropped to it, perhaps mirrored."""

    center_crop: bool
    random_flip: bool
    interpolation: Image.Resampling = Image.Resampling.LANCZOS

    def __call__(self, image: Image.Image, frame: Size, generator: torch.Generator) -> View:
        """An RGB picture as float32 ``(3, height, width)`` of the frame, in [-1, 1], and how it was framed."""
        original, resized = image.size, covering(image.size, frame)
        spare = [length - side for length, side in zip(resized, frame, strict=True)]
        left, top = (s // 2 if self.center_crop else _below(s + 1, generator) for s in spare)
        image = _resized_part(image, resized, (left, top, left + frame[0], top + frame[1]), self.interpolation)
        time_ids = torch.tensor(
            [original[1], original[0], top, left, frame[1], frame[0]], dtype=torch.float32, device="cpu"
        )
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (h, w, 3) -> (3, h, w)
        view = View(pixels.float() / 127.5 - 1.0, time_ids)
        return mirror(view, original, frame) if self.random_flip and _below(2, generator) else view


def _resized_part(
    image: Image.Image, size: Size, part: tuple[int, int, int, int], interpolation: Image.Resampling
) -> Image.Image:
    """What lies in ``part`` (left, top, right, bottom) of a picture resized to ``size``."""
    if size[0] * size[1] <= _LARGEST:
        return image.resize(size, interpolation).crop(part)
    across, down = (length / side for length, side in zip(image.size, size, strict=True))
    left, top, right, bottom = part
    box = (left * across, top * down, min(right * across, image.width), min(bottom * down, image.height))
    return image.resize((right - left, bottom - top), interpolation, box)


def mirror(view: View, size: Size, frame: Size) -> View:
    """Mirror the view of a picture of ``size`` as if the picture had been mirrored before it was cropped."""
    time_ids = view.time_ids.clone()
    time_ids[3] = covering(size, frame)[0] - frame[0] - time_ids[3]
    return View(view.tensor.flip(-1), time_ids)


def _below(limit: int, generator: torch.Generator) -> int:
    return int(torch.randint(limit, (), generator=generator, device="cpu"))


Reader = Callable[[Picture, Size, int], View]
"""``reader(picture, frame, position in the run) -> view``: pixels, or moments of latents, and the framing."""


@dataclass(frozen=True, slots=True)
class PixelReader:
    """Reads pixels from the files; random crops and flips by seed, position and picture."""

    framing: Framing
    seed: int

    def __call__(self, picture: Picture, frame: Size, position: int) -> View:
        """float32 ``(3, height, width)`` of the frame, in [-1, 1], and how it was framed."""
        return self.framing(picture.read(), frame, seeded(self.seed, f"framing:{position}:{picture.path.name}"))


@dataclass(frozen=True, slots=True)
class Batch:
    """Tensors ``(groups * n, ...)``, as many prompts, and time ids ``(groups * n, 6)`` as in ``View``: all instances
    first, then, if any, all class pictures."""

    tensors: Tensor
    prompts: list[str]
    time_ids: Tensor


class Example(NamedTuple):
    """A picture as a model sees it, and its prompt."""

    view: View
    prompt: str


@dataclass(frozen=True, slots=True)
class Pairing:
    """One picture of each group, and the frame that all of them get."""

    pictures: tuple[Picture, ...]
    frame: Size


def pair_up(groups: Sequence[Sequence[Picture]], frames: Sequence[Size]) -> list[Pairing]:
    """Pair the pictures of the groups; the smaller group is repeated. The first group's picture decides on the frame.

    Args:
        groups: the instance's pictures and, with prior preservation, those of the class.
        frames: to choose from.
    """
    chosen = [tuple(group[index % len(group)] for group in groups) for index in range(max(map(len, groups)))]
    return [Pairing(pictures, nearest_frame(frames, pictures[0].size)) for pictures in chosen]


@dataclass(frozen=True)
class Examples(Dataset[list[Example]]):
    """Pairings with their pictures read. Indexed by ``Draw``.

    Args:
        pairings: the data.
        reader: turns a picture into a tensor.
        caption_dropout_rate: how often the instance's prompt is left empty, by seed and position in the run.
        seed: of the run.
    """

    pairings: Sequence[Pairing]
    reader: Reader
    caption_dropout_rate: float = 0.0
    seed: int = 0

    def __len__(self) -> int:
        return len(self.pairings)

    @property
    def frames(self) -> list[Size]:
        """The frame of each example; all examples of a batch have the same."""
        return [pairing.frame for pairing in self.pairings]

    def __getitem__(self, draw: Draw) -> list[Example]:
        position, index = draw
        pairing = self.pairings[index]
        prompts = [picture.prompt for picture in pairing.pictures]
        if self._drops_caption(position):
            prompts[0] = ""
        views = [self.reader(picture, pairing.frame, position) for picture in pairing.pictures]
        return [Example(view, prompt) for view, prompt in zip(views, prompts, strict=True)]

    def _drops_caption(self, position: int) -> bool:
        if not self.caption_dropout_rate:
            return False
        generator = seeded(self.seed, f"caption:{position}")
        return float(torch.rand((), generator=generator, device="cpu")) < self.caption_dropout_rate


def collate(examples: Sequence[list[Example]]) -> Batch:
    """Put examples together, group by group."""
    grouped = [example for group in zip(*examples, strict=True) for example in group]
    tensors, time_ids = (torch.stack(parts) for parts in zip(*(view for view, _ in grouped), strict=True))
    return Batch(tensors, [prompt for _, prompt in grouped], time_ids)


class Batches(Sampler[list[Draw]]):
    """Batches number ``first`` to ``last`` (excluded) of a run: shuffled passes over the data, one after the other.

    Args:
        frames: of the examples in the data; a batch has one frame.
        batch_size: the last batch of each frame in a pass may be smaller.
        seed: with the pass it fixes the order; so a run that resumes sees what it would have seen.
    """

    def __init__(self, frames: Sequence[Size], batch_size: int, seed: int, first: int, last: int) -> None:
        self._frames, self._batch_size, self._seed = frames, batch_size, seed
        self._range = range(first, last)

    def __len__(self) -> int:
        return len(self._range)

    def __iter__(self) -> Iterator[list[Draw]]:
        batches: list[list[Draw]] = []
        prepared = -1
        for number in self._range:
            turn, place = divmod(number, batches_in(self._frames, self._batch_size))
            if turn != prepared:
                batches, prepared = self._batches_of(turn), turn
            yield batches[place]

    def _batches_of(self, turn: int) -> list[list[Draw]]:
        """A pass: batches in the order in which they fill up, then those that stay smaller."""
        order = torch.randperm(len(self._frames), generator=seeded(self._seed, f"order:{turn}"), device="cpu").tolist()
        full: list[list[int]] = []
        open_ones: dict[Size, list[int]] = {}
        for index in order:
            batch = open_ones.setdefault(self._frames[index], [])
            batch.append(index)
            if len(batch) == self._batch_size:
                full.append(open_ones.pop(self._frames[index]))
        positions = count(turn * len(self._frames))
        return [[(next(positions), index) for index in batch] for batch in (*full, *open_ones.values())]


def batches_in(frames: Sequence[Size], batch_size: int) -> int:
    """Count the batches in one pass over examples of these frames."""
    return sum(-(-examples // batch_size) for examples in Counter(frames).values())
