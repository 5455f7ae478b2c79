"""Check every link of the built site: files and headings must be there; external ones are listed, not fetched.

python docs/check_links.py docs/_build/html
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = {"", "top"}
        self.feed(file.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            elif name in ("href", "src") and value:
                self.links.append(value)


def main() -> None:
    site = Path(sys.argv[1]).resolve()
    pages = {file: Page(file) for file in site.rglob("*.html")}
    broken, external = [], set()
    for file, page in pages.items():
        for link in page.links:
            scheme, host, path, _, anchor = urlsplit(link)
            if scheme or host:
                external |= set() if scheme == "data" else {link}
                continue
            target = (file.parent / unquote(path)).resolve() if path else file
            there = target.is_file() and (target not in pages or unquote(anchor) in pages[target].anchors)
            broken += [] if there else [f"{file.relative_to(site)}: {link}"]
    print(f"{len(pages)} pages, {sum(len(page.links) for page in pages.values())} links")
    print("\n".join(["external, not checked:", *sorted(external)]))
    if broken or not pages:
        sys.exit("\n".join(["broken:", *sorted(set(broken))]))


if __name__ == "__main__":
    main()
