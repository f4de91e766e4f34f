"""Aspect-ratio buckets: frames of about the same area, so that pictures need not be square."""

import math
from collections.abc import Sequence

from shira_diffusers.dreambooth.config import TrainingConfig
from shira_diffusers.dreambooth.pictures import Size


def frames_of(config: TrainingConfig) -> list[Size]:
    """The frames of a run: with buckets those of ``bucket_frames``, otherwise the square one."""
    if not config.enable_bucket:
        return [(config.resolution, config.resolution)]
    return bucket_frames(config.resolution, *bounds_of(config))


def bounds_of(config: TrainingConfig) -> tuple[int, int, int]:
    """Shortest side, longest side and step of a run's frames, in pixels: those given, or else what suits the
    resolution. At 512 these are kohya's: 256, 1024 and 64.

    The shortest side is half the resolution, the longest twice it, as those that SDXL was trained on. The step divides
    the resolution, and is a multiple of 8, the factor of autoencoders, of at most an eighth of it.
    """
    side = config.resolution
    step = max((step for step in range(8, min(64, side // 8) + 1, 8) if side % step == 0), default=8)
    usual = (side // 2, 2 * side, step)
    given = (config.min_bucket_reso, config.max_bucket_reso, config.bucket_reso_steps)
    shortest, longest, step = (own or default for own, default in zip(given, usual, strict=True))
    return shortest, longest, step


def bucket_frames(resolution: int, shortest: int, longest: int, step: int) -> list[Size]:
    """Frames of at most ``resolution ** 2`` pixels, as large as their width allows, and those turned by a quarter.

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
    """The frame of the aspect ratio that is nearest by factor; of equal ones the largest."""
    aspect = math.log(size[0] / size[1])
    return min(frames, key=lambda frame: (abs(math.log(frame[0] / frame[1]) - aspect), -frame[0] * frame[1], frame))
