"""diffusers: ``load_shira`` and its family on every pipeline, an attention processor, and side branches.

In: pipelines and attention modules. Out: calls of the engine. All that depends on diffusers' interfaces stands here.
"""

from shira_diffusers.integrations.attention import (
    ShiraAttnProcessor,
    remove_shira_attn_processors,
    set_shira_attn_processors,
)
from shira_diffusers.integrations.extract import extract_adapter
from shira_diffusers.integrations.pipelines import install

__all__ = [
    "ShiraAttnProcessor",
    "extract_adapter",
    "install",
    "remove_shira_attn_processors",
    "set_shira_attn_processors",
]
