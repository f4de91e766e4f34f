"""`shira serve` on one GPU and on several of a machine, and a LoRA server: pictures per second, tails, and bytes.

python -m benchmarks.scripts.serving_gpus [--replicas 1 2] [--requests N] [--toy] [--out FILE]

A model of SD 1.5's size with random weights, in float16, and 32 adapters of 1 % of its entries; one replica has one
GPU. 16 clients ask for pictures of 512 x 512 over HTTP, each with one of the adapters by Zipf's law and for 8, 20 or 50
steps (5 : 4 : 1), each client as soon as it has its last picture. Requests that wait for one adapter are one batch.
CUDA graphs are the service's setting ``cuda_graphs``; a service without is measured for the first number of replicas.
The LoRA server has one GPU and LoRAs of rank 16: load, set, draw and unload for each request.
``times_lora``: pictures per second over those of the LoRA server. ``differing``: pictures that are not the bytes that
the first service gave for their request, of those that it drew in a batch of the same size; ``differing_alone``: of
these, the ones that were a batch by themselves (with others the kernels of a GPU may round a picture by its place in
the batch). With ``--toy`` the demo model and its adapters, on a CPU.
"""

import tempfile
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionPipeline

from benchmarks.measure import Run, options, seconds_of
from benchmarks.models import shira_adapter
from benchmarks.rivals import lora_files
from benchmarks.scripts.serving_load import MODEL, asked, bundled, good, shira_serve, speed, until_ready, uvicorn
from benchmarks.scripts.serving_schedule import ADAPTERS, of_sd15_size, offer
from benchmarks.serving.clients import CLIENTS, Answer, ask_all
from shira_diffusers import save_adapter
from shira_diffusers.serving.requests import ImageRequest

DTYPES = {"cpu": "float32", "cuda": "float16"}
RANK = 16
PLAIN, GRAPHS, LORA_SERVER = "shira serve", "shira serve, CUDA graphs", "lora_server"


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--replicas", nargs="+", type=int, default=[1, 2], help="one GPU each; default 1 2")
    parser.add_argument("--requests", type=int, help="default 80")
    args = parser.parse_args()
    args.device = "cpu" if args.toy else "cuda"
    run = Run("serving_gpus", args, gpus=max(args.replicas), clients=CLIENTS, adapters=ADAPTERS)
    run.until = float("inf")
    steps, size = (4, 64) if args.toy else (20, 512)
    todo = list(asked(args.requests or (CLIENTS if args.toy else 80), steps, size))
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        pipe = StableDiffusionPipeline.from_pretrained(MODEL) if args.toy else of_sd15_size("cuda")
        pipe.save_pretrained(model := folder / "model")
        adapters = offer(folder / "adapters", bundled() if args.toy else written(pipe, folder))
        loras = offer(folder / "loras", lora_files(pipe, folder, 4, rank=RANK))
        del pipe
        drawn: list[list[Answer]] = []
        for method, replicas in services(args.replicas, args.device):
            own = {"device": args.device, "replicas": replicas, "cuda_graphs": method == GRAPHS}
            run.case(lambda own=own: served(model, adapters, own, todo, drawn), method=method, replicas=replicas)
        run.case(lambda: served_loras(model, loras, todo, args.device), method=LORA_SERVER, replicas=1)
    speeds = {row["method"]: row["pictures_per_s"] for row in run.rows if "pictures_per_s" in row}
    for row in run.rows:
        if "pictures_per_s" in row and LORA_SERVER in speeds:
            row["times_lora"] = round(row["pictures_per_s"] / speeds[LORA_SERVER], 3)
    run.write()


def services(replicas: list[int], device: str) -> list[tuple[str, int]]:
    if device == "cpu":
        return [(PLAIN, number) for number in replicas]
    return [(PLAIN, replicas[0]), *((GRAPHS, number) for number in replicas)]


def written(pipe: Any, folder: Path) -> list[Path]:
    return [save_adapter(shira_adapter(pipe.unet, "rand", 0.01, seed), folder / str(seed)) for seed in range(4)]


def served(
    model: Path, adapters: Path, own: dict[str, Any], todo: list[ImageRequest], drawn: list[list[Answer]]
) -> dict[str, Any]:
    """Ask for all pictures; ``own`` settings; ``drawn`` has the answers of the cases before, and gets these."""
    settings = {"dtype": DTYPES[own["device"]], "pictures_per_minute": 10**9, "device_bytes": 4 * 2**30, **own}
    with shira_serve(adapters, model, settings) as (server, address):
        until_ready(server, address, own["replicas"])
        answers, figures = asking(address, todo)
    drawn.append(good(answers))
    before = {what(answer): answer.png for answer in drawn[0]}
    again = [answer for answer in drawn[-1] if what(answer) in before]
    differing = [answer for answer in again if answer.png != before[what(answer)]]
    return {
        **figures,
        "distinct": len({answer.png for answer in drawn[-1]}),
        "compared": len(again),
        "differing": len(differing),
        "differing_alone": sum(answer.batch == 1 for answer in differing),
    }


def served_loras(model: Path, loras: Path, todo: list[ImageRequest], device: str) -> dict[str, Any]:
    with uvicorn("lora_server", loras, model, 1, DEVICE=device, DTYPE=DTYPES[device]) as (_, address):
        return asking(address, todo)[1]


def asking(address: str, todo: list[ImageRequest]) -> tuple[list[Answer], dict[str, Any]]:
    ask_all(address, todo[: 2 * CLIENTS])  # CUDA's libraries set themselves up, and adapters are read
    answers: list[Answer] = []
    seconds = seconds_of(lambda: answers.extend(ask_all(address, todo)))
    return answers, speed(answers, seconds)


def what(answer: Answer) -> tuple[object, ...]:
    """All that a picture depends on."""
    return *answer.request.kind, answer.request.seed, answer.batch


if __name__ == "__main__":
    main()
