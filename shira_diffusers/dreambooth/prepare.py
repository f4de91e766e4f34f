"""Get the data of a run ready: which pictures, read how, with what encoded in advance."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader

from shira_diffusers.dreambooth.base_model import side_factor
from shira_diffusers.dreambooth.config import TrainingConfig
from shira_diffusers.dreambooth.data import (
    INTERPOLATIONS,
    Batch,
    Batches,
    Examples,
    Framing,
    Pairing,
    PixelReader,
    Reader,
    View,
    collate,
    covering,
    frames_of,
    mirror,
    pair_up,
)
from shira_diffusers.dreambooth.data_parallel import Parts, Share, share_of
from shira_diffusers.dreambooth.families import Conditions, Pipe, embed, text_encoders_of
from shira_diffusers.dreambooth.interrupts import leave_to_the_main_process
from shira_diffusers.dreambooth.loss import Objective, encode
from shira_diffusers.dreambooth.pictures import Picture, Size
from shira_diffusers.errors import ShiraError, counted, listing, verb
from shira_diffusers.seeds import seeded

Groups = Sequence[Sequence[Picture]]

logger = logging.getLogger(__name__)


def prepare_examples(pipe: Pipe, config: TrainingConfig, groups: Groups, seed: int) -> tuple[Examples, Objective]:
    """Prepare the data of a run and its loss, computing in advance what does not change from step to step.

    Args:
        pipe: the base in float32, on its device.
        groups: the instance's pictures and, with prior preservation, those of the class.

    Raises:
        ShiraError: latents are to be cached, but crops are random.
    """
    frames = frames_of(config)
    if config.enable_bucket:
        _require_whole_latents(pipe, frames)
    pairings = pair_up(groups, frames)
    _tell_what_may_surprise(pairings, config)
    interpolation = INTERPOLATIONS[config.image_interpolation_mode]
    reader: Reader = PixelReader(Framing(config.center_crop, config.random_flip, interpolation), seed)
    if config.cache_latents:
        if not config.center_crop:
            _require_fixed_crops(pairings)
        reader = _encode_all(pipe, config, pairings, seed)
    embeddings = None if config.train_text_encoder else _embed_all(pipe, config, groups)
    data = Examples(pairings, reader, config.caption_dropout_rate, seed)
    return data, Objective(pipe, config, embeddings, config.cache_latents)


def load_shares(
    examples: Examples, config: TrainingConfig, seed: int, first: int, last: int, process: int = 0, processes: int = 1
) -> Iterator[tuple[Batch, Share]]:
    """Load one process's shares of batches ``first`` to ``last`` (exclusive), which are ``processes`` times as large.

    Together the processes see what one process would see with that batch size.
    """
    size = config.train_batch_size
    batches = Batches(examples.frames, size * processes, seed, first, last)
    parts = Parts(batches, size, process, processes)
    loader = DataLoader(
        examples,
        batch_sampler=parts,
        collate_fn=collate,
        num_workers=config.dataloader_num_workers,
        worker_init_fn=leave_to_the_main_process,
    )
    for draws, batch in zip(batches, loader, strict=True):
        yield batch, share_of(len(draws), size, process, processes)


def _require_whole_latents(pipe: Pipe, frames: Sequence[Size]) -> None:
    factor = side_factor(pipe)
    if any(side % factor for frame in frames for side in frame):
        raise ShiraError(f"bucket_reso_steps must be a multiple of {factor}, which the model divides sides by")


def _require_fixed_crops(pairings: Sequence[Pairing]) -> None:
    """Refuse pictures of which random crops would differ."""
    for pairing in pairings:
        for picture in pairing.pictures:
            if covering(picture.size, pairing.frame) != pairing.frame:
                raise ShiraError(
                    f"cache_latents encodes each picture once, but the crop of {picture.path} ({picture.size[0]} x "
                    f"{picture.size[1]}) is random: add center_crop, or make all pictures "
                    f"{pairing.frame[0]} x {pairing.frame[1]} or of that shape"
                )


def _tell_what_may_surprise(pairings: Sequence[Pairing], config: TrainingConfig) -> None:
    first = {pairing.pictures[0]: pairing.frame for pairing in pairings}
    small = [picture for picture, frame in first.items() if covering(picture.size, frame) > picture.size]
    if small:
        names = [f"{picture.path} ({picture.size[0]} x {picture.size[1]})" for picture in small]
        count, are = counted(len(small), "picture"), verb(len(small), "is", "are")
        frame = verb(len(small), "its frame", "their frames")
        logger.warning("%s %s smaller than %s and %s enlarged:%s", count, are, frame, are, listing(sorted(names)))
    most = max(Counter(pairing.frame for pairing in pairings).values())
    if most < config.train_batch_size:
        shape = " of one shape" if config.enable_bucket else ""
        logger.warning(
            "batches hold %s at most, since there are no more%s, and train_batch_size is %d; "
            "--repeats would fill them", counted(most, "example"), shape, config.train_batch_size
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _MomentReader:
    """Looks up the moments of latents that were encoded in advance, float32 ``(2c, h, w)``, on the CPU.

    Args:
        views: of each picture in each of its frames, with moments: as it is and, with random flips, mirrored.
        seed: with the position in the run it selects one of the two.
    """

    views: dict[tuple[Picture, Size], list[View]]
    seed: int

    def __call__(self, picture: Picture, frame: Size, position: int) -> View:
        either = self.views[picture, frame]
        generator = seeded(self.seed, f"framing:{position}:{picture.path.name}")
        return either[int(torch.randint(len(either), (), generator=generator, device="cpu"))]


def _encode_all(pipe: Pipe, config: TrainingConfig, pairings: Sequence[Pairing], seed: int) -> _MomentReader:
    framing = Framing(config.center_crop, False, INTERPOLATIONS[config.image_interpolation_mode])
    wanted = dict.fromkeys((picture, pairing.frame) for pairing in pairings for picture in pairing.pictures)

    def views(picture: Picture, frame: Size) -> list[View]:
        plain = PixelReader(framing, seed)(picture, frame, 0)
        both = [plain, mirror(plain, picture.size, frame)] if config.random_flip else [plain]
        return [View(encode(pipe, v.tensor.unsqueeze(0)).squeeze(0).cpu(), v.time_ids) for v in both]

    return _MomentReader({key: views(*key) for key in wanted}, seed)


@torch.no_grad()
def _embed_all(pipe: Pipe, config: TrainingConfig, groups: Groups) -> dict[str, Conditions]:
    """What the denoiser is given for each prompt, without the first dimension, on the base's device.

    Text encoders then leave the device: a T5 is larger than many a denoiser.
    """
    prompts = dict.fromkeys(["", *(picture.prompt for group in groups for picture in group)])  # "": dropped captions
    known = {prompt: embed(pipe, [prompt], config.max_sequence_length) for prompt in prompts}
    for encoder in text_encoders_of(pipe):
        encoder.to("cpu")
    return {prompt: {n: t.squeeze(0) for n, t in given.items()} for prompt, given in known.items()}
