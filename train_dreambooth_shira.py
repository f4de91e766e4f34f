"""Train a SHiRA adapter for Stable Diffusion from a few pictures: ``shira train``. See docs/training.md, or --help."""

import sys

from shira_command import train

if __name__ == "__main__":
    sys.exit(train(sys.argv[1:], "train_dreambooth_shira.py"))
