"""Sparse training of any model: one flat float32 parameter holds all deltas.

In: a module and masks. Out: a ``SparseTuner`` to step, or gradients that are zero off the mask (``mask_gradients``).
Knows no pictures, prompts or diffusion.
"""

from shira_diffusers.training.masking import mask_gradients
from shira_diffusers.training.tuner import SparseTuner

__all__ = ["SparseTuner", "mask_gradients"]
