"""Any Stable Diffusion base: LoRA and SHiRA trained alike on folders of pictures, and scored alone and in pairs.

The trainer's own data, noise and loss serve both methods, so a seed is the same pictures, crops, timesteps and noise.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from benchmarks.study.scorers import Pictures, Scorer
from shira_diffusers.atomic_write import write_atomically
from shira_diffusers.dreambooth.base_model import adapted_models, adapted_targets, complete, load_base
from shira_diffusers.dreambooth.config import TrainingConfig
from shira_diffusers.dreambooth.families import denoiser_of, family_of
from shira_diffusers.dreambooth.launch import start
from shira_diffusers.dreambooth.pictures import find_pictures, instance_pictures
from shira_diffusers.dreambooth.prepare import load_shares, prepare_examples
from shira_diffusers.dreambooth.train import train
from shira_diffusers.errors import ShiraError
from shira_diffusers.formats.shira_file import WEIGHTS_NAME
from shira_diffusers.integrations.open_pipeline import open_pipeline
from shira_diffusers.seeds import step_seed
from shira_diffusers.weights.targets import select

RANK = 16
DRAWN_AT_ONCE = 8
LORA_FILE = "pytorch_lora_weights.safetensors"
Method = tuple[str, float]
Mix = tuple[str, ...]


@dataclass(frozen=True)
class Trial:
    """What all methods share. Each result holds it, and is continued under the same one only.

    Args:
        base: a pipeline's folder that the trainer takes.
        clip, dino: see `Scorer`.
        styles_from: holds a folder of pictures for each style or subject; a .txt beside a picture is its caption.
        concepts: each is drawn once; one that is repeated is drawn with other noise.
        prompt: what stands before a concept in what is drawn and in what CLIP compares with. It names no style, so that
            all style in a picture comes from the adapters.
        caption: of training pictures that have none.
        resolution: pixels a side; None is the trainer's default for the base.
    """

    base: str
    clip: str
    dino: str | None
    styles_from: str
    concepts: Sequence[str]
    prompt: str = "a picture of"
    caption: str = "a picture"
    resolution: int | None = None
    steps: int = 400
    batch: int = 4
    guidance: float = 7.5
    drawing_steps: int = 30
    strengths: Sequence[float] = (0.6, 0.8, 1.0, 1.2, 1.4)

    @property
    def texts(self) -> list[str]:
        """The prompts of all concepts."""
        return [f"{self.prompt} {concept}" for concept in self.concepts]

    @property
    def styles(self) -> dict[str, Path]:
        """The folders of pictures by their names."""
        place = Path(self.styles_from)
        found = sorted(path for path in place.glob("*") if path.is_dir() and not path.name.startswith("."))
        if not found:
            raise ShiraError(f"--styles-from: expected a folder of folders of pictures, got {self.styles_from!r}")
        return {path.name: path for path in found}

    def config(self, style: str, method: Method, seed: int, work: Path) -> TrainingConfig:
        """The trainer's settings; its defaults but for what both methods share."""
        made = TrainingConfig(
            pretrained_model_name_or_path=self.base,
            instance_data_dir=str(self.styles[style]),
            instance_prompt=self.caption,
            resolution=self.resolution,  # type: ignore[arg-type]  # None until the base is known
            repeats=self.batch,  # so that all batches are full
            center_crop=True,
            cache_latents=True,
            seed=seed,
            train_batch_size=self.batch,
            max_train_steps=self.steps,
            mixed_precision="no",
            learning_rate=method[1],
            checkpointing_steps=self.steps + 1,
            report_to="none",
        )
        digest = hashlib.sha256(repr(made).encode()).hexdigest()[:12]
        return complete(replace(made, output_dir=str(work / f"{style}-{method[0]}-{digest}")))


def train_lora(config: TrainingConfig) -> Path:
    """Train a LoRA on the weights, batches and noise that `train` would take, and average it over the same steps."""
    pipe = load_base(config, start(config).device)
    seed = int(config.seed or 0)
    examples, objective = prepare_examples(pipe, config, [instance_pictures(config)], seed)
    models, denoiser, part = adapted_models(pipe, config), denoiser_of(pipe), family_of(pipe).denoiser
    names = select(models, adapted_targets(pipe, models, config))
    layers = [name.removeprefix(f"{part}.").removesuffix(".weight") for name in names]
    torch.manual_seed(seed)
    denoiser.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=layers))
    trained = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    means = [parameter.detach().clone() for parameter in trained]
    optimizer = torch.optim.AdamW(trained, config.learning_rate, weight_decay=config.adam_weight_decay)
    generator, last = torch.Generator(objective.device), int(config.max_train_steps or 0)
    for step, (batch, _) in enumerate(load_shares(examples, config, seed, 0, last)):
        objective.loss(batch, generator.manual_seed(step_seed(seed, "noise", step))).backward()
        torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        count = max(1, step + 1 - int(config.average_from * last))
        for mean, parameter in zip(means, trained, strict=True):
            mean.lerp_(parameter.detach(), 1 / count)
    with torch.no_grad():
        for mean, parameter in zip(means, trained, strict=True):
            parameter.copy_(mean)
    partial = Path(f"{config.output_dir}.partial")
    type(pipe).save_lora_weights(partial, **{f"{part}_lora_layers": get_peft_model_state_dict(denoiser)})
    return partial.rename(config.output_dir) / LORA_FILE


METHODS: dict[str, tuple[Callable[[TrainingConfig], Path], str]] = {
    "lora": (train_lora, LORA_FILE),
    "shira": (train, WEIGHTS_NAME),
}


def run_scores(
    trial: Trial, methods: Sequence[Method], seeds: Sequence[int], work: Path, results: Path, device: str
) -> None:
    """Write one JSON a method and seed, mix by mix; what is there is not done again.

    Args:
        methods: each a name in `METHODS` and a learning rate.
        work: where adapters are kept.

    Raises:
        ShiraError: what is wrong with the trial, before any training; or a result of another trial.
    """
    scorer = Scorer(trial.clip, trial.dino, device)
    found = {name: find_pictures(folder, trial.caption) for name, folder in trial.styles.items()}
    for method in methods:
        trial.config(next(iter(found)), method, 0, work)  # says what is wrong with the base or the rate
    looks = {name: scorer.looks([picture.read() for picture in pictures]) for name, pictures in found.items()}
    texts = list(dict.fromkeys(trial.texts))
    asked = [texts.index(text) for text in trial.texts]
    for seed, method in itertools.product(seeds, methods):
        file = results / f"{method[0]}@{method[1]:g}-{seed}.json"
        result = _begun(file, trial, method, seed)
        done = [(tuple(row["mix"]), row["strength"]) for row in result["rows"]]
        missing = [one for one in _mixes(trial) if one not in done]
        draw = _painter(trial, method, seed, work, device) if missing else None
        for mix, strength in missing:
            scores = scorer.score(draw(mix, strength), texts, asked, {name: looks[name] for name in mix or looks})
            result["rows"].append({"mix": mix, "strength": strength, **scores})
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(result).encode())
            print(f"{file.stem}: {'+'.join(mix) or 'base'} at {strength}", flush=True)


def _mixes(trial: Trial) -> list[tuple[Mix, float]]:
    """The base, then single styles and pairs at each strength."""
    mixes = [names for size in (1, 2) for names in itertools.combinations(trial.styles, size)]
    return [((), 0.0), *itertools.product(mixes, trial.strengths)]


def _begun(file: Path, trial: Trial, method: Method, seed: int) -> dict[str, Any]:
    """A result as far as it goes.

    Raises:
        ShiraError: it is of another trial.
    """
    wanted = json.loads(json.dumps(asdict(trial)))
    new = {"recipe": {"name": f"{method[0]}@{method[1]:g}"}, "seed": seed, "trial": wanted, "rows": []}
    kept: dict[str, Any] = json.loads(file.read_text()) if file.exists() else new
    if other := [name for name, value in wanted.items() if kept["trial"].get(name) != value]:
        raise ShiraError(f"{file} was made with another {', '.join(other)}; give another --results, or delete it")
    return kept


def _painter(trial: Trial, method: Method, seed: int, work: Path, device: str) -> Callable[[Mix, float], Pictures]:
    """Train what is missing; returns what draws all concepts under a mix, where picture i has the noise of seed i."""
    training, name = METHODS[method[0]]
    configs = [trial.config(style, method, seed, work) for style in trial.styles]
    files = [Path(config.output_dir, name) for config in configs]
    for config, file in zip(configs, files, strict=True):
        if not file.exists():
            training(config)
    pipe = open_pipeline(trial.base, torch.float16 if device.startswith("cuda") else torch.float32).to(device)
    pipe.safety_checker = None  # it blackens pictures
    handles = {style: f"style_{number}" for number, style in enumerate(trial.styles)}  # PEFT takes no dots in names
    for file, handle in zip(files, handles.values(), strict=True):
        if name == LORA_FILE:
            pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name=handle)
        else:
            pipe.load_shira(file, handle, activate=False)
    options = {"guidance_scale": trial.guidance, "num_inference_steps": trial.drawing_steps}
    options |= dict.fromkeys(("height", "width"), configs[0].resolution)

    def draw(mix: Mix, strength: float) -> Pictures:
        worn = [handles[style] for style in mix or handles]  # the base is all of them at 0
        (pipe.set_adapters if name == LORA_FILE else pipe.set_shira)(worn, [strength] * len(worn))
        noises = [torch.Generator().manual_seed(number) for number in range(len(trial.texts))]
        parts = (slice(first, first + DRAWN_AT_ONCE) for first in range(0, len(noises), DRAWN_AT_ONCE))
        drawn = [pipe(trial.texts[part], generator=noises[part], **options).images for part in parts]
        return list(itertools.chain(*drawn))

    return draw
