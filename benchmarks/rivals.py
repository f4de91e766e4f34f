"""Set up what users have today: diffusers' LoRA in its three ways to switch, and PEFT's SHiRA."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import ShiraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.measure import alternate, seconds_of
from benchmarks.models import RANK, lora_state
from shira_diffusers.weights.targets import DEFAULT_TARGETS, PRESETS, select


class LoraCycle:
    """Unfuse and unload one LoRA, load and fuse the other: each call is one switch."""

    def __init__(self, pipe: Any, files: list[Path]) -> None:
        self.pipe, self.files, self.loaded = pipe, list(files), False

    def __call__(self) -> None:
        self.close()
        self.load()
        self.fuse()

    def close(self) -> None:
        if self.loaded:
            self.pipe.unfuse_lora(components=["unet"])
            self.pipe.unload_lora_weights()
            self.loaded = False

    def load(self) -> None:
        self.files.reverse()
        self.pipe.load_lora_weights(str(self.files[0]), adapter_name="lora")

    def fuse(self) -> None:
        self.pipe.fuse_lora(components=["unet"])
        self.loaded = True

    def stages(self) -> dict[str, float]:
        """Milliseconds of each stage, once; a LoRA is fused before and after."""
        actions = {
            "unfuse": lambda: self.pipe.unfuse_lora(components=["unet"]),
            "unload": self.pipe.unload_lora_weights,
            "load": self.load,
            "fuse": self.fuse,
        }
        return {name: round(1000 * seconds_of(action), 4) for name, action in actions.items()}


@contextmanager
def loras_of_request(pipe: Any, folder: Path, mix: Mapping[str, float]) -> Iterator[None]:
    """As a plain LoRA server does for each request: load and set the LoRAs of a mix, draw in the block, unload."""
    for name in mix:
        pipe.load_lora_weights(str(folder), weight_name=f"{name}.safetensors", adapter_name=name)
    pipe.set_adapters(list(mix), list(mix.values()))
    yield
    pipe.unload_lora_weights()


def lora_files(pipe: Any, folder: str | Path, count: int = 2, rank: int = RANK) -> list[Path]:
    """Files of LoRAs of random values."""
    files = [Path(folder, f"lora{seed}.safetensors") for seed in range(count)]
    for seed, file in enumerate(files):
        save_file(lora_state(pipe.unet, seed, rank), file)
    return files


@contextmanager
def two_loras(pipe: Any, count: int = 2) -> Iterator[Callable[[], None]]:
    """LoRAs ``lora0``, ``lora1``, ... loaded and not fused; the action activates the first two in turns."""
    names = [f"lora{number}" for number in range(count)]
    try:
        for number, name in enumerate(names):
            pipe.load_lora_weights(lora_state(pipe.unet, number), adapter_name=name)
        switch = alternate(lambda name: pipe.set_adapters([name], [1.0]), names[:2])
        switch()
        yield switch
    finally:
        pipe.unload_lora_weights()


@contextmanager
def hotswapped(pipe: Any, files: list[Path]) -> Iterator[Callable[[], None]]:
    """One LoRA loaded and not fused; the action reads the other file into its place."""
    try:
        pipe.load_lora_weights(str(files[0]), adapter_name="lora")
        yield alternate(lambda file: pipe.load_lora_weights(str(file), adapter_name="lora", hotswap=True), files[::-1])
    finally:
        pipe.unload_lora_weights()


class PeftShira:
    """Two adapters of PEFT's SHiRA in a model's layers."""

    def __init__(self, unet: Any) -> None:
        self.layers = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
        self.names = ["a", "b"]

    def switch(self) -> None:
        """Unmerge one, merge the other."""
        self.names.reverse()
        for layer in self.layers:
            if layer.merged:
                layer.unmerge()
            layer.merge(adapter_names=[self.names[0]])


def shira_config(weights: Iterable[Tensor], density: float, targets: list[str], **more: Any) -> Any:
    """Of PEFT's SHiRA, with the rank that comes nearest to a density; masks are drawn where the weights are."""
    weights = list(weights)
    rank = round(density * sum(w.numel() for w in weights) / sum(sum(w.shape) for w in weights))
    config: Any = ShiraConfig(r=max(1, rank), target_modules=targets, **more)
    config.mask_fn = random_mask  # PEFT's own takes minutes, on the CPU
    return config


def random_mask(layer: nn.Linear, r: int, **_: Any) -> Tensor:
    """As PEFT's own: ones at ``r * (in + out)`` random entries, ``(out, in)``."""
    weight = layer.weight
    mask = torch.zeros(weight.numel(), dtype=weight.dtype, device=weight.device)
    mask[torch.randperm(weight.numel(), device=weight.device)[: r * sum(weight.shape)]] = 1
    return mask.view(weight.shape)


def detach_peft(unet: Any) -> None:
    """Put the base's layers back, unmerged."""
    for name, module in list(unet.named_modules()):
        if isinstance(module, BaseTunerLayer):
            if module.merged:
                module.unmerge()
            unet.set_submodule(name, module.get_base_layer())
    unet._hf_peft_config_loaded = False
    vars(unet).pop("peft_config", None)


@contextmanager
def peft_shira(unet: Any, density: float, names: tuple[str, ...] = ("a", "b")) -> Iterator[PeftShira]:
    """PEFT's SHiRA for attention and feed-forward; the first adapter is set, none is merged."""
    weights, targets = select(unet).values(), list(PRESETS[DEFAULT_TARGETS])
    try:
        for name in names:
            unet.add_adapter(shira_config(weights, density, targets, init_weights=False), name)
        unet.requires_grad_(False)
        unet.set_adapter("a")
        yield PeftShira(unet)
    finally:
        detach_peft(unet)
