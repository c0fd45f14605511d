"""A map of speeds: every framework in every experiment, beside the fastest one there."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import seaborn as sns
from markupsafe import Markup

from ptbench.analysis.collect import comparable
from ptbench.analysis.experiment import Analysis
from ptbench.backends import FRAMEWORKS
from ptbench.report import words
from ptbench.report.drawing import WIDTH, panels, save, style
from ptbench.report.formatting import framework_name, grouped
from ptbench.report.svg import inline_svg

SPEED = "tokens_per_second"
ROW = 0.26  # inches
LONGEST = 34  # characters of a row's label
# Not the page's own colours, which change places for readers who prefer the dark.
BLACK, WHITE = "#101214", "#fefefe"


class SpeedMap(NamedTuple):
    """The drawing and its words."""

    svg: Markup
    words: str


def relative_speeds(analyses: Sequence[Analysis]) -> pd.DataFrame:
    """Return each framework's speed as a share of the fastest one's, by experiment.

    A share is the geometric mean over the variants and numbers of devices that all of the
    experiment's frameworks ran, of usable rows whose speeds compare. With a single experiment there
    is a row for each variant. Where one framework ran alone there is nothing to compare, and no
    row.
    """
    single = len(analyses) == 1
    speeds = pd.DataFrame(
        [
            {
                "row": analysis.label(row.variant) if single else analysis.name,
                "variant": f"{row.variant} {row.devices}",
                "framework": row.framework,
                "log": np.log(row.value(SPEED) or np.nan),
            }
            for analysis in analyses
            for group in grouped(analysis.rows)
            if comparable(SPEED, fair := [row for row in group if row.usable and row.value(SPEED)])
            for row in fair
        ],
        columns=["row", "variant", "framework", "log"],
    )
    table = speeds.pivot_table("log", ["row", "variant"], "framework", sort=False)
    if table.empty:  # no run has finished yet
        return pd.DataFrame()
    shared = table.groupby(level="row", sort=False, group_keys=False).apply(
        lambda part: part.dropna(axis="columns", how="all").dropna()
    )
    means = shared.groupby(level="row", sort=False).mean().dropna(thresh=2)
    ordered = means.reindex(columns=[name for name in FRAMEWORKS if name in means])
    return pd.DataFrame(np.exp(ordered.sub(ordered.max(axis="columns"), axis="index")))


def draw_speed_map(analyses: Sequence[Analysis]) -> SpeedMap | None:
    """Draw `relative_speeds`; None unless there are two rows and two frameworks."""
    shares = relative_speeds(analyses)
    if min(shares.shape) < 2:
        return None
    fastest = shares.idxmax(axis="columns").value_counts()
    said = [f"{framework_name(str(name))} is fastest in {n}" for name, n in fastest.items()]
    labels = [shortened(str(row)) for row in shares.index]
    shades = sns.light_palette("#3f6690", as_cmap=True)
    with style(), tempfile.TemporaryDirectory() as folder:
        left = 0.3 + 0.075 * max(map(len, labels))
        figure, [[axes]] = panels(
            1, height=ROW * len(shares), left=left, right=0.2, above=0.35, below=0.1,
            width=min(WIDTH, left + 0.2 + 1.1 * len(shares.columns)),
        )  # fmt: skip
        sns.heatmap(
            shares.rename(columns=lambda name: framework_name(str(name))),
            ax=axes, vmin=0, vmax=1, cbar=False, annot=True, fmt=".2f", linewidths=1,
            cmap=shades, yticklabels=labels,
        )  # fmt: skip
        for text in axes.texts:
            text.set_color(BLACK if luminance(shades(float(text.get_text()))) > 0.18 else WHITE)
        axes.set(xlabel="", ylabel="")
        axes.tick_params(length=0, labeltop=True, labelbottom=False)
        axes.tick_params(axis="x", labelsize=7.5)
        save(figure, Path(folder) / "speeds")
        svg = inline_svg(Path(folder) / "speeds.svg", "speeds")
    return SpeedMap(svg, f"Of {len(shares)} rows, {words.listed(said)} (not tested).")


def shortened(label: str) -> str:
    """Return a label that leaves room for the map."""
    return label if len(label) <= LONGEST else f"{label[: LONGEST - 1]}…"


def luminance(colour: Sequence[float]) -> float:
    """Return the relative luminance of an sRGB colour (WCAG 2.1)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))
