"""Hundreds of adapters for one model: a folder, a cache in RAM and one on the device, each within a budget.

In: a folder of files and a module. Out: the adapter asked for, active, however many there are.
"""

from shira_diffusers.library.adapter_library import AdapterLibrary
from shira_diffusers.library.two_tier_cache import NoRoomError

__all__ = ["AdapterLibrary", "NoRoomError"]
