"""What both models go through: a base, two adapters on it, switched and fused, and LoRAs of similar size.

The rows are those of the paper's table of language models (arXiv 2406.13175, table 4): adapters alone, and together.
"""

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from transformers import Trainer, TrainingArguments, set_seed

from shira_diffusers import Resident, ShiraAdapter, build_masks, fuse, mask_gradients
from shira_diffusers.training import SparseTuner

Batch = dict[str, Tensor]
Task = Callable[[int, torch.Generator], Batch]
"""Draws a number of examples: the model's inputs and ``labels``; -100 is not judged."""
Accuracies = dict[str, float]


@dataclass(frozen=True)
class Subject:
    """A model with random weights, what its base learns, and the two tasks of the adapters."""

    model: nn.Module
    layers: list[str]
    base_task: Task
    tasks: dict[str, Task]
    scores: Callable[[Any, Tensor], tuple[Tensor, Tensor]]
    """Of the model's logits and the labels: what was predicted and what was right, of the same shape."""


@dataclass(frozen=True)
class Settings:
    base_steps: int
    steps: int
    shira_rate: float = 3e-3
    lora_rates: tuple[float, ...] = (3e-3, 1e-3)
    density: float = 0.05
    rank: int = 2
    base_rate: float = 3e-3
    batch: int = 64
    judged: int = 2000
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """The base with no adapter active, the adapters by the table's row and task, and the table."""

    model: nn.Module
    adapters: dict[str, dict[str, ShiraAdapter]]
    report: dict[str, Any]


def compare(subject: Subject, settings: Settings) -> Result:
    set_seed(settings.seed)
    base, start = subject.model, time.perf_counter()
    fit_in_trainer(base, subject.base_task, settings, settings.base_steps, settings.base_rate)
    report: dict[str, Any] = {
        "settings": asdict(settings),
        "base task": accuracy(base, subject, subject.base_task, settings),
        "base": accuracies(base, subject, settings),
    }
    adapters = train_adapters(subject, settings)
    report["rows"] = {row: shira_row(subject, pair, settings) for row, pair in adapters.items()}
    report["rows"] |= {f"LoRA, rate {rate}": lora_row(subject, settings, rate) for rate in settings.lora_rates}
    report["seconds"] = round(time.perf_counter() - start)
    return Result(base, adapters, report)


def train_adapters(subject: Subject, settings: Settings) -> dict[str, dict[str, ShiraAdapter]]:
    """Two ways to train, two pairs: the second adapter trains the largest weights as the first does, or the next."""
    (first, first_task), (second, second_task) = subject.tasks.items()
    model = subject.model
    masks = build_masks(model, "wm", settings.density, subject.layers)
    one = fit_sparsely(model, masks, first_task, settings)
    apart = build_masks(model, "wm", settings.density, subject.layers, avoid=[one])
    return {
        "SHiRA-WM, overlapping": {first: one, second: fit_masked(model, masks, second_task, settings)},
        "SHiRA-WM, apart": {first: one, second: fit_masked(model, apart, second_task, settings)},
    }


def fit_sparsely(model: nn.Module, masks: dict[str, Tensor], task: Task, settings: Settings) -> ShiraAdapter:
    """A loop of one's own: one flat parameter, and gradients and optimizer state for the masked entries only."""
    with SparseTuner(model.train(), masks) as tuner:
        optimizer = torch.optim.AdamW([tuner.deltas], lr=settings.shira_rate, weight_decay=0.0)
        schedule = CosineAnnealingLR(optimizer, settings.steps)
        for batch in batches(task, settings, settings.steps):
            model(**batch).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            tuner.apply()
    return tuner.adapter()


def fit_masked(model: nn.Module, masks: dict[str, Tensor], task: Task, settings: Settings) -> ShiraAdapter:
    """``transformers.Trainer``, unchanged; what it trains is a copy, so that the difference can be taken."""
    trained = copy.deepcopy(model)
    with mask_gradients(trained, masks):
        fit_in_trainer(trained, task, settings, settings.steps, settings.shira_rate)
    return ShiraAdapter.from_difference(model, trained, dtype=torch.float16)


def fit_in_trainer(model: nn.Module, task: Task, settings: Settings, steps: int, rate: float) -> None:
    examples = [
        dict(zip(batch, row, strict=True))
        for batch in batches(task, settings, steps)
        for row in zip(*batch.values(), strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=settings.batch,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            seed=settings.seed,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
        )
        Trainer(model, arguments, train_dataset=examples).train()


def batches(task: Task, settings: Settings, steps: int) -> Iterator[Batch]:
    random = torch.Generator().manual_seed(settings.seed)
    return (task(settings.batch, random) for _ in range(steps))


def shira_row(subject: Subject, pair: dict[str, ShiraAdapter], settings: Settings) -> dict[str, Any]:
    """Switch from adapter to adapter to both, in the resident weights, and back to the base's bits."""
    model = subject.model
    before = bits(model)
    resident = Resident(model)
    for name, adapter in pair.items():
        resident.add(adapter, name)
    single = {}
    for name, task in subject.tasks.items():
        resident.set({name: 1.0})
        single[name] = accuracy(model, subject, task, settings)
    resident.set(dict.fromkeys(pair, 1.0))
    fused = accuracies(model, subject, settings)
    together = bits(model)
    resident.clear()
    restored = same_bits(before, bits(model))
    with as_one(resident, pair):
        same = same_bits(together, bits(model))
    resident.remove(*pair)
    sizes = {name: adapter.nnz for name, adapter in pair.items()}
    return row(sizes, single, fused) | {"base's bits restored": restored, "fused adapter has the same bits": same}


@contextmanager
def as_one(resident: Resident, pair: dict[str, ShiraAdapter]) -> Iterator[None]:
    """The pair fused into one adapter, active until the block ends."""
    resident.add(fuse(pair), "fused")
    with resident.using({"fused": 1.0}):
        yield
    resident.remove("fused")


def lora_row(subject: Subject, settings: Settings, rate: float) -> dict[str, Any]:
    """Two LoRAs of PEFT on the same layers, alone and summed."""
    config = LoraConfig(r=settings.rank, lora_alpha=2 * settings.rank, target_modules=subject.layers)
    first, *_ = subject.tasks
    model = get_peft_model(copy.deepcopy(subject.model), config, first)
    sizes, single = {}, {}
    for name, task in subject.tasks.items():
        if name != first:
            model.add_adapter(name, config)
        model.set_adapter(name)
        sizes[name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        fit_in_trainer(model, task, settings, settings.steps, rate)
        single[name] = accuracy(model, subject, task, settings)
    model.base_model.set_adapter(list(subject.tasks))
    return row(sizes, single, accuracies(model, subject, settings))


def row(sizes: dict[str, int], single: Accuracies, fused: Accuracies) -> dict[str, Any]:
    drop = mean(single) - mean(fused)
    return {"trained values": sizes, "single": single, "fused": fused, "drop": drop}


def accuracies(model: nn.Module, subject: Subject, settings: Settings) -> Accuracies:
    return {name: accuracy(model, subject, task, settings) for name, task in subject.tasks.items()}


@torch.inference_mode()
def accuracy(model: nn.Module, subject: Subject, task: Task, settings: Settings) -> float:
    """In percent, of examples that no training has seen."""
    batch = task(settings.judged, torch.Generator().manual_seed(settings.seed + 1))
    labels = batch.pop("labels")
    predicted, right = subject.scores(model.eval()(**batch).logits, labels)
    judged = right != -100
    return float(100 * (predicted == right)[judged].float().mean())


def mean(accuracies: Accuracies) -> float:
    return sum(accuracies.values()) / len(accuracies)


def bits(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the parameters as they are now; ``state_dict`` would give the base's, whatever is active."""
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def table(report: dict[str, Any]) -> str:
    names = list(report["base"])
    lines = [["", "values", *names, "mean", *(f"{name}, fused" for name in names), "mean, fused", "drop"]]
    lines += [["base", "", *percent(report["base"]), *[""] * (len(names) + 2)]]
    for name, found in report["rows"].items():
        values = max(found["trained values"].values())
        single, fused = percent(found["single"]), percent(found["fused"])
        lines += [[name, f"{values:,}", *single, *fused, f"{found['drop']:.1f}"]]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(found: Accuracies) -> list[str]:
    return [f"{value:.1f}" for value in [*found.values(), mean(found)]]


def run(subject: Callable[[], Subject], settings: Settings, argv: Sequence[str] | None, about: str | None) -> None:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, help="write the report as JSON")
    args = parser.parse_args(argv)
    set_seed(args.seed)
    report = compare(subject(), replace(settings, seed=args.seed)).report
    print(table(report))
    for name, found in report["rows"].items():
        print(name, {key: value for key, value in found.items() if isinstance(value, bool)})
    print(f"base task {report['base task']:.1f} %, {report['seconds']} s")
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n")
