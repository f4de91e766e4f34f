"""Pictures without torch: ONNX Runtime, numpy, tokenizers, and an adapter file."""
