"""Adapters on resident weights: plan a mix, save the bits that it overwrites, write, and write them back.

In: adapters and scales. Out: weights that hold ``round(base + sum of scale * delta)``, and the base's bits again
afterwards. Knows modules and their weights, neither files nor pipelines.
"""

from shira_diffusers.engine.resident import Resident

__all__ = ["Resident"]
