"""Memory of the app over 300 pictures with changing mixes, on the demo model.

python -m benchmarks.scripts.app_memory [--pictures 300] [--steps 2] [--adapters FOLDER] [--toy] [--out FILE]

Pictures go the way of the app's own: settings checked, a turn, a switch, a picture, a PNG in the history; every tenth
is a rough preview, every seventh is stopped midway. Reported: resident memory of the process every 50 pictures, after
the garbage collector has run, and its growth from picture 50 on, when all caches have been filled.
"""

import asyncio
import gc
import random
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from app.drawing.requests import Stopped
from app.history.galleries import Visitor
from app.settings.settings import Settings
from app.studio import Studio
from benchmarks.measure import ASSETS, out_of, toy_options, write
from shira_diffusers import MERGE_METHODS

EVERY = 50


def main() -> None:
    parser = toy_options(__doc__, "12 pictures", "app_memory.json")
    parser.add_argument("--pictures", type=int, default=300)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--adapters", type=Path, default=ASSETS / "adapters")
    args = parser.parse_args()
    pictures, every = (12, 3) if args.toy else (args.pictures, EVERY)
    with tempfile.TemporaryDirectory() as data:
        studio = Studio.open(str(ASSETS / "emoji-diffusion"), args.adapters, Path(data))
        studio.lora.result()
        rows = asyncio.run(draw(studio, pictures, every, args.steps))
        studio.close()
    first, last = rows[0]["rss_mb"], rows[-1]["rss_mb"]
    figures = {"model": "emoji-diffusion", "steps": args.steps, "adapters": len(studio.session.cards), "toy": args.toy}
    write("app_memory", {**figures, "rows": rows, "growth_mb": round(last - first, 1)}, out_of("app_memory", args))


async def draw(studio: Studio, pictures: int, every: int, steps: int) -> list[dict[str, Any]]:
    """Draw, and note the memory every so many pictures."""
    chance, rows, start = random.Random(0), list[dict[str, Any]](), time.perf_counter()
    for number in range(1, pictures + 1):
        await draw_one(studio, number, settings_of(studio, chance, steps))
        if number % every == 0:
            gc.collect()
            memory = psutil.Process().memory_info().rss / 1e6
            rows.append({"pictures": number, "rss_mb": round(memory, 1), "s": round(time.perf_counter() - start, 1)})
            print(rows[-1], flush=True)
    return rows


async def draw_one(studio: Studio, number: int, settings: Settings) -> None:
    visitor = Visitor(f"visit {number % 5}")
    if number % 10 == 0:
        await studio.requests.preview(visitor.visit, settings)
        return

    def stop(done: int, of: int) -> None:
        if number % 7 == 0 and done == 1:
            studio.requests.stop(visitor.visit)

    with suppress(Stopped):
        await studio.requests.draw(visitor, settings, stop)


def settings_of(studio: Studio, chance: random.Random, steps: int) -> Settings:
    """A prompt, seed, method and up to three adapters at random, some by block."""
    names = chance.sample(studio.session.adapter_names, chance.randint(0, min(3, len(studio.session.adapter_names))))
    strengths = (chance.uniform(-1, 2), {"unet": {"down": chance.random(), "up": chance.random()}})
    mix = {name: chance.choice(strengths) for name in names}
    prompt = chance.choice(studio.session.suggestions)
    return studio.session.checked(prompt, mix, chance.randrange(10**6), steps, 3.0, chance.choice(list(MERGE_METHODS)))


if __name__ == "__main__":
    main()
