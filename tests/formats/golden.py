"""The adapters whose files lie in ``golden/``, byte for byte as they were written once.

``format_1.safetensors`` was written by ``save_adapter`` of version 0.1.0, the last that wrote format 1, and is never
written again. ``python -m tests.formats.golden`` writes the others: a change of their bytes is a change of the format.
"""

from pathlib import Path

import torch

from shira_diffusers import ShiraAdapter, SparseDelta, save_adapter

FOLDER = Path(__file__).parent / "golden"
METADATA = {"base_model": "tiny", "instance_prompt": "Gruß", "library_version": "0"}


def delta(indices: list[int], shape: tuple[int, ...], dtype: torch.dtype = torch.float16) -> SparseDelta:
    """With the values 1, -0.5, 1 / 3, -0.25, ... rounded to a dtype."""
    values = [(-1) ** k / (k + 1) for k in range(len(indices))]
    return SparseDelta(torch.tensor(indices, dtype=torch.int64), torch.tensor(values).to(dtype), shape)


def mixed() -> ShiraAdapter:
    """Gaps of all three dtypes, values of all three, a weight without entries, one of 2^34 entries, probes of two."""
    deltas = {
        "unet.a.weight": delta([0, 2, 258, 259], (4, 65)),
        "unet.b.weight": delta([5], (1, 2, 3, 1), torch.float32),
        "unet.c.weight": delta([300, 66_000, 66_001], (300, 300), torch.bfloat16),
        "unet.d.weight": delta([], (3, 3)),
        "unet.e.weight": delta([70_000 * k for k in range(1, 30)], (1500, 1500)),
        "unet.f.weight": delta([7, 2_000_000_000], (50_000, 50_000), torch.float32),
        "text_encoder.g.weight": delta([3, 70_000], (2**17, 2**17)),
    }
    probes = {"unet.a.weight": torch.tensor([1.0, 2.0]).half(), "unet.c.weight": torch.tensor([-0.5]).half()}
    return ShiraAdapter(deltas, METADATA, probes)


def plain() -> ShiraAdapter:
    """Values of one dtype, a text encoder's weight too, probes of one."""
    deltas = {
        "unet.b.weight": delta([0, 2, 258, 259], (4, 65)),
        "unet.a.weight": delta([], (3, 3)),
        "text_encoder.c.weight": delta([1, 510, 1199], (10, 15, 4, 2)),
    }
    return ShiraAdapter(deltas, METADATA, {"unet.b.weight": torch.tensor([1.0, 2.0, -3.0]).half()})


def blocks() -> ShiraAdapter:
    """Entries in aligned runs of 32, as of the block masks."""
    runs = {"unet.a.weight": [0, 1, 300], "unet.b.weight": [2]}
    deltas = {n: delta([32 * k + j for k in at for j in range(32)], (128, 100)) for n, at in runs.items()}
    return ShiraAdapter(deltas, METADATA)


FORMAT_2 = {"format_2": plain, "format_2_runs": blocks, "format_2_mixed": mixed}


def assert_same(found: ShiraAdapter, expected: ShiraAdapter) -> None:
    """The same weights, indices, probes and metadata, and the same values, whatever their dtype."""
    assert found.deltas.keys() == expected.deltas.keys()
    for name, delta in expected.deltas.items():
        assert found.deltas[name].shape == delta.shape
        assert torch.equal(found.deltas[name].indices, delta.indices)
        assert torch.equal(found.deltas[name].values.double(), delta.values.double())
    assert found.base_probes.keys() == expected.base_probes.keys()
    assert all(torch.equal(found.base_probes[name], probe) for name, probe in expected.base_probes.items())
    assert found.metadata.items() >= expected.metadata.items()


if __name__ == "__main__":
    for name, make in FORMAT_2.items():
        save_adapter(make(), FOLDER / f"{name}.safetensors")
