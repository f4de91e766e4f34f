"""Whose denoising step comes next in a service: in turns, first come first served, or grouped by adapter.

python -m benchmarks.scripts.serving_schedule [--device cpu|cuda] [--toy] [--out FILE]

The demo model on a CPU; on a GPU one of SD 1.5's size, of random weights, in float16, with adapters of 1 % at random.
32 adapters with Zipf's popularity, 20 clients, Poisson arrivals, 8, 20 or 50 steps (5 : 4 : 1), batches of one.
``throughput``: requests that all wait, against plain calls of the pipeline with one adapter, active all the time,
before and after each block of five, all drawn once before; ``lora server`` is a plain LoRA server's loop, without HTTP:
load, set, draw and unload for each request, with LoRAs of rank 16 of the same weights. ``graphs``: in turns with
``cuda_graphs``; ``graphs, one adapter``: the same requests, all for one adapter. On a CPU all times are CPU time
of this process, with one thread, so that other processes do not count.
``real``: a service at 90 % load, as clients see it, and what a simulation of the same arrivals says.
``simulated``: 5,000 requests at each load with the times in ``times_ms``; it asks the scheduler's own ``Turns``.
``first``: to the end of the first step. ``picture``: to the picture; ``short``: of those with 8 steps. ``throughput``:
seconds of plain calls with one adapter that a second's work is worth.
"""

import argparse
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.measure import ASSETS, Run, alternate, options, seconds_of
from benchmarks.models import TOY, UNETS, make_unet, shira_adapter
from benchmarks.rivals import lora_files, loras_of_request
from shira_diffusers import AdapterLibrary, save_adapter
from shira_diffusers.integrations.pipelines import resident_of
from shira_diffusers.serving.jobs import Job
from shira_diffusers.serving.requests import ImageRequest
from shira_diffusers.serving.scheduler import StepScheduler
from shira_diffusers.serving.stepping import arguments_of
from shira_diffusers.serving.turns import POLICIES, Turns

ADAPTERS, CLIENTS, MAX_WAITING, MAX_RUNNING = 32, 20, 256, 64
NAMES = [f"a{number}" for number in range(ADAPTERS)]
STEPS = {8: 5, 20: 4, 50: 1}  # and how often
LOADS = (0.5, 0.7, 0.9, 1.0, 1.2)
LORA_SERVER, GRAPHS = "lora server", "graphs"
DEMO = ASSETS / "emoji-diffusion"
PROMPT = "a picture of a red apple on a teal background"
Arrival = tuple[float, ImageRequest]


@dataclass(frozen=True)
class Times:
    """Seconds of what a service does.

    Args:
        begin: to encode the text, beside the first step.
        step: of denoising.
        decode: after the last step.
        switch: from one adapter to another.
    """

    begin: float
    step: float
    decode: float
    switch: float

    def alone(self, steps: int) -> float:
        """Of a plain call."""
        return self.begin + steps * self.step + self.decode


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--requests", type=int, default=20, help="of the real service; default 20")
    args = parser.parse_args()
    torch.set_num_threads(1)
    run = Run("serving_schedule", args, adapters=ADAPTERS, clients=CLIENTS, max_running=MAX_RUNNING)
    run.until = float("inf")
    on_cpu = args.device == "cpu"
    pipe = StableDiffusionPipeline.from_pretrained(DEMO) if on_cpu else of_sd15_size(args.device, toy=args.toy)
    pipe.set_progress_bar_config(disable=True)
    with tempfile.TemporaryDirectory() as folder:
        files = sorted((ASSETS / "adapters").glob("*.safetensors"))
        if args.device != "cpu":
            files = [save_adapter(shira_adapter(pipe.unet, "rand", 0.01, k), Path(folder, str(k))) for k in range(4)]
        offered = offer(Path(folder, "offered"), files, os.link)
        loras = offer(Path(folder, "loras"), lora_files(pipe, folder, 4, rank=16), os.link)
        with AdapterLibrary(offered, device=args.device, device_bytes=8 * 2**30) as library:
            measure(run, pipe, library, loras, args)


def offer(folder: Path, files: list[Path], put: Callable[[Path, Path], object] = shutil.copyfile) -> Path:
    """A folder with files under all names: copies, or links of them."""
    folder.mkdir()
    for number, name in enumerate(NAMES):
        put(files[number % len(files)], folder / f"{name}.safetensors")
    return folder


def of_sd15_size(device: str, *, toy: bool = False) -> Any:
    """Random weights in float16, with the tokenizer and the scheduler of the demo model."""
    unet = make_unet((TOY if toy else UNETS)["SD 1.5"] | {"sample_size": 64}, device, torch.float16)
    width = unet.config.cross_attention_dim
    text = CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=12, num_attention_heads=max(width // 64, 1)
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8) if toy else (128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=2,
        norm_num_groups=8,
    )
    pipe = StableDiffusionPipeline(
        unet=unet,
        text_encoder=CLIPTextModel(text).eval(),
        vae=vae.eval(),
        tokenizer=CLIPTokenizer.from_pretrained(DEMO / "tokenizer"),
        scheduler=DDIMScheduler.from_pretrained(DEMO / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipe.to(device, torch.float16)


def measure(run: Run, pipe: Any, library: AdapterLibrary, loras: Path, args: argparse.Namespace) -> None:
    for name in library.names:
        library.get(name, pipe)  # read and decode all
    clock = time.process_time if args.device == "cpu" else time.perf_counter
    times = measured(pipe, library, clock, 1 if args.toy else 5)
    run.about["times_ms"] = {name: round(1000 * seconds, 2) for name, seconds in vars(times).items()}
    for policy, found in throughput(pipe, library, loras, clock, args.toy).items():
        run.case(lambda f=found: {"throughput": median(f), "blocks": f}, mode="throughput", policy=policy)
    arrivals = list(requests(0.9, times, 4 if args.toy else args.requests))
    for policy in POLICIES:
        run.case(lambda p=policy: served(pipe, library, p, arrivals, times), mode="real", policy=policy, load=0.9)
        run.case(lambda p=policy: simulated(p, arrivals, times), mode="real, simulated", policy=policy, load=0.9)
    for load in LOADS:
        many = list(requests(load, times, 50 if args.toy else 5_000))
        for policy in POLICIES:
            run.case(lambda p=policy, m=many: simulated(p, m, times), mode="simulated", policy=policy, load=load)


# ---------------------------------------------------------------- what is asked for


def requests(load: float, times: Times, count: int, seed: int = 0) -> Iterator[Arrival]:
    """Requests and when they come, at a share of what plain calls with one adapter could serve."""
    draw, at = random.Random(seed), 0.0
    mean = sum(times.alone(steps) * share for steps, share in STEPS.items()) / sum(STEPS.values())
    for number in range(count):
        at += draw.expovariate(load / mean)
        yield at, request(draw, number)


def request(draw: random.Random, number: int) -> ImageRequest:
    adapter = draw.choices(range(ADAPTERS), [1 / (rank + 1) for rank in range(ADAPTERS)])[0]
    steps = draw.choices(list(STEPS), list(STEPS.values()))[0]
    client = f"client {draw.randrange(CLIENTS)}"
    return ImageRequest(prompt=PROMPT, mix={f"a{adapter}": 1.0}, steps=steps, seed=number, client=client)


# ---------------------------------------------------------------- measured


def measured(pipe: Any, library: AdapterLibrary, clock: Callable[[], float], repeats: int) -> Times:
    rows = [one_call(pipe, clock) for _ in range(repeats + 1)][1:]
    begin, step, decode = (median(column) for column in zip(*rows, strict=True))
    resident, names = resident_of(pipe), ("a0", "a1")
    with library.keep(pipe, names):
        turn = alternate(resident.set, [{name: 1.0} for name in names])
        switch = [taken(lambda: seconds_of(turn), clock) for _ in range(4 * repeats + 4)]
        resident.clear()
    return Times(max(begin - step, 0.0), step, decode, median(switch[4:]))


def one_call(pipe: Any, clock: Callable[[], float]) -> tuple[float, float, float]:
    """Seconds to the end of the first step, of each of the others, and after the last."""
    at = [clock()]

    def note(*_: Any) -> dict[str, Any]:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        at.append(clock())
        return {}

    pipe(PROMPT, num_inference_steps=12, callback_on_step_end=note)
    end = clock()
    return at[1] - at[0], (at[-1] - at[1]) / 11, end - at[-1]


def throughput(
    pipe: Any, library: AdapterLibrary, loras: Path, clock: Callable[[], float], toy: bool
) -> dict[str, list[float]]:
    """Seconds of plain calls over those of the scheduler, for the same requests, by policy; and of a LoRA server's."""
    draw = random.Random(1)
    contenders: dict[str, Callable[[list[ImageRequest]], float]] = {
        policy: partial(with_scheduler, pipe, library, policy, clock) for policy in POLICIES
    }
    contenders[LORA_SERVER] = partial(with_loras, pipe, loras, clock)
    if pipe.device.type == "cuda":
        contenders[GRAPHS] = replayed = partial(with_scheduler, pipe, library, "turns", clock, cuda_graphs=True)
        contenders[f"{GRAPHS}, one adapter"] = lambda batch: replayed([replace(one, mix={"a0": 1.0}) for one in batch])
    ratios: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(1 if toy else 3):
        batch = [request(draw, number) for number in range(1 if toy else 5)]
        plain(pipe, library, batch, clock)  # the first is slower
        before = plain(pipe, library, batch, clock)
        for name, draws in contenders.items():
            seconds = draws(batch)
            after = plain(pipe, library, batch, clock)
            ratios[name].append(round((before + after) / 2 / seconds, 4))
            before = after
    return ratios


def with_scheduler(
    pipe: Any,
    library: AdapterLibrary,
    policy: str,
    clock: Callable[[], float],
    batch: list[ImageRequest],
    *,
    cuda_graphs: bool = False,
) -> float:
    """Seconds to draw a batch for the second time: CUDA's libraries set themselves up for each thread that draws."""
    with scheduler(pipe, library, policy, cuda_graphs=cuda_graphs) as service:
        draw_all(pipe, service, batch)
        return taken(lambda: draw_all(pipe, service, batch), clock)


def with_loras(pipe: Any, loras: Path, clock: Callable[[], float], batch: list[ImageRequest]) -> float:
    def draw() -> None:
        for one in batch:
            with loras_of_request(pipe, loras, one.mix):
                pipe(**arguments_of([one]))

    draw()
    return taken(draw, clock)


def plain(pipe: Any, library: AdapterLibrary, batch: list[ImageRequest], clock: Callable[[], float]) -> float:
    with library.use(pipe, {"a0": 1.0}):
        return taken(lambda: [pipe(**arguments_of([one])) for one in batch], clock)


def taken(action: Callable[[], object], clock: Callable[[], float]) -> float:
    began = clock()
    action()
    return clock() - began


def draw_all(pipe: Any, service: StepScheduler, batch: list[ImageRequest]) -> None:
    with resident_of(pipe).reading():  # so that all wait when the first begins
        jobs = [service.submit(one) for one in batch]
    for job in jobs:
        job.result()


@contextmanager
def scheduler(pipe: Any, library: AdapterLibrary, policy: str, *, cuda_graphs: bool = False) -> Iterator[StepScheduler]:
    limits = {"max_batch": 1, "max_waiting": MAX_WAITING, "max_running": MAX_RUNNING}
    with StepScheduler(pipe, library, policy=policy, cuda_graphs=cuda_graphs, **limits) as service:
        yield service


def served(pipe: Any, library: AdapterLibrary, policy: str, arrivals: list[Arrival], times: Times) -> dict[str, Any]:
    """What clients see of a real service."""
    records: list[Record] = []
    with scheduler(pipe, library, policy) as service:
        clock = Clock(service, pipe.device.type)
        for at, one in arrivals:
            clock.wait(at)
            records.append(Record(one, clock.now))
            job = service.submit(one, records[-1].stepped)
            job.future.add_done_callback(records[-1].ended)
        while any(record.end is None for record in records):
            time.sleep(0.01)
        switches = service.stats().switches
    return {"requests": len(records), "switches": switches, **summary(records, arrivals[0][0], times)}


class Clock:
    """Seconds since it was made: of a GPU by the wall; of a CPU those that this process has computed, and been idle.

    So other processes of a busy machine do not count.
    """

    def __init__(self, service: StepScheduler, device: str) -> None:
        self._service, self._read = service, time.process_time if device == "cpu" else time.perf_counter
        self._began, self._idle, self._skips = self._read(), 0.0, device == "cpu"

    def now(self) -> float:
        return self._read() - self._began + self._idle

    def wait(self, until: float) -> None:
        while (left := until - self.now()) > 0:
            stats = self._service.stats()
            if self._skips and not stats.waiting + stats.running:
                self._idle += left
            else:
                time.sleep(min(left, 0.005))


class Record:
    """When a request came, showed its first step, and was finished, by some clock."""

    def __init__(self, request: ImageRequest, clock: Callable[[], float]) -> None:
        self.request, self._clock, self.came = request, clock, clock()
        self.first: float | None = None
        self.end: float | None = None

    def stepped(self, _: object = None) -> None:
        self.first = self.first or self._clock()

    def ended(self, _: object = None) -> None:
        self.end = self._clock()


# ---------------------------------------------------------------- simulated


def simulated(policy: str, arrivals: list[Arrival], times: Times) -> dict[str, Any]:
    turns, records = Turns(policy, 1, MAX_RUNNING), dict[Job, Record]()
    coming, clock, active, refused = iter(arrivals), 0.0, None, 0
    following = next(coming, None)
    while True:
        while following and following[0] <= clock:
            if len(turns.waiting) < MAX_WAITING:
                turns.add(job := Job(following[1]))
                records[job] = Record(following[1], lambda: clock)  # noqa: B023  # as it is then
                records[job].came = following[0]
            else:
                refused += 1
            following = next(coming, None)
        group = turns.next()
        if group is None and following is None:
            break
        if group is None:
            clock, active = following[0], None  # while idle, the mix of before is active
            continue
        job = group.jobs[0]
        clock += times.switch * (active != job.request.mix)
        active = job.request.mix
        is_last = job.steps == job.request.steps
        clock += times.decode if is_last else times.step + times.begin * (job.steps == 0)
        turns.ran(group)
        if is_last:
            records[job].ended()
            turns.leave(group)
            job.finish([])
        else:
            job.step(job.steps + 1)
            records[job].stepped()
    return {**summary(list(records.values()), arrivals[0][0], times), "refused": round(refused / len(arrivals), 4)}


def summary(records: list[Record], began: float, times: Times) -> dict[str, Any]:
    first = [record.first - record.came for record in records if record.first]
    picture = {record: record.end - record.came for record in records if record.end}
    work = sum(times.alone(record.request.steps) for record in picture)
    return {
        "throughput": round(work / (max(record.end or 0.0 for record in records) - began), 4),
        "first": percentiles(first),
        "picture": percentiles(list(picture.values())),
        "short": percentiles([taken for record, taken in picture.items() if record.request.steps == min(STEPS)]),
    }


def percentiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    at = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    return {"mean": round(fmean(ordered), 3)} | {
        name: round(ordered[round(share * (len(ordered) - 1))], 3) for name, share in at.items()
    }


if __name__ == "__main__":
    main()
