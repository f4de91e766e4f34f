"""`shira serve` under load and faults, against LoRA servers: pictures per second, tails, and each picture's bytes.

python -m benchmarks.scripts.serving_load [--requests N] [--steps N] [--size N] [--toy] [--out FILE]

The demo model on a CPU; every server has two processes that draw, with one thread each, on this machine alone. 16
clients ask for pictures with one of 32 adapters by Zipf's law, each as soon as it has its last picture. A tenth of the
requests goes to each server without faults: `shira serve`; a plain LoRA server (load, set, draw, unload); and one as
diffusers' examples/server. All requests go to `shira serve` under faults: killed replicas, a damaged adapter, clients
that leave, a disk that is full for uploads (the kernel refuses the ingress's writes beyond 64 KiB, by RLIMIT_FSIZE).
``cancelled``: requests that the replicas of the end gave up as their clients had left, not those of killed ones.
After the load each picture is compared with what a plain call gives for its settings and the size of its batch.
The bundled adapters are offered under 32 names; LoRAs have random values, rank 4 and about the same bytes.
"""

import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from benchmarks.measure import ASSETS, Run, options, seconds_of
from benchmarks.rivals import lora_files, loras_of_request
from benchmarks.scripts.serving_schedule import ADAPTERS, offer, percentiles, request
from benchmarks.serving.clients import CLIENTS, Answer, ask_all
from shira_diffusers import AdapterLibrary
from shira_diffusers.serving.requests import ImageRequest
from shira_diffusers.serving.stepping import arguments_of

MODEL = ASSETS / "emoji-diffusion"
SEEDS = 4  # as many as a batch may have, so that one call gives the pictures of all
REPLICAS = 2
LEAVING = 20  # one of so many clients leaves
FULL = 2**16  # bytes that a file may have when the disk is full
BUDGETS = {"device_bytes": 32 * 2**20, "ram_bytes": 16 * 2**20}  # for about a third and a half of the adapters
SETTINGS = {"replicas": REPLICAS, "pictures_per_minute": 10**9, "max_pictures": SEEDS, **BUDGETS}
Using = Callable[[Mapping[str, float]], AbstractContextManager[Any]]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--requests", type=int, help="default 5,000")
    parser.add_argument("--steps", type=int, default=4, help="of a request for 20; others in proportion; default 4")
    parser.add_argument("--size", type=int, default=64, help="pixels; default 64")
    parser.set_defaults(device="cpu")
    args = parser.parse_args()
    args.requests = args.requests or (16 if args.toy else 5000)
    torch.set_num_threads(1)
    about = {"requests": args.requests, "steps": args.steps, "size": args.size, "adapters": ADAPTERS}
    run = Run("serving_load", args, clients=CLIENTS, replicas=REPLICAS, **BUDGETS, **about)
    run.until = float("inf")
    pipe = StableDiffusionPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    requests = list(asked(args.requests, args.steps, args.size))
    few = requests[: max(args.requests // 10, CLIENTS)]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        adapters = offer(folder / "adapters", bundled())
        loras = offer(folder / "loras", lora_files(pipe, folder, 4, rank=4))
        with AdapterLibrary(adapters, device="cpu") as library:
            ours, theirs = Alone(pipe, partial(library.use, pipe)), Alone(pipe, partial(loras_of_request, pipe, loras))
            run.case(lambda: loop(pipe, library, few), method="loop")
            run.case(lambda: measured(shira_serve(adapters), few, ours), method="shira serve", faults="none")
            for name in ("lora_server", "example_server"):
                run.case(lambda n=name: measured(uvicorn(n, loras), few, theirs), method=name, faults="none")
            run.case(lambda: faulted(adapters, requests, ours), method="shira serve", faults="all")
    run.about["load_average"] = [round(load, 1) for load in os.getloadavg()]
    run.write()


# ---------------------------------------------------------------- what is asked for, and what is right


def asked(count: int, steps: int, size: int) -> Iterator[ImageRequest]:
    draw = random.Random(0)
    for number in range(count):
        one = request(draw, number)
        own = {"steps": max(1, round(one.steps * steps / 20)), "seed": number % SEEDS, "client": None}
        yield replace(one, **own, width=size, height=size, guidance=3.0)


def bundled() -> list[Path]:
    return sorted((ASSETS / "adapters").glob("*.safetensors"))


class Alone:
    """What plain calls draw.

    Args:
        pipe: the pipeline.
        using: makes a mix active for a block.
    """

    def __init__(self, pipe: Any, using: Using) -> None:
        self._pipe, self._using = pipe, using
        self._drawn: dict[tuple[object, ...], bytes] = {}

    def pixels(self, request: ImageRequest, batch: int) -> bytes:
        """Of the picture of a request in a batch of a size."""
        if (*request.kind, batch, request.seed) not in self._drawn:
            all_of = [replace(request, seed=(request.seed + k) % SEEDS) for k in range(batch)]
            with self._using(request.mix):
                images = self._pipe(**arguments_of(all_of)).images
            for one, image in zip(all_of, images, strict=True):
                self._drawn[*request.kind, batch, one.seed] = image.tobytes()
        return self._drawn[*request.kind, batch, request.seed]

    def is_right(self, answer: Answer) -> bool:
        return Image.open(BytesIO(answer.png)).tobytes() == self.pixels(answer.request, answer.batch)


# ---------------------------------------------------------------- servers


@contextmanager
def running(command: list[str], **environment: str) -> Iterator[tuple[psutil.Popen, str]]:
    """A server in processes of its own, and its address; ``PORT`` in its command is a free port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", *(port if word == "PORT" else word for word in command)]
    address, own = f"http://127.0.0.1:{port}", os.environ | environment | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as log:
        server = psutil.Popen(command, env=own, stdout=log, stderr=subprocess.STDOUT)
        try:
            until_ready(server, address)
            yield server, address
        except AssertionError as error:
            log.seek(0)
            raise AssertionError(f"{error}: {log.read().decode(errors='replace')[-2000:]}") from error
        finally:
            with suppress(psutil.NoSuchProcess):
                server.terminate()
            server.wait(180)


def until_ready(server: psutil.Popen, address: str, replicas: int | None = None) -> None:
    """Wait until a server, and a number of its replicas, answer."""
    for _ in range(600):
        assert server.poll() is None, f"the server has ended with code {server.poll()}"
        try:
            answer = httpx.get(f"{address}/readyz", timeout=10)
            if answer.status_code == 200 and replicas in (None, (answer.json() or {}).get("replicas")):
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise TimeoutError("the server is not ready after five minutes")


def shira_serve(
    adapters: Path, model: Path = MODEL, settings: Mapping[str, object] = SETTINGS
) -> AbstractContextManager[tuple[psutil.Popen, str]]:
    flags = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    command = ["shira_diffusers.cli", "serve", str(model), "--adapters", str(adapters), "--port", "PORT"]
    return running([*command, *flags])


def uvicorn(
    name: str, loras: Path, model: Path = MODEL, workers: int = REPLICAS, **environment: str
) -> AbstractContextManager[tuple[psutil.Popen, str]]:
    app = ["uvicorn", "--factory", f"benchmarks.serving.{name}:build", "--log-level", "warning"]
    command = [*app, "--port", "PORT", "--workers", str(workers)]
    return running(command, MODEL=str(model), LORAS=str(loras), **environment)


# ---------------------------------------------------------------- measured


def loop(pipe: Any, library: AdapterLibrary, requests: list[ImageRequest]) -> dict[str, Any]:
    """Plain calls with one adapter in one process with one thread."""
    with library.use(pipe, {"a0": 1.0}):
        taken = [seconds_of(lambda one=one: pipe(**arguments_of([one]))) for one in requests]
    return {"pictures": len(taken), "pictures_per_s": round(len(taken) / sum(taken), 3)}


def measured(
    server: AbstractContextManager[tuple[psutil.Popen, str]], requests: list[ImageRequest], alone: Alone
) -> dict[str, Any]:
    with server as (_, address):
        ask_all(address, requests[:CLIENTS])  # warm-up
        answers = []
        seconds = seconds_of(lambda: answers.extend(ask_all(address, requests)))
    return summary(answers, seconds, alone)


def summary(answers: list[Answer], seconds: float, alone: Alone) -> dict[str, Any]:
    return {**speed(answers, seconds), "wrong": sum(not alone.is_right(answer) for answer in good(answers))}


def speed(answers: list[Answer], seconds: float) -> dict[str, Any]:
    drawn = good(answers)
    return {
        "pictures": len(drawn),
        "pictures_per_s": round(len(drawn) / seconds, 3),
        "picture": percentiles([answer.seconds for answer in drawn]) if drawn else None,
        "batches": dict(sorted(Counter(str(answer.batch) for answer in drawn).items())),
        "outcomes": dict(Counter(answer.outcome for answer in answers)),
    }


def good(answers: list[Answer]) -> list[Answer]:
    """Those that are pictures."""
    return [answer for answer in answers if answer.outcome == "200"]


def faulted(adapters: Path, requests: list[ImageRequest], alone: Alone) -> dict[str, Any]:
    with shira_serve(adapters) as (server, address):
        ask_all(address, requests[:CLIENTS])
        faults, answers, part = Faults(server, address, adapters), list[Answer](), len(requests) // 8
        order = [faults.kill, faults.damage, faults.kill, faults.fill, faults.empty, faults.mend, faults.kill]
        at = {(number + 1) * part: fault for number, fault in enumerate(order)}
        seconds = seconds_of(lambda: answers.extend(ask_all(address, requests, leaving=LEAVING, at=at)))
        until_ready(server, address, REPLICAS)
        metrics = httpx.get(f"{address}/metrics", timeout=60).text.splitlines()
        busy = [line for line in metrics if line.startswith(("shira_waiting{", "shira_running{"))]
        assert busy and all(line.endswith(" 0.0") for line in busy), f"something is drawn for nobody: {busy}"
    found = summary(answers, seconds, alone)
    refused = {answer.outcome for answer in answers if answer.request.mix.keys() != {Faults.DAMAGED}}
    assert refused <= {"200", "left", "503 replica_lost", "503 overloaded"}, f"unexpected answers: {refused}"
    cancelled = sum(float(line.rsplit(" ", 1)[1]) for line in metrics if line.startswith("shira_cancelled_total{"))
    return {**found, "done": faults.done, "cancelled": int(cancelled)}


class Faults:
    """Faults of a service while it draws; each asserts what clients see of it."""

    DAMAGED = "a1"

    def __init__(self, server: psutil.Popen, address: str, adapters: Path) -> None:
        self._server, self._address, self._folder = server, address, adapters
        self._file, self._whole = adapters / f"{self.DAMAGED}.safetensors", b""
        self.done: dict[str, int] = {}

    def kill(self) -> None:
        """Kill a replica that draws."""
        while not (found := self._processes("Replica")):
            time.sleep(0.1)  # until one of those that were killed before is back
        found[0].kill()
        self._note("replicas killed")

    def damage(self) -> None:
        """Put a file with one other bit in place of an adapter."""
        self._whole = self._file.read_bytes()
        self._replace(self._whole[:-1] + bytes([self._whole[-1] ^ 1]))
        self._note("adapters damaged")

    def mend(self) -> None:
        self._replace(self._whole)

    def fill(self) -> None:
        """Let the kernel refuse long files to the ingress: an upload fails in the middle, and leaves nothing."""
        before = sorted(self._folder.iterdir())
        self._limit(FULL)
        assert self._upload() == 507, "an upload to a full disk must be refused"
        assert sorted(self._folder.iterdir()) == before, "a refused upload left something"
        self._note("uploads to a full disk refused")

    def empty(self) -> None:
        self._limit(psutil.RLIM_INFINITY)
        assert self._upload() == 201, "an upload must succeed once there is room"

    def _processes(self, deployment: str) -> list[psutil.Process]:
        title = f"ray::ServeReplica:shira:{deployment}"
        return [each for each in self._server.children(recursive=True) if title_of(each).startswith(title)]

    def _limit(self, most: int) -> None:
        for each in self._processes("Ingress"):
            each.rlimit(psutil.RLIMIT_FSIZE, (most, psutil.RLIM_INFINITY))

    def _upload(self) -> int:
        content = bundled()[0].read_bytes()
        return httpx.put(f"{self._address}/v1/adapters/uploaded", content=content, timeout=60).status_code

    def _replace(self, content: bytes) -> None:
        whole = self._file.with_suffix(".new")
        whole.write_bytes(content)
        os.replace(whole, self._file)

    def _note(self, what: str) -> None:
        self.done[what] = self.done.get(what, 0) + 1


def title_of(process: psutil.Process) -> str:
    try:
        return "".join(process.cmdline()[:1])
    except psutil.Error:  # it has ended
        return ""


if __name__ == "__main__":
    main()
