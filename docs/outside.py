"""mkdocs hook: pages link to files of the repository outside of docs/; those are taken into the site at their paths.

A file that is linked to and shown by a browser (Markdown, pictures) becomes a page or file of the site, and so do those
that it links to. Other files and folders (scripts, results as a whole) lose their link and keep their words. What does
not exist fails the build.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
SHOWN = (".md", ".png")
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")


def on_files(files, config):
    """Add what pages link to, and what that links to."""
    waiting = [(f"docs/{file.src_uri}", file.content_string) for file in files.documentation_pages()]
    while waiting:
        page, text = waiting.pop()
        for *_, target in LINK.findall(text):
            path = _named(page, target)
            if path is None or not path.endswith(SHOWN) or files.get_file_from_path(_in_site(path)):
                continue
            files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
            if path.endswith(".md"):
                waiting.append((path, (ROOT / path).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn links from docs/ to elsewhere, and back, into links within the site."""
    own = page.file.src_uri
    here = own if page.file.src_dir == str(ROOT) else f"docs/{own}"

    def turned(found):
        mark, words, target = found.groups()
        path = _named(here, target)
        if path is None:
            return found[0]
        if not path.endswith(SHOWN):
            return words
        anchor = "".join(target.partition("#")[1:])
        return f"{mark}[{words}]({posixpath.relpath(_in_site(path), posixpath.dirname(own) or '.')}{anchor})"

    return LINK.sub(turned, markdown)


def _in_site(path):
    return path.removeprefix("docs/")


def _named(page, target):
    """The path in the repository that `target` in `page` names; None for a URL, an anchor, or from docs/ into docs/."""
    target = target.partition("#")[0]
    if not target or re.match(r"[a-z]+:", target):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
    if page.startswith("docs/") and path.startswith("docs/"):
        return None  # mkdocs looks after these itself
    if path.startswith("..") or not (ROOT / path).exists():
        raise PluginError(f"{page}: there is no {path}")
    return path
