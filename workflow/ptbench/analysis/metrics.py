"""METRICS: one row for each metric of a run. Everything that handles metrics reads this table.

Collecting, statistics, tables, CSV files, figures, pages and published numbers go through it. To
add a metric, measure it in `training/records.py` and add a row here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from pydantic import Field

from ptbench.analysis.statistics import as_sample, t_interval
from ptbench.model.recipe import Model
from ptbench.training.records import Epoch, Hardware, Metrics, Score, Seconds, perplexity

NOTHING = "\N{EN DASH}"  # stands where there is no number
FEWEST_OF_QUARTILES = 5  # values; of fewer, a median's range is shown


class Result(NamedTuple):
    """What a finished run left."""

    metrics: Metrics
    history: tuple[Epoch, ...]
    flops_per_token: float | None = None  # of a training step's products; None: unknown
    rent_per_second: float | None = None  # of the GPUs or CPU cores that it held; None: unknown


class Summary(Model):
    """What the seeds of one row say about one metric.

    `summarise_perplexity`, `summarise_median` and `summarise_largest` define the numbers.
    """

    n: int = Field(ge=1, description="Seeds.")
    value: float = Field(description="The number that stands for all seeds.")
    std: float | None = Field(None, description="Sample standard deviation of the seeds' numbers.")
    low: float | None = Field(
        None, description="Lower end of the interval; of a median, lower quartile or least."
    )
    high: float | None = Field(
        None, description="Upper end of the interval; of a median, upper quartile or largest."
    )
    nll: float | None = Field(None, description="Mean over seeds [nats per token]; perplexities.")
    nll_std: float | None = Field(None, description="Its sample standard deviation over seeds.")


def summarise_perplexity(nlls: Sequence[float]) -> Summary:
    """Summarise the mean nll of each seed [nats per token] as a perplexity.

    The value is exp of the mean nll, the geometric mean of the seeds' perplexities. `low` and
    `high` are the exponentiated ends of the 95 % t interval of the mean nll, so the interval holds
    the value and is not symmetric. `std` is that of the seeds' own perplexities, because other
    papers print it after ±.
    """
    sample = as_sample(nlls)
    several = len(sample) > 1
    low, high = t_interval(sample) or (None, None)
    return Summary(
        n=len(sample),
        value=perplexity(float(sample.mean())),
        std=float(as_sample([perplexity(nll) for nll in nlls]).std(ddof=1)) if several else None,
        low=None if low is None else perplexity(low),
        high=None if high is None else perplexity(high),
        nll=float(sample.mean()),
        nll_std=float(sample.std(ddof=1)) if several else None,
    )


def summarise_median(values: Sequence[float]) -> Summary:
    """Summarise times or rates, whose outliers all lie on one side, by median and quartiles.

    Quartiles interpolate linearly: definition 7 of Hyndman and Fan (1996), "Sample quantiles in
    statistical packages", The American Statistician 50, 361-365. Of fewer than five values they
    would be made up, so `low` and `high` are the least and the largest.
    """
    sample = as_sample(values)
    ends = [0, 50, 100] if len(sample) < FEWEST_OF_QUARTILES else [25, 50, 75]
    low, median, high = (float(q) for q in np.percentile(sample, ends))
    return Summary(n=len(sample), value=median, low=low, high=high)


def summarise_largest(values: Sequence[float]) -> Summary:
    """Summarise sizes by the largest, which is what a machine must have room for."""
    return Summary(n=len(values), value=max(values))


def write_perplexity(value: float, beside: float | None = None) -> str:
    """Write two decimals below 10,000 and none above.

    Args:
        value: a perplexity, or a standard deviation.
        beside: the perplexity whose deviation it is, which then decides.
    """
    if math.isinf(value):
        return "∞"
    return f"{value:,.2f}" if (beside or value) < 10_000 else f"{value:,.0f}"


def write_share(value: float, decimals: int = 1) -> str:
    """Write a share in percent."""
    return f"{100 * value:.{decimals}f} %"


def write_count(value: float) -> str:
    """Write a whole number with its thousands separated."""
    return f"{value:,.0f}"


def write_millions(value: float) -> str:
    """Write millions with three decimals, as the literature does; whole below a million."""
    return f"{value / 1e6:.3f} M" if value >= 1_000_000 else f"{value:,.0f}"


def write_bytes(value: float) -> str:
    """Write MB or GB (powers of ten)."""
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


def write_seconds(value: float) -> str:
    """Write seconds up to ten minutes, then minutes, then hours and minutes: three digits."""
    if value < 600:
        return f"{value:.1f} s" if value < 100 else f"{value:.0f} s"
    if value < 2 * 60 * 60:
        return f"{value / 60:.1f} min"
    minutes = round(value / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def write_short_seconds(value: float) -> str:
    """Write milliseconds below a second."""
    return f"{value * 1000:.3g} ms" if value < 1 else write_seconds(value)


def write_flops(value: float) -> str:
    """Write GFLOP/s or TFLOP/s."""
    return f"{value / 1e12:.3g} TFLOP/s" if value >= 1e12 else f"{value / 1e9:.3g} GFLOP/s"


def write_joules(value: float) -> str:
    """Write J, kJ or MJ."""
    for size, unit in ((1e6, "MJ"), (1e3, "kJ")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} J"


class Kind(NamedTuple):
    """How the seeds of a row become one number."""

    summarise: Callable[[Sequence[float]], Summary]
    value: str  # what the number is, in words
    spread: str  # what `low` and `high` are, in words
    column: str  # ending of the number's column in a CSV file


PERPLEXITY = Kind(summarise_perplexity, "mean", "95 % t interval", "")
MEDIAN = Kind(summarise_median, "median", "quartiles, or the range", "_median")
LARGEST = Kind(summarise_largest, "largest", "", "")


@dataclass(frozen=True)
class Metric:
    """One row of METRICS."""

    name: str  # in files
    title: str  # in headings and figures
    header: str | None  # of its column in printed tables; None: it is in the CSV files alone
    unit: str  # of the stored number; empty where it has none
    better: Literal["lower", "higher", "neither"]
    kind: Kind
    write: Callable[[float], str]  # for people
    read: Callable[[Result], float | None]  # from a run; of a perplexity, the mean nll [nats]

    @property
    def depends_on_machine(self) -> bool:
        """Whether another machine gives another number: times, speeds and memory."""
        return self.unit in (
            "s",
            "tokens/s",
            "FLOP/s",
            "bytes",
            "cores",
            "share",
            "W",
            "J",
            "money",
        )

    @property
    def is_decided(self) -> bool:
        """Whether the recipe decides it: parameters, and batches per epoch."""
        return self.kind is LARGEST and self.better == "neither"

    def is_certain(self, seeds: Sequence[float]) -> bool:
        """Return whether seeds leave no doubt about a count or size: all have the same.

        Of what the recipe decides, one seed tells. Epochs and memory take two.
        """
        counted = self.kind is LARGEST or (self.better == "neither" and not self.unit)
        return counted and len(seeds) >= (1 if self.is_decided else 2) and len(set(seeds)) == 1

    def shown(self, value: float) -> float:
        """Return a number as `read` gives it in the metric's own unit: exp(nll), else itself."""
        return perplexity(value) if self.kind is PERPLEXITY else value

    def text(self, value: float | None) -> str:
        """Write a number for people; a dash where there is none."""
        return NOTHING if value is None else self.write(value)

    @property
    def label(self) -> str:
        """Return the title with its unit, for an axis."""
        return f"{self.title} [{self.unit}]" if self.unit else self.title

    def spread_text(self, summary: Summary | None) -> str:
        """Write a summary's interval, quartiles or range; say why a perplexity has no interval.

        Ends that read the same say nothing and are left out.
        """
        if summary is None or not self.kind.spread:
            return ""
        if summary.n == 1:
            return "n = 1" if self.kind is PERPLEXITY else ""
        if summary.low is None or summary.high is None:
            return "no spread"
        low, high = self.write(summary.low), self.write(summary.high)
        return "" if low == high and self.kind is MEDIAN else f"{low} to {high}"


def write_money(value: float) -> str:
    """Write a sum, or kilowatt-hours: two decimals, and three of a few hundredths."""
    if 0 < value < 0.01:
        return "< 0.01"
    return f"{value:,.3f}" if 0 < value < 0.1 else f"{value:,.2f}"


def nll_of(score: Score | None) -> float | None:
    """Return a score's mean negative log-likelihood [nats per token], if there is a score."""
    return score.nll if score else None


def seconds_per_batch(metrics: Metrics) -> float | None:
    """Return the time of a training step after the warm-up [s], by the median speed of epochs."""
    if metrics.tokens_per_second is None or metrics.train is None:
        return None
    return metrics.train.tokens / metrics.steps_per_epoch / metrics.tokens_per_second


def flops_per_second(run: Result) -> float | None:
    """Return the rate of the model's matrix products in training [FLOP/s]."""
    speed = run.metrics.tokens_per_second
    return None if speed is None or run.flops_per_token is None else speed * run.flops_per_token


def rent(run: Result) -> float | None:
    """Return what a run's GPUs or CPU cores cost, from its start to its end."""
    of_a_second = run.rent_per_second
    return None if of_a_second is None else of_a_second * run.metrics.seconds.total


def training_and_validation(seconds: Seconds) -> float:
    """Return what published training times count [s]: all training steps, and validation."""
    return seconds.compile + seconds.training + seconds.validation


def of_hardware(read: Callable[[Hardware], float | None]) -> Callable[[Result], float | None]:
    """Return what reads a number of the hardware sampler; None where it did not run."""
    return lambda run: read(run.metrics.hardware) if run.metrics.hardware else None


def gpu_watts(hardware: Hardware) -> float | None:
    """Return the mean power of a run's GPUs together [W]."""
    return None if hardware.gpu_joules is None else hardware.gpu_joules / hardware.seconds


# fmt: off
METRICS: dict[str, Metric] = {metric.name: metric for metric in (
    Metric("test_perplexity", "Test perplexity", "Test perplexity", "", "lower", PERPLEXITY,
           write_perplexity, lambda run: nll_of(run.metrics.test)),
    Metric("valid_perplexity", "Validation perplexity", "Valid perplexity", "", "lower", PERPLEXITY,
           write_perplexity, lambda run: nll_of(run.metrics.valid)),
    Metric("train_perplexity", "Training perplexity", "Train perplexity", "", "lower", PERPLEXITY,
           write_perplexity, lambda run: nll_of(run.metrics.train)),
    Metric("test_accuracy", "Accuracy of the next word", "Accuracy", "", "higher", MEDIAN,
           write_share, lambda run: run.metrics.test_accuracy),
    Metric("tokens_per_second", "Training speed", "Tokens/s", "tokens/s", "higher", MEDIAN,
           write_count, lambda run: run.metrics.tokens_per_second),
    Metric("seconds_per_epoch", "Time per epoch", "Time per epoch", "s", "lower", MEDIAN,
           write_seconds, lambda run: run.metrics.seconds_per_epoch),
    Metric("seconds_per_batch", "Time per batch", None, "s", "lower", MEDIAN,
           write_short_seconds, lambda run: seconds_per_batch(run.metrics)),
    Metric("flops_per_second", "Model FLOP/s", None, "FLOP/s", "higher", MEDIAN,
           write_flops, flops_per_second),
    Metric("steps_per_epoch", "Batches per epoch", None, "", "neither", LARGEST,
           write_count, lambda run: run.metrics.steps_per_epoch),
    Metric("epochs", "Epochs", "Epochs", "", "neither", MEDIAN,
           "{:g}".format, lambda run: run.metrics.epochs),
    Metric("best_epoch", "Best epoch", "Best epoch", "", "neither", MEDIAN,
           "{:g}".format, lambda run: run.metrics.best_epoch),
    Metric("total_seconds", "Total time", "Total time", "s", "lower", MEDIAN,
           write_seconds, lambda run: run.metrics.seconds.total),
    Metric("rent", "Rent of a run", "Rent", "money", "lower", MEDIAN, write_money, rent),
    Metric("load_seconds", "Time to load the corpus", "Load time", "s", "lower", MEDIAN,
           write_short_seconds, lambda run: run.metrics.seconds.load),
    Metric("start_up_seconds", "Start-up time", None, "s", "lower", MEDIAN,
           write_seconds, lambda run: run.metrics.seconds.start_up),
    Metric("compile_seconds", "Compilation time", None, "s", "lower", MEDIAN,
           write_seconds, lambda run: run.metrics.seconds.compile),
    Metric("training_seconds", "Training time", None, "s", "lower", MEDIAN,
           write_seconds, lambda run: run.metrics.seconds.training),
    Metric("validation_seconds", "Validation time", None, "s", "lower", MEDIAN,
           write_seconds, lambda run: run.metrics.seconds.validation),
    Metric("training_and_validation_seconds", "Training and validation time", None, "s", "lower",
           MEDIAN, write_seconds, lambda run: training_and_validation(run.metrics.seconds)),
    Metric("test_seconds", "Test time", None, "s", "lower", MEDIAN,
           write_seconds, lambda run: run.metrics.seconds.test if run.metrics.test else None),
    Metric("accuracy_seconds", "Accuracy time", None, "s", "lower", MEDIAN, write_seconds,
           lambda run: run.metrics.seconds.accuracy or None),
    Metric("checkpointing_seconds", "Checkpointing time", None, "s", "lower", MEDIAN,
           write_seconds, lambda run: run.metrics.seconds.checkpointing),
    Metric("parameters", "Parameters", "Parameters", "", "neither", LARGEST,
           write_millions, lambda run: run.metrics.parameters),
    Metric("peak_memory_bytes", "Peak memory", "Peak memory", "bytes", "lower", LARGEST,
           write_bytes, lambda run: run.metrics.peak_memory_bytes),
    Metric("peak_device_memory_bytes", "Peak GPU memory", "GPU memory", "bytes", "lower", LARGEST,
           write_bytes, lambda run: run.metrics.peak_device_memory_bytes),
    Metric("memory_bytes", "Mean memory", None, "bytes", "lower", LARGEST,
           write_bytes, of_hardware(lambda own: own.memory_bytes)),
    Metric("own_cores", "Cores kept busy", "Cores used", "cores", "neither", MEDIAN,
           "{:.2f}".format, of_hardware(lambda own: own.own_cores)),
    Metric("other_cores", "Cores that other processes kept busy", None, "cores", "lower", MEDIAN,
           "{:.2f}".format, of_hardware(lambda own: own.other_cores)),
    Metric("gpu_utilization", "GPU use", "GPU use", "share", "higher", MEDIAN,
           lambda value: write_share(value, 0), of_hardware(lambda own: own.gpu_utilization)),
    Metric("gpu_watts", "GPU power", None, "W", "lower", MEDIAN,
           "{:.0f} W".format, of_hardware(gpu_watts)),
    Metric("gpu_joules", "GPU energy", "GPU energy", "J", "lower", MEDIAN,
           write_joules, of_hardware(lambda own: own.gpu_joules)),
    Metric("cpu_joules", "Processors' energy", "CPU energy", "J", "lower", MEDIAN,
           write_joules, of_hardware(lambda own: own.cpu_joules)),
)}
# fmt: on

if TYPE_CHECKING:
    MetricName = str
else:
    MetricName = Literal[tuple(METRICS)]
