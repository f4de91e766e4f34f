"""SHiRA on models that diffusers does not know: a tiny Llama and a tiny ViT, compared with LoRA."""
