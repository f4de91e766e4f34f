"""A LoRA server as one writes it first: FastAPI, one pipeline, a lock, and for each request: load, set, draw, unload.

uvicorn --factory benchmarks.serving.lora_server:build, with the folders of model and LoRAs in MODEL and LORAS; DEVICE
and DTYPE are the CPU's and float32 unless given.
"""

import io
import os
import threading
from collections.abc import Iterable
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from fastapi import FastAPI, Response
from pydantic import BaseModel

LORAS = os.environ.get("LORAS", "")


class Body(BaseModel):
    """What `shira serve` takes too."""

    prompt: str
    mix: dict[str, float]
    seed: int
    steps: int
    guidance: float
    size: str


def open_model() -> Any:
    dtype = getattr(torch, os.environ.get("DTYPE", "float32"))
    pipe = StableDiffusionPipeline.from_pretrained(os.environ["MODEL"], torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(os.environ.get("DEVICE", "cpu"))


def draw(pipe: Any, body: Body) -> Any:
    width, height = map(int, body.size.split("x"))
    return pipe(
        body.prompt,
        num_inference_steps=body.steps,
        guidance_scale=body.guidance,
        generator=torch.Generator().manual_seed(body.seed),
        width=width,
        height=height,
    ).images[0]


def load(pipe: Any, folder: str, names: Iterable[str]) -> None:
    for name in names:
        pipe.load_lora_weights(folder, weight_name=f"{name}.safetensors", adapter_name=name)


def answer(image: Any) -> Response:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return Response(buffer.getvalue(), media_type="image/png")


def build() -> FastAPI:
    app, pipe, lock = FastAPI(), open_model(), threading.Lock()

    @app.get("/readyz")
    def ready() -> None:
        return None

    @app.post("/v1/images")
    def images(body: Body) -> Response:  # in a thread of Starlette's
        with lock:
            try:
                load(pipe, LORAS, body.mix)
                pipe.set_adapters(list(body.mix), list(body.mix.values()))
                return answer(draw(pipe, body))
            finally:
                pipe.unload_lora_weights()

    return app
