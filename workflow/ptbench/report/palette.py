"""Colours and markers: one of each per framework, for light paper and for a dark screen.

Within each palette any two frameworks are at least 20 CIELAB units apart under normal vision and
under protanopia and deuteranopia (after Machado et al. 2009), and each has a contrast of at
least 3:1 on its background (WCAG 2.1, 1.4.11). Tests check both. Markers differ too.
"""

from __future__ import annotations

from ptbench.backends import FRAMEWORKS

LIGHT_BACKGROUND = "#ffffff"
DARK_BACKGROUND = "#14171a"

FRAMEWORK_COLOURS = {framework: row.colour for framework, row in FRAMEWORKS.items()}
DARK_FRAMEWORK_COLOURS = {framework: row.dark_colour for framework, row in FRAMEWORKS.items()}
FRAMEWORK_MARKERS = {framework: row.marker for framework, row in FRAMEWORKS.items()}

INK, DARK_INK = "#1f2328", "#e6e8eb"
MUTED, DARK_MUTED = "#5f6772", "#a3abb5"  # secondary text, reference lines
GRID, DARK_GRID = "#e2e5e9", "#2e343b"

# Where a run's time went: name and colour of each clock of `Seconds`, and of what is left of the
# total. From light to dark, so that they differ in grey too.
CLOCKS = {
    "load": ("load data", "#d9c39a"),
    "start_up": ("start up", "#b7c4d3"),
    "compile": ("compile", "#8aa5c2"),
    "training": ("train", "#3f6690"),
    "validation": ("validate", "#6d9a86"),
    "test": ("test", "#55796a"),
    "accuracy": ("accuracy", "#a9bf8f"),
    "checkpointing": ("save", "#9b7b8f"),
    "other": ("other", "#c9cdd2"),
}

# What a figure's colour becomes on the page, where the reader's preference decides.
PAGE_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    LIGHT_BACKGROUND: "--background",
    **{colour: f"--{framework}" for framework, colour in FRAMEWORK_COLOURS.items()},
}

# The variables' values for either preference.
LIGHT_PAGE = {
    "ink": INK,
    "muted": MUTED,
    "grid": GRID,
    "background": LIGHT_BACKGROUND,
    **FRAMEWORK_COLOURS,
}
DARK_PAGE = {
    "ink": DARK_INK,
    "muted": DARK_MUTED,
    "grid": DARK_GRID,
    "background": DARK_BACKGROUND,
    **DARK_FRAMEWORK_COLOURS,
}
