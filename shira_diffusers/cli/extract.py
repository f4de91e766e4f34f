"""Extract an adapter file from a fine-tuned model: ``shira extract``."""

from pathlib import Path

import torch

from shira_diffusers.cli.convert import output_file
from shira_diffusers.cli.progress_bar import progress_bar
from shira_diffusers.formats.shira_file import save_adapter
from shira_diffusers.integrations.extract import extract_adapter
from shira_diffusers.masks.sparsify import EnergyReport, Ranking


def extract_file(
    base: Path,
    tuned: Path,
    output: Path | None,
    *,
    density: float,
    ranking: Ranking,
    dtype: torch.dtype,
    force: bool = False,
) -> tuple[Path, EnergyReport]:
    """Compare two models and write an adapter, whole or not at all.

    Args:
        base, tuned: as for ``extract_adapter``.
        output: as for ``output_file``.

    Returns:
        The file written, and what is kept.

    Raises:
        ShiraError: the output exists, or as ``extract_adapter``.
        OSError: a file cannot be read or written.
    """
    target = output_file(output, tuned, force)
    with progress_bar(unit="weights") as progress:
        found = extract_adapter(base, tuned, density, ranking=ranking, dtype=dtype, progress=progress)
    return save_adapter(found.adapter, target), found.report
