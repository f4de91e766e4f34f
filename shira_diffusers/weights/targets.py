"""Choose which weights of a model are adapted, by names, presets and patterns."""

import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from shira_diffusers.errors import AdapterMismatchError, ShiraError

Targets = str | re.Pattern[str] | Sequence[str]

DEFAULT_TARGETS = "attention+ff"

_ATTENTION = (
    # diffusers attention, joint attention (SD3, Flux)
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    # text encoders: CLIP, Gemma and its like (o_proj), T5
    "q_proj", "k_proj", "v_proj", "out_proj", "o_proj",
    "SelfAttention.q", "SelfAttention.k", "SelfAttention.v", "SelfAttention.o",
    # GPT-2, whose layers are Conv1D
    "c_attn", "q_attn", "attn.c_proj", "crossattention.c_proj",
)  # fmt: skip
_FEED_FORWARD = (
    "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
    "ffn.net.0.proj", "ffn.net.2", "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2",
    # Flux single blocks; a bare `proj_out` would also take the output layer
    "proj_mlp", "single_transformer_blocks.*.proj_out",
    "fc1", "fc2", "gate_proj", "up_proj", "down_proj",
    "DenseReluDense.wi", "DenseReluDense.wi_0", "DenseReluDense.wi_1", "DenseReluDense.wo",
    "mlp.c_fc", "mlp.c_proj",
)  # fmt: skip
PRESETS: dict[str, tuple[str, ...]] = {
    "attention": _ATTENTION,
    "attention+ff": _ATTENTION + _FEED_FORWARD,
    "all-linear": ("*",),
    "all": ("*",),
}

# Copies that diffusers makes of other weights (`fuse_qkv_projections`): written along with their originals.
FUSED_COPIES: dict[str, tuple[str, ...]] = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_added_kv": ("add_k_proj", "add_v_proj"),
}
# What torch.compile and PEFT put between a module and its weight.
WRAPPERS = ("_orig_mod", "base_layer")


def models_of(pipe: Any) -> dict[str, nn.Module]:
    """The models of a pipeline by component name; of a modular one those that are loaded so far."""
    # not `components`, which refuses pipelines of the user's own whose __init__ takes other names; one that registers
    # nothing has no config, and that of a modular one leaves out models that it makes itself
    is_modular = any(cls.__name__ == "ModularPipeline" for cls in type(pipe).__mro__)
    names = pipe.components if is_modular else getattr(pipe, "config", ())
    parts = {name: vars(pipe).get(name) for name in names if not name.startswith("_")}
    return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}


def parts_of(target: Any) -> nn.Module | Mapping[str, nn.Module]:
    """What adapters are for: a module, or ``{component: module}``, as given or a pipeline's.

    Raises:
        ShiraError: anything else, or components with a dot in their names.
    """
    if isinstance(target, Mapping) and (dotted := [repr(name) for name in target if "." in str(name)]):
        raise ShiraError(
            f"expected names of components without a dot, which ends them in names of parameters, got "
            f'{", ".join(dotted)}: rename them, for instance {{"unet": module}}'
        )
    if isinstance(target, nn.Module | Mapping):
        return target
    if found := models_of(target):
        return found
    raise ShiraError(f"expected a module, {{component: module}} or a pipeline, got {type(target).__name__}")


def by_prefix(target: Any) -> dict[str, nn.Module]:
    """The modules of ``parts_of`` by the prefix of their parameters' names: ``component.``, or nothing."""
    parts = parts_of(target)
    return {"": parts} if isinstance(parts, nn.Module) else {f"{name}.": part for name, part in parts.items()}


def require_modules(target: Any, expected: str, call: str) -> None:
    """Require something else than a pipeline, where its meaning is not clear.

    Raises:
        ShiraError: neither a module nor, where ``expected`` is more than a module, ``{component: module}``; names what
            to call instead.
    """
    if isinstance(target, nn.Module) or (isinstance(target, Mapping) and expected != "a module"):
        return
    models = target if isinstance(target, Mapping) else models_of(target)
    among = f", which has {', '.join(models)}" if models else ""
    raise ShiraError(f"expected {expected}, got {type(target).__name__}{among}; call {call}")


def canonical_name(name: str) -> str:
    """A parameter's name without what ``torch.compile`` and PEFT insert: the name that files store."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _owners(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    modules = dict(model.named_modules())
    for path, module in modules.items():
        parent, _, leaf = path.rpartition(".")
        if not (leaf in FUSED_COPIES and FUSED_COPIES[leaf][-1] in modules[parent]._modules):
            yield canonical_name(path), module


def named_weights(model: nn.Module, *, every: bool = False) -> dict[str, Tensor]:
    """Canonical name -> weight of each Linear and Conv2d of a module, and of GPT-2's Conv1D, stored as (in, out).

    Args:
        model: any module; compiled ones and PEFT-wrapped layers are looked through.
        every: also all other floating-point parameters (norms, biases, embeddings).

    Returns:
        The live tensors, detached; a weight that two layers share appears under its first name only. LoRA's own
        matrices and the fused copies of ``fuse_qkv_projections`` are left out.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, module in _owners(model):
        if any(part.startswith("lora_") for part in path.split(".")):
            continue
        is_target = isinstance(module, nn.Linear | nn.Conv2d | Conv1D)
        for leaf, parameter in module.named_parameters(recurse=False):
            wanted = (is_target and leaf == "weight") or (every and parameter.is_floating_point())
            if wanted and id(parameter) not in seen:
                seen.add(id(parameter))
                found[f"{path}.{leaf}" if path else leaf] = parameter.detach()
    return found


def _matches(path: str, pattern: str | re.Pattern[str]) -> bool:
    """Whether a module's path fits: as a dotted suffix, a glob, or a regular expression of the whole path."""
    if isinstance(pattern, re.Pattern):
        return pattern.fullmatch(path) is not None
    if path == pattern or path.endswith("." + pattern) or fnmatchcase(path, pattern):
        return True
    if fnmatchcase(path, "*." + pattern):
        return True
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error:  # a glob such as `*.to_q` is no regular expression
        return False


def select(model: nn.Module | Mapping[str, nn.Module], targets: Targets = DEFAULT_TARGETS) -> dict[str, Tensor]:
    """The weights that ``targets`` names, by canonical name, in the model's order.

    Args:
        model: a module, or ``{component: module}``; then each name begins with its component.
        targets: a preset (``attention``, ``attention+ff``, ``all-linear``, ``all``), or one or several patterns,
            each a dotted suffix (``to_q``), a glob (``*attn2.to_*``) or a regular expression, of the path of a
            layer or the name of its weight.

    Raises:
        AdapterMismatchError: a preset or patterns that match no Linear or Conv2d weight. Of several patterns some may.
    """
    named = {f"{prefix}{n}": w for prefix, part in by_prefix(model).items() for n, w in named_weights(part).items()}
    if isinstance(targets, str) and targets in PRESETS:
        only_linear = targets != "all"
        patterns: Sequence[str | re.Pattern[str]] = PRESETS[targets]
    else:
        only_linear = False
        patterns = [targets] if isinstance(targets, str | re.Pattern) else list(targets)
    chosen = {
        name: weight
        for name, weight in named.items()
        if (weight.ndim == 2 or not only_linear) and _any_match(name, patterns)
    }
    if not chosen:
        raise AdapterMismatchError(
            f"targets {targets!r} match none of the {len(named)} Linear and Conv2d weights "
            f"(for instance {', '.join(list(named)[:3])}); "
            f"expected a preset ({', '.join(PRESETS)}), a suffix such as 'to_q', a glob or a regular expression"
        )
    return chosen


def _any_match(name: str, patterns: Sequence[str | re.Pattern[str]]) -> bool:
    path = name.removesuffix(".weight")
    return any(_matches(path, pattern) or _matches(name, pattern) for pattern in patterns)


def weight_shape(layer: nn.Module) -> tuple[int, ...] | None:
    """The shape of a layer's dense weight by its own account, however it is stored; None for what can have no branch.

    Linear and Conv2d layers can, those of optimum-quanto, bitsandbytes, torchao and GGUF too, and GPT-2's Conv1D.
    """
    if isinstance(layer, Conv1D):
        return tuple(layer.weight.shape)  # (in, out)
    if isinstance(layer, nn.Conv2d):
        return (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
    sizes = (getattr(layer, "out_features", None), getattr(layer, "in_features", None))
    return sizes if all(isinstance(size, int) for size in sizes) else None  # type: ignore[return-value]
