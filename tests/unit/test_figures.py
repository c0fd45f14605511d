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
from matplotlib.collections import LineCollection
from tests.support.fake_results import (
    plan,
    write_corpus,
    write_diverged,
    write_results,
)

from ptbench.analysis.collect import CorpusFacts, Row, collect_rows
from ptbench.analysis.experiment import Analysis, FigureFile, RowResult, analyse
from ptbench.analysis.plan import PlannedVariant
from ptbench.analysis.published import PublishedValue
from ptbench.backends import FRAMEWORKS
from ptbench.configuration.specification import whole
from ptbench.report.figures import (
    choose,
    clock_parts,
    curve,
    draw_curves,
    draw_list,
    draw_scaling,
    draw_sweep,
    front,
    last_finite,
    profile,
    scaling,
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


def draw(results: Path, folder: Path) -> tuple[FigureFile, ...]:
    experiment = plan(devices=(1, 2))
    write_results(results, experiment)
    write_corpus(results, floor_perplexity=100.0)
    for seed in (1, 2, 3):  # a framework without any result
        (results / f"cells/tiny/keras/devices-1/seed-{seed}/metrics.json").unlink()
    rows = collect_rows(experiment, results)
    facts = CorpusFacts(floor_perplexity=100.0, kneser_ney_nll_nats={3: {"test": np.log(150.0)}})
    analysis = analyse(experiment, rows, facts, [])
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
        path = folder / f"{file.name}.svg"
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_text_in_the_drawings_stays_text(figures: tuple[Path, tuple[FigureFile, ...]]) -> None:
    folder, files = figures
    for file in files:
        root = ElementTree.parse(folder / f"{file.name}.svg")
        words = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
        assert {"PyTorch", "TensorFlow", "MXNet", "JAX"} <= words


def test_reference_lines_are_named_with_their_perplexities(
    figures: tuple[Path, tuple[FigureFile, ...]],
) -> None:
    folder, _ = figures
    root = ElementTree.parse(folder / "perplexity.svg")
    words = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"floor of the corpus, 100.00", "Kneser-Ney 3-gram, 150.00"} <= words


def test_no_reference_line_crosses_a_heading(tmp_path: Path) -> None:
    analysis, _ = studied(tmp_path, lengths(2))
    analysis = analysis.model_copy(update={"floor_perplexity": 100.0})
    [axes] = draw_list(analysis, analysis.metric).axes
    [floor] = [c for c in axes.collections if isinstance(c, LineCollection)]
    headings = [text.xy[1] for text in axes.texts if text.get_weight() == "bold"]
    assert len(headings) == 2
    for y in headings:
        assert not any(top < y < end for (_, top), (_, end) in floor.get_segments())


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
        assert "Keras no result" in file.alternative or file.name == "front"
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
    analysis = analyse(experiment, rows, CorpusFacts(), [])
    axes = draw_curves(analysis, rows).axes[0]
    [cross] = [line for line in axes.lines if line.get_marker() == "X"]
    point = (cross.get_xdata()[0], cross.get_ydata()[0])
    if place == "value":
        [result] = rows[0].results("diverged").values()
        assert point == (3, pytest.approx(math.exp(result.history[-1].valid_nll)))
    else:
        assert point == (1, 1)
        assert cross.get_transform() == axes.get_xaxis_transform()
    [file] = write_figures(analysis, rows, tmp_path / "f")
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


def studied(
    results: Path,
    settings: dict[str, dict[str, int]],
    devices: tuple[int, ...] = (1,),
    frameworks: tuple[str, ...] = ("pytorch", "jax"),
) -> tuple[Analysis, list[Row]]:
    """Return the analysis of variants with these settings, and its rows."""
    experiment = plan(variants=tuple(settings), devices=devices, frameworks=frameworks)
    known = {name: PlannedVariant(settings=of) for name, of in settings.items()}
    experiment = experiment.model_copy(update={"variants": known})
    write_results(results, experiment, speed={"jax": 20_000.0})
    write_diverged(results, experiment.cells[0], epochs=2)
    rows = collect_rows(experiment, results)
    value = PublishedValue(
        experiment="demo", variant=whole(next(iter(settings))), framework=None, devices=1,
        metric="test_perplexity", value=120.0, source="paper", locator="Table 1", note="",
    )  # fmt: skip
    return analyse(experiment, rows, CorpusFacts(), [value]), rows


def lengths(count: int) -> dict[str, dict[str, int]]:
    return {
        f"tiny+sequence_length={5 * n}": {"sequence_length": 5 * n} for n in range(1, count + 1)
    }


def test_no_published_number_stands_beside_reduced_runs(tmp_path: Path) -> None:
    for name, drawn in (("tiny", True), ("tiny+budget=smoke", False)):
        analysis, rows = studied(tmp_path, {name: {}})
        assert len(analysis.published) == 2  # one in each framework
        drawings = {drawing.file.name: drawing for drawing in choose(analysis, rows)}
        [axes] = drawings["perplexity"].draw().axes
        assert ("D" in [line.get_marker() for line in axes.lines]) == drawn


def test_a_sweep_of_fourteen_values_is_one_figure_on_a_page(tmp_path: Path) -> None:
    analysis, rows = studied(tmp_path, lengths(14))
    drawings = {drawing.file.name: drawing for drawing in choose(analysis, rows)}
    assert list(drawings) == [
        "sweep-sequence-length", "learning-curves", "front", "performance-profile", "seconds",
    ]  # fmt: skip
    for drawing in drawings.values():
        width, height = drawing.draw().get_size_inches()
        assert height < 2.5 * width
    upper, lower = drawings["sweep-sequence-length"].draw().axes
    lines = [line for line in upper.lines if len(line.get_xdata()) == 14]
    assert len(lines) == 2  # one for each framework
    for line, framework in zip(lines, ("pytorch", "jax"), strict=True):
        assert line.get_marker() == FRAMEWORK_MARKERS[framework]
        expected = [r.value("test_perplexity") for r in analysis.rows if r.framework == framework]
        assert list(line.get_ydata()) == expected
    assert [line.get_xydata().tolist() for line in upper.lines if line.get_marker() == "D"] == [
        [[5.0, 120.0]]
    ]
    assert [line.get_marker() for line in upper.lines].count("X") == 1  # the diverged seed
    assert lower.get_xlabel() == "Sequence length"


def test_a_second_swept_key_has_line_styles(tmp_path: Path) -> None:
    settings = {
        f"tiny+hidden_size={width}+layers={layers}": {"hidden_size": width, "layers": layers}
        for layers in (1, 2)
        for width in (100, 200, 400)
    }
    analysis, rows = studied(tmp_path, settings)
    [sweep] = analysis.sweeps
    axes = draw_sweep(analysis, rows, sweep).axes[0]
    styles = {line.get_linestyle() for line in axes.lines if len(line.get_xdata()) == 3}
    assert len(styles) == 2
    [file] = [d.file for d in choose(analysis, rows) if d.file.name == "sweep-hidden-size"]
    assert "full, layers 1; broken, layers 2" in file.caption


def test_scaling_shows_the_ratio_of_speeds(tmp_path: Path) -> None:
    analysis, _ = studied(tmp_path, {"tiny": {}}, devices=(1, 2, 4))
    time, faster, efficiency, score = draw_scaling(analysis).axes
    for index, framework in enumerate(("pytorch", "jax")):
        rows = [row for row in analysis.rows if row.framework == framework]
        speeds = np.array([row.value("tokens_per_second") for row in rows])
        assert faster.lines[index].get_ydata() == pytest.approx(speeds / speeds[0])
        shares = speeds / speeds[0] / (1, 2, 4)
        assert efficiency.lines[index].get_ydata() == pytest.approx(shares)
    assert list(faster.lines[2].get_ydata()) == [1, 2, 4]
    assert (time.get_title(), score.get_title()) == ("Time per epoch [s]", "Test perplexity")


def test_of_many_variants_scaling_is_the_geometric_mean(tmp_path: Path) -> None:
    analysis, _ = studied(tmp_path, lengths(5), devices=(1, 2))
    means = scaling(analysis, "tokens_per_second")
    assert list(means) == [("", "pytorch"), ("", "jax")]
    values = [
        row.value("tokens_per_second")
        for row in analysis.rows
        if (row.framework, row.devices) == ("jax", 2)
    ]
    assert means["", "jax"][2] == pytest.approx(np.exp(np.mean(np.log(values))))


def test_the_front_is_of_rows_that_none_beats_in_both(tmp_path: Path) -> None:
    analysis, _ = studied(tmp_path, lengths(6), devices=(1, 2))
    best = front(analysis)

    def place(row: RowResult) -> tuple[float, float]:
        return row.value("total_seconds") or 0, row.value(analysis.metric) or 0

    for row in analysis.rows:
        beaten = any(all(a < b for a, b in zip(place(o), place(row), strict=True)) for o in best)
        assert beaten != (row in best)


def test_a_profile_has_the_fastest_at_one(tmp_path: Path) -> None:
    analysis, _ = studied(tmp_path, lengths(4))
    ratios = profile(analysis)
    assert ratios["jax"] == [1.0] * 4  # drawn twice as fast
    assert all(1.8 < ratio < 2.3 for ratio in ratios["pytorch"])
    shared = analysis.rows[0].model_copy(update={"cells_at_once": 2})
    unfair = analysis.model_copy(update={"rows": (shared, *analysis.rows[1:])})
    assert profile(unfair)["jax"] == [1.0] * 3  # without the variant of that row


def test_bars_of_time_are_over_what_every_framework_has_finished(tmp_path: Path) -> None:
    analysis, rows = studied(tmp_path, lengths(5))
    lost = [
        row.model_copy(update={"n_ok": 0}) if (row.variant, row.framework) == lacking else row
        for row in analysis.rows
        for lacking in [(analysis.variants[4].name, "jax")]
    ]
    analysis = analysis.model_copy(update={"rows": tuple(lost)})
    [seconds] = [d for d in choose(analysis, rows) if d.file.name == "seconds"]
    assert "the mean over those 4 of 5 variants" in seconds.file.caption
    [axes] = seconds.draw().axes
    own = [row for row in analysis.rows if row.framework == "pytorch"][:4]
    expected = np.mean([sum(clock_parts(row).values()) for row in own])
    widths = [bar.get_width() for bar in axes.patches[: len(CLOCKS)]]
    assert axes.get_xlabel() == "Minutes of a run"
    assert sum(widths) == pytest.approx(expected / 60)


def test_the_caption_of_scaling_counts_the_variants_that_are_whole(tmp_path: Path) -> None:
    analysis, rows = studied(tmp_path, lengths(5), devices=(1, 2))
    lost = analysis.rows[-1].model_copy(update={"usable": False})
    analysis = analysis.model_copy(update={"rows": (*analysis.rows[:-1], lost)})
    [drawing] = [d for d in choose(analysis, rows) if d.file.name == "scaling"]
    assert "on every number of devices: PyTorch 5, JAX 4 of 5." in drawing.file.caption


def test_a_curve_is_the_mean_of_its_seeds(tmp_path: Path) -> None:
    analysis, rows = studied(tmp_path, {"tiny": {}})
    histories = [result.history for result in rows[1].results().values()]
    found = curve(rows[1])
    third = [history[2].valid_nll for history in histories]
    assert found.valid[2] == pytest.approx(math.exp(np.mean(third)))
    assert (found.low[2], found.high[2]) == (math.exp(min(third)), math.exp(max(third)))
    assert found.seconds[2] == pytest.approx(3 * 93)
    by_time = draw_curves(analysis, rows).axes[1]
    assert by_time.get_xlabel() == "Minutes"
    assert by_time.lines[0].get_xdata()[2] == pytest.approx(3 * 93 / 60)
