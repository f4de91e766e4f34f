"""Make the site of the repository's pages: links out of docs/ lead into it, pictures follow the colours."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
SHARED = ("assets/styles.png",)  # pictures of the repository that pages show
_LINK = re.compile(r"(?<=\]\()\.\./([^)#\s]+)")
_PICTURE = re.compile(r'<picture><source media="[^"]*" srcset="([^"]+)"><img src="([^"]+)" alt="([^"]*)"></picture>')


def on_files(files: Files, config: Any) -> Files:
    """Add the shared pictures to the site."""
    for path in SHARED:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def outward(path: str, repository: str) -> str:
    """Where a path of the repository lies: on the site if it is a shared picture, else in the repository."""
    if path in SHARED:
        return path
    kind = "tree" if (ROOT / path).is_dir() else "blob"
    return posixpath.join(repository, kind, "main", path)


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """The page with links out of docs/ as addresses, and with pictures that follow the site's colours."""
    linked = _LINK.sub(lambda link: outward(link[1], config.repo_url), markdown)
    return _PICTURE.sub(r"![\3](\2#only-light)![\3](\1#only-dark)", linked)
