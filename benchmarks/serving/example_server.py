"""The structure of diffusers' examples/server, written anew: a pipeline per request over shared models, in an executor.

uvicorn --factory benchmarks.serving.example_server:build, with the folders of model and LoRAs in MODEL and LORAS

The example has no adapters, seeds or sizes, and answers with a link to a file. Added here in the least way: all LoRAs
are loaded at the start, a request sets its own before it draws, and the answer is the picture. As in the example
nothing keeps requests apart that draw at the same time.
"""

import asyncio
from pathlib import Path

from diffusers import StableDiffusionPipeline
from fastapi import FastAPI, Response

from benchmarks.serving.lora_server import LORAS, Body, answer, draw, load, open_model


def build() -> FastAPI:
    app, shared = FastAPI(), open_model()
    load(shared, LORAS, sorted(file.stem for file in Path(LORAS).glob("*.safetensors")))

    @app.get("/readyz")
    def ready() -> None:
        return None

    @app.post("/v1/images")
    async def images(body: Body) -> Response:
        pipe = StableDiffusionPipeline.from_pipe(
            shared, scheduler=shared.scheduler.from_config(shared.scheduler.config)
        )
        pipe.set_progress_bar_config(disable=True)

        def run() -> Response:
            pipe.set_adapters(list(body.mix), list(body.mix.values()))
            return answer(draw(pipe, body))

        return await asyncio.get_running_loop().run_in_executor(None, run)

    return app
