"""Out of memory is told in one sentence, with flags that help."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image

from shira_diffusers import ShiraError
from shira_diffusers.dreambooth.config import TrainingConfig
from shira_diffusers.dreambooth.out_of_memory import explained_memory, is_out_of_memory, remedies
from shira_diffusers.dreambooth.train import train

NEEDED = {"pretrained_model_name_or_path": "base", "instance_data_dir": "i", "instance_prompt": "p", "resolution": 512}


@pytest.mark.parametrize("error", ["PyTorch on a CPU", "Python", "a GPU", "cuBLAS", "a worker", "a process"])
def test_what_says_that_memory_ran_out_is_recognised(error: str) -> None:
    errors = {
        "Python": MemoryError(),
        "a GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."),
        "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        "a worker": RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
        "a process": OSError(12, "Cannot allocate memory"),
    }
    if error == "PyTorch on a CPU":
        with pytest.raises(RuntimeError) as caught:
            torch.empty(2**60)
        errors[error] = caught.value
    assert is_out_of_memory(errors[error])


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), OSError("no such file"), ValueError("out of memory")])
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)) as caught, explained_memory(TrainingConfig(**NEEDED), lambda: "nothing"):
        raise error
    assert caught.value is error


def test_flags_that_are_given_are_not_advised() -> None:
    assert remedies(TrainingConfig(**NEEDED)) == [
        "--gradient_checkpointing", "--train_batch_size 2 --gradient_accumulation_steps 2", "--mixed_precision bf16",
        "--recompute_inputs", "--sample_batch_size 1", "a --resolution below 512",
    ]  # fmt: skip
    frugal = {"train_batch_size": 1, "gradient_checkpointing": True, "mixed_precision": "fp16", "sample_batch_size": 1}
    assert remedies(TrainingConfig(**NEEDED, **frugal, recompute_inputs=True)) == ["a --resolution below 512"]


def test_the_message_tells_the_amount_and_what_is_saved() -> None:
    with (
        pytest.raises(ShiraError) as caught,
        explained_memory(TrainingConfig(**NEEDED), lambda: "checkpoint-10 is saved"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total ...")
    told = str(caught.value)
    assert told.startswith(
        "out of memory (tried to allocate 2.00 GiB): checkpoint-10 is saved; to need less, --gradient"
    )
    assert "\n" not in told


@contextmanager
def memory_left(size: int) -> Iterator[None]:
    """Allocating more fails, as on a machine that has no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads how much memory is in use as Linux tells it")
@pytest.mark.parametrize("cached", [True, False], ids=["before training", "in a step"])
def test_a_run_that_needs_too_much(base: Path, tmp_path: Path, cached: bool) -> None:
    """A picture of four gigabytes: a real failure to allocate."""
    (tmp_path / "pictures").mkdir()
    Image.effect_noise((16, 16), 90).save(tmp_path / "pictures" / "0.png")
    settings = {
        "pretrained_model_name_or_path": str(base), "instance_data_dir": str(tmp_path / "pictures"),
        "instance_prompt": "a sks cat", "output_dir": str(tmp_path / "out"), "resolution": 2**15,
        "train_batch_size": 1, "report_to": "none", "max_train_steps": 1, "cache_latents": cached,
    }  # fmt: skip
    message = r"^out of memory.*: nothing was saved yet; to need less, --gradient_checkpointing, .*--resolution below"
    with memory_left(2**29), pytest.raises(ShiraError, match=message):
        train(TrainingConfig(**settings))
    assert not (tmp_path / "out").exists()
