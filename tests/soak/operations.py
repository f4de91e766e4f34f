"""Random operations on a small real pipeline beside a model of what they mean; ``reference`` is the oracle.

All that an episode does follows from its seed, dtype and number: ``python -m tests.soak --episode fp16:12 --seed 0``
replays one. A ``Difference`` shows these three and the trail of operations.
"""

import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.hooks import apply_layerwise_casting
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from shira_diffusers import (
    ResidentStateError,
    ShiraAdapter,
    ShiraError,
    SparseDelta,
    build_masks,
    load_adapter,
    save_adapter,
)
from shira_diffusers.formats.shira_file import encode
from tests import reference, tiny

DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
}
PARTS = ("unet", "text_encoder")
NAMES = ("a", "b", "c", "d", "e")
NUMBERS = (1.0, 0.0, -1.0, 0.3, 2, 1.7)
EPISODE = 125  # operations, after which the base is put back
_SOME = 3  # after so many operations weights of adapters are compared; before a cast, a bake and such too
_ALL = 24  # after so many operations every parameter is compared, not only those of adapters
_FUSED = ("to_qkv", "to_kv")


class Difference(AssertionError):
    """The pipeline and the model of it differ; the message has what is needed to replay it."""


def small_unet() -> diffusers.UNet2DConditionModel:
    return tiny.unet(block_out_channels=(8, 16), attention_head_dim=4, norm_num_groups=4)


def small_pipeline(kind: str = "fp32") -> StableDiffusionPipeline:
    """UNet (67,000 parameters) and text encoder; fp8 is storage under diffusers' layerwise casting."""
    pipe = StableDiffusionPipeline(
        vae=None,
        text_encoder=tiny.text_encoder(),
        tokenizer=None,
        unet=small_unet(),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    if kind == "fp8":
        pipe.unet.enable_layerwise_casting(storage_dtype=DTYPES[kind], compute_dtype=torch.float32)
        apply_layerwise_casting(pipe.text_encoder, storage_dtype=DTYPES[kind], compute_dtype=torch.float32)
    elif kind != "fp32":
        pipe.to(DTYPES[kind])
    if kind == "bf16":
        pipe.unet.to(memory_format=torch.channels_last)
    return pipe


@cache
def pool() -> tuple[ShiraAdapter, ...]:
    """Adapters that overlap in part: of one part or both, of all dtypes, and one in aligned runs of 32 entries."""
    pipe = small_pipeline()
    return (
        tiny.adapter_for(pipe, 1, only=("to_q", "q_proj", "conv_in")),
        tiny.adapter_for(pipe, 2, only=("attn1.to_q", "attn1.to_k", "fc1"), dtype=torch.float16, density=0.02),
        tiny.adapter_for(pipe, 3, only=("to_q", "0.conv1"), dtype=torch.bfloat16, components=("unet",), density=0.5),
        tiny.adapter_for(pipe, 4, only=("q_proj", "fc1"), components=("text_encoder",), density=0.001),
        block_adapter(pipe),
    )


def block_adapter(pipe: StableDiffusionPipeline) -> ShiraAdapter:
    generator = torch.Generator().manual_seed(5)
    masks = build_masks({"unet": pipe.unet}, "block", 0.25, "attention", seed=5)
    weights = tiny.weights_of(pipe)
    deltas = {
        name: SparseDelta(its, torch.randn(its.numel(), generator=generator) * 0.5, tuple(weights[name].shape))
        for name, its in masks.items()
    }
    return ShiraAdapter(deltas, {"base_model": "tiny"})


def write_lora(folder: Path) -> Path:
    """A LoRA of the UNet's attention and convolutions."""
    model = small_unet()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v", "conv1"]))
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(model))
    return folder


def live_weights(pipe: StableDiffusionPipeline) -> dict[str, Tensor]:
    """The tensors that hold the weights now, by the names of a plain model: under a LoRA, or in accelerate's map."""
    found = {}
    for part in PARTS:
        model = getattr(pipe, part)
        for path, module in () if model is None else model.named_modules():
            if "lora_" in path or path.endswith(_FUSED):
                continue
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    tensor = module._hf_hook.weights_map[name] if parameter.is_meta else parameter
                    found[f"{part}.{path}.{name}".replace(".base_layer", "")] = tensor.detach()
    return found


def fitting(scale: Any, adapters: Iterable[ShiraAdapter]) -> Any:
    """A strength without the components that one of the adapters lacks, which are refused."""
    if not isinstance(scale, Mapping):
        return scale
    lists = [adapter.component_names() for adapter in adapters]
    return {part: own for part, own in scale.items() if all(part in names for names in lists)}


class Walk:
    """One pipeline that lives through all episodes of one dtype.

    Args:
        kind: of ``DTYPES``.
        folder: for files.
        counts: of operations by name, counted up.
    """

    def __init__(self, kind: str, folder: Path, counts: Counter[str] | None = None) -> None:
        self.kind, self.folder = kind, folder
        self.counts: Counter[str] = Counter() if counts is None else counts
        self.pipe = small_pipeline(kind)
        self.original = {name: weight.clone() for name, weight in live_weights(self.pipe).items()}
        self.lora_folder = write_lora(folder / f"lora_{kind}")
        self.adapted = sorted({name for adapter in pool() for name in adapter.deltas})
        self._begin(random.Random(0))

    def _begin(self, rng: random.Random) -> None:
        self.rng, self.trail = rng, []
        self.loaded: dict[str, ShiraAdapter] = {}
        self.mix: dict[str, Any] = {}
        self.aside: dict[str, Any] | None = None
        self.stale: dict[str, Tensor] = {}  # after a cast the old mix, cast, may stay until the next switch
        self.base = {name: weight.clone() for name, weight in self.original.items()}
        self.dtype, self.offloaded = self.kind, set[str]()
        self.lora, self.fused = "", False
        self._look()

    def _look(self) -> None:
        self.live = live_weights(self.pipe)
        self.addresses = {name: weight.data_ptr() for name, weight in self.live.items()}

    # ---------------------------------------------------------------- an episode

    def episode(self, seed: int, number: int, length: int = EPISODE) -> None:
        """Random operations, then everything inactive and the base put back.

        Raises:
            Difference: something differs, or raised what it should not; with seed and trail.
        """
        self._begin(random.Random(f"{seed} {self.kind} {number}"))
        with self._told(seed, number):
            for count in range(1, length + 1):
                self._one()
                if count % _SOME == 0:
                    self.check(everything=count % _ALL == 0)
            self._finish()

    @contextmanager
    def _told(self, seed: int, number: int) -> Iterator[None]:
        try:
            yield
        except (Exception, pytest.fail.Exception) as error:
            trail = "\n".join(f"  {k}: {what}" for k, what in enumerate(self.trail))
            raise Difference(
                f"{type(error).__name__}: {error}\nseed {seed}, {self.kind}, episode {number}; replay: "
                f"python -m tests.soak --episode {self.kind}:{number} --seed {seed}\n{trail}"
            ) from error

    def _one(self) -> None:
        possible = [(name, weight) for name, weight, may in OPERATIONS if may(self)]
        name = self.rng.choices([name for name, _ in possible], [weight for _, weight in possible])[0]
        self.trail.append(name)
        self.counts[name] += 1
        getattr(self, name)()

    def _finish(self) -> None:
        """Both ways back to the base, and the pipeline as it was at the start."""
        self.trail.append("finish")
        if self.lora == "fused":
            self.lora_unfuse()
        if self.lora:
            self.lora_unload()
        self.offloaded_no_more()
        if self.fused:
            self.projections()
        if self.rng.random() < 0.5:
            self.disable()
            self.check(True)
        self.unload()
        self.check(True)
        if self.dtype != self.kind:
            self.cast_back()
            self.check(True)
        with torch.no_grad():
            for name, weight in self.live.items():
                weight.copy_(self.original[name])

    def check(self, everything: bool) -> None:
        """Compare weights with the oracle, and what the pipeline says with the model."""
        touched = {name for active in self.mix for name in self.loaded[active].deltas}
        expected = reference.apply({name: self.base[name] for name in touched}, self.loaded, self.mix)
        if everything:
            assert live_weights(self.pipe).keys() == self.base.keys()
            now = {name: weight.data_ptr() for name, weight in live_weights(self.pipe).items()}
            assert now == self.addresses, "weights have moved"
            self._check_copies()
        names = self.base if everything else self.adapted
        wrong = [name for name in names if not self._holds(name, expected.get(name, self.base[name]))]
        assert not wrong, f"{len(wrong)} weights differ: {wrong}"
        assert self.pipe.get_active_shira() == self.mix
        parts = {name: adapter.component_names() for name, adapter in self.loaded.items()}
        assert {name: sorted(found) for name, found in self.pipe.list_shira().items()} == parts

    def _holds(self, name: str, expected: Tensor) -> bool:
        now = self.live[name]
        return tiny.same_bits(now, expected) or (name in self.stale and tiny.same_bits(now, self.stale[name]))

    def _check_copies(self) -> None:
        """Fused projections hold what the single ones do."""
        for module in self.pipe.unet.modules() if self.fused else ():
            if getattr(module, "fused_projections", False):
                parts = (
                    (module.to_k, module.to_v) if hasattr(module, "to_kv") else (module.to_q, module.to_k, module.to_v)
                )
                copy = module.to_kv if hasattr(module, "to_kv") else module.to_qkv
                bits = [part.weight.detach().contiguous().view(-1).view(torch.uint8) for part in parts]
                assert torch.equal(copy.weight.detach().view(-1).view(torch.uint8), torch.cat(bits)), "a fused copy"

    # ---------------------------------------------------------------- choices

    def note(self, what: object) -> None:
        self.trail[-1] += f" {what}"

    def names(self, least: int = 0) -> list[str]:
        count = self.rng.randint(min(least, len(self.loaded)), min(3, len(self.loaded)))
        return self.rng.sample(sorted(self.loaded), count)

    def number(self) -> float:
        return self.rng.choice(NUMBERS)

    def scale(self, *adapters: ShiraAdapter) -> Any:
        kind = self.rng.random()
        if kind < 0.5:
            return self.number()
        unet: Any = self.number()
        if kind < 0.75:
            unet = {part: self.number() for part in self.rng.sample(["down", "mid", "up"], self.rng.randint(0, 3))}
        elif kind < 0.9:
            unet = {"up": {"block_0": [self.number(), self.number()]}, "down": {"block_1": self.number()}}
        scale = {"unet": unet, "text_encoder": self.number()}
        if self.rng.random() < 0.5:
            del scale[self.rng.choice(PARTS)]
        return fitting(scale, adapters)

    def source(self, adapter: ShiraAdapter) -> object:
        """An adapter in memory, or as a file, or the state dict of one."""
        kind = self.rng.choice(["memory", "file", "state dict"])
        self.note(kind)
        if kind == "memory":
            return adapter
        return adapter_file(pool().index(adapter), self.folder) if kind == "file" else encode(adapter)[0]

    # ---------------------------------------------------------------- operations

    def load(self) -> None:
        name = self.rng.choice([name for name in NAMES if name not in self.loaded])
        adapter = self.rng.choice(pool())
        scale, activate = self.scale(adapter), self.rng.random() < 0.4
        self.note((name, pool().index(adapter), scale, activate))
        source = self.source(adapter)
        with nullcontext() if activate or scale == 1.0 else pytest.warns(UserWarning, match="has no effect"):
            self.pipe.load_shira(source, name, scale=scale, activate=activate)
        self.loaded[name] = adapter
        if activate:
            self._mixed({name: scale})

    def _mixed(self, mix: dict[str, Any], aside: dict[str, Any] | None = None) -> None:
        self.mix, self.aside, self.stale = mix, aside, {}

    def hotswap(self) -> None:
        name, adapter = self.rng.choice(sorted(self.loaded)), self.rng.choice(pool())
        self.note((name, pool().index(adapter)))
        self.pipe.load_shira(self.source(adapter), name, hotswap=True)
        self.loaded[name] = adapter
        for mix in (self.mix, self.aside or {}):
            if name in mix:
                mix[name] = fitting(mix[name], [adapter])

    def set(self) -> None:
        names = self.names(1)
        weights: Any = [self.scale(self.loaded[name]) for name in names]
        if self.rng.random() < 0.4:
            weights = self.scale(*(self.loaded[name] for name in names))
        self.note((names, weights))
        self.pipe.set_shira(names, weights)
        each = weights if isinstance(weights, list) else [weights] * len(names)
        self._mixed(dict(zip(names, each, strict=True)))

    def rescale(self) -> None:
        name = self.rng.choice(sorted(self.mix))
        mix = {**self.mix, name: self.scale(self.loaded[name])}
        self.note(mix)
        self.pipe.set_shira(mix)
        self._mixed(mix)

    def disable(self) -> None:
        self.pipe.disable_shira()
        self._mixed({}, self.mix if self.aside is None else self.aside)

    def enable(self) -> None:
        self.pipe.enable_shira()
        self._mixed(self.mix if self.aside is None else self.aside)

    def delete(self) -> None:
        names = self.names(1)
        self.note(names)
        self.pipe.delete_shira(names)
        for name in names:
            del self.loaded[name]
        self.mix = self._known(self.mix)
        self.aside = None if self.aside is None else self._known(self.aside)

    def _known(self, mix: dict[str, Any]) -> dict[str, Any]:
        return {name: scale for name, scale in mix.items() if name in self.loaded}

    def unload(self) -> None:
        self.pipe.unload_shira()
        self.loaded = {}
        self._mixed({})

    def save_and_load_again(self) -> None:
        name = self.rng.choice(sorted(self.loaded))
        self.note(name)
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            self.pipe.save_shira(folder, name)
            tiny.assert_same_adapter(load_adapter(folder), self.loaded[name])
            self.pipe.delete_shira(name)
            self.pipe.load_shira(folder, name, activate=False)
        adapter = self.loaded.pop(name)
        self.mix, self.aside = self._known(self.mix), None if self.aside is None else self._known(self.aside)
        self.loaded[name] = adapter

    def fuse(self) -> None:
        """The mix as one adapter in a file gives the same bits, even after a cast."""
        self.pipe.set_shira(self.mix)
        self._mixed(self.mix)
        self.check(False)
        before = {name: self.live[name].clone() for name in self.adapted}
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            self.pipe.load_shira(self.pipe.save_shira(folder), "fused")
        wrong = [name for name in before if not tiny.same_bits(self.live[name], before[name])]
        assert not wrong, f"fused into one adapter these differ: {wrong}"
        self.pipe.delete_shira("fused")
        self._mixed({})

    def bake(self) -> None:
        self.check(False)
        self.pipe.bake_shira()
        self.base = {name: weight.clone() for name, weight in self.live.items()}
        self._mixed({})

    def use(self) -> None:
        """A block, which may raise."""
        names = self.names()
        scale, raises = self.scale(*(self.loaded[name] for name in names)), self.rng.random() < 0.5
        self.note((names, scale, raises))
        mix, aside = self.mix, self.aside
        with suppress(ZeroDivisionError), self.pipe.shira(names, scale):
            self._mixed(dict.fromkeys(names, scale))
            self.check(False)
            if raises:
                raise ZeroDivisionError
        self._mixed(mix, aside)

    def refused(self) -> None:
        """Bad calls, after which nothing has changed."""
        kind = self.rng.choice(["unknown", "in use", "not finite", "component", "too large"])
        self.note(kind)
        some = self.rng.choice(sorted(self.loaded))
        acts: dict[str, Callable[[], object]] = {
            "unknown": lambda: self.pipe.set_shira([some, "nobody"]),
            "in use": lambda: self.pipe.load_shira(pool()[0], some),
            "not finite": lambda: self.pipe.set_shira(some, float("nan")),
            "component": lambda: self.pipe.set_shira(some, {"vae": 1.0}),
            "too large": lambda: self.pipe.set_shira(some, 1e40),
        }
        with pytest.raises(ShiraError):
            acts[kind]()
        self.check(False)

    # ---------------------------------------------------------------- what others do to the weights

    def cast(self) -> None:
        """``.to(dtype)``: the base is cast with the rest."""
        self.check(False)
        self.dtype = self.rng.choice([kind for kind in ("fp32", "fp16", "bf16") if kind != self.dtype])
        self.note(self.dtype)
        self.pipe.to(DTYPES[self.dtype])
        self._cast(dict.fromkeys(self.base, DTYPES[self.dtype]))

    def cast_back(self) -> None:
        """To the dtypes of the start; those of layerwise casting differ by layer, and it casts layer by layer."""
        self.check(False)
        self.dtype = self.kind
        own = {name: weight.dtype for name, weight in self.original.items()}
        if self.kind != "fp8":
            self.pipe.to(DTYPES[self.kind])
        for part in PARTS if self.kind == "fp8" else ():
            for path, module in getattr(self.pipe, part).named_modules():
                kinds = {own.get(f"{part}.{path}.{name}".replace(".base_layer", "")) for name in module._parameters}
                for dtype in kinds - {None}:
                    module.to(dtype)
        self._cast(own)
        if self.kind == "fp8" and self.mix:
            self.check(False)
            self.pipe.set_shira(self.mix)  # a whole cast to a third dtype may round twice: foreign
            self._mixed(self.mix)

    def _cast(self, dtypes: Mapping[str, torch.dtype]) -> None:
        before = self.live
        self.base = {name: weight.to(dtypes[name]) for name, weight in self.base.items()}
        self.stale = {name: before[name].to(dtypes[name]).clone() for name in self.adapted}
        self._look()

    def offload(self) -> None:
        part = self.rng.choice([part for part in PARTS if part not in self.offloaded])
        self.note(part)
        accelerate.cpu_offload(getattr(self.pipe, part), torch.device("cpu"))
        self.offloaded.add(part)
        self._look()

    def offloaded_no_more(self) -> None:
        for part in self.offloaded:
            accelerate.hooks.remove_hook_from_module(getattr(self.pipe, part), recurse=True)
        self.offloaded = set()
        self._look()

    def lora_load(self) -> None:
        self.pipe.load_lora_weights(self.lora_folder, adapter_name="lora")
        self.lora = "loaded"
        self._look()

    def lora_fuse(self) -> None:
        """While it is fused, its layers cannot be overwritten."""
        self.pipe.fuse_lora()
        with pytest.raises(ResidentStateError, match="LoRA"):
            self.pipe.load_shira(pool()[0], "refused")
        self.lora = "fused"
        self._rebase()

    def lora_unfuse(self) -> None:
        """It is subtracted, by PEFT: the base is what that leaves."""
        self.pipe.unfuse_lora()
        self.lora = "loaded"
        self._rebase()

    def _rebase(self) -> None:
        """Others wrote to the base, nothing being active: only to the layers of the LoRA."""
        self._look()
        for name, weight in self.live.items():
            if name.endswith(("to_q.weight", "to_v.weight", "conv1.weight")):
                self.base[name] = weight.clone()

    def lora_unload(self) -> None:
        self.pipe.unload_lora_weights()
        self.lora = ""
        self._look()

    def projections(self) -> None:
        self.fused = not self.fused
        self.note(self.fused)
        if self.fused:
            self.pipe.unet.fuse_qkv_projections()
        else:
            self.pipe.unet.unfuse_qkv_projections()
            remove_copies(self.pipe.unet)
        self._look()

    def draw(self) -> None:
        assert torch.isfinite(tiny.run_unet(self.pipe.unet)).all()
        if self.kind == "fp8":
            self._look()  # layerwise casting gives weights other memory


def remove_copies(model: nn.Module) -> None:
    """Remove the fused projections, which diffusers leaves behind."""
    for module in model.modules():
        for name in _FUSED:
            module._modules.pop(name, None)
        if hasattr(module, "fused_projections"):
            module.fused_projections = False


@cache
def adapter_file(number: int, folder: Path) -> Path:
    return save_adapter(pool()[number], folder / f"{number}.safetensors")


def _always(walk: Walk) -> bool:
    return walk.lora != "fused"


def _free(walk: Walk) -> bool:
    return _always(walk) and len(walk.loaded) < len(NAMES)


def _loaded(walk: Walk) -> bool:
    return _always(walk) and bool(walk.loaded)


def _mixed(walk: Walk) -> bool:
    return _always(walk) and bool(walk.mix)


def _plain(walk: Walk) -> bool:
    return not walk.offloaded and not walk.fused


OPERATIONS: tuple[tuple[str, float, Callable[[Walk], bool]], ...] = (
    ("load", 14, _free),
    ("hotswap", 4, _loaded),
    ("set", 26, _loaded),
    ("rescale", 12, _mixed),
    ("disable", 5, _always),
    ("enable", 7, _always),
    ("delete", 7, _loaded),
    ("unload", 1, _always),
    ("save_and_load_again", 2, _loaded),
    ("fuse", 2, _mixed),
    ("bake", 1.5, _mixed),
    ("use", 6, _loaded),
    ("refused", 3, _loaded),
    ("cast", 2, lambda walk: _always(walk) and not walk.offloaded),
    ("cast_back", 3, lambda walk: _always(walk) and not walk.offloaded and walk.dtype != walk.kind),
    ("offload", 1, lambda walk: _plain(walk) and not walk.lora and len(walk.offloaded) < len(PARTS)),
    ("offloaded_no_more", 3, lambda walk: bool(walk.offloaded)),
    ("lora_load", 1, lambda walk: _plain(walk) and not walk.lora),
    ("lora_fuse", 3, lambda walk: walk.lora == "loaded" and not walk.mix and walk.dtype != "fp8"),
    ("lora_unfuse", 30, lambda walk: walk.lora == "fused"),
    ("lora_unload", 3, lambda walk: walk.lora == "loaded"),
    ("projections", 1, lambda walk: not walk.offloaded and not walk.lora and walk.kind != "fp8"),
    ("draw", 2, lambda walk: _always(walk) and walk.dtype == walk.kind and not (walk.lora and walk.kind == "fp8")),
)
"""Name, how often, and when it may be done."""
