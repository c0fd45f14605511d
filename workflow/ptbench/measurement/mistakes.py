"""What each framework says to five classic mistakes, made in its own layers.

    uv run python -m ptbench.measurement.mistakes

It makes them in every framework's environment and writes `backends/mistakes.yaml`, which the report
shows. A message names the cause if it has all that a user must know to see what is wrong: both
sizes, both types, the word, or the name of what has no value. Sizes are numbers that nothing else
in a message would have.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from ptbench.backends import FRAMEWORKS
from ptbench.environments import PYTHON
from ptbench.files import write_atomically
from ptbench.isolation import isolate
from ptbench.model.recipe import Model

FILE = Path(__file__).parents[1] / "backends" / "mistakes.yaml"

TIME, BATCH, WIDTH, INPUTS, VOCABULARY = 3, 17, 37, 41, 1009
OTHER_BATCH, OTHER_INPUTS = 13, 43
LONGEST = 300  # characters of a message that are kept

# What a message must have, as regular expressions, to name the cause of each mistake.
CAUSES = {
    "wrong shape": (rf"\b{INPUTS}\b", rf"\b{OTHER_INPUTS}\b"),
    "word outside the vocabulary": (rf"\b{VOCABULARY}\b",),
    "state of another batch size": (rf"\b{BATCH}\b", rf"\b{OTHER_BATCH}\b"),
    "another type": ("float64|double", "float32|float(?!64)"),
    "missing initial value": ("weight|kernel|embedding|initial",),
}


class Mistake(Model):
    """One mistake in one framework."""

    error: str | None = Field(None, description="Class of the error; null: there was none.")
    message: str = Field(description="Its message, or what happened without one.")
    names_cause: bool = Field(False, description="Whether the message says what is wrong.")


def read_mistakes() -> dict[str, dict[str, Mistake]]:
    """Return every framework's mistakes by name, all in the same order."""
    from ptbench.yaml import read_yaml  # needs what frameworks' environments do not have

    return {
        framework: {name: Mistake.model_validate(said) for name, said in found.items()}
        for framework, found in read_yaml(FILE).items()
    }


def ones(*shape: int, dtype: Any = np.float32) -> Any:
    """Return an array of ones."""
    return np.ones(shape, dtype)


def numbered_rows() -> Any:
    """Return an embedding whose rows hold their number, so that a row shows which it is."""
    return np.repeat(np.arange(VOCABULARY, dtype=np.float32)[:, None], WIDTH, axis=1)


Calls = dict[str, Callable[[], Any]]  # each mistake, by its name in CAUSES


def pytorch() -> Calls:
    """Return the mistakes in PyTorch."""
    torch = importlib.import_module("torch")
    layer, given = torch.nn.LSTM(INPUTS, WIDTH), torch.from_numpy
    state = tuple(torch.zeros(1, OTHER_BATCH, WIDTH) for _ in range(2))
    return {
        "wrong shape": lambda: layer(given(ones(TIME, BATCH, OTHER_INPUTS))),
        "word outside the vocabulary": lambda: torch.nn.Embedding(VOCABULARY, WIDTH)(
            torch.tensor([VOCABULARY])
        ),
        "state of another batch size": lambda: layer(given(ones(TIME, BATCH, INPUTS)), state),
        "another type": lambda: layer(given(ones(TIME, BATCH, INPUTS, dtype=np.float64))),
        "missing initial value": lambda: torch.nn.LazyLinear(WIDTH).weight.sum(),
    }


def tensorflow() -> Calls:
    """Return the mistakes in TensorFlow: in its operators, and tf.keras' layer of LSTMs."""
    tf = importlib.import_module("tensorflow")
    layer = tf.keras.layers.LSTM(WIDTH)
    layer.build((BATCH, TIME, INPUTS))
    state = [tf.zeros((OTHER_BATCH, WIDTH)) for _ in range(2)]
    return {
        "wrong shape": lambda: layer(tf.constant(ones(BATCH, TIME, OTHER_INPUTS))),
        "word outside the vocabulary": lambda: tf.gather(ones(VOCABULARY, WIDTH), [VOCABULARY]),
        "state of another batch size": lambda: layer(
            tf.constant(ones(BATCH, TIME, INPUTS)), initial_state=state
        ),
        "another type": lambda: tf.matmul(
            tf.constant(ones(BATCH, INPUTS, dtype=np.float64)), tf.Variable(ones(INPUTS, WIDTH))
        ),
        "missing initial value": lambda: tf.Variable(shape=(INPUTS, WIDTH), name="weight"),
    }


def keras() -> Calls:
    """Return the mistakes in Keras."""
    keras = importlib.import_module("keras")
    layer = keras.layers.LSTM(WIDTH)
    layer.build((BATCH, TIME, INPUTS))
    state = [ones(OTHER_BATCH, WIDTH) for _ in range(2)]
    return {
        "wrong shape": lambda: layer(ones(BATCH, TIME, OTHER_INPUTS)),
        "word outside the vocabulary": lambda: keras.layers.Embedding(VOCABULARY, WIDTH)(
            np.array([[VOCABULARY]])
        ),
        "state of another batch size": lambda: layer(
            ones(BATCH, TIME, INPUTS), initial_state=state
        ),
        "another type": lambda: layer(ones(BATCH, TIME, INPUTS, dtype=np.float64)),
        "missing initial value": lambda: keras.layers.Dense(WIDTH).kernel,
    }


def mxnet() -> Calls:
    """Return the mistakes in MXNet."""
    mx = importlib.import_module("mxnet")
    layer = mx.gluon.rnn.LSTM(WIDTH, input_size=INPUTS)
    embedding = mx.gluon.nn.Embedding(VOCABULARY, WIDTH)
    for block in (layer, embedding):
        block.initialize()
    embedding.weight.set_data(mx.nd.array(numbered_rows()))
    state = [mx.nd.zeros((1, OTHER_BATCH, WIDTH)) for _ in range(2)]
    given = mx.nd.array

    def finished(result: Any) -> Any:
        mx.nd.waitall()  # errors come when a result is waited for
        return result

    return {
        "wrong shape": lambda: finished(layer(given(ones(TIME, BATCH, OTHER_INPUTS)))),
        "word outside the vocabulary": lambda: finished(embedding(given([VOCABULARY]))),
        "state of another batch size": lambda: finished(
            layer(given(ones(TIME, BATCH, INPUTS)), state)
        ),
        "another type": lambda: finished(layer(given(ones(TIME, BATCH, INPUTS), dtype="float64"))),
        "missing initial value": lambda: mx.gluon.nn.Dense(WIDTH)(given(ones(BATCH, INPUTS))),
    }


def jax() -> Calls:
    """Return the mistakes in JAX, which has no layers: in what layers are written with."""
    jax = importlib.import_module("jax")
    jnp = jax.numpy
    parameters = {"weight": jnp.ones((INPUTS, WIDTH)), "recurrent": jnp.ones((WIDTH, WIDTH))}

    def layer(x: Any, h: Any) -> Any:
        def step(h: Any, x: Any) -> tuple[Any, Any]:
            h = jnp.tanh(x @ parameters["weight"] + h @ parameters["recurrent"])
            return h, h

        return jax.lax.scan(step, h, x)[1]

    def wrong_type() -> Any:
        with jax.enable_x64(True):
            return layer(
                jnp.ones((TIME, BATCH, INPUTS), "float64"), jnp.zeros((BATCH, WIDTH), "float32")
            )

    state = jnp.zeros((BATCH, WIDTH))
    return {
        "wrong shape": lambda: layer(jnp.ones((TIME, BATCH, OTHER_INPUTS)), state),
        "word outside the vocabulary": lambda: jnp.array(numbered_rows())[jnp.array([VOCABULARY])],
        "state of another batch size": lambda: layer(
            jnp.ones((TIME, BATCH, INPUTS)), jnp.zeros((OTHER_BATCH, WIDTH))
        ),
        "another type": wrong_type,
        "missing initial value": lambda: layer_without_value(parameters),
    }


def layer_without_value(parameters: Mapping[str, Any]) -> Any:
    """Use a parameter that was never given a value."""
    return parameters["embedding"]


MAKE: dict[str, Callable[[], Calls]] = {
    each.__name__: each for each in (pytorch, tensorflow, keras, mxnet, jax)
}


def mistakes(framework: str) -> dict[str, Mistake]:
    """Make every mistake in a framework, which can be imported here; return what it says."""
    return {name: said_to(name, call) for name, call in MAKE[framework]().items()}


def said_to(name: str, call: Callable[[], Any]) -> Mistake:
    """Return what is said to one mistake."""
    try:
        result = call()
    except Exception as error:
        text = plain(str(error))
        found = all(re.search(cause, text, re.IGNORECASE) for cause in CAUSES[name])
        return Mistake(error=type(error).__name__, message=text[:LONGEST], names_cause=found)
    values = np.asarray(getattr(result, "asnumpy", lambda: result)(), np.float64)
    if name == "word outside the vocabulary":
        return Mistake(message=f"nothing; it takes word {values.flat[0]:.0f}, the last one")
    return Mistake(message="nothing; it gives a result")


def plain(text: str) -> str:
    """Return a message on one line, without stack traces, addresses and the terminal's colours."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text.partition("Stack trace")[0])
    text = re.sub(r"0x[0-9a-f]+|(/[\w.+-]+)+/|\{\{.*?\}\}", "", text)
    return " ".join(text.split())


def main(arguments: list[str]) -> None:
    """Print the mistakes of a framework as JSON, or write those of all."""
    if arguments:
        answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        isolate(arguments[0], 1)
        found = mistakes(arguments[0])
        answers.write(json.dumps({name: each.model_dump() for name, each in found.items()}))
        answers.close()
        return
    every = {}
    for framework in FRAMEWORKS:
        python = Path("results/environments") / f"{framework}-cpu" / PYTHON
        words = [str(python), "-m", "ptbench.measurement.mistakes", framework]
        package = str(Path(__file__).parents[2])
        said = subprocess.run(
            words, check=True, capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": package},
        )  # fmt: skip
        every[framework] = json.loads(said.stdout)
    head = "# Written by `uv run python -m ptbench.measurement.mistakes`; see there.\n"
    write_atomically(FILE, head + as_yaml(every))


def as_yaml(every: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Return the mistakes as YAML, whose scalars may be JSON's."""
    lines = []
    for framework, found in every.items():
        lines.append(f"{framework}:")
        for name, said in found.items():
            lines.append(f"  {name}:")
            lines += [f"    {key}: {json.dumps(value)}" for key, value in said.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(sys.argv[1:])
