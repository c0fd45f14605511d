"""Drawings as elements of a page."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from markupsafe import Markup

from ptbench.report.palette import PAGE_VARIABLES

SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"


def inline_svg(path: Path, prefix: str) -> Markup:
    """Return a drawing as an element of the page.

    Its ids get a prefix, because two drawings on a page must not share one. Its colours become the
    page's variables, so that it follows the reader's choice of light or dark. It is hidden from
    screen readers, which read the words beside it.

    Args:
        path: the SVG file.
        prefix: of its ids.
    """
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    for parent in root.iter():
        for child in list(parent):
            if child.tag in {f"{{{SVG}}}metadata", f"{{{SVG}}}style"}:
                parent.remove(child)
    for element in root.iter():
        for key, value in element.attrib.items():
            element.set(key, _inline_attribute(key, value, prefix))
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("aria-hidden", "true")
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _inline_attribute(key: str, value: str, prefix: str) -> str:
    if key == "id":
        return f"{prefix}-{value}"
    if key == f"{{{XLINK}}}href":
        return value.replace("#", f"#{prefix}-", 1)
    value = re.sub(r"url\(#", f"url(#{prefix}-", value)
    if key == "style":
        for colour, variable in PAGE_VARIABLES.items():
            value = value.replace(colour, f"var({variable})")
    return value
