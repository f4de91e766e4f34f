"""Make the text of the package page: the README, with links that lead into the repository at the release's tag.

Where pyproject.toml names no repository, the text of links stays, and pictures are left out. All else about the package
stands in pyproject.toml.
"""

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
_LINK = re.compile(r'(!?)(\[[^\]]*\]\(|<img src=")(?![a-z]+:|#)([^)"\s]+)')


_WHOLE_LINK = re.compile(r"!\[[^\]]*\]\((?![a-z]+:)[^)]*\)|<img [^>]*>|\[([^\]]*)\]\((?![a-z]+:|#)[^)]*\)")


def package_page(readme: str, repository: str | None, tag: str) -> str:
    """The README with absolute links: of pictures to the files themselves, of others to their pages."""
    if repository is None:
        return _WHOLE_LINK.sub(lambda link: link[1] or "", readme)

    def absolute(link: re.Match[str]) -> str:
        is_picture = link[1] or link[2].startswith("<img")
        return f"{link[1]}{link[2]}{repository}/{'raw' if is_picture else 'blob'}/{tag}/{link[3]}"

    return _LINK.sub(absolute, readme)


if __name__ == "__main__":
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    page = package_page(
        (ROOT / "README.md").read_text(encoding="utf-8"), project["urls"].get("Repository"), f"v{project['version']}"
    )
    setup(long_description=page, long_description_content_type="text/markdown")
