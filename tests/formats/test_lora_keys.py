"""LoRA files in other programs' keys, built by hand: a layer gets ``alpha / r * up @ down``, or all is refused."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor

from shira_diffusers import AdapterFormatError, AdapterMismatchError, convert_lora
from shira_diffusers.formats.lora import LoraUpdates
from tests import compat_matrix, original_layout, tiny
from tests.formats.test_lora import wan_pipeline

# A layer of a file -> the weights whose rows it holds, one below the other.
Layers = Mapping[str, list[str]]
State = dict[str, Tensor]

_DOUBLE, _SINGLE = "transformer.transformer_blocks.0", "transformer.single_transformer_blocks.0"
FLUX = {
    "double_blocks.0.img_attn.qkv": [f"{_DOUBLE}.attn.to_{part}.weight" for part in "qkv"],
    "double_blocks.0.txt_attn.qkv": [f"{_DOUBLE}.attn.add_{part}_proj.weight" for part in "qkv"],
    "double_blocks.0.img_attn.proj": [f"{_DOUBLE}.attn.to_out.0.weight"],
    "double_blocks.0.txt_mlp.0": [f"{_DOUBLE}.ff_context.net.0.proj.weight"],
    "double_blocks.0.img_mod.lin": [f"{_DOUBLE}.norm1.linear.weight"],
    "single_blocks.0.linear2": [f"{_SINGLE}.proj_out.weight"],
}
OUTSIDE_OF_BLOCKS = {
    "img_in": ["transformer.x_embedder.weight"],
    "guidance_in.in_layer": ["transformer.time_text_embed.guidance_embedder.linear_1.weight"],
    "final_layer.linear": ["transformer.proj_out.weight"],
}


def random_lora(
    pipe: DiffusionPipeline, layers: Layers, key: str, matrices: tuple[str, str] = ("lora_down", "lora_up")
) -> tuple[State, State]:
    """A file's tensors, and the dense update of each weight.

    Args:
        key: of a layer, with ``{path}``, or with ``{flat}`` for points as underscores. With ``lora_down`` each layer
            has an alpha of its own.
    """
    weights, generator = tiny.weights_of(pipe), torch.Generator().manual_seed(0)
    state, updates = State(), State()
    for number, (path, names) in enumerate(layers.items()):
        shapes, r = [weights[name].shape for name in names], 2 + number % 2
        down = torch.randn(r, *shapes[0][1:], generator=generator)
        up = torch.randn(sum(shape[0] for shape in shapes), r, *[1] * (down.ndim - 2), generator=generator)
        name = key.format(path=path, flat=path.replace(".", "_"))
        state |= {f"{name}.{matrices[0]}.weight": down, f"{name}.{matrices[1]}.weight": up}
        alpha = float(r)
        if matrices[0] == "lora_down":
            alpha = 1.0 + number % 3
            state[f"{name}.alpha"] = torch.tensor(alpha)
        whole = (up.flatten(1) @ down.flatten(1)).view(-1, *down.shape[1:]) * (alpha / r)
        updates |= zip(names, whole.split([shape[0] for shape in shapes]), strict=True)
    return state, updates


def assert_converted(pipe: DiffusionPipeline, file: Path, state: State, expected: State) -> None:
    save_file(state, file)
    found = convert_lora(file, pipe, 1.0).adapter
    assert found.deltas.keys() == expected.keys()
    for name, delta in found.deltas.items():
        torch.testing.assert_close(delta.to_dense(), expected[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("key", "matrices", "layers"),
    [
        ("lora_unet_{flat}", ("lora_down", "lora_up"), FLUX | OUTSIDE_OF_BLOCKS),
        ("diffusion_model.{path}", ("lora_down", "lora_up"), FLUX | OUTSIDE_OF_BLOCKS),
        ("diffusion_model.{path}", ("lora_A", "lora_B"), FLUX | OUTSIDE_OF_BLOCKS),
        ("{path}", ("lora_A", "lora_B"), FLUX),
        ("{path}", ("lora_down", "lora_up"), FLUX),
        ("base_model.model.{path}", ("lora_A", "lora_B"), FLUX | OUTSIDE_OF_BLOCKS),
    ],
    ids=["kohya", "comfyui", "comfyui of peft", "peft", "bare", "fal"],
)
def test_flux_by_its_own_names(tmp_path: Path, key: str, matrices: tuple[str, str], layers: Layers) -> None:
    """diffusers' loader leaves out layers outside of blocks, and knows ``lora_A`` beside its own names only."""
    pipe = tiny.flux_pipeline()
    assert_converted(pipe, tmp_path / "lora.safetensors", *random_lora(pipe, layers, key, matrices))


def test_flux_of_xlabs(tmp_path: Path) -> None:
    names = {
        "double_blocks.0.processor.qkv_lora1": FLUX["double_blocks.0.img_attn.qkv"],
        "double_blocks.0.processor.qkv_lora2": FLUX["double_blocks.0.txt_attn.qkv"],
        "double_blocks.0.processor.proj_lora1": FLUX["double_blocks.0.img_attn.proj"],
        "single_blocks.0.processor.qkv_lora": [f"{_SINGLE}.attn.to_{part}.weight" for part in "qkv"],
        "single_blocks.0.processor.proj_lora": FLUX["single_blocks.0.linear2"],
    }
    pipe = tiny.flux_pipeline()
    assert_converted(pipe, tmp_path / "lora.safetensors", *random_lora(pipe, names, "{path}", ("down", "up")))


def test_alphas_beside_diffusers_names(tmp_path: Path) -> None:
    """diffusers ignores them, and the update would be ``r / alpha`` times too large."""
    names = {name.removesuffix(".weight"): [name] for layer in FLUX.values() for name in layer}
    pipe = tiny.flux_pipeline()
    assert_converted(pipe, tmp_path / "lora.safetensors", *random_lora(pipe, names, "{path}"))


def test_the_joint_layer_of_flux_single_blocks(tmp_path: Path) -> None:
    """diffusers splits it at Flux's real width only; the model here has that width."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(num_layers=0, num_single_layers=1)
    pipe = FluxPipeline(None, None, None, None, None, None, transformer.to_empty(device="cpu"))  # nothing is written
    parts = ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]
    layers = {"single_blocks.0.linear1": [f"{_SINGLE}.{part}.weight" for part in parts]}
    state, expected = random_lora(pipe, layers, "lora_unet_{flat}")
    save_file(state, tmp_path / "lora.safetensors")
    updates = LoraUpdates(tmp_path / "lora.safetensors", pipe)
    assert {name for name, update in updates() if torch.allclose(update, expected[name], atol=1e-5)} == expected.keys()


def test_sdxl_by_its_original_names(tmp_path: Path) -> None:
    """As kohya's trainers and LyCORIS' LoCon name all layers: attention, resnets, samplers, embeddings."""
    pipe = tiny.sdxl_pipeline()
    layers = {
        original_layout.unet_key(name, 1).removesuffix(".weight"): [f"unet.{name}"]
        for name in tiny.weights_of(pipe.unet)
    }
    kinds = ("in_layers_2", "emb_layers_1", "out_layers_3", "skip_connection", "_op", "time_embed_0", "label_emb_0_2")
    state, expected = random_lora(pipe, layers, "lora_unet_{flat}")
    assert all(any(kind in key for key in state) for kind in (*kinds, "input_blocks_3_1", "output_blocks_1_2_conv"))
    assert_converted(pipe, tmp_path / "lora.safetensors", state, expected)


def test_layers_that_diffusers_leaves_out(tmp_path: Path) -> None:
    """They are named, not left out without a word; another component's do no harm when one is asked for."""
    pipe = tiny.flux_pipeline()
    state, expected = random_lora(pipe, FLUX, "lora_unet_{flat}")
    t5 = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    more = {f"{t5}.lora_down.weight": torch.ones(2, 32), f"{t5}.lora_up.weight": torch.ones(32, 2)}
    save_file(state | more, tmp_path / "t5.safetensors")
    with pytest.raises(AdapterFormatError, match=rf"1 of 7 layers that diffusers cannot load; merge it.*\n  - {t5}"):
        convert_lora(tmp_path / "t5.safetensors", pipe)
    found = convert_lora(tmp_path / "t5.safetensors", pipe, 1.0, component="transformer").adapter
    assert found.deltas.keys() == expected.keys()
    zeros = {key: torch.zeros_like(tensor) for key, tensor in more.items()}
    assert_converted(pipe, tmp_path / "t5.safetensors", state | zeros, expected)


def test_two_ways_to_name_blocks_in_one_file(tmp_path: Path) -> None:
    pipe, rest = tiny.sdxl_pipeline(), "transformer_blocks.0.attn1.to_q"
    one = {f"middle_block.1.{rest}": [f"unet.mid_block.attentions.0.{rest}.weight"]}
    other = {f"up_blocks.0.attentions.0.{rest}": [f"unet.up_blocks.0.attentions.0.{rest}.weight"]}
    save_file(random_lora(pipe, one | other, "lora_unet_{flat}")[0], tmp_path / "lora.safetensors")
    with pytest.raises(AdapterFormatError, match=r"has 1 of 2 layers that .*\n  - lora_unet_middle_block_1"):
        convert_lora(tmp_path / "lora.safetensors", pipe)


WAN = {
    "blocks.0.self_attn.o": ["transformer.blocks.0.attn1.to_out.0.weight"],
    "blocks.0.cross_attn.k_img": ["transformer.blocks.0.attn2.add_k_proj.weight"],
    "blocks.0.cross_attn.v_img": ["transformer.blocks.0.attn2.add_v_proj.weight"],
    "blocks.0.ffn.2": ["transformer.blocks.0.ffn.net.2.weight"],
    "time_projection.1": ["transformer.condition_embedder.time_proj.weight"],
    "head.head": ["transformer.proj_out.weight"],
}
QWEN = {
    name: [f"transformer.{name}.weight"]
    for name in ("img_in", "transformer_blocks.0.attn.add_q_proj", "transformer_blocks.0.img_mlp.net.2")
}


@pytest.mark.parametrize(
    ("make", "layers", "key", "matrices"),
    [
        (wan_pipeline, WAN, "diffusion_model.{path}", ("lora_A", "lora_B")),
        (wan_pipeline, WAN, "diffusion_model.{path}", ("lora_down", "lora_up")),
        (lambda: compat_matrix.qwen_image()[0], QWEN, "diffusion_model.{path}", ("lora_down", "lora_up")),
        (lambda: compat_matrix.qwen_image()[0], QWEN, "lora_unet_{flat}", ("lora_down", "lora_up")),
    ],
    ids=["wan", "wan, alpha", "qwen", "qwen of kohya"],
)
def test_wan_and_qwen_in_the_keys_of_comfyui(
    tmp_path: Path, make: Callable[[], DiffusionPipeline], layers: Layers, key: str, matrices: tuple[str, str]
) -> None:
    pipe = make()
    assert_converted(pipe, tmp_path / "lora.safetensors", *random_lora(pipe, layers, key, matrices))


@pytest.mark.parametrize(
    ("make", "attention"),
    [(tiny.sd3_pipeline, "attn"), (lambda: compat_matrix.sana()[0], "attn1")],
    ids=["sd3", "sana"],
)
def test_alphas_that_diffusers_refuses(tmp_path: Path, make: Callable[[], DiffusionPipeline], attention: str) -> None:
    """PEFT's keys with alphas; in ComfyUI's, diffusers does not know these models, and they are refused."""
    pipe, name = make(), f"transformer_blocks.0.{attention}.to_q"
    state, expected = random_lora(pipe, {name: [f"transformer.{name}.weight"]}, "{path}")
    peft = {key.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): tensor for key, tensor in state.items()}
    file = tmp_path / "lora.safetensors"
    assert_converted(pipe, file, {f"transformer.{key}": tensor for key, tensor in peft.items()}, expected)
    save_file({f"diffusion_model.{key}": tensor for key, tensor in peft.items()}, file)
    with pytest.raises(AdapterMismatchError, match="diffusers does not know its keys: merge it into the base with"):
        convert_lora(file, pipe)
