"""The figures: legible to all, the same bytes for the same numbers, text that stays text."""

from __future__ import annotations

import itertools
import math
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.fake_results import plan, write_corpus, write_diverged, write_results

from ptbench.analysis.collect import CorpusFacts, collect_rows
from ptbench.analysis.experiment import FigureFile, analyse
from ptbench.backends import FRAMEWORKS
from ptbench.report.figures import (
    clock_parts,
    draw_learning_curves,
    last_finite,
    spread,
    write_figures,
)
from ptbench.report.palette import (
    CLOCKS,
    DARK_BACKGROUND,
    DARK_FRAMEWORK_COLOURS,
    DARK_INK,
    DARK_MUTED,
    FRAMEWORK_COLOURS,
    FRAMEWORK_MARKERS,
    INK,
    LIGHT_BACKGROUND,
    MUTED,
)
from ptbench.training.records import Seconds

# Machado, Oliveira and Fernandes (2009), table 1, severity 1.0; on linear RGB.
COLOUR_BLINDNESS = {
    "none": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
}


def linear_rgb(colour: str) -> np.ndarray:
    """IEC 61966-2-1."""
    encoded = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB, white point D65."""
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    scaled = to_xyz @ np.clip(rgb, 0, 1) / np.array([0.9505, 1.0, 1.089])
    f = np.where(scaled > 0.008856, np.cbrt(scaled), 7.787 * scaled + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(a: str, b: str) -> float:
    """WCAG 2.1, contrast ratio."""
    weights = np.array([0.2126, 0.7152, 0.0722])
    low, high = sorted(float(weights @ linear_rgb(c)) for c in (a, b))
    return (high + 0.05) / (low + 0.05)


PALETTES = [
    pytest.param(FRAMEWORK_COLOURS, LIGHT_BACKGROUND, id="light"),
    pytest.param(DARK_FRAMEWORK_COLOURS, DARK_BACKGROUND, id="dark"),
]


@pytest.mark.parametrize(("palette", "background"), PALETTES)
def test_every_framework_has_its_colour_and_marker(
    palette: dict[str, str], background: str
) -> None:
    assert set(palette) == set(FRAMEWORKS)
    assert len({FRAMEWORK_MARKERS[framework] for framework in FRAMEWORKS}) == len(FRAMEWORKS)
    assert min(contrast(colour, background) for colour in palette.values()) >= 3


@pytest.mark.parametrize("kind", COLOUR_BLINDNESS)
@pytest.mark.parametrize(("palette", "background"), PALETTES)
def test_colours_stay_apart_for_the_colour_blind(
    palette: dict[str, str], background: str, kind: str
) -> None:
    seen = [lab(COLOUR_BLINDNESS[kind] @ linear_rgb(colour)) for colour in palette.values()]
    distances = [np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)]
    assert min(distances) >= 20, background


def test_text_is_legible_in_both_palettes() -> None:
    for text in (INK, MUTED):
        assert contrast(text, LIGHT_BACKGROUND) >= 4.5
    for text in (DARK_INK, DARK_MUTED):
        assert contrast(text, DARK_BACKGROUND) >= 4.5


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_labels_never_overlap_and_move_only_if_they_must(heights: list[float]) -> None:
    heights = sorted(heights)
    gap = 0.1
    places = spread(heights, gap)
    assert all(b - a >= gap - 1e-9 for a, b in itertools.pairwise(places))
    assert places[0] >= -1e-9
    assert places[-1] <= 1 + 1e-9
    if all(b - a >= gap for a, b in itertools.pairwise(heights)):
        assert places == pytest.approx(heights)


def draw(results: Path, folder: Path) -> tuple[FigureFile, ...]:
    experiment = plan(devices=(1, 2))
    write_results(results, experiment)
    write_corpus(results, floor_perplexity=100.0)
    for seed in (1, 2, 3):  # a framework without any result
        (results / f"cells/tiny/keras/devices-1/seed-{seed}/metrics.json").unlink()
    rows = collect_rows(experiment, results)
    analysis = analyse(experiment, rows, CorpusFacts(floor_perplexity=100.0), [])
    for row in analysis.rows:
        if row.n_ok:
            total = np.mean(row.seeds("total_seconds"))
            assert sum(clock_parts(row).values()) == pytest.approx(total)
    return write_figures(analysis, rows, folder)


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[FigureFile, ...]]:
    folder = tmp_path_factory.mktemp("figures")
    return folder / "a", draw(folder / "results", folder / "a")


def test_the_same_numbers_give_the_same_bytes(
    figures: tuple[Path, tuple[FigureFile, ...]], tmp_path: Path
) -> None:
    folder, files = figures
    draw(tmp_path / "results", tmp_path / "again")
    for file in files:
        for suffix in (".svg", ".png"):
            path = (folder / file.name).with_suffix(suffix)
            assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_text_in_the_drawings_stays_text(figures: tuple[Path, tuple[FigureFile, ...]]) -> None:
    folder, files = figures
    for file in files:
        root = ElementTree.parse(folder / f"{file.name}.svg")
        words = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
        assert {"PyTorch", "TensorFlow", "MXNet", "JAX", "tiny, 1 device, stock"} <= words


def test_no_drawing_fetches_anything_or_carries_a_date(
    figures: tuple[Path, tuple[FigureFile, ...]],
) -> None:
    folder, files = figures
    for file in files:
        text = (folder / f"{file.name}.svg").read_text()
        assert "dc:date" not in text
        assert "<image" not in text
        assert "@import" not in text


def test_each_figure_says_in_words_what_it_shows(
    figures: tuple[Path, tuple[FigureFile, ...]],
) -> None:
    for file in figures[1]:
        assert "Keras no result" in file.alternative
        assert file.title
        assert file.caption


def test_an_experiment_without_any_result_has_no_figures(tmp_path: Path) -> None:
    experiment = plan()
    rows = collect_rows(experiment, tmp_path)
    assert write_figures(analyse(experiment, rows, CorpusFacts(), []), rows, tmp_path / "f") == ()
    assert not (tmp_path / "f").exists()


def test_the_clocks_of_the_figure_are_those_that_a_run_records() -> None:
    assert {*CLOCKS, "total"} - {"other"} == set(Seconds.model_fields)


@pytest.mark.parametrize(("epochs", "place"), [(3, "value"), (0, "upper edge")])
def test_a_diverged_run_is_a_cross_at_its_last_finite_value(
    tmp_path: Path, epochs: int, place: str
) -> None:
    experiment = plan(frameworks=("jax",), seeds=(1,))
    write_diverged(tmp_path, experiment.cells[0], epochs=epochs)
    rows = collect_rows(experiment, tmp_path)
    axes = draw_learning_curves(rows).axes[0]
    [cross] = [line for line in axes.lines if line.get_marker() == "X"]
    point = (cross.get_xdata()[0], cross.get_ydata()[0])
    if place == "value":
        [result] = rows[0].results("diverged").values()
        assert point == (3, pytest.approx(math.exp(result.history[-1].valid_nll)))
    else:
        assert point == (1, 1)
        assert cross.get_transform() == axes.get_xaxis_transform()
    [file] = write_figures(analyse(experiment, rows, CorpusFacts(), []), rows, tmp_path / "f")
    assert "Crosses are runs that diverged" in file.caption
    assert "1 of 1 diverged" in file.alternative


def test_a_run_that_ended_beyond_all_numbers_is_drawn_where_it_was_finite(tmp_path: Path) -> None:
    experiment = plan(frameworks=("jax",), seeds=(1,))
    write_diverged(tmp_path, experiment.cells[0], epochs=3)
    [row] = collect_rows(experiment, tmp_path)
    [cell] = row.cells
    assert cell.result is not None
    first, second, last = cell.result.history
    endless = last.model_copy(update={"valid_nll": math.inf})
    result = cell.result._replace(history=(first, second, endless))
    assert last_finite(replace(cell, result=result)) == (2, math.exp(second.valid_nll))


def test_the_users_own_plotting_settings_change_nothing(
    figures: tuple[Path, tuple[FigureFile, ...]], tmp_path: Path
) -> None:
    folder, files = figures
    with matplotlib.rc_context({"text.usetex": True, "savefig.bbox": "tight", "lines.marker": "o"}):
        draw(tmp_path / "results", tmp_path / "again")
    for path in ((folder / file.name).with_suffix(".svg") for file in files):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
