"""The folder a page is written to: pictures for the page and as PNG, tables as CSV, every file renamed into place."""

from __future__ import annotations

import base64
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from fedeat.report.figures import png, svg


@dataclass(frozen=True)
class Panel:
    """One picture of a figure: `name` without an extension, `image` a data URI, `alt` what it shows."""

    name: str
    image: str
    alt: str
    width: int


@dataclass
class Canvas:
    """The folder a page is written to; draws each figure once for the page and once as PNG."""

    folder: Path
    names: set[str] = field(default_factory=set)

    def panel(self, figure: Figure, name: str, alt: str) -> Panel:
        """Writes the figure as PNG and returns it for the page."""
        stem = self.unique(name)
        self.picture(figure, stem)
        figure.set_layout_engine("none")  # laid out by the first drawing, and costly
        encoded = base64.b64encode(svg(figure).encode()).decode()
        pixels = round(96 * figure.get_figwidth())
        return Panel(stem, f"data:image/svg+xml;base64,{encoded}", alt, pixels)

    def picture(self, figure: Figure, stem: str) -> None:
        """Writes the figure as PNG only."""
        write_file(self.folder / "figures" / f"{stem}.png", png(figure))

    def csv(self, text: str, name: str) -> str:
        """Writes a table as CSV and returns its path relative to the page."""
        stem = self.unique(name)
        write_file(self.folder / "tables" / f"{stem}.csv", text.encode())
        return f"tables/{stem}.csv"

    def unique(self, name: str) -> str:
        """A file name that is safe everywhere and not taken yet on this page."""
        stem = re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-.")[:80] or "figure"
        candidate, count = stem, 1
        while candidate.lower() in self.names:
            count += 1
            candidate = f"{stem}-{count}"
        self.names.add(candidate.lower())
        return candidate


def write_file(path: Path, content: bytes) -> None:
    """Writes to a new file and renames it, so that a kill leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(content)
    os.replace(new, path)
