"""A process in a framework's environment that does with its backends what the tests ask.

    PYTHONPATH=workflow python -m tests.support.worker

Started by `remote.py`, whose `RemoteBackend` is the other end. Imports NumPy and `ptbench` alone,
until a message names the framework.
"""

from __future__ import annotations

import os
import traceback
from typing import IO, Any

from tests.support import probes, wire

from ptbench import backends
from ptbench.backends.base import Backend, Setup
from ptbench.corpus.batching import Batch
from ptbench.model.recipe import Recipe


class Objects:
    """The backends and states that live here, under the numbers by which the tests know them."""

    def __init__(self) -> None:
        self.by_number: dict[int, Any] = {}

    def keep(self, thing: Any) -> wire.Handle:
        handle = wire.Handle(len(self.by_number))
        self.by_number[handle.number] = thing
        return handle

    def resolved(self, value: Any) -> Any:
        return self.by_number[value.number] if isinstance(value, wire.Handle) else value

    def perform(self, action: str, *arguments: Any) -> Any:
        """Do one thing that a test asks for; the result is fit for `wire.send`."""
        values = [self.resolved(value) for value in arguments]
        if action == "create":
            return self.keep(create(*values))
        if action == "probe":
            backend, name, *rest = values
            return getattr(probes, name)(backend, *rest)
        if action == "attribute":
            backend, name = values
            return getattr(backend, name)
        if action == "set":
            backend, name, value = values
            return setattr(backend, name, value)
        return self.call(action, *values)

    def call(self, method: str, backend: Backend, *arguments: Any) -> Any:
        """Call a method of the contract; states stay here and scalars are waited for."""
        if method in ("gradients", "train_step", "evaluate_step"):
            batch, *rest = arguments
            arguments = Batch(*batch), *rest
        result = getattr(backend, method)(*arguments)
        if method in ("initial_state", "restore"):
            return self.keep(result)
        if method == "train_step":
            return [float(result.nll), float(result.gradient_norm), self.keep(result.state)]
        if method == "evaluate_step":
            return [float(result.nll), self.keep(result.state)]
        if method == "next_token_log_probabilities":
            return [result[0], self.keep(result[1])]
        return result


def create(
    framework: str,
    recipe: str,
    vocabulary_size: int,
    devices: int,
    seed: int,
    accelerator: str,
    threads: int,
) -> Backend:
    """The framework's backend for a recipe given as JSON."""
    given = Recipe.model_validate_json(recipe)
    setup = Setup(given, vocabulary_size, devices, seed, accelerator, threads)  # type: ignore[arg-type]
    return backends.create(framework, setup)


def answer(objects: Objects, request: list[Any]) -> dict[str, Any]:
    try:
        return {"result": objects.perform(*request)}
    except Exception as error:
        return {
            "errors": [base.__name__ for base in type(error).__mro__],
            "text": str(error),
            "traceback": traceback.format_exc(),
        }


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer requests until there are no more."""
    objects = Objects()
    while True:
        try:
            request = wire.receive(requests)
        except EOFError:
            break
        wire.send(answers, answer(objects, request))
    for thing in objects.by_number.values():
        if isinstance(thing, Backend):
            thing.close()


def main() -> None:
    # What frameworks and their child processes print must not get between the messages.
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    serve(requests, answers)


if __name__ == "__main__":
    main()
