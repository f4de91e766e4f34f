"""Draw the same picture under the base and under each adapter alone, to see what adapters do to it."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModularPipeline
from torch import Tensor

from shira_diffusers.adapters.scales import Scale
from shira_diffusers.engine.resident import Resident
from shira_diffusers.errors import ShiraError


def drawn_effects(
    pipe: DiffusionPipeline | ModularPipeline, resident: Resident, mix: Mapping[str, Scale], call: Mapping[str, Any]
) -> dict[str, Tensor]:
    """What each adapter alone changes in the final latents, float32 on the CPU, by name; the mix before returns.

    Args:
        call: arguments of the pipeline's call. Each drawing starts from the same state of ``generator``, by default
            one that is seeded with 0.

    Raises:
        ShiraError: an argument says what comes out, or what comes out is no tensor.
    """
    if refused := {"output_type", "output", "return_dict"} & call.keys():
        raise ShiraError(f"the report compares latents, so it takes no {sorted(refused)[0]}; leave it out")
    generators = call.get("generator") or torch.Generator().manual_seed(0)
    states = [each.get_state() for each in _listed(generators)]

    def latents(one: dict[str, Scale]) -> Tensor:
        for each, state in zip(_listed(generators), states, strict=True):
            each.set_state(state)
        with resident.using(one):
            return _latents(pipe, {**call, "generator": generators})

    plain = latents({})
    return {name: latents({name: scale}) - plain for name, scale in mix.items()}


def _listed(generators: torch.Generator | list[torch.Generator]) -> list[torch.Generator]:
    return generators if isinstance(generators, list) else [generators]


def _latents(pipe: Any, call: Mapping[str, Any]) -> Tensor:
    is_modular = isinstance(pipe, ModularPipeline)
    found = pipe(**call, output="latents") if is_modular else pipe(**call, output_type="latent", return_dict=False)[0]
    if not isinstance(found, Tensor):
        raise ShiraError(f"expected latents from {type(pipe).__name__}, got {type(found).__name__}")
    return found.detach().float().cpu()
