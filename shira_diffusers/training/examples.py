"""Get the data of a run ready: which pictures, read how, with what encoded in advance."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch.utils.data import DataLoader

from shira_diffusers.errors import ShiraError
from shira_diffusers.masks import seeded
from shira_diffusers.training.config import TrainingConfig
from shira_diffusers.training.data import (
    Batch,
    Batches,
    Examples,
    Framing,
    Picture,
    PixelReader,
    Reader,
    View,
    collate,
    read_picture,
)
from shira_diffusers.training.families import Conditions, Pipe, embed
from shira_diffusers.training.objective import Objective, encode
from shira_diffusers.training.parallel import Parts, Share, share_of

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


def load_shares(
    examples: Examples, config: TrainingConfig, seed: int, first: int, last: int, process: int, processes: int
) -> Iterator[tuple[Batch, Share]]:
    """One process's shares of batches number ``first`` to ``last`` (excluded), which are ``processes`` times as large.

    Together the processes see what one process would see with that batch size.
    """
    size = config.train_batch_size
    batches = Batches(len(examples), size * processes, seed, first, last)
    parts = Parts(batches, size, process, processes)
    loader = DataLoader(examples, batch_sampler=parts, collate_fn=collate, num_workers=config.dataloader_num_workers)
    for draws, batch in zip(batches, loader, strict=True):
        yield batch, share_of(len(draws), size, process, processes)


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
        views: of each picture, with moments: as it is and, with random flips, mirrored.
        seed: with the position in the run it tells which of the two.
    """

    def __init__(self, views: dict[Picture, list[View]], seed: int) -> None:
        self._views = views
        self._seed = seed

    def __call__(self, picture: Picture, position: int) -> View:
        either = self._views[picture]
        generator = seeded(self._seed, f"framing:{position}:{picture.path.name}")
        return either[int(torch.randint(len(either), (), generator=generator))]


def _encode_all(pipe: Pipe, config: TrainingConfig, groups: Groups, seed: int) -> _MomentReader:
    framing = Framing(config.resolution, config.center_crop, random_flip=False)
    pictures = dict.fromkeys(picture for group in groups for picture in group)

    def views(picture: Picture) -> list[View]:
        pixels, time_ids = PixelReader(framing, seed)(picture, 0)  # centred crops: the same when mirrored
        both = [pixels, pixels.flip(-1)] if config.random_flip else [pixels]
        return [View(encode(pipe, part.unsqueeze(0)).squeeze(0).cpu(), time_ids) for part in both]

    return _MomentReader({picture: views(picture) for picture in pictures}, seed)


@torch.no_grad()
def _embed_all(pipe: Pipe, groups: Groups) -> dict[str, Conditions]:
    """What the denoiser is given for each prompt, without the first dimension, on the base's device."""
    prompts = dict.fromkeys(["", *(picture.prompt for group in groups for picture in group)])  # "": dropped captions
    return {prompt: {n: t.squeeze(0) for n, t in embed(pipe, [prompt]).items()} for prompt in prompts}
