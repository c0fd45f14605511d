"""Checkpoints: a run that is killed anywhere and started again ends as one that never was.

The frameworks' processes are killed for real in `tests/faults`; here the oracle dies, in this
process, at points that hypothesis chooses.
"""

from __future__ import annotations

import dataclasses
import json
import math
import resource
import signal
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.problems import new_oracle
from tests.unit.test_loop import SIZES, VOCABULARY, text

from ptbench import files
from ptbench.backends.base import EvaluateStep, TrainStep
from ptbench.backends.oracle import Oracle
from ptbench.corpus.batching import ParallelStreams, Sentences, VariedStreams, Windows
from ptbench.errors import InterruptionError, PtbenchError
from ptbench.model.recipe import Recipe
from ptbench.training import checkpoints as module
from ptbench.training import loop
from ptbench.training.checkpoints import Checkpoints, Header, Identity, read_arrays, to_json
from ptbench.training.clocks import Clocks
from ptbench.training.loop import Run, Splits, Sums, train
from ptbench.training.records import Epoch
from ptbench.training.schedules import averages_since
from ptbench.training.signals import Signals

CLOCKED = {"tokens_per_second", "training_seconds", "validation_seconds"}
IDENTITY = Identity(
    cell="v/jax/devices-1/seed-1", fingerprint="f", corpus="c", vocabulary_size=9, framework="n 1"
)

# What could be lost on the way: moments, the plateau's memory, patience, the best parameters.
RECIPES = {
    "adam, dropout, plateau and patience": Recipe(
        **SIZES, optimizer="adam", learning_rate=0.3, dropout=0.3, schedule="plateau",
        plateau_patience=0, plateau_threshold=0.05, patience=2, epochs=5,
    ),
    "roll back": Recipe(
        **{**SIZES, "constant_epochs": 3}, schedule="roll_back_then_decay", learning_rate=20.0,
        clip_norm=1.0, learning_rate_decay=0.1, epochs=4, dropout=0.2,
    ),
    "rmsprop, warming up, sentences": Recipe(
        **SIZES, optimizer="rmsprop", learning_rate=0.05, schedule="warm_up_then_decay",
        warm_up_epochs=1.5, feeding="sentences", epochs=3, weight_decay=0.01,
    ),
    "windows": Recipe(**SIZES, feeding="windows", schedule="constant", epochs=3),
    "averaging": Recipe(
        **SIZES, optimizer="asgd", averaging_interval=1, schedule="constant", epochs=6,
        learning_rate=12.0, clip_norm=1.0, weight_dropout=0.2,
    ),
    "varied windows and fine-tuning": Recipe(
        **SIZES, window_lengths="varied", optimizer="asgd", averaging_interval=None,
        schedule="constant", epochs=4, fine_tuning_epochs=2, learning_rate=12.0, clip_norm=1.0,
    ),
}  # fmt: skip


def splits(recipe: Recipe) -> Splits:
    texts = [text(length, length) for length in (180, 60, 50)]
    if recipe.feeding == "windows":
        return Splits(*(Windows(t, 4, 6, wraps=len(t) == 180) for t in texts))
    if recipe.feeding == "sentences":
        return Splits(*(Sentences(t, 4, 8) for t in texts))
    fixed = [ParallelStreams(t, 4, 6) for t in texts]
    if recipe.window_lengths == "varied":
        fixed[0] = VariedStreams(texts[0], 4, 6, seed=1)
    return Splits(*fixed)


class KilledError(BaseException):
    """What nothing catches, as nothing catches SIGKILL."""


class Mortal(Oracle):
    """The oracle, in a process that dies after so many steps of any kind."""

    life = math.inf

    def live(self) -> None:
        self.life -= 1
        if self.life < 0:
            raise KilledError

    def train_step(self, *arguments: Any) -> TrainStep:
        self.live()
        return super().train_step(*arguments)

    def evaluate_step(self, *arguments: Any) -> EvaluateStep:
        self.live()
        return super().evaluate_step(*arguments)


def attempt(
    recipe: Recipe, folder: Path | None, life: float = math.inf, minutes: float = 0.0, **keep: Any
) -> Run:
    """One process's try at the run."""
    backend = new_oracle(recipe, 1, 3, VOCABULARY, Mortal)
    backend.life = life
    if folder is None:
        return train(backend, splits(recipe), Clocks(), lambda _: None)
    clocks = Clocks()
    keeper = Checkpoints(folder, IDENTITY, lambda: clocks.seconds, minutes, **keep)
    feed = splits(recipe).train
    resumed = keeper.latest(lambda: backend.snapshot(backend.initial_state(feed.batch_size, True)))
    saved = resumed and resumed.saved
    return train(backend, splits(recipe), clocks, lambda _: None, keeper, saved)


def result(run: Run) -> Any:
    """All of a run that no clock wrote."""
    assert run.test is not None
    assert run.best_parameters is not None
    return (
        [epoch.model_dump(exclude=CLOCKED) for epoch in run.history],
        run.test,
        run.best and run.best.epoch,
        run.stopped,
        {name: array.tobytes() for name, array in run.best_parameters.items()},
    )


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Any]:
    return {name: result(attempt(recipe, None)) for name, recipe in RECIPES.items()}


@pytest.fixture(autouse=True)
def _fetch_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several times an epoch, which has eight steps here; the sums must not depend on it."""
    monkeypatch.setattr(loop, "FETCH_EVERY", 2)


def test_the_recipes_meet_what_they_are_there_for(uninterrupted: dict[str, Any]) -> None:
    history, _, _, stopped, _ = uninterrupted["adam, dropout, plateau and patience"]
    assert len({epoch["learning_rate"] for epoch in history}) > 1
    assert stopped == "patience"
    history, *_ = uninterrupted["roll back"]
    assert history[2]["valid_nll"] > min(epoch["valid_nll"] for epoch in history[:3])
    history, *_ = uninterrupted["averaging"]
    assert averages_since(
        RECIPES["averaging"], [Epoch.model_construct(**epoch) for epoch in history[:-1]]
    )


@pytest.mark.parametrize("name", RECIPES)
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(lives=st.lists(st.integers(0, 60), max_size=12), every_fetch=st.booleans())
def test_a_run_killed_anywhere_ends_as_one_that_was_not(
    name: str,
    lives: list[int],
    every_fetch: bool,
    uninterrupted: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("checkpoints")
    for life in lives:
        try:
            attempt(RECIPES[name], folder, life, minutes=0.0 if every_fetch else 60.0)
        except KilledError:
            continue
    assert result(attempt(RECIPES[name], folder)) == uninterrupted[name]


def test_a_run_killed_within_any_write_of_a_checkpoint_loses_nothing_before_it(
    uninterrupted: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dies at every call that changes the disk in turn: before the write, the flush, the rename."""
    name = "roll back"
    calls = 0

    def mortal(function: Any) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            nonlocal calls
            calls -= 1
            if calls < 0:
                raise KilledError
            return function(*arguments, **keywords)

        return call

    monkeypatch.setattr(module, "save_file", mortal(module.save_file))
    monkeypatch.setattr(files, "flush", mortal(files.flush))
    monkeypatch.setattr(Path, "replace", mortal(Path.replace))
    reached = []
    for lifetime in range(3, 13):  # calls: each is killed a step later than the one before
        calls = lifetime
        with pytest.raises(KilledError):
            attempt(RECIPES[name], tmp_path)
        whole = [n for n in module.NAMES if (tmp_path / n).exists()]
        if whole:  # what is there under its name is whole, whenever the process died
            _, metadata = read_arrays(tmp_path / whole[0])
            content = json.loads(metadata["checkpoint"])
            reached.append((len(content["history"]), (content["sums"] or {"steps": 0})["steps"]))
    assert len(reached) > 5
    assert reached == sorted(reached), "a later attempt may not be behind an earlier one"
    calls = 10**9
    assert result(attempt(RECIPES[name], tmp_path)) == uninterrupted[name]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with two checkpoints of a run that died in its third epoch."""
    with pytest.raises(KilledError):
        attempt(RECIPES["roll back"], tmp_path, life=40)
    assert {path.name for path in tmp_path.iterdir()} == set(module.NAMES)
    return tmp_path


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(position: float) -> Any:
    def flip(content: bytes) -> bytes:
        at = int(position * (len(content) - 1))
        return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]

    return flip


FLIPS = (0.0, 0.001, 0.1, 0.3, 0.5, 0.8, 1.0)  # where in the file


@pytest.mark.parametrize(
    "damage",
    [truncated, lambda _: b"", lambda content: content * 2, *map(flipped, FLIPS)],
    ids=["half", "empty", "twice", *(f"a bit at {position}" for position in FLIPS)],
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(
    saved: Path, damage: Any, uninterrupted: dict[str, Any]
) -> None:
    last = saved / "last.safetensors"
    last.write_bytes(damage(last.read_bytes()))
    said: list[str] = []
    run = attempt(RECIPES["roll back"], saved, say=said.append)
    [line] = said
    assert line.startswith(f"{last} is no checkpoint of this run: it")
    assert line.endswith("; it is now last.safetensors.rejected-1")
    assert (saved / "last.safetensors.rejected-1").exists()
    assert run.steps_here < len(run.history) * 8, "should have gone on from the one before"
    assert result(run) == uninterrupted["roll back"]


def test_with_both_damaged_training_starts_again(
    saved: Path, uninterrupted: dict[str, Any]
) -> None:
    for name in module.NAMES:
        (saved / name).write_bytes(b"nonsense")
    said: list[str] = []
    assert (
        result(attempt(RECIPES["roll back"], saved, say=said.append)) == uninterrupted["roll back"]
    )
    assert len(said) == 2


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_no_bit_can_flip_unseen(data: st.DataObject, saved: Path) -> None:
    content = (saved / "last.safetensors").read_bytes()
    at = data.draw(st.integers(0, len(content) - 1))
    bit = data.draw(st.integers(0, 7))
    copy = saved / "copy.safetensors"
    copy.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
    with pytest.raises(module.RejectedError):
        read_arrays(copy)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"identity": {"cell": "w/jax/devices-1/seed-1"}}, "its cell is w/jax/devices-1/seed-1"),
        ({"identity": {"fingerprint": "g"}}, "its fingerprint is g, not f"),
        ({"identity": {"vocabulary_size": 10}}, "its vocabulary_size is 10, not 9"),
        ({"identity": {"corpus": "d"}}, "its corpus is d, not c"),
        ({"identity": {"framework": "n 2"}}, "its framework is n 2, not n 1"),
        ({"format": 2}, "it has format 2, this ptbench reads format 1"),
        ({"history": "none"}, "its header is not that of a checkpoint"),
    ],
)
def test_another_run_s_or_a_newer_checkpoint_is_set_aside(
    saved: Path, change: dict[str, Any], reason: str
) -> None:
    for name in module.NAMES:
        arrays, metadata = read_arrays(saved / name)
        content = json.loads(metadata["checkpoint"])
        for key, value in change.items():
            content[key] = content[key] | value if isinstance(value, dict) else value
        module.write_arrays(saved / name, arrays, {"checkpoint": json.dumps(content)})
    said: list[str] = []
    run = attempt(RECIPES["roll back"], saved, say=said.append)
    assert run.steps_here == len(run.history) * len(splits(RECIPES["roll back"]).train)
    assert len(said) == 2
    assert all(reason in line for line in said)


def test_a_checkpoint_of_another_model_or_of_no_run_is_set_aside(saved: Path) -> None:
    said: list[str] = []
    wider = RECIPES["roll back"].model_copy(update={"hidden_size": 6})
    attempt(wider, saved, say=said.append)
    assert len(said) == 2
    assert all("its arrays are not those of this model" in line for line in said)
    module.write_arrays(saved / "last.safetensors", {"a": np.zeros(3)}, {})
    said.clear()
    attempt(RECIPES["roll back"], saved, say=said.append)
    assert "its header is not that of a checkpoint" in said[0]


def test_a_finished_run_is_not_trained_again_but_scored(tmp_path: Path) -> None:
    recipe = RECIPES["windows"]
    first = attempt(recipe, tmp_path)
    again = attempt(recipe, tmp_path)
    assert again.steps_here == 0
    assert result(again) == result(first)


@pytest.mark.parametrize("step", [0, 1, 2, 5, 8, 9, 11, 13, 20, 31, 32, 34])
def test_a_run_told_to_end_has_saved_every_step_it_took(
    step: int, tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    """At a step of training, of validation, of the test: at once, and nothing is done twice."""
    recipe, taken = RECIPES["windows"], 0

    class Counts(Mortal):
        def live(self) -> None:
            nonlocal taken
            taken += 1

    backend, clocks = new_oracle(recipe, 1, 3, VOCABULARY, Counts), Clocks()

    class Told(Signals):
        def interrupted(self) -> bool:
            return taken > step

    keeper = Checkpoints(tmp_path, IDENTITY, lambda: clocks.seconds, signals=Told())
    with pytest.raises(InterruptionError) as caught:
        train(backend, splits(recipe), clocks, lambda _: None, keeper)
    assert caught.value.status == 75
    assert taken == step + 1
    trained = backend.step
    run = attempt(recipe, tmp_path)
    total = len(run.history) * len(splits(recipe).train)
    assert run.steps_here == total - trained
    assert result(run) == uninterrupted["windows"]


def test_lost_time_is_not_counted_and_kept_time_is(tmp_path: Path) -> None:
    """The clocks of a resumed run are the checkpoint's, and what came after it."""
    recipe = RECIPES["windows"]
    with pytest.raises(KilledError):
        attempt(recipe, tmp_path, life=26)  # four steps into the third epoch
    _, metadata = read_arrays(tmp_path / "last.safetensors")
    header = Header.model_validate(json.loads(metadata["checkpoint"]))
    before = header.sums
    assert before is not None
    seen: list[Sums] = []

    class Watches(loop.Keeper):
        def due(self) -> bool:
            return True

        def save(self, saved: loop.Saved) -> None:
            if saved.run.sums:
                seen.append(dataclasses.replace(saved.run.sums))

    backend = new_oracle(recipe, seed=3, vocabulary_size=VOCABULARY)
    resumed = Checkpoints(tmp_path, IDENTITY, dict).latest(
        lambda: backend.snapshot(backend.initial_state(4, True))
    )
    assert resumed is not None
    run = train(backend, splits(recipe), Clocks(), lambda _: None, Watches(), resumed.saved)
    assert run.history[:2] == header.history
    # The first steps of the second process compile again, and are no part of the speed.
    assert seen[0].steps == before.steps + loop.WARM_UP_STEPS
    assert seen[0].compile_seconds > before.compile_seconds
    assert seen[0].timed_tokens == before.timed_tokens
    assert seen[0].training_seconds == before.training_seconds
    assert run.history[2].training_seconds == pytest.approx(
        seen[-1].compile_seconds + seen[-1].training_seconds
    )


EPOCHS = st.builds(
    Epoch,
    **dict.fromkeys(Epoch.model_fields, st.floats(allow_nan=False)) | {"epoch": st.integers(1)},
)


@given(
    st.lists(EPOCHS, max_size=2),
    st.builds(Sums, **dict.fromkeys(("nll", "gradient_norm"), st.floats(allow_nan=False))),
)
def test_numbers_come_back_exactly(history: list[Epoch], sums: Sums) -> None:
    header = Header(identity=IDENTITY, history=history, sums=sums, seconds={"t": 0.1}, written=1.5)
    assert Header.model_validate(json.loads(to_json(header))) == header


@contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process can grow beyond 2,000 bytes.

    Not a fixture: pytest writes its progress while those are still in force, and where its output
    is a file, that would be the file that cannot grow.
    """
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_a_sentence_and_leaves_the_checkpoint_before(
    tmp_path: Path,
) -> None:
    whole = {"a": np.arange(3.0)}
    path, former = tmp_path / "last.safetensors", tmp_path / "previous.safetensors"
    module.write_arrays(path, whole, {}, former)
    message = r"last.safetensors cannot be written \(.*too large"
    with pytest.raises(PtbenchError, match=message), full_disk():
        module.write_arrays(path, {"a": np.zeros(10_000)}, {}, former)
    assert np.array_equal(read_arrays(path)[0]["a"], whole["a"])
    assert [p.name for p in tmp_path.iterdir()] == ["last.safetensors"], "nothing half-written"


def test_a_folder_that_cannot_be_written_to_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PtbenchError, match="cannot be written"):
        module.write_arrays(tmp_path / "file" / "last.safetensors", {}, {})


def test_a_header_that_claims_more_than_there_is_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    path.write_bytes(struct.pack("<Q", 2**40) + b"{}")
    with pytest.raises(module.RejectedError):
        read_arrays(path)


def test_a_checkpoint_that_cannot_be_read_now_is_not_taken_for_damaged(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    module.write_arrays(path, {"a": np.arange(3.0)}, {})
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limit[1]))  # no more than are open already
    try:
        with pytest.raises(OSError, match="Too many open files"):
            read_arrays(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert np.array_equal(read_arrays(path)[0]["a"], [0.0, 1.0, 2.0])


def test_a_checkpoint_has_the_clocks_and_what_the_hardware_sampler_added_up(
    tmp_path: Path,
) -> None:
    recipe = next(iter(RECIPES.values()))
    attempt(recipe, tmp_path, hardware={"own_seconds": 2.5})
    backend = new_oracle(recipe, 1, 3, VOCABULARY)
    batch_size = splits(recipe).train.batch_size
    resumed = Checkpoints(tmp_path, IDENTITY, dict).latest(
        lambda: backend.snapshot(backend.initial_state(batch_size, True))
    )
    assert resumed is not None
    assert resumed.hardware == {"own_seconds": 2.5}
    assert resumed.seconds["training"] > 0
