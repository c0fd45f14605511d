"""The model in float64 NumPy, forward and backward, written to be read.

Every framework is tested against it. It is not a framework: nothing is timed with it, and it
takes any number of devices as one.

Notation: x_t is the input of a layer at time t, h and c its output and cell state, z its gates'
pre-activations; d_a is the derivative of the objective with respect to a.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ptbench.backends.contract import (
    OPTIMIZER_SLOTS,
    Backend,
    EvaluateStep,
    Mask,
    Parameters,
    State,
    Tokens,
    TrainStep,
    check_parameters,
    objective_divisor,
    parameter_shapes,
)
from ptbench.training.initialization import draw_parameters

Array = npt.NDArray[np.float64]


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), written so that it cannot overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def log_softmax(logits: Array) -> Array:
    """Log-probabilities over the last axis, by log-sum-exp."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@dataclass
class LayerTrace:
    """What the backward pass of one LSTM layer needs of its forward pass, [time, batch, ...]."""

    x: Array
    h: Array  # [time + 1, batch, hidden], the initial state first
    c: Array  # [time + 1, batch, hidden], the initial state first
    gates: Array  # [time, batch, 4 hidden], after their non-linearities


def lstm_forward(x: Array, w: Array, u: Array, b: Array, h0: Array, c0: Array) -> LayerTrace:
    """One LSTM layer (Zaremba et al. 2014, equation 3): gates z_t = x_t w + h_(t-1) u + b.

    Args:
        x: [time, batch, inputs].
        w: [inputs, 4 hidden].
        u: [hidden, 4 hidden].
        b: [4 hidden].
        h0: [batch, hidden].
        c0: [batch, hidden].
    """
    steps = len(x)
    h, c = np.stack([h0] * (steps + 1)), np.stack([c0] * (steps + 1))
    gates = x @ w + b
    for t in range(steps):
        z = gates[t] + h[t] @ u
        i, f, g, o = np.split(z, 4, axis=-1)
        i, f, g, o = sigmoid(i), sigmoid(f), np.tanh(g), sigmoid(o)
        c[t + 1] = f * c[t] + i * g
        h[t + 1] = o * np.tanh(c[t + 1])
        gates[t] = np.concatenate([i, f, g, o], axis=-1)
    return LayerTrace(x, h, c, gates)


def lstm_backward(trace: LayerTrace, w: Array, u: Array, d_h: Array) -> tuple[Array, ...]:
    """Derivatives with respect to x, w, u and b, given those of the outputs, d_h.

    Truncated: nothing flows into the initial state, nor from any later window.
    """
    d_z = np.empty_like(trace.gates)
    d_h_next = np.zeros_like(trace.h[0])
    d_c_next = np.zeros_like(trace.c[0])
    for t in reversed(range(len(trace.x))):
        i, f, g, o = np.split(trace.gates[t], 4, axis=-1)
        tanh_c = np.tanh(trace.c[t + 1])
        d_h_t = d_h[t] + d_h_next
        d_c = d_c_next + d_h_t * o * (1 - tanh_c**2)
        d_z[t] = np.concatenate(
            [
                d_c * g * i * (1 - i),
                d_c * trace.c[t] * f * (1 - f),
                d_c * i * (1 - g**2),
                d_h_t * tanh_c * o * (1 - o),
            ],
            axis=-1,
        )
        d_h_next = d_z[t] @ u.T
        d_c_next = d_c * f
    d_w = np.einsum("tbi,tbj->ij", trace.x, d_z)
    d_u = np.einsum("tbi,tbj->ij", trace.h[:-1], d_z)
    return d_z @ w.T, d_w, d_u, d_z.sum(axis=(0, 1))


class NumpyOracle(Backend):
    """The contract in float64, for tests."""

    name = "numpy"
    package = "numpy"
    features = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.load_parameters(draw_parameters(self.recipe, self.vocabulary_size, self.seed))
        self.slots: dict[str, dict[str, Array]] = {
            slot: {name: np.zeros_like(p) for name, p in self.p.items()}
            for slot in OPTIMIZER_SLOTS[self.recipe.optimizer]
        }

    def parameters(self) -> Parameters:
        return {name: p.astype(np.float32) for name, p in self.p.items()}

    def load_parameters(self, parameters: Mapping[str, npt.NDArray[Any]]) -> None:
        check_parameters(parameters, self.recipe, self.vocabulary_size)
        names = parameter_shapes(self.recipe, self.vocabulary_size)
        self.p: dict[str, Array] = {name: parameters[name].astype(np.float64) for name in names}

    def initial_state(self, batch_size: int, training: bool) -> State:  # noqa: ARG002
        # [layer, (h, c), batch, hidden]
        return np.zeros((self.recipe.layers, 2, batch_size, self.recipe.hidden_size))

    def dropout_masks(self, steps: int, batch_size: int) -> list[Array]:
        """Multipliers of the embedding's and each layer's output: 0, or 1 / keep probability."""
        rng, keep = np.random.default_rng([self.seed, self.step]), 1 - self.recipe.dropout
        widths = [self.recipe.embedding_size] + [self.recipe.hidden_size] * self.recipe.layers
        return [(rng.random((steps, batch_size, n)) < keep) / keep for n in widths]

    def forward(
        self, inputs: Tokens, state: Array, masks: list[Array] | None
    ) -> tuple[Array, list[LayerTrace], Array, Array]:
        """Log-probabilities, each layer's trace, the softmax's input, and the final state."""
        x = self.p["embedding"][inputs]
        if masks:
            x = x * masks[0]
        traces, final = [], np.empty_like(state)
        for layer in range(self.recipe.layers):
            weights = [self.p[f"rnn.{layer}.{kind}"] for kind in ("input", "recurrent", "bias")]
            trace = lstm_forward(x, *weights, *state[layer])
            traces.append(trace)
            final[layer] = trace.h[-1], trace.c[-1]
            x = trace.h[1:] * masks[layer + 1] if masks else trace.h[1:]
        logits = x @ self.p["softmax.weight"].T + self.p["softmax.bias"]
        return log_softmax(logits), traces, x, final

    def backward(
        self,
        inputs: Tokens,
        d_logits: Array,
        traces: list[LayerTrace],
        top: Array,
        masks: list[Array] | None,
    ) -> dict[str, Array]:
        """The objective's gradient for every parameter, from that for the logits."""
        d: dict[str, Array] = {}
        d["softmax.weight"] = np.einsum("tbv,tbh->vh", d_logits, top)
        d["softmax.bias"] = d_logits.sum(axis=(0, 1))
        d_x = d_logits @ self.p["softmax.weight"]
        for layer in reversed(range(self.recipe.layers)):
            d_h = d_x * masks[layer + 1] if masks else d_x
            w, u = self.p[f"rnn.{layer}.input"], self.p[f"rnn.{layer}.recurrent"]
            d_x, d_w, d_u, d_b = lstm_backward(traces[layer], w, u, d_h)
            d[f"rnn.{layer}.input"] = d_w
            d[f"rnn.{layer}.recurrent"] = d_u
            d[f"rnn.{layer}.bias"] = d_b
        if masks:
            d_x = d_x * masks[0]
        d["embedding"] = np.zeros_like(self.p["embedding"])
        np.add.at(d["embedding"], inputs, d_x)
        return {name: d[name] for name in self.p}

    def loss_and_gradients(
        self, inputs: Tokens, targets: Tokens, mask: Mask, state: Array
    ) -> tuple[float, dict[str, Array], Array]:
        """Summed nll, float64 gradient of the objective, and the final state."""
        masks = self.dropout_masks(*inputs.shape) if self.recipe.dropout else None
        log_p, traces, top, final = self.forward(inputs, state, masks)
        target_log_p = np.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
        # d nll / d logits = softmax(logits) - one_hot(target)
        d_logits = np.exp(log_p)
        d_logits[(*np.indices(targets.shape), targets)] -= 1.0
        d_logits *= mask[..., None].astype(np.float64) / objective_divisor(self.recipe, mask)
        gradients = self.backward(inputs, d_logits, traces, top, masks)
        return float(-(target_log_p * mask).sum()), gradients, final

    def gradients(self, inputs: Tokens, targets: Tokens, mask: Mask, state: State) -> Parameters:
        _, gradients, _ = self.loss_and_gradients(inputs, targets, mask, state)
        return {name: g.astype(np.float32) for name, g in gradients.items()}

    def train_step(
        self, inputs: Tokens, targets: Tokens, mask: Mask, state: State, learning_rate: float
    ) -> TrainStep:
        nll, gradients, final = self.loss_and_gradients(inputs, targets, mask, state)
        norm = float(np.sqrt(sum((g**2).sum() for g in gradients.values())))
        clip = self.recipe.clip_norm
        scale = clip / norm if clip is not None and norm > clip else 1.0
        self.step += 1
        for name, p in self.p.items():
            g = scale * gradients[name] + self.recipe.weight_decay * p
            p -= learning_rate * self.direction(name, g)
        return TrainStep(nll, norm, final)

    def direction(self, name: str, g: Array) -> Array:
        """What a rate of 1 subtracts from a parameter with gradient g; see the contract."""
        recipe = self.recipe
        if recipe.optimizer == "sgd":
            return g
        slots = {slot: arrays[name] for slot, arrays in self.slots.items()}
        if recipe.optimizer == "rmsprop":
            s, decay = slots["mean_square"], recipe.rmsprop_decay
            s[:] = decay * s + (1 - decay) * g**2
            return g / (np.sqrt(s) + recipe.optimizer_epsilon)
        m, v = slots["first_moment"], slots["second_moment"]
        m[:] = recipe.adam_beta1 * m + (1 - recipe.adam_beta1) * g
        v[:] = recipe.adam_beta2 * v + (1 - recipe.adam_beta2) * g**2
        m_hat = m / (1 - recipe.adam_beta1**self.step)
        v_hat = v / (1 - recipe.adam_beta2**self.step)
        return m_hat / (np.sqrt(v_hat) + recipe.optimizer_epsilon)

    def evaluate_step(
        self, inputs: Tokens, targets: Tokens, mask: Mask, state: State
    ) -> EvaluateStep:
        log_p, _, _, final = self.forward(inputs, state, None)
        target_log_p = np.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
        return EvaluateStep(float(-(target_log_p * mask).sum()), final)

    def next_token_log_probabilities(
        self, inputs: Tokens, state: State
    ) -> tuple[npt.NDArray[np.float32], State]:
        log_p, _, _, final = self.forward(inputs, state, None)
        return log_p.astype(np.float32), final

    def snapshot(self, state: State) -> dict[str, npt.NDArray[Any]]:
        saved: dict[str, npt.NDArray[Any]] = {f"parameter.{n}": p.copy() for n, p in self.p.items()}
        for slot, arrays in self.slots.items():
            saved |= {f"optimizer.{slot}.{name}": a.copy() for name, a in arrays.items()}
        return {**saved, "step": np.array(self.step), "state": np.array(state)}

    def restore(self, snapshot: Mapping[str, npt.NDArray[Any]]) -> State:
        self.p = {name: snapshot[f"parameter.{name}"].copy() for name in self.p}
        self.slots = {
            slot: {name: snapshot[f"optimizer.{slot}.{name}"].copy() for name in self.p}
            for slot in self.slots
        }
        self.step = int(snapshot["step"])
        return snapshot["state"].copy()

    def synchronize(self) -> None:
        pass

    def device_names(self) -> list[str]:
        return [f"numpy:{r}" for r in range(self.devices)]
