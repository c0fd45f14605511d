"""Colours and markers, one per framework everywhere, on light paper and on a dark screen.

Within each palette any two frameworks stay at least 20 CIELAB units apart under normal vision and
under protanopia and deuteranopia (after Machado et al. 2009), and each has a contrast of at
least 3:1 on its background (WCAG 2.1, 1.4.11); tests hold both. Markers differ too.
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

# Where a run's time went; from light to dark, so that they differ in grey too.
CLOCK_COLOURS = {
    "load": "#d9c39a",
    "start_up": "#b7c4d3",
    "compile": "#8aa5c2",
    "training": "#3f6690",
    "evaluation": "#6d9a86",
    "checkpointing": "#9b7b8f",
    "other": "#c9cdd2",
}

# What a figure's colour becomes on the page, where the reader's preference decides.
PAGE_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    LIGHT_BACKGROUND: "--background",
    **{colour: f"--{framework}" for framework, colour in FRAMEWORK_COLOURS.items()},
}
