"""What a run reports while it trains: on the terminal, and to the trackers."""

import logging
import sys
import time
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm

logger = logging.getLogger(__name__)

_GIB = 2**30


class Progress:
    """The progress bar of the main process, and the figures of each step for the trackers.

    Args:
        last, done: steps in all, and those done before.
    """

    def __init__(self, accelerator: Accelerator, last: int, done: int) -> None:
        self._accelerator = accelerator
        self._bar = tqdm(desc="Steps", total=last, initial=done, disable=not accelerator.is_main_process)
        self._started = time.perf_counter()
        self._mute = False

    def begin(self) -> None:
        """Begin a step: time since the last one, such as for validation, does not count."""
        self._started = time.perf_counter()

    def end(self, step: int, loss: float, rates: list[float], pictures: int) -> None:
        """End a step and report it.

        Args:
            step: its number.
            loss: of the step, a mean over its pictures.
            rates: learning rates of the denoiser and, where they are trained, of the text encoders.
            pictures: in the step, of all processes, class pictures included.
        """
        figures: dict[str, Any] = {
            "loss": loss,
            "lr": rates[0],
            "images_per_second": pictures / max(time.perf_counter() - self._started, 1e-9),
            "peak_memory_gib": peak_memory(self._accelerator.device) / _GIB,
        }
        if len(rates) > 1:
            figures["text_encoder_lr"] = rates[1]
        shown = {
            "loss": f"{loss:.4f}",
            "lr": f"{rates[0]:.3g}",
            "images/s": f"{figures['images_per_second']:.3g}",
            "peak": f"{figures['peak_memory_gib']:.2f} GiB",
        }
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()
        self._report(figures, step)

    def _report(self, figures: dict[str, Any], step: int) -> None:
        """Send figures to the trackers; one that fails is not used any more, and training goes on."""
        if self._mute:
            return
        try:
            self._accelerator.log(figures, step=step)
        except Exception as error:  # noqa: BLE001 - trackers are others' code: none of it may end a training
            self._mute = True
            logger.warning("step %d and those after it are not tracked: %s; training goes on", step, error)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of tensors on a CUDA device, else of this process (0 on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def show(accelerator: Accelerator, images: list[Image.Image], step: int) -> None:
    """Send validation pictures to the trackers that take pictures."""
    for tracker in accelerator.trackers:
        if images and hasattr(tracker, "log_images"):
            pixels = np.stack([np.asarray(image) for image in images])
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"validation": pixels}, step=step, **options)
