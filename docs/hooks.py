"""What MkDocs cannot do by itself: take in the files outside docs/ that pages link to, and set mathematics as MathML.

A file outside docs/ (CHANGELOG.md, tables and pictures in benchmarks/results) lies in the site under its path in the
repository, so that the same links work here, in a clone, and where the repository is shown.
"""

from __future__ import annotations

import html
import os
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()[^)#\s:]+(?=[)#\s])")
MATHS = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)


def repository_path(page: File) -> str:
    """The path of a page in the repository, of which docs/ is the site's root."""
    return page.src_uri if page.generated_by else f"docs/{page.src_uri}"


def site_path(target: str, page: str) -> str:
    """Where in the site the file is that a page at this path in the repository names so."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def on_files(files: Files, config: Any) -> Files:
    pages = [file for file in files if file.is_documentation_page()]
    pages += [add(files, config, name) for name in ("CHANGELOG.md", "SECURITY.md", "CONTRIBUTING.md")]
    for page in pages:  # grows
        for target in LINK.findall(page.content_string):
            path = site_path(target, repository_path(page))
            if files.get_file_from_path(path) is None and (ROOT / path).is_file():
                added = add(files, config, path)
                if added.is_documentation_page():
                    pages.append(added)
    return files


def add(files: Files, config: Any, path: str) -> File:
    file = File.generated(config, path, abs_src_path=str(ROOT / path))
    if path.startswith("benchmarks/"):
        file.inclusion = InclusionLevel.NOT_IN_NAV
    files.append(file)
    return file


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    here = posixpath.dirname(page.file.src_uri)
    return LINK.sub(lambda m: os.path.relpath(site_path(m[0], repository_path(page.file)), here or "."), markdown)


def on_page_content(content: str, **_: Any) -> str:
    return MATHS.sub(lambda m: convert(html.unescape(m[2]), display="block" if m[1] == "div" else "inline"), content)
