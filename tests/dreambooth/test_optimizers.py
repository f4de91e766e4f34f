"""Groups over one flat parameter, against optimizers over parameters of their own."""

import builtins
import copy
import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prodigyopt import Prodigy
from torch import nn

from shira_diffusers import ShiraError
from shira_diffusers.dreambooth.config import TrainingConfig
from shira_diffusers.dreambooth.optimizers import Slices, make_optimizer, make_schedule, require_optimizer, resume

COUNTS = {"unet.a": 700, "unet.b": 301, "text_encoder.a": 17, "text_encoder_2.a": 130}


def config(**settings: object) -> TrainingConfig:
    needed = {"pretrained_model_name_or_path": "base", "instance_data_dir": "p", "instance_prompt": "a cat"}
    complete = {"learning_rate": 1e-2, "adam_weight_decay": 1e-2, "lr_warmup_steps": 2}
    return TrainingConfig(**(needed | complete | settings))


def make(settings: TrainingConfig) -> tuple[nn.Parameter, Slices, torch.optim.Optimizer, Any]:
    deltas = nn.Parameter(torch.zeros(sum(COUNTS.values())))
    slices = Slices(deltas, {name: torch.arange(count) for name, count in COUNTS.items()})
    optimizer = make_optimizer(settings, slices, examples_a_step=8)
    return deltas, slices, optimizer, make_schedule(settings, optimizer, steps=20)


def step(deltas: nn.Parameter, slices: Slices, optimizer: torch.optim.Optimizer, schedule: Any, number: int) -> None:
    deltas.grad = torch.randn(deltas.shape, generator=torch.Generator().manual_seed(number))
    slices.receive_gradients()
    torch.nn.utils.clip_grad_norm_([deltas], 1.0)
    optimizer.step()
    schedule.step()
    slices.clear_gradients()


def reference(groups: list[dict[str, Any]], steps: int, kind: Any = torch.optim.AdamW, **options: Any) -> torch.Tensor:
    """The same steps with a parameter for each group, as diffusers' scripts have them."""
    counts = [1001, 147][: len(groups)] if len(groups) > 1 else [1148]
    parameters = [nn.Parameter(torch.zeros(count)) for count in counts]
    optimizer = kind([{"params": [p], **group} for p, group in zip(parameters, groups, strict=True)], **options)
    schedule = make_schedule(config(lr_scheduler="cosine"), optimizer, 20)
    for number in range(steps):
        gradient = torch.randn(1148, generator=torch.Generator().manual_seed(number))
        for parameter, part in zip(parameters, gradient.split(counts), strict=True):
            parameter.grad = part.clone()
        whole = torch.cat([p.grad for p in parameters]).norm()
        for parameter in parameters:
            parameter.grad *= min(1.0, 1.0 / float(whole + 1e-6))
        optimizer.step()
        schedule.step()
    return torch.cat([parameter.detach() for parameter in parameters])


@pytest.mark.parametrize("decay", [None, 1e-3], ids=["same decay", "own decay"])
def test_text_encoders_have_their_own_learning_rate_and_decay(decay: float | None) -> None:
    options = {"lr_scheduler": "cosine", "text_encoder_lr": 1e-4, "adam_weight_decay_text_encoder": decay}
    state = make(config(**options))
    for number in range(6):
        step(*state, number)
    expected = reference(
        [{"lr": 1e-2, "weight_decay": 1e-2}, {"lr": 1e-4, "weight_decay": 1e-2 if decay is None else decay}], 6
    )
    torch.testing.assert_close(state[0].detach(), expected, rtol=1e-5, atol=1e-9)
    assert float(state[0][1001:].detach().abs().max()) < 0.02 * float(state[0][:1001].detach().abs().max())


def test_without_one_text_encoders_learn_as_the_denoiser() -> None:
    state = make(config(lr_scheduler="cosine"))
    for number in range(6):
        step(*state, number)
    expected = reference([{"lr": 1e-2, "weight_decay": 1e-2}], 6)
    torch.testing.assert_close(state[0].detach(), expected, rtol=1e-5, atol=1e-9)


def test_prodigy_is_that_of_prodigyopt(caplog: pytest.LogCaptureFixture) -> None:
    options = {
        "optimizer": "prodigy", "learning_rate": 1.0, "text_encoder_lr": 0.5, "lr_scheduler": "cosine",
        "prodigy_beta3": 0.9, "use_8bit_adam": True,
    }  # fmt: skip
    with caplog.at_level(logging.WARNING):
        state = make(config(**options))
    assert "text_encoder_lr has no effect with Prodigy" in caplog.text
    assert "use_8bit_adam has no effect with optimizer prodigy" in caplog.text
    assert isinstance(state[2], Prodigy)
    for number in range(6):
        step(*state, number)
    own = {"beta3": 0.9, "decouple": True, "use_bias_correction": True, "safeguard_warmup": True}
    expected = reference([{"lr": 1.0, "weight_decay": 1e-2}] * 2, 6, Prodigy, **own)
    torch.testing.assert_close(state[0].detach(), expected, rtol=1e-4, atol=1e-9)
    assert bool(state[0].any())


def test_scale_lr_spares_the_text_encoders_as_in_diffusers() -> None:
    _, _, optimizer, _ = make(config(scale_lr=True, text_encoder_lr=1e-4, lr_scheduler="constant"))
    assert [group["lr"] for group in optimizer.param_groups] == [8e-2, 1e-4]


@pytest.mark.parametrize("kind", ["AdamW", "prodigy"])
@pytest.mark.parametrize("changed", [{}, {"learning_rate": 5e-3, "adam_weight_decay": 0.0}], ids=["same", "changed"])
def test_resuming_takes_the_moments_and_the_position_but_the_rate_of_now(kind: str, changed: dict[str, object]) -> None:
    settings = {"lr_scheduler": "cosine", "text_encoder_lr": 1e-4, "optimizer": kind}
    whole = make(config(**settings))
    for number in range(3):
        step(*whole, number)
    deltas, _, optimizer, schedule = whole
    saved = copy.deepcopy({"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()})
    other = make(config(**settings | changed))
    with torch.no_grad():
        other[0].copy_(deltas)
    resume(other[2], other[3], saved)
    factor = whole[3].get_last_lr()[0] / 1e-2
    assert 0 < factor < 1
    rate = changed.get("learning_rate", 1e-2)
    assert other[3].get_last_lr()[0] == pytest.approx(rate * factor)
    assert other[2].param_groups[0]["weight_decay"] == changed.get("adam_weight_decay", 1e-2)
    for number in range(3, 6):
        step(*whole, number)
        step(*other, number)
    assert torch.equal(deltas, other[0]) == (not changed)
    assert other[3].get_last_lr()[0] == pytest.approx(whole[3].get_last_lr()[0] * rate / 1e-2)


def test_prodigy_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name == "prodigyopt":
            raise ImportError(name)
        return load(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ShiraError, match="pip install prodigyopt, or use AdamW"):
        make(config(optimizer="prodigy"))


def test_8_bit_adam_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", SimpleNamespace(AdamW8bit=torch.optim.AdamW))
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace())
    with pytest.raises(ShiraError, match="use_8bit_adam needs a GPU"):
        require_optimizer(config(use_8bit_adam=True))
    require_optimizer(config())


def test_other_optimizers_and_a_still_prodigy_are_refused() -> None:
    with pytest.raises(ShiraError, match="optimizer must be AdamW or prodigy, got 'sgd'"):
        config(optimizer="sgd")
    with pytest.raises(ShiraError, match="learning_rate must be above 0 for Prodigy"):
        config(optimizer="Prodigy", learning_rate=0.0)
