"""Adapters without torch: ONNX Runtime sessions whose weights are overwritten, so that no session is built anew.

In: a folder that ``shira export-onnx`` wrote, and adapter files. Out: sessions that draw with the active mix, and the
base's bits again afterwards. Needs numpy, safetensors and onnxruntime; only ``export`` needs torch and onnx.
"""

from shira_diffusers.edge.resident import OnnxResident

__all__ = ["OnnxResident"]
