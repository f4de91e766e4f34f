"""What users have today: diffusers' LoRA in its three ways to switch, and PEFT's SHiRA."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import ShiraConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from benchmarks.measure import timed
from benchmarks.models import lora_state
from benchmarks.scripts.training import random_mask
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
        return {name: timed(action, 1, 0)["median_ms"] for name, action in actions.items()}


@contextmanager
def two_loras(pipe: Any, count: int = 2) -> Iterator[Callable[[], None]]:
    """LoRAs ``lora0``, ``lora1``, ... loaded and not fused; the action activates the first two in turns."""
    names = [f"lora{number}" for number in range(count)]
    try:
        for number, name in enumerate(names):
            pipe.load_lora_weights(lora_state(pipe.unet, number), adapter_name=name)
        pair = names[:2]

        def switch() -> None:
            pair.reverse()
            pipe.set_adapters([pair[0]], [1.0])

        switch()
        yield switch
    finally:
        pipe.unload_lora_weights()


@contextmanager
def hotswapped(pipe: Any, files: list[Path]) -> Iterator[Callable[[], None]]:
    """One LoRA loaded and not fused; the action reads the other file into its place."""
    turn = list(files)
    try:
        pipe.load_lora_weights(str(turn[0]), adapter_name="lora")

        def switch() -> None:
            turn.reverse()
            pipe.load_lora_weights(str(turn[0]), adapter_name="lora", hotswap=True)

        yield switch
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


@contextmanager
def peft_shira(unet: Any, density: float, names: tuple[str, ...] = ("a", "b")) -> Iterator[PeftShira]:
    """PEFT's SHiRA of the rank that comes near a density; masks are drawn where the weights are, as PEFT's are slow."""
    weights = select(unet).values()
    rank = max(1, round(density * sum(w.numel() for w in weights) / sum(sum(w.shape) for w in weights)))
    targets = list(PRESETS[DEFAULT_TARGETS])
    try:
        for name in names:
            config: Any = ShiraConfig(r=rank, target_modules=targets, init_weights=False)
            config.mask_fn = random_mask
            unet.add_adapter(config, name)
        unet.requires_grad_(False)
        unet.set_adapter("a")
        yield PeftShira(unet)
    finally:
        for name, module in list(unet.named_modules()):
            if isinstance(module, BaseTunerLayer):
                if module.merged:
                    module.unmerge()
                unet.set_submodule(name, module.get_base_layer())
        unet._hf_peft_config_loaded = False
        vars(unet).pop("peft_config", None)
