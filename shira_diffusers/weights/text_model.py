"""CLIP's text encoders name a parameter with ``text_model.`` or without it: transformers 5.6 dropped it.

Standard library only. In: names. Out: the other name of each; files may have either.
"""

PREFIX = "text_model."


def other_name(name: str) -> str:
    """The name that other versions of transformers give a parameter or layer, named without its component."""
    return name.removeprefix(PREFIX) if name.startswith(PREFIX) else PREFIX + name


def other_full_names(name: str) -> tuple[str, ...]:
    """The other names of a parameter that is named as in files: with its component, or of a bare module."""
    component, _, rest = name.partition(".")
    return other_name(name), f"{component}.{other_name(rest)}"
