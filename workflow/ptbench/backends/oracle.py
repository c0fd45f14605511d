"""The model in float64 NumPy, forward and backward, written to be read.

Every framework is tested against it. It is not a framework: nothing is timed with it, and it
takes any number of devices as one. What it computes is in `Backend`'s docstring.

Notation: x_t is the input of a layer at time t, h its output, c its cell state, z its gates before
their non-linearities; d_a is the derivative of the objective with respect to a.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ptbench.backends import base
from ptbench.corpus.batching import Batch
from ptbench.model.parameters import GATES, Layout, Parameters

Array = npt.NDArray[np.float64]


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), written so that it cannot overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def log_sum_exp(x: Array, axis: int) -> Array:
    """log sum exp over an axis, which is kept."""
    largest = x.max(axis=axis, keepdims=True)
    return largest + np.log(np.exp(x - largest).sum(axis=axis, keepdims=True))


def log_softmax(logits: Array) -> Array:
    """Log-probabilities over the last axis."""
    return logits - log_sum_exp(logits, axis=-1)


class Step(NamedTuple):
    """A cell after one time step, and what its derivative needs, all [batch, ...]."""

    h: Array
    c: Array
    gates: Array  # [batch, gates x width], after their non-linearities


class Derivative(NamedTuple):
    """Derivatives with respect to what a time step took, all [batch, ...]."""

    z_input: Array  # the part of the gates that comes from the layer's input
    z_recurrent: Array  # and that which comes from the previous output, through the weights
    h: Array  # the previous output, past the weights
    c: Array


class Lstm:
    """Gates input, forget, candidate, output."""

    @staticmethod
    def forward(z_input: Array, z_recurrent: Array, h: Array, c: Array) -> Step:
        i, f, g, o = np.split(z_input + z_recurrent, 4, axis=-1)
        i, f, g, o = sigmoid(i), sigmoid(f), np.tanh(g), sigmoid(o)
        c = f * c + i * g
        return Step(o * np.tanh(c), c, np.concatenate([i, f, g, o], axis=-1))

    @staticmethod
    def backward(
        step: Step, z_recurrent: Array, h: Array, c: Array, d_h: Array, d_c: Array
    ) -> Derivative:
        i, f, g, o = np.split(step.gates, 4, axis=-1)
        tanh_c = np.tanh(step.c)
        d_c = d_c + d_h * o * (1 - tanh_c**2)
        d_z = np.concatenate(
            [
                d_c * g * i * (1 - i),
                d_c * c * f * (1 - f),
                d_c * i * (1 - g**2),
                d_h * tanh_c * o * (1 - o),
            ],
            axis=-1,
        )
        return Derivative(d_z, d_z, np.zeros_like(h), d_c * f)


class Gru:
    """Gates reset, update, candidate; the candidate's recurrent part is reset after its product."""

    @staticmethod
    def forward(z_input: Array, z_recurrent: Array, h: Array, c: Array) -> Step:
        x_r, x_z, x_n = np.split(z_input, 3, axis=-1)
        u_r, u_z, u_n = np.split(z_recurrent, 3, axis=-1)
        r, z = sigmoid(x_r + u_r), sigmoid(x_z + u_z)
        n = np.tanh(x_n + r * u_n)
        return Step((1 - z) * n + z * h, c, np.concatenate([r, z, n], axis=-1))

    @staticmethod
    def backward(
        step: Step, z_recurrent: Array, h: Array, c: Array, d_h: Array, d_c: Array
    ) -> Derivative:
        r, z, n = np.split(step.gates, 3, axis=-1)
        u_n = np.split(z_recurrent, 3, axis=-1)[2]
        d_n = d_h * (1 - z) * (1 - n**2)
        d_r = d_n * u_n * r * (1 - r)
        d_z = d_h * (h - n) * z * (1 - z)
        return Derivative(
            np.concatenate([d_r, d_z, d_n], axis=-1),
            np.concatenate([d_r, d_z, d_n * r], axis=-1),
            d_h * z,
            d_c,
        )


@dataclass
class SimpleRnn:
    """The simple recurrent cell of Elman (1990), or the same with rectified units."""

    activation: Callable[[Array], Array]
    slope: Callable[[Array], Array]  # its derivative, as a function of its value

    def forward(self, z_input: Array, z_recurrent: Array, h: Array, c: Array) -> Step:
        h = self.activation(z_input + z_recurrent)
        return Step(h, c, h)

    def backward(
        self, step: Step, z_recurrent: Array, h: Array, c: Array, d_h: Array, d_c: Array
    ) -> Derivative:
        d_z = d_h * self.slope(step.h)
        return Derivative(d_z, d_z, np.zeros_like(h), d_c)


RNNS: dict[str, Any] = {
    "lstm": Lstm,
    "gru": Gru,
    "rnn_tanh": SimpleRnn(np.tanh, slope=lambda h: 1 - h**2),
    "rnn_relu": SimpleRnn(lambda z: np.maximum(z, 0.0), slope=lambda h: np.heaviside(h, 0.0)),
}


@dataclass
class Layer:
    """One recurrent layer: its cell, its weights, and the mask of its previous output."""

    cell: Any  # one of RNNS
    w: Array  # [inputs, gates x width]
    u: Array  # [width, gates x width]
    b: Array  # [gates x width]
    r: Array  # [gates x width]
    mask: Array  # [batch, width], or 1
    kept: Array | float = 1.0  # what the weights u were multiplied by, [width, gates x width]

    def forward(self, x: Array, h0: Array, c0: Array) -> LayerTrace:
        """Args: x: [time, batch, inputs]; h0, c0: [batch, width]."""
        h, c, steps, recurrent = [h0], [c0], [], []
        for z_input in x @ self.w + self.b:
            z_recurrent = (h[-1] * self.mask) @ self.u + self.r
            step = self.cell.forward(z_input, z_recurrent, h[-1], c[-1])
            h.append(step.h)
            c.append(step.c)
            steps.append(step)
            recurrent.append(z_recurrent)
        return LayerTrace(x, np.stack(h), np.stack(c), steps, recurrent)

    def backward(self, trace: LayerTrace, d_out: Array) -> tuple[Array, dict[str, Array]]:
        """Derivatives with respect to x and each parameter, given those of the outputs.

        Truncated: nothing flows into the initial state, nor from any later window.
        """
        d_h, d_c = np.zeros_like(trace.h[0]), np.zeros_like(trace.c[0])
        d_input, d_recurrent = [], []
        for t in reversed(range(len(trace.x))):
            d = self.cell.backward(
                trace.steps[t], trace.recurrent[t], trace.h[t], trace.c[t], d_out[t] + d_h, d_c
            )
            d_h, d_c = d.h + (d.z_recurrent @ self.u.T) * self.mask, d.c
            d_input.append(d.z_input)
            d_recurrent.append(d.z_recurrent)
        d_z_input, d_z_recurrent = np.stack(d_input[::-1]), np.stack(d_recurrent[::-1])
        d_parameters = {
            "input": np.einsum("tbi,tbj->ij", trace.x, d_z_input),
            "recurrent": self.kept
            * np.einsum("tbi,tbj->ij", trace.h[:-1] * self.mask, d_z_recurrent),
            "bias": d_z_input.sum(axis=(0, 1)),
            "recurrent_bias": d_z_recurrent.sum(axis=(0, 1)),
        }
        return d_z_input @ self.w.T, d_parameters


@dataclass
class LayerTrace:
    """What the backward pass of a layer needs of its forward pass."""

    x: Array  # [time, batch, inputs]
    h: Array  # [time + 1, batch, width], the initial state first
    c: Array  # [time + 1, batch, width]
    steps: list[Step]
    recurrent: list[Array]  # [batch, gates x width] at each time


@dataclass
class Masks:
    """What dropout multiplies by: 0, or 1 / keep probability; 1 where nothing is dropped."""

    words: Array  # [vocabulary, 1]
    units: list[Array]  # of the embedding's output and each layer's, [time or 1, batch, width]
    recurrent: list[Array]  # of each layer's previous output, [batch, width]
    weights: list[Array]  # of each layer's recurrent weights, [width, gates x width]
    latents: Array  # [time or 1, batch, mixtures, latent]

    @classmethod
    def none(cls, layers: int) -> Masks:
        one = np.ones(1)
        return cls(one, [one] * (layers + 1), [one] * layers, [one] * layers, one)


@dataclass
class Forward:
    """Log-probabilities of every next word, and what the backward pass needs."""

    inputs: npt.NDArray[np.int32]
    layers: list[Layer]
    traces: list[LayerTrace]
    top: Array  # [time, batch, width], the last layer's output, dropped
    latents: Array  # [time, batch, mixtures, latent], before dropout; empty without mixtures
    features: Array  # [time, batch, mixtures or 1, features], before any projection
    projected: Array  # [time, batch, mixtures or 1, rank]
    log_prior: Array  # [time, batch, mixtures or 1]
    log_components: Array  # [time, batch, mixtures or 1, vocabulary]
    log_probabilities: Array  # [time, batch, vocabulary]
    state: dict[str, Array]


class Oracle(base.Backend):
    """The contract in float64, for tests."""

    name = "oracle"
    package = "numpy"
    dtype = np.float64

    def __init__(self, setup: base.Setup) -> None:
        super().__init__(setup)
        # by kind (the parameters, or a slot of the optimizer) and canonical name
        self.arrays: dict[str, dict[str, Array]] = {
            kind: {name: np.zeros(shape) for name, shape in self.shapes.items()}
            for kind in (base.PARAMETER, *self.slots)
        }

    def layout(self, name: str) -> Layout:
        return Layout(kept=self.kept.get(name))  # zeros too, whatever the kernel

    @property
    def p(self) -> dict[str, Array]:
        """The parameters."""
        return self.arrays[base.PARAMETER]

    def read(self, kind: str) -> base.Arrays:
        return self.arrays[kind]

    def write(self, kind: str, arrays: Parameters) -> None:
        self.arrays[kind] = {name: np.asarray(a, np.float64) for name, a in arrays.items()}

    def read_state(self, state: base.State) -> base.Arrays:
        return state

    def make_state(self, arrays: Parameters, training: bool) -> base.State:
        return dict(arrays)

    def dropout_masks(self, steps: int, batch_size: int) -> Masks:
        """What the next training step drops."""
        recipe, rng = self.recipe, np.random.default_rng([self.setup.seed, self.step])
        times = 1 if recipe.dropout_kind == "locked" else steps
        inputs_and_layers = (recipe.embedding_size, *recipe.widths)

        def mask(rate: float, *shape: int) -> Array:
            return (rng.random(shape) >= rate) / (1 - rate)

        latent = recipe.latent_size or recipe.widths[-1]
        return Masks(
            words=mask(recipe.word_dropout, self.setup.vocabulary_size, 1),
            units=[
                mask(rate, times, batch_size, width)
                for rate, width in zip(recipe.unit_dropout, inputs_and_layers, strict=True)
            ],
            recurrent=[mask(recipe.recurrent_dropout, batch_size, n) for n in recipe.widths],
            weights=[
                mask(recipe.weight_dropout, n, len(GATES[recipe.rnn]) * n) for n in recipe.widths
            ],
            latents=mask(recipe.latent_dropout, times, batch_size, recipe.mixtures, latent),
        )

    def forward(
        self, inputs: npt.NDArray[np.int32], state: dict[str, Array], masks: Masks
    ) -> Forward:
        p, recipe = self.p, self.recipe
        x = (p["embedding"] * masks.words)[inputs] * masks.units[0]
        layers, traces, final = [], [], {}
        for index in range(recipe.layers):
            name = f"rnn.{index}"
            w, u, b = (p[f"{name}.{kind}"] for kind in ("input", "recurrent", "bias"))
            r = p.get(f"{name}.recurrent_bias", np.zeros_like(b))
            kept = masks.weights[index]
            layer = Layer(RNNS[recipe.rnn], w, u * kept, b, r, masks.recurrent[index], kept)
            h0 = state[f"state.{index}.h"]
            trace = layer.forward(x, h0, state.get(f"state.{index}.c", np.zeros_like(h0)))
            layers.append(layer)
            traces.append(trace)
            final[f"state.{index}.h"] = trace.h[-1]
            if recipe.rnn == "lstm":
                final[f"state.{index}.c"] = trace.c[-1]
            x = trace.h[1:] * masks.units[index + 1]

        features, latents = x[:, :, None], np.empty(0)
        log_prior = np.zeros((*inputs.shape, 1))
        if recipe.mixtures:
            latents = np.tanh(x @ p["latent.weight"] + p["latent.bias"])
            latents = latents.reshape(*inputs.shape, recipe.mixtures, -1)
            features = latents * masks.latents
            log_prior = log_softmax(x @ p["prior.weight"])
        projected = features
        if "softmax.projection" in p:
            projected = features @ p["softmax.projection"]
        logits = projected @ self.output_matrix.T + p.get("softmax.bias", 0.0)
        log_components = log_softmax(logits)
        log_p = log_sum_exp(log_prior[..., None] + log_components, axis=2)[:, :, 0]
        return Forward(
            inputs, layers, traces, x, latents, features, projected, log_prior, log_components,
            log_p, final,
        )  # fmt: skip

    @property
    def output_matrix(self) -> Array:
        """[vocabulary, features]."""
        return self.p["embedding" if self.recipe.tie_weights else "softmax.weight"]

    def backward(
        self, forward: Forward, targets: npt.NDArray[np.int32], weights: Array, masks: Masks
    ) -> dict[str, Array]:
        """Every parameter's gradient of the sum of weights [time, batch] times each target's nll.

        The posterior of mixture k is the share of the target's probability that it gives. By the
        chain rule, d nll / d logits_k = posterior_k (softmax_k - one_hot(target)), and
        d nll / d prior's logits = prior - posterior.
        """
        p, recipe = self.p, self.recipe
        d = {name: np.zeros_like(value) for name, value in p.items()}
        at_target = np.take_along_axis(forward.log_components, targets[..., None, None], axis=-1)
        log_joint = forward.log_prior + at_target[..., 0]
        posterior = np.exp(log_joint - log_sum_exp(log_joint, axis=-1))
        d_logits = np.exp(forward.log_components)
        time, batch = np.indices(targets.shape)
        d_logits[time, batch, :, targets] -= 1.0
        d_logits *= (weights[..., None] * posterior)[..., None]

        output = "embedding" if recipe.tie_weights else "softmax.weight"
        d[output] += np.einsum("tbkv,tbkf->vf", d_logits, forward.projected)
        if "softmax.bias" in p:
            d["softmax.bias"] = d_logits.sum(axis=(0, 1, 2))
        d_features = d_logits @ self.output_matrix
        if "softmax.projection" in p:
            d["softmax.projection"] = np.einsum("tbkf,tbkr->fr", forward.features, d_features)
            d_features = d_features @ p["softmax.projection"].T
        if recipe.mixtures:
            d_latents = d_features * masks.latents * (1 - forward.latents**2)
            d_latents = d_latents.reshape(*targets.shape, -1)
            d_prior = weights[..., None] * (np.exp(forward.log_prior) - posterior)
            d["latent.weight"] = np.einsum("tbi,tbj->ij", forward.top, d_latents)
            d["latent.bias"] = d_latents.sum(axis=(0, 1))
            d["prior.weight"] = np.einsum("tbi,tbk->ik", forward.top, d_prior)
            d_x = d_latents @ p["latent.weight"].T + d_prior @ p["prior.weight"].T
        else:
            d_x = d_features[:, :, 0]

        d_change = np.zeros_like(forward.top)
        if recipe.penalizes:
            d_top, d_change = self.penalty_gradients(forward, weights)
            d_x = d_x + d_top
        for index in reversed(range(recipe.layers)):
            d_out = d_x * masks.units[index + 1]
            if index == recipe.layers - 1:
                d_out = d_out + d_change
            d_x, d_layer = forward.layers[index].backward(forward.traces[index], d_out)
            for kind, value in d_layer.items():
                if (name := f"rnn.{index}.{kind}") in p:
                    d[name] = value * self.kept.get(name, True)
        d_rows = np.zeros_like(p["embedding"])
        np.add.at(d_rows, forward.inputs, d_x * masks.units[0])
        d["embedding"] += d_rows * masks.words
        return d

    def penalty_gradients(self, forward: Forward, weights: Array) -> tuple[Array, Array]:
        """Of both activation regularisations, with respect to the last layer's dropped output and
        to its output before dropout; both [time, batch, width].
        """
        recipe, h = self.recipe, forward.traces[-1].h[1:]
        each = weights[..., None] / h.shape[-1]  # [time, batch, 1]
        d_top = 2 * recipe.activation_regularization * each * forward.top
        both_real = np.minimum(each[1:], each[:-1])
        d_step = 2 * recipe.temporal_activation_regularization * both_real * (h[1:] - h[:-1])
        d_h = np.zeros_like(h)
        d_h[1:] += d_step
        d_h[:-1] -= d_step
        return d_top, d_h

    def loss_and_gradients(
        self, batch: Batch, state: dict[str, Array]
    ) -> tuple[float, dict[str, Array], dict[str, Array]]:
        """Return the summed nll, the float64 gradient of the objective, and the final state."""
        masks = self.next_masks(batch)
        forward = self.forward(batch.inputs, state, masks)
        weights = batch.mask.astype(np.float64) / self.objective_divisor(batch)
        gradients = self.backward(forward, batch.targets, weights, masks)
        return summed_nll(forward, batch), gradients, forward.state

    @property
    def no_masks(self) -> Masks:
        return Masks.none(self.recipe.layers)

    def next_masks(self, batch: Batch) -> Masks:
        return self.dropout_masks(*batch.inputs.shape) if self.recipe.drops else self.no_masks

    def forward_pass(self, batch: Batch, state: base.State) -> base.Scalar:
        return summed_nll(self.forward(batch.inputs, state, self.next_masks(batch)), batch)

    def forward_and_backward_pass(self, batch: Batch, state: base.State) -> base.Scalar:
        return self.loss_and_gradients(batch, state)[0]

    def read_gradients(self, batch: Batch, state: base.State) -> base.Arrays:
        return self.loss_and_gradients(batch, state)[1]

    def train_step(self, batch: Batch, state: base.State, learning_rate: float) -> base.TrainStep:
        nll, gradients, final = self.loss_and_gradients(batch, state)
        norm = float(np.sqrt(sum((g**2).sum() for g in gradients.values())))
        clip = self.recipe.clip_norm
        scale = clip / norm if clip is not None and norm > clip else 1.0
        averaged = self.averaged
        self.step += 1
        for name, p in self.p.items():
            g = scale * gradients[name] + self.recipe.weight_decay * p
            p -= learning_rate * self.direction(name, g)
            if self.recipe.optimizer == "asgd":
                mean = self.arrays["average"][name]
                mean[:] = (1 - 1 / averaged) * mean + p / averaged
        return base.TrainStep(nll, norm, final)

    def direction(self, name: str, g: Array) -> Array:
        """What a rate of 1 subtracts from a parameter with gradient g; see the contract."""
        recipe = self.recipe
        if recipe.optimizer in ("sgd", "asgd"):
            return g
        slots = {slot: self.arrays[slot][name] for slot in self.slots}
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

    def evaluate_step(self, batch: Batch, state: base.State) -> base.EvaluateStep:
        forward = self.forward(batch.inputs, state, self.no_masks)
        return base.EvaluateStep(summed_nll(forward, batch), forward.state)

    def next_token_log_probabilities(
        self, inputs: npt.NDArray[np.int32], state: base.State
    ) -> tuple[npt.NDArray[np.float32], base.State]:
        forward = self.forward(inputs, state, self.no_masks)
        return forward.log_probabilities.astype(np.float32), forward.state

    def synchronize(self) -> None:
        pass

    def device_names(self) -> list[str]:
        return [f"numpy:{r}" for r in range(self.devices)]


def summed_nll(forward: Forward, batch: Batch) -> float:
    """Return the negative log-likelihood of the real tokens [nats]."""
    at_target = batch.targets[..., None]
    log_p = np.take_along_axis(forward.log_probabilities, at_target, axis=-1)[..., 0]
    return float(-(log_p * batch.mask).sum())
