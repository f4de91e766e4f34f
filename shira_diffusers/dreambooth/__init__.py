"""The DreamBooth trainer: pictures, captions and a pipeline folder in, an adapter with its model card out.

Needs the ``train`` extra. ``train.py`` reads from top to bottom; a model family is a row of ``families.py``, a flag a
field of ``config.py``.
"""
