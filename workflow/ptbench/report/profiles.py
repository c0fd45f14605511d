"""The profiles of an experiment's rows, for its page: `ptbench.measurement.profile` makes them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ptbench.analysis.experiment import RowResult
from ptbench.measurement.profile import Profile
from ptbench.report.formatting import group_title, grouped

# Phases in the order in which a step has them, with their headings.
PHASES = {
    "feed": "Feed", "forward": "Forward", "backward": "Backward", "update": "Clip and update"
}  # fmt: skip


class Shares(NamedTuple):
    """What a run of one epoch spends its time on, and of that a training step."""

    training: float  # of a run of one epoch
    validation: float
    test: float
    forward: float  # of training
    backward: float

    @property
    def rest(self) -> float:
        """Return what neither pass takes of training."""
        return 1 - self.forward - self.backward


# By line_profiler, of an LSTM in pytorch/examples: Greatti 2019, "Profiling", Figure 4.
GREATTI = Shares(0.95, 0.023, 0.026, 0.464, 0.446)


class ProfiledRow(NamedTuple):
    """A row and its profile."""

    row: RowResult
    profile: Profile

    @property
    def seconds(self) -> float:
        """Return the time of a step with its feed [s]."""
        return self.profile.feed.median + self.profile.step.median

    def share(self, phase: str) -> float:
        """Return a phase's share of the step with its feed."""
        return float(getattr(self.profile, phase).median) / self.seconds

    @property
    def shares(self) -> Shares | None:
        """Return its shares of a run of one epoch; None of an older profile."""
        epoch = self.profile.epoch
        if epoch is None:
            return None
        total = epoch.training + epoch.validation + epoch.test
        return Shares(
            epoch.training / total,
            epoch.validation / total,
            epoch.test / total,
            self.share("forward"),
            self.share("backward"),
        )

    @property
    def note(self) -> str:
        """Return why its numbers may be wrong; nothing where they are not."""
        busy = self.profile.hardware and self.profile.hardware.busy
        return "other processes took cores that it could have used" if busy else ""


class ProfiledGroup(NamedTuple):
    """Rows that differ by framework alone."""

    title: str
    rows: list[ProfiledRow]


def profiles_of(rows: Iterable[RowResult], results: Path) -> list[ProfiledGroup]:
    """Return the profiles that are there, of the recipes as they are now.

    Args:
        rows: of an experiment.
        results: the results folder.
    """
    found = []
    for group in grouped(list(rows)):
        profiled = [
            ProfiledRow(row, profile)
            for row in group
            if (profile := read_profile(row, results)) is not None
        ]
        if profiled:
            found.append(ProfiledGroup(group_title(group[0]), profiled))
    return found


def read_profile(row: RowResult, results: Path) -> Profile | None:
    """Return a row's profile; None if there is none, or one of another recipe."""
    folder = results / "profiles" / row.variant / row.framework / f"devices-{row.devices}"
    try:
        profile = Profile.model_validate_json((folder / "profile.json").read_bytes())
    except (OSError, ValueError):
        return None
    return profile if row.fingerprint in (None, profile.fingerprint) else None
