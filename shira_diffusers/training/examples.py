"""Get the data of a run ready: which pictures, read how, with what encoded in advance."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from shira_diffusers.errors import ShiraError
from shira_diffusers.masks import seeded
from shira_diffusers.training.base import Pipe
from shira_diffusers.training.config import TrainingConfig
from shira_diffusers.training.data import (
    Batch,
    Batches,
    Examples,
    Framing,
    Picture,
    PixelReader,
    Reader,
    collate,
    read_picture,
)
from shira_diffusers.training.objective import Objective, embed, encode

Groups = Sequence[Sequence[Picture]]


def prepare_examples(pipe: Pipe, config: TrainingConfig, groups: Groups, seed: int) -> tuple[Examples, Objective]:
    """The data of a run, and the loss that takes it. What need not be computed at each step is computed here.

    Args:
        pipe: the base in float32, on its device.
        groups: the instance's pictures and, with prior preservation, those of the class.

    Raises:
        ShiraError: latents are to be cached, but crops are random.
    """
    reader: Reader = PixelReader(Framing(config.resolution, config.center_crop, config.random_flip), seed)
    if config.cache_latents:
        if not config.center_crop:
            _require_square(groups)
        reader = _encode_all(pipe, config, groups, seed)
    embeddings = None if config.train_text_encoder else _embed_all(pipe, groups)
    data = Examples(groups, reader, config.caption_dropout_rate, seed)
    return data, Objective(pipe, config, embeddings, config.cache_latents)


def load_batches(examples: Examples, config: TrainingConfig, seed: int, first: int, last: int) -> Iterable[Batch]:
    """Batches number ``first`` to ``last`` (excluded) of a run."""
    batches = Batches(len(examples), config.train_batch_size, seed, first, last)
    workers = config.dataloader_num_workers
    return DataLoader(examples, batch_sampler=batches, collate_fn=collate, num_workers=workers)


def _require_square(groups: Groups) -> None:
    for picture in (picture for group in groups for picture in group):
        width, height = read_picture(picture.path).size
        if width != height:
            raise ShiraError(
                f"cache_latents encodes each picture once, but the crop of {picture.path} ({width} x {height}) is "
                "random: add center_crop, or make all pictures square"
            )


class _MomentReader:
    """Looks up the moments of latents that were encoded in advance, float32 ``(2c, h, w)``, on the CPU.

    Args:
        moments: of each picture ``(1 or 2, 2c, h, w)``: as it is and, with random flips, mirrored.
        seed: with the position in the run it tells which of the two.
    """

    def __init__(self, moments: dict[Picture, Tensor], seed: int) -> None:
        self._moments = moments
        self._seed = seed

    def __call__(self, picture: Picture, position: int) -> Tensor:
        either = self._moments[picture]
        generator = seeded(self._seed, f"framing:{position}:{picture.path.name}")
        return either[int(torch.randint(len(either), (), generator=generator))]


def _encode_all(pipe: Pipe, config: TrainingConfig, groups: Groups, seed: int) -> _MomentReader:
    framing = Framing(config.resolution, config.center_crop, random_flip=False)
    pictures = dict.fromkeys(picture for group in groups for picture in group)

    def moments(picture: Picture) -> Tensor:
        pixels = PixelReader(framing, seed)(picture, 0).unsqueeze(0)
        both = [pixels, pixels.flip(-1)] if config.random_flip else [pixels]
        return torch.cat([encode(pipe, part).cpu() for part in both])

    return _MomentReader({picture: moments(picture) for picture in pictures}, seed)


@torch.no_grad()
def _embed_all(pipe: Pipe, groups: Groups) -> dict[str, Tensor]:
    """``prompt -> (tokens, width)``, on the base's device."""
    prompts = dict.fromkeys(["", *(picture.prompt for group in groups for picture in group)])  # "": dropped captions
    return {prompt: embed(pipe, [prompt]).squeeze(0) for prompt in prompts}
