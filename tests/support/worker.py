"""A process in a framework's environment that runs backends for the tests.

    PYTHONPATH=workflow python -m tests.support.worker

`remote.py` starts it; `RemoteBackend` is the other end. It imports only NumPy and `ptbench` until a
message names the framework.
"""

from __future__ import annotations

import os
import traceback
from typing import IO, Any

from tests.support import probes, wire

from ptbench import backends
from ptbench.backends.base import Backend, Setup
from ptbench.model.recipe import Recipe


class Objects:
    """Keep backends and states, each under the number that the tests know it by."""

    def __init__(self) -> None:
        self.by_number: dict[int, Any] = {}

    def keep(self, thing: Any) -> wire.Handle:
        handle = wire.Handle(len(self.by_number))
        self.by_number[handle.number] = thing
        return handle

    def resolved(self, value: Any) -> Any:
        return self.by_number[value.number] if isinstance(value, wire.Handle) else value

    def perform(self, action: str, *arguments: Any) -> Any:
        """Do what a test asks for, and return what `wire.send` can send."""
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
        """Call a method of `Backend`; states stay here, and scalars are finished numbers."""
        result = getattr(backend, method)(*arguments)
        if method in ("initial_state", "restore"):
            return self.keep(result)
        if method == "train_step":
            return [float(result.nll), float(result.gradient_norm), self.keep(result.state)]
        if method in ("forward_pass", "forward_and_backward_pass"):
            return float(result)
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
    """Return the framework's backend for a recipe in JSON."""
    given = Recipe.model_validate_json(recipe)
    setup = Setup(given, vocabulary_size, devices, seed, accelerator, threads)  # type: ignore[arg-type]
    return backends.create(framework, setup)


def answer(objects: Objects, request: list[Any]) -> dict[str, Any]:
    """Return the result of a request, or the error that it raised."""
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
    """Serve whoever started this process through its standard input and output."""
    # What frameworks and their child processes print must not get between the messages: it goes to
    # stderr, which is the log.
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    serve(requests, answers)


if __name__ == "__main__":
    main()
