"""Masks: which entries of a weight are trained.

In: a model, a family (a name or a function), a density. Out: sorted flat indices by parameter name. A new family is a
function in ``families.py`` and a line in its table.
"""

from shira_diffusers.masks.families import build_masks

__all__ = ["build_masks"]
