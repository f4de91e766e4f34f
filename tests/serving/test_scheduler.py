"""Pictures in turns: each with the bits that it has alone, and the model as it was before."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    FirstBlockCacheConfig,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from shira_diffusers import AdapterFormatError, AdapterLibrary, ShiraAdapter, ShiraError, save_adapter
from shira_diffusers.adapters.base_probes import probe_base
from shira_diffusers.integrations.pipelines import resident_of
from shira_diffusers.serving.jobs import Job
from shira_diffusers.serving.requests import ClosedError, DeadlineError, ImageRequest, QueueFullError, RequestError
from shira_diffusers.serving.scheduler import StepScheduler
from tests import tiny

NAMES = {"blue", "gold", "oil"}
SECONDS = 120  # to wait for pictures that take less than one


def write_adapters(pipe: DiffusionPipeline, folder: Path) -> None:
    parts = tuple(tiny.modules_of(pipe))
    for seed, name in enumerate(sorted(NAMES)):
        save_adapter(tiny.adapter_for(pipe, seed, components=parts), folder / f"{name}.safetensors")


@pytest.fixture
def library(tmp_path: Path, pipe: DiffusionPipeline) -> Iterator[AdapterLibrary]:
    write_adapters(pipe, tmp_path)
    with AdapterLibrary(tmp_path) as library:
        yield library


@pytest.fixture
def scheduler(pipe: DiffusionPipeline, library: AdapterLibrary) -> Iterator[StepScheduler]:
    """One that must leave the model as it was."""
    before = tiny.snapshot(pipe)
    with StepScheduler(pipe, library, output_type="latent", max_waiting=8) as scheduler:
        yield scheduler
    tiny.assert_same_bits(pipe, before)
    assert not pipe.list_shira().keys() - NAMES  # those are the library's own


def request(*mix: str, **options: Any) -> ImageRequest:
    given = {"prompt": "a red cat", "steps": 3, "width": tiny.SIZE, "height": tiny.SIZE, **options}
    return ImageRequest(mix={name: 0.5 + k for k, name in enumerate(mix)}, **given)


def alone(pipe: DiffusionPipeline, library: AdapterLibrary, *batch: ImageRequest) -> Tensor:
    """What a plain call draws: ``(pictures, 4, 8, 8)`` latents."""
    first, each = batch[0], [(one, k) for one in batch for k in range(one.n)]
    options: dict[str, Any] = {} if first.guidance is None else {"guidance_scale": first.guidance}
    if first.negative_prompt is not None:
        options["negative_prompt"] = [one.negative_prompt for one, _ in each]
    with library.use(pipe, first.mix):
        return pipe(
            [one.prompt for one, _ in each],
            num_inference_steps=first.steps,
            generator=[torch.Generator().manual_seed(one.seed + k) for one, k in each],
            width=first.width,
            height=first.height,
            output_type="latent",
            **options,
        ).images


def drawn(job: Job) -> Tensor:
    return torch.stack(job.result(SECONDS))


def submit_together(pipe: DiffusionPipeline, scheduler: StepScheduler, *requests: ImageRequest) -> list[Job]:
    """Submit requests that all wait when the first of them begins."""
    with resident_of(pipe).reading():
        return [scheduler.submit(one) for one in requests]


# ---------------------------------------------------------------- bits


def with_unipc() -> DiffusionPipeline:
    pipe = tiny.pipeline()
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    return pipe


def with_heun() -> DiffusionPipeline:
    pipe = tiny.pipeline()
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    return pipe


def offloaded() -> DiffusionPipeline:
    pipe = tiny.pipeline()
    pipe.enable_model_cpu_offload(device="cpu")
    return pipe


@pytest.mark.parametrize(
    "make", [tiny.pipeline, with_unipc, with_heun, tiny.sdxl_pipeline, tiny.flux_pipeline, offloaded]
)
def test_mixes_that_take_turns_have_the_bits_that_they_have_alone(
    make: Callable[[], DiffusionPipeline], tmp_path: Path
) -> None:
    pipe, order = make(), list[int]()
    write_adapters(pipe, tmp_path)
    before = tiny.snapshot(pipe)
    requests = [request("blue", steps=6), request("gold"), request(), request("oil", "blue", n=2, seed=3)]
    with AdapterLibrary(tmp_path) as library:
        with StepScheduler(pipe, library, output_type="latent") as scheduler:
            jobs = [scheduler.submit(one, lambda _, k=k: order.append(k)) for k, one in enumerate(requests)]
            pictures = [drawn(job) for job in jobs]
        tiny.assert_same_bits(pipe, before)
        assert pipe.list_shira() == {}
        assert order != sorted(order)  # one after the other it was not
        for one, job, picture in zip(requests, jobs, pictures, strict=True):
            assert job.batch == one.n
            assert torch.equal(picture, alone(pipe, library, one))


def test_a_batch_of_several_clients_has_the_bits_of_a_plain_batch(
    pipe: DiffusionPipeline, library: AdapterLibrary, scheduler: StepScheduler
) -> None:
    prompts = ("a red cat", "a dog", "the sea at night")
    batch = [request("blue", prompt=prompt, seed=k, negative_prompt="rain") for k, prompt in enumerate(prompts)]
    jobs = submit_together(pipe, scheduler, request("gold"), *batch)
    pictures = torch.cat([drawn(job) for job in jobs[1:]])
    assert [job.batch for job in jobs] == [1, 3, 3, 3]
    scheduler.close()
    assert torch.equal(pictures, alone(pipe, library, *batch))
    same = [batch[1]] * 3  # a neighbour's prompt and seed change nothing
    assert torch.equal(pictures[1], alone(pipe, library, *same)[1])


def test_the_mix_that_was_active_returns(pipe: DiffusionPipeline, library: AdapterLibrary) -> None:
    pipe.load_shira(tiny.adapter_for(pipe, 7), "own", scale=0.7)
    before = tiny.snapshot(pipe)
    with StepScheduler(pipe, library, output_type="latent") as scheduler:
        first, second = scheduler.submit(request("blue")), scheduler.submit(request())
        pictures = drawn(first), drawn(second)
    tiny.assert_same_bits(pipe, before)
    assert pipe.get_active_shira() == {"own": 0.7}
    assert list(pipe.list_shira()) == ["own"]
    pipe.unload_shira()
    assert torch.equal(pictures[0], alone(pipe, library, request("blue")))
    assert torch.equal(pictures[1], alone(pipe, library, request()))


def test_a_file_that_is_replaced_changes_no_picture_that_has_begun(
    pipe: DiffusionPipeline, library: AdapterLibrary, scheduler: StepScheduler, tmp_path: Path
) -> None:
    old, later = alone(pipe, library, request("blue", steps=6)), list[Job]()

    def replace(step: int) -> None:
        if step == 2:
            save_adapter(tiny.adapter_for(pipe, 9), tmp_path / "blue.safetensors")
            later.append(scheduler.submit(request("blue")))

    picture = drawn(scheduler.submit(request("blue", steps=6), replace))
    new = drawn(later[0])
    scheduler.close()
    assert torch.equal(picture, old)
    assert torch.equal(new, alone(pipe, library, request("blue")))


def test_mixes_without_room_beside_others_begin_later(tmp_path: Path, pipe: DiffusionPipeline) -> None:
    write_adapters(pipe, tmp_path)
    with AdapterLibrary(tmp_path) as library, library.pinned("blue"):
        size = library.stats().device.nbytes
    with AdapterLibrary(tmp_path, device_bytes=2 * size) as library:
        with StepScheduler(pipe, library, output_type="latent") as scheduler:
            requests = [request("blue"), request("gold"), request("oil"), request("gold", "oil")]
            jobs = submit_together(pipe, scheduler, *requests)
            pictures = [drawn(job) for job in jobs]
            too_many = scheduler.submit(request("blue", "gold", "oil"))
            with pytest.raises(ShiraError, match="no room for adapter"):
                too_many.result(SECONDS)
        for one, picture in zip(requests, pictures, strict=True):
            assert torch.equal(picture, alone(pipe, library, one))


# ---------------------------------------------------------------- ends


def test_a_cancelled_job_ends_before_its_next_step(
    pipe: DiffusionPipeline, library: AdapterLibrary, scheduler: StepScheduler
) -> None:
    long: list[Job] = []
    may_cancel = threading.Event()
    long.append(scheduler.submit(request("blue", steps=900), lambda step: step == 2 and may_cancel.wait(SECONDS)))
    other = scheduler.submit(request("gold"))
    assert long[0].cancel()
    may_cancel.set()
    with pytest.raises(CancelledError):
        long[0].result(SECONDS)
    picture = drawn(other)
    assert not other.cancel()
    assert long[0].steps <= 2
    scheduler.close()
    assert scheduler.stats().cancelled == 1
    assert torch.equal(picture, alone(pipe, library, request("gold")))


def test_deadlines_end_jobs_that_wait_and_jobs_that_run(scheduler: StepScheduler) -> None:
    running, waiting = scheduler.submit(request("blue", steps=900, deadline=0.3)), list[Job]()
    waiting.append(scheduler.submit(request("gold", steps=900, deadline=0.001)))
    with pytest.raises(DeadlineError, match=r"expected 900 steps within 0\.3 seconds, got \d+"):
        running.result(SECONDS)
    with pytest.raises(DeadlineError):
        waiting[0].result(SECONDS)
    assert drawn(scheduler.submit(request("gold", deadline=SECONDS))).shape == (1, 4, 8, 8)


def test_a_damaged_or_unknown_adapter_costs_its_own_request_only(
    pipe: DiffusionPipeline, library: AdapterLibrary, scheduler: StepScheduler, tmp_path: Path
) -> None:
    file = tmp_path / "oil.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    other = tiny.adapter_for(tiny.sdxl_pipeline(), components=("text_encoder_2",))
    save_adapter(other, tmp_path / "foreign.safetensors")
    jobs = submit_together(
        pipe, scheduler, request("blue"), request("oil"), request("blue", "foreign"), request("none"), request("gold")
    )
    for job, error in zip(jobs[1:4], (AdapterFormatError, ShiraError, ShiraError), strict=True):
        with pytest.raises(error):
            job.result(SECONDS)
    pictures = drawn(jobs[0]), drawn(jobs[4])
    scheduler.close()
    assert torch.equal(pictures[0], alone(pipe, library, request("blue")))
    assert torch.equal(pictures[1], alone(pipe, library, request("gold")))


def test_what_the_pipeline_refuses_is_the_requests_fault_and_no_other_error_is(
    pipe: DiffusionPipeline, library: AdapterLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipe, "scheduler", DDIMScheduler(num_train_timesteps=5))
    with StepScheduler(pipe, library) as scheduler:
        with pytest.raises(RequestError, match="`num_inference_steps`: 6 cannot be larger") as refused:
            scheduler.submit(request("blue", steps=6)).result(SECONDS)
        assert type(refused.value.__cause__) is ValueError
        monkeypatch.setattr(pipe.scheduler, "step", lambda *_, **__: int("not a number"))
        with pytest.raises(ValueError, match="not a number") as failed:
            scheduler.submit(request("blue")).result(SECONDS)
        assert type(failed.value) is ValueError
    sd3 = tiny.whole_sd3_pipeline(with_t5=False)
    sd3.patch_size = 8
    refused = pytest.raises(RequestError, match="`height` and `width` have to be divisible by 16")
    with StepScheduler(sd3, library) as scheduler, refused:
        scheduler.submit(request(width=24)).result(SECONDS)


@pytest.mark.parametrize(("kind", "steps"), [(DDIMScheduler, 1000), (PNDMScheduler, 1)])
def test_steps_that_a_scheduler_cannot_take_are_the_requests_fault(
    pipe: DiffusionPipeline, library: AdapterLibrary, monkeypatch: pytest.MonkeyPatch, kind: type, steps: int
) -> None:
    """DDIM finds no noise level for the first of 1,000 steps, PNDM none to interpolate: neither checks."""
    monkeypatch.setattr(pipe, "scheduler", kind.from_config(pipe.scheduler.config))
    refused = pytest.raises(RequestError, match=r"cannot draw this: .*; ask for another number of steps")
    with StepScheduler(pipe, library) as scheduler, refused:
        scheduler.submit(request("blue", steps=steps)).result(SECONDS)


def test_an_error_in_the_middle_of_a_picture_costs_no_other(
    pipe: DiffusionPipeline, library: AdapterLibrary, scheduler: StepScheduler
) -> None:
    def break_down(module: torch.nn.Module, given: tuple[Tensor, ...]) -> None:
        if given[0].shape[0] == 4:  # with guidance, two pictures
            raise MemoryError("out of memory")

    handle = pipe.unet.mid_block.register_forward_pre_hook(break_down)
    jobs = submit_together(pipe, scheduler, request("blue"), request("gold", n=2))
    with pytest.raises(MemoryError, match="out of memory"):
        jobs[1].result(SECONDS)
    picture = drawn(jobs[0])
    scheduler.close()
    handle.remove()
    assert torch.equal(picture, alone(pipe, library, request("blue")))
    assert scheduler.stats().failed == scheduler.stats().finished == 1


def test_a_mix_that_the_weights_cannot_hold_costs_no_other(
    pipe: DiffusionPipeline, library: AdapterLibrary, scheduler: StepScheduler
) -> None:
    too_strong = ImageRequest(prompt="a cat", mix={"blue": 3.4e38}, steps=3)
    jobs = submit_together(pipe, scheduler, request("blue"), too_strong, request())
    with pytest.raises(ShiraError, match=r"become infinite or NaN with blue=3\.4e\+38, expected"):
        jobs[1].result(SECONDS)
    pictures = drawn(jobs[0]), drawn(jobs[2])
    scheduler.close()
    assert torch.equal(pictures[0], alone(pipe, library, request("blue")))
    assert torch.equal(pictures[1], alone(pipe, library, request()))


def test_warnings_name_the_file(pipe: DiffusionPipeline, library: AdapterLibrary, tmp_path: Path) -> None:
    plain, elsewhere = tiny.adapter_for(pipe), {n: -weight for n, weight in tiny.weights_of(pipe).items()}
    strange = ShiraAdapter(plain.deltas, plain.metadata, probe_base(plain.deltas, elsewhere))
    save_adapter(strange, tmp_path / "strange.safetensors")
    with StepScheduler(pipe, library, output_type="latent") as scheduler, pytest.warns(UserWarning) as warned:
        drawn(scheduler.submit(request("strange")))
    assert str(warned[0].message).startswith("adapter 'strange' fits by shape but was trained on another model")


def test_weights_that_others_modified_end_the_jobs_and_the_next_ones_are_drawn(
    pipe: DiffusionPipeline, library: AdapterLibrary
) -> None:
    weight = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.data
    kept = list[Tensor]()

    def modify(step: int) -> None:
        if step == 2:  # the other one begins after it
            kept.append(weight.clone())
            weight.zero_()
        elif step == 3:
            weight.copy_(kept[0])

    with StepScheduler(pipe, library, output_type="latent") as scheduler:
        with resident_of(pipe).reading():
            jobs = [scheduler.submit(request("blue"), modify), scheduler.submit(request("gold"))]
        with pytest.raises(ShiraError, match="modified outside"):
            jobs[1].result(SECONDS)
        jobs[0].result(SECONDS)
        picture = drawn(scheduler.submit(request("gold")))
    assert torch.equal(picture, alone(pipe, library, request("gold")))


def test_limits_are_kept(pipe: DiffusionPipeline, scheduler: StepScheduler) -> None:
    with pytest.raises(RequestError, match="at most 4 pictures"):
        scheduler.submit(request(n=5))
    with resident_of(pipe).reading():
        waiting = [scheduler.submit(request("gold", steps=500)) for _ in range(8)]
        with pytest.raises(QueueFullError, match="8 requests wait"):
            scheduler.submit(request())
        assert waiting[-1].cancel()  # which frees its place at once
        waiting.append(scheduler.submit(request()))
    scheduler.close()
    for job in waiting:
        with pytest.raises((ClosedError, CancelledError)):
            job.result(SECONDS)
    with pytest.raises(ClosedError, match="make a new one"):
        scheduler.submit(request())


def test_progress_is_told_step_by_step(scheduler: StepScheduler) -> None:
    job, steps = scheduler.submit(request("blue", steps=5)), list[int]()
    job.future.add_done_callback(lambda _: steps.append(-1))
    seen = list(job.progress())
    assert seen == sorted(set(seen))
    assert seen[-1] == 5
    assert job.result(SECONDS)
    assert list(scheduler.submit(request("none")).progress()) == []


def test_an_on_step_that_fails_costs_nothing(scheduler: StepScheduler, caplog: pytest.LogCaptureFixture) -> None:
    def fail(step: int) -> None:
        raise RuntimeError("the event loop is closed")

    assert drawn(scheduler.submit(request("blue"), fail)).shape == (1, 4, 8, 8)
    assert "the event loop is closed" in caplog.text


def test_what_cannot_take_turns_is_refused(pipe: DiffusionPipeline, library: AdapterLibrary) -> None:
    with pytest.raises(ShiraError, match="turns, arrival, grouped, got 'random'"):
        StepScheduler(pipe, library, policy="random")
    with pytest.raises(ShiraError, match="max_batch=0"):
        StepScheduler(pipe, library, max_batch=0)
    unconditional = DDPMPipeline(pipe.unet, DDPMScheduler())
    with pytest.raises(ShiraError, match="DDPMPipeline has no callback_on_step_end"):
        StepScheduler(unconditional, library)
    flux = tiny.flux_pipeline()
    flux.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ShiraError, match="transformer caches"):
        StepScheduler(flux, library)
