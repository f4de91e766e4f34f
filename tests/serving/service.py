"""A service of a tiny pipeline: its folder, and what its pictures must be."""

import io
import socket
from pathlib import Path

import torch
from PIL import Image

from shira_diffusers import save_adapter
from shira_diffusers.serving.settings import Settings
from tests import tiny

BODY = {"prompt": "a red cat", "steps": 2, "seed": 5, "size": f"{tiny.SIZE}x{tiny.SIZE}"}


def make_service(folder: Path) -> Path:
    """The folder, with a model, adapters and keys in it."""
    pipe = tiny.pipeline()
    pipe.save_pretrained(folder / "model")
    for seed, name in enumerate(("blue", "gold")):
        save_adapter(tiny.adapter_for(pipe, seed), folder / "adapters" / f"{name}.safetensors")
    (folder / "keys").write_text("# who may\nann:key-of-ann:admin\n\nbob:key-of-bob\n")
    return folder


def drawn_alone(settings: Settings, name: str, strength: float, n: int = 1, steps: int = 2) -> bytes:
    """Pixels of all pictures of one plain call of a pipeline with one adapter."""
    pipe = tiny.pipeline()
    pipe.load_shira(Path(settings.adapter_source, f"{name}.safetensors"), name, scale=strength)
    images = pipe(
        [BODY["prompt"]] * n,
        num_inference_steps=steps,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(5 + k) for k in range(n)],
        width=tiny.SIZE,
        height=tiny.SIZE,
    ).images
    return b"".join(image.tobytes() for image in images)


def pixels(*pngs: bytes) -> bytes:
    """Of all pictures, one after the other."""
    return b"".join(Image.open(io.BytesIO(png)).tobytes() for png in pngs)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
