"""Endpoints for programs, called with ``gradio_client``: a file per subject."""
