"""The demo model: how long a switch takes, whether ten thousand of them leave a trace, how long a picture takes.

python -m benchmarks.scripts.demo
"""

import argparse
import random
import time
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

import shira_diffusers  # noqa: F401  gives pipelines `load_shira`
from benchmarks.measure import ASSETS, spread, timed, write
from shira_diffusers.integrations.pipelines import resident_of
from shira_diffusers.library.folder import adapters_in

PROMPT = "a picture of a red apple on a teal background"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--switches", type=int, default=10_000)
    args = parser.parse_args()
    pipe, names = load()
    before = bits(pipe)
    figures: dict[str, Any] = {"adapters": names}
    figures["random_switches"] = random_switches(pipe, names, args.switches)
    pipe.disable_shira()
    figures["random_switches"]["parameters_that_differ"] = differing(before, bits(pipe))
    figures["picture"] = picture_times(pipe, names[0])
    print(write("demo", figures).read_text())


def load() -> tuple[Any, list[str]]:
    """The bundled pipeline with all bundled adapters, none of them active."""
    pipe: Any = StableDiffusionPipeline.from_pretrained(ASSETS / "emoji-diffusion")
    pipe.set_progress_bar_config(disable=True)
    files = dict(adapters_in(ASSETS / "adapters"))
    for name, file in files.items():
        pipe.load_shira(file, name, activate=False)
    return pipe, list(files)


def random_switches(pipe: Any, names: list[str], count: int) -> dict[str, Any]:
    """Random mixes of one to all adapters at random strengths, by kind of switch."""
    rng = random.Random(0)
    seconds: dict[str, list[float]] = {"one adapter to another": [], "a strength moved": [], "a mix of several": []}
    shares = []
    now: list[str] = []
    for _ in range(count):
        mix = now if now and rng.random() < 0.3 else rng.sample(names, rng.randint(1, len(names)))
        kind = "a strength moved" if mix == now else "a mix of several" if len(mix) > 1 else "one adapter to another"
        weights = [rng.uniform(-1, 2) for _ in mix]
        start = time.perf_counter()
        pipe.set_shira(mix, weights)
        seconds[kind].append(time.perf_counter() - start)
        now = mix
        if len(mix) == 1:
            changed, total = resident_of(pipe).changed()
            shares.append(changed / total)
    return {
        "count": count,
        "by_kind": {kind: spread(taken) for kind, taken in seconds.items() if taken},
        "share_of_weights_one_adapter_changes": round(max(shares), 5),
    }


def bits(pipe: Any) -> dict[str, tuple[int, Tensor]]:
    """Address and values of every parameter."""
    parts = (pipe.unet, pipe.text_encoder, pipe.vae)
    named = ((f"{type(m).__name__}.{name}", p) for m in parts for name, p in m.named_parameters())
    return {name: (p.data_ptr(), p.detach().clone()) for name, p in named}


def differing(before: dict[str, tuple[int, Tensor]], after: dict[str, tuple[int, Tensor]]) -> int:
    """How many parameters have another address or other bits."""
    same = (before[n][0] == after[n][0] and torch.equal(before[n][1], after[n][1]) for n in before)
    return len(before) - sum(same)


def picture_times(pipe: Any, name: str) -> dict[str, Any]:
    """One picture, 20 steps with guidance, of the base and after a switch, in turns."""

    def draw() -> None:
        pipe(PROMPT, num_inference_steps=20, guidance_scale=3.0)

    def styled() -> None:
        with pipe.shira(name):
            draw()

    return {"base": timed(draw, 9, 2), "after_a_switch": timed(styled, 9, 2)}


if __name__ == "__main__":
    main()
