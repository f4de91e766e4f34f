"""Make the site of the repository's pages: links out of docs/ lead into it, pictures follow the colours.

Where pyproject.toml names no repository, links out of docs/ are their text alone.
"""

import posixpath
import re
import tomllib
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
SHARED = ("assets/styles.png",)  # pictures of the repository that pages show
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")
_PICTURE = re.compile(r'<picture><source media="[^"]*" srcset="([^"]+)"><img src="([^"]+)" alt="([^"]*)"></picture>')


def on_config(config: Any) -> Any:
    """Take the repository's address, if there is one, from where the package has it."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    config.repo_url = urls.get("Repository")
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the shared pictures to the site."""
    for path in SHARED:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def outward(link: re.Match[str], repository: str | None) -> str:
    """A link out of docs/, ``[text](../path#anchor)``: to a shared picture on the site, else into the repository."""
    mark, text, path, anchor = link.groups(default="")
    if path in SHARED:
        return f"{mark}[{text}]({path})"
    if repository is None:
        return text
    kind = "tree" if (ROOT / path).is_dir() else "blob"
    return f"{mark}[{text}]({posixpath.join(repository, kind, 'main', path)}{anchor})"


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """The page with links out of docs/ as addresses, and with pictures that follow the site's colours."""
    linked = _LINK.sub(lambda link: outward(link, config.repo_url), markdown)
    return _PICTURE.sub(r"![\3](\2#only-light)![\3](\1#only-dark)", linked)
