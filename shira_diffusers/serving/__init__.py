"""Pictures for many clients from one resident pipeline, whose adapters change from one denoising step to the next.

In: requests with a mix of adapters each, over HTTP or from Python. Out: their pictures, step by step, each with the
bits that it has alone. Ray Serve runs the service on one machine or many.
"""

from typing import Any


def app(args: dict[str, Any]) -> Any:
    """The application for Ray Serve: ``serve run shira_diffusers.serving:app model=...``, or a config file's args.

    Args:
        args: see ``Settings``.

    Raises:
        ShiraError: args that are unknown or out of range.
    """
    from shira_diffusers.serving.deployment import application  # needs the extra `serve`
    from shira_diffusers.serving.settings import Settings

    return application(Settings.checked(args))
