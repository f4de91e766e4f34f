"""Running out of memory, reported in one sentence with the flags that help."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from shira_diffusers.dreambooth.config import TrainingConfig
from shira_diffusers.errors import ShiraError
from shira_diffusers.masks.families import CALIBRATED

# what PyTorch raises as a plain RuntimeError: its allocators, cuBLAS and cuDNN, and a killed data loader's worker
_SIGNS = re.compile(
    r"out of memory|not enough memory|can't allocate memory|ALLOC_FAILED|Cannot allocate memory"
    r"|DataLoader worker .* is killed by signal: Killed",
    re.IGNORECASE,
)
_WANTED = re.compile(r"[Tt]ried to allocate ([\d.]+ ?\w+)")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of a GPU or of the machine."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and bool(_SIGNS.search(str(error)))


@contextmanager
def explained_memory(config: TrainingConfig, progress: Callable[[], str]) -> Iterator[None]:
    """Report running out of memory anywhere inside as one sentence.

    Args:
        config: flags that it has already are not advised.
        progress: called on error, says what is done and saved so far.

    Raises:
        ShiraError: memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise ShiraError(
            f"out of memory{_amount(error)}: {progress()}; to need less, {', '.join(remedies(config))}"
        ) from error


def _amount(error: BaseException) -> str:
    found = _WANTED.search(str(error))
    return f" (tried to allocate {found[1]})" if found else ""


def remedies(config: TrainingConfig) -> list[str]:
    """List the flags that would lower the memory of a run with these settings, the most effective first."""
    batch = config.train_batch_size
    smaller = f"--train_batch_size {max(1, batch // 2)} --gradient_accumulation_steps "
    advice = {
        "--gradient_checkpointing": not config.gradient_checkpointing,
        f"{smaller}{2 * config.gradient_accumulation_steps}": batch > 1,
        "--mask_type wm, which needs no gradients of whole weights": config.mask_type in CALIBRATED,
        "--mixed_precision bf16": config.mixed_precision in (None, "no"),
        "--recompute_inputs": not config.recompute_inputs,
        "no --train_text_encoder": config.train_text_encoder,
        "--sample_batch_size 1": config.sample_batch_size > 1,
        "--dataloader_num_workers 0": config.dataloader_num_workers > 0,
        f"a --resolution below {config.resolution}": True,
    }
    return [flag for flag, helps in advice.items() if helps]
