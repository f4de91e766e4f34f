"""The recipe of assets/emoji-diffusion: a small Stable Diffusion trained from scratch on Noto Color Emoji."""
