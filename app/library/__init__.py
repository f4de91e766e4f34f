"""The adapters of the app: files on disk, uploads, and the cards that describe them."""
