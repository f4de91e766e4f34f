"""Adapters as frozen data: deltas by parameter name, their metadata, and what can be computed from them alone.

In: tensors. Out: ``ShiraAdapter``, merged adapters (``fuse``), and figures on how much two adapters interfere. Knows no
model, no file and no pipeline.
"""

from importlib.util import find_spec

if find_spec("torch") is not None:  # without it ``edge`` uses what needs NumPy only
    from shira_diffusers.adapters.adapter import ShiraAdapter
    from shira_diffusers.adapters.delta import SparseDelta
    from shira_diffusers.adapters.merge import MERGE_METHODS, fuse

__all__ = ["MERGE_METHODS", "ShiraAdapter", "SparseDelta", "fuse"]
