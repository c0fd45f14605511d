"""The language model in MXNet 1.9 Gluon: hybrid blocks, `gluon.Trainer` and one context a replica.

Top to bottom: the model, its loss, then the `Backend` that trains it. What a backend must do is in
`contract.py`; the model's definition, against which this is tested, is `numpy_oracle.py`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ptbench.backends.contract import (
    OPTIMIZER_SLOTS,
    Backend,
    EvaluateStep,
    Feature,
    Mask,
    Parameters,
    Scalar,
    State,
    Tokens,
    TrainStep,
    check_parameters,
    device_columns,
    objective_divisor,
    rate_and_epsilon,
)
from ptbench.configuration.models import Accelerator, Recipe
from ptbench.errors import PtbenchError

# Read by CUDA's libraries when they load: no rounding of fp32 products to TF32, no atomic sums.
os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
os.environ["MXNET_ENFORCE_DETERMINISM"] = "1"

import mxnet as mx
from mxnet import autograd, gluon
from mxnet.gluon import nn, rnn


class LanguageModel(gluon.HybridBlock):
    """Embedding, LSTM layers and output layer, with dropout between them.

    The layers are single ones because a stack's own dropout spares its last layer's output.
    """

    def __init__(self, recipe: Recipe, vocabulary_size: int) -> None:
        super().__init__()
        self.dropout = recipe.dropout
        uniform = mx.init.Uniform(recipe.initialization_scale)
        with self.name_scope():
            self.embedding = nn.Embedding(
                vocabulary_size, recipe.embedding_size, weight_initializer=uniform
            )
            self.layers = nn.HybridSequential()
            for layer in range(recipe.layers):
                self.layers.add(
                    rnn.LSTM(
                        recipe.hidden_size,
                        input_size=recipe.hidden_size if layer else recipe.embedding_size,
                        i2h_weight_initializer=uniform,
                        h2h_weight_initializer=uniform,
                        i2h_bias_initializer=mx.init.LSTMBias(recipe.forget_bias),
                    )
                )
            self.output = nn.Dense(
                vocabulary_size,
                flatten=False,
                in_units=recipe.hidden_size,
                weight_initializer=uniform,
                bias_initializer=uniform,
            )
        # One effective bias: Gluon's second one stays zero.
        self.layers.collect_params(".*h2h_bias").setattr("grad_req", "null")

    def hybrid_forward(self, F: Any, inputs: Any, states: Any) -> Any:  # noqa: N803 - Gluon's name
        """Logits [time, batch, vocabulary] and each layer's final [h, c], [1, batch, hidden]."""
        x = self.drop(F, self.embedding(inputs))
        final = []
        for layer, state in zip(self.layers, states, strict=True):
            x, state = layer(x, state)
            x = self.drop(F, x)
            final.append(state)
        return self.output(x), final

    def drop(self, F: Any, x: Any) -> Any:  # noqa: N803
        """Inverted dropout while training, by MXNet's own generator: cuDNN's ignores the seed."""
        return F.Dropout(x, p=self.dropout, cudnn_off=True) if self.dropout else x


class NegativeLogLikelihood(gluon.HybridBlock):
    """The model with its loss, in one graph."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def hybrid_forward(self, F: Any, inputs: Any, targets: Any, mask: Any, states: Any) -> Any:  # noqa: N803
        """Summed negative log-likelihood [1] of the real tokens in nats, and the final states."""
        logits, states = self.model(inputs, states)
        log_p = F.pick(F.log_softmax(logits), targets)
        return -(log_p * mask).sum(), states


class SlotOptimizer(mx.optimizer.Optimizer):
    """An optimizer whose slots the backend makes, saves and restores.

    Args:
        slots: the arrays of the index-th parameter on a context.
    """

    def __init__(
        self, recipe: Recipe, slots: dict[tuple[int, mx.Context], list[mx.nd.NDArray]]
    ) -> None:
        super().__init__(learning_rate=recipe.learning_rate, wd=recipe.weight_decay)
        self.recipe, self.slots, self.epsilon = recipe, slots, recipe.optimizer_epsilon

    def create_state(self, index: int, weight: mx.nd.NDArray) -> list[mx.nd.NDArray]:
        return self.slots[index, weight.context]


class Adam(SlotOptimizer):
    """MXNet's update, with a rate and an epsilon that are set before each step.

    `rate_and_epsilon` gives both. mx.optimizer.Adam adds epsilon to the uncorrected moment's root,
    and the count of steps by which it corrects can be restored by unpickling alone.
    """

    def update(self, index: int, weight: Any, grad: Any, state: list[Any]) -> None:  # noqa: ARG002
        mx.nd.adam_update(
            weight,
            grad,
            *state,
            out=weight,
            lr=self.learning_rate,
            beta1=self.recipe.adam_beta1,
            beta2=self.recipe.adam_beta2,
            epsilon=self.epsilon,
            wd=self.wd,
        )


class RMSProp(SlotOptimizer):
    """RMSProp with epsilon added to the root; mx.optimizer.RMSProp adds it under the root."""

    def update(self, index: int, weight: Any, grad: Any, state: list[Any]) -> None:  # noqa: ARG002
        (s,) = state
        g = grad + self.wd * weight
        s[:] = self.recipe.rmsprop_decay * s + (1 - self.recipe.rmsprop_decay) * g**2
        weight -= self.learning_rate * g / (s.sqrt() + self.epsilon)


class MXNetBackend(Backend):
    """Gluon on one context for each replica; MXNet's engine runs all of it in the background."""

    name = "mxnet"
    package = "mxnet"
    features = (
        Feature("embedding", True, "gluon.nn.Embedding"),
        Feature("LSTM layer", True, "gluon.rnn.LSTM, its second bias frozen at zero"),
        Feature("dropout", True, "nd.Dropout"),
        Feature("softmax cross-entropy", True, "nd.log_softmax and nd.pick"),
        Feature("SGD", True, "gluon.Trainer and optimizer.SGD"),
        Feature("Adam", False, "gluon.Trainer and Adam, over nd.adam_update"),
        Feature("RMSProp", False, "gluon.Trainer and RMSProp"),
        Feature("weight decay", True, "optimizer.Optimizer(wd)"),
        Feature("gradient clipping by global norm", True, "gluon.utils.clip_global_norm"),
        Feature("uniform initialisation", True, "init.Uniform and init.LSTMBias"),
        Feature("learning-rate change", True, "Trainer.set_learning_rate"),
        Feature("data parallel", True, "gluon.utils.split_and_load and Trainer.allreduce_grads"),
        Feature("truncated back-propagation with carried state", True, "states of gluon.rnn.LSTM"),
        Feature("deterministic per-step randomness", True, "random.seed before every step"),
        Feature("saving parameters", False, "MXNetBackend.parameters"),
    )

    def __init__(
        self,
        recipe: Recipe,
        vocabulary_size: int,
        devices: int = 1,
        seed: int = 0,
        accelerator: Accelerator = "cpu",
        threads: int = 1,
    ) -> None:
        super().__init__(recipe, vocabulary_size, devices, seed, accelerator, threads)
        self.contexts = choose_contexts(accelerator, devices)
        self.model = LanguageModel(recipe, vocabulary_size)
        mx.random.seed(random_seed(seed))
        self.model.initialize(ctx=self.contexts)
        self.nll = NegativeLogLikelihood(self.model)
        # Buffers and execution plan are made once; only what a call returns is allocated anew.
        self.nll.hybridize(static_alloc=True, static_shape=True)
        self.trainable = list(self.named_parameters().values())
        self.slots = {
            (index, context): [
                mx.nd.zeros(parameter.shape, ctx=context) for _ in OPTIMIZER_SLOTS[recipe.optimizer]
            ]
            for index, parameter in enumerate(self.trainable)
            for context in self.contexts
        }
        self.trainer = gluon.Trainer(
            self.trainable,
            self.optimizer(),
            kvstore="device" if accelerator == "cuda" else "local",
            update_on_kvstore=False,  # the summed gradient is clipped before the update
        )

    def optimizer(self) -> mx.optimizer.Optimizer:
        if self.recipe.optimizer == "sgd":
            return mx.optimizer.SGD(
                learning_rate=self.recipe.learning_rate, wd=self.recipe.weight_decay
            )
        kind = Adam if self.recipe.optimizer == "adam" else RMSProp
        return kind(self.recipe, self.slots)

    # ---- parameters

    def named_parameters(self) -> dict[str, gluon.Parameter]:
        """Gluon's trained parameters by canonical name."""
        named = {"embedding": self.model.embedding.weight}
        for layer, lstm in enumerate(self.model.layers):
            named[f"rnn.{layer}.input"] = lstm.l0_i2h_weight
            named[f"rnn.{layer}.recurrent"] = lstm.l0_h2h_weight
            named[f"rnn.{layer}.bias"] = lstm.l0_i2h_bias
        named["softmax.weight"] = self.model.output.weight
        named["softmax.bias"] = self.model.output.bias
        return named

    def parameters(self) -> Parameters:
        return {
            name: canonical(name, p.data(self.contexts[0]))
            for name, p in self.named_parameters().items()
        }

    def load_parameters(self, parameters: Mapping[str, npt.NDArray[Any]]) -> None:
        check_parameters(parameters, self.recipe, self.vocabulary_size)
        for name, parameter in self.named_parameters().items():
            value = np.asarray(parameters[name], np.float32)
            parameter.set_data(mx.nd.array(value.T if is_transposed(name) else value))

    # ---- training

    def initial_state(self, batch_size: int, training: bool) -> State:
        """One list of each layer's [h, c] per replica; a single list if not for training."""
        if not training:
            return self.zero_state(batch_size, self.contexts[0])
        return [
            self.zero_state(columns.stop - columns.start, context)
            for columns, context in zip(
                device_columns(batch_size, self.devices), self.contexts, strict=True
            )
        ]

    def zero_state(self, batch_size: int, context: mx.Context) -> list[list[mx.nd.NDArray]]:
        """Each layer's [h, c] of zeros [1, batch, hidden]."""
        return [layer.begin_state(batch_size, ctx=context) for layer in self.model.layers]

    def forward_backward(
        self, inputs: Tokens, targets: Tokens, mask: Mask, state: State
    ) -> tuple[mx.nd.NDArray, State]:
        """Leave the objective's gradient, summed over replicas, in every replica's `grad`.

        Returns the summed nll and the final state.
        """
        divisor = objective_divisor(self.recipe, mask)
        # All uploads come first: one waits for what cpu(0) was given before, so a later one would
        # keep its replica waiting for the first.
        shares = [
            gluon.utils.split_and_load(to_device(a, self.contexts[0]), self.contexts, batch_axis=1)
            for a in (inputs, targets, mask)
        ]
        nlls, objectives, states = [], [], []
        with autograd.record():
            for replica, context in enumerate(self.contexts):
                if self.recipe.dropout:
                    mx.random.seed(random_seed(self.seed, self.step, replica), ctx=context)
                nll, final = self.nll(*(share[replica] for share in shares), state[replica])
                nlls.append(nll)
                objectives.append(nll / divisor)
                states.append(final)
        autograd.backward(objectives)
        self.trainer.allreduce_grads()
        nll = mx.nd.add_n(*[n.as_in_context(self.contexts[0]) for n in nlls])
        return nll, [carried(s) for s in states]

    def gradients(self, inputs: Tokens, targets: Tokens, mask: Mask, state: State) -> Parameters:
        self.forward_backward(inputs, targets, mask, state)
        return {
            name: canonical(name, p.grad(self.contexts[0]))
            for name, p in self.named_parameters().items()
        }

    def train_step(
        self, inputs: Tokens, targets: Tokens, mask: Mask, state: State, learning_rate: float
    ) -> TrainStep:
        nll, final = self.forward_backward(inputs, targets, mask, state)
        # Every replica holds the same summed gradient, so each finds the same norm by itself.
        norms = [
            gluon.utils.clip_global_norm(
                [p.grad(context) for p in self.trainable],
                math.inf if self.recipe.clip_norm is None else self.recipe.clip_norm,
                check_isfinite=False,  # looking would wait for the device
            )
            for context in self.contexts
        ]
        rate, epsilon = rate_and_epsilon(self.recipe, learning_rate, self.step)
        self.trainer.set_learning_rate(rate)
        self.trainer.optimizer.epsilon = epsilon
        self.trainer.update(batch_size=1)
        self.step += 1
        return TrainStep(as_scalar(nll), as_scalar(norms[0]), final)

    # ---- evaluation

    def evaluate_step(
        self, inputs: Tokens, targets: Tokens, mask: Mask, state: State
    ) -> EvaluateStep:
        arrays = (to_device(a, self.contexts[0]) for a in (inputs, targets, mask))
        nll, final = self.nll(*arrays, state)
        return EvaluateStep(as_scalar(nll), final)

    def next_token_log_probabilities(
        self, inputs: Tokens, state: State
    ) -> tuple[npt.NDArray[np.float32], State]:
        logits, final = self.model(to_device(inputs, self.contexts[0]), state)
        return mx.nd.log_softmax(logits).asnumpy(), final

    # ---- snapshots

    def snapshot(self, state: State) -> dict[str, npt.NDArray[Any]]:
        saved: dict[str, npt.NDArray[Any]] = {
            f"parameter.{name}": p for name, p in self.parameters().items()
        }
        for index, name in enumerate(self.named_parameters()):
            arrays = self.slots[index, self.contexts[0]]
            for slot, array in zip(OPTIMIZER_SLOTS[self.recipe.optimizer], arrays, strict=True):
                saved[f"optimizer.{slot}.{name}"] = canonical(name, array)
        # [layer, (h, c), global batch, hidden]
        replicas = [
            np.stack([[a.asnumpy()[0] for a in layer] for layer in replica]) for replica in state
        ]
        return {**saved, "step": np.array(self.step), "state": np.concatenate(replicas, axis=2)}

    def restore(self, snapshot: Mapping[str, npt.NDArray[Any]]) -> State:
        self.load_parameters({n: snapshot[f"parameter.{n}"] for n in self.named_parameters()})
        for index, name in enumerate(self.named_parameters()):
            for context in self.contexts:
                arrays = self.slots[index, context]
                for slot, array in zip(OPTIMIZER_SLOTS[self.recipe.optimizer], arrays, strict=True):
                    value = snapshot[f"optimizer.{slot}.{name}"]
                    array[:] = mx.nd.array(value.T if is_transposed(name) else value)
        self.step = int(snapshot["step"])
        saved = snapshot["state"]
        columns = device_columns(saved.shape[2], self.devices)
        return [
            [[mx.nd.array(a[None, block], ctx=context) for a in layer] for layer in saved]
            for block, context in zip(columns, self.contexts, strict=True)
        ]

    # ---- housekeeping

    def synchronize(self) -> None:
        mx.nd.waitall()

    def device_names(self) -> list[str]:
        return [f"{c.device_type}:{c.device_id}" for c in self.contexts]

    def settings(self) -> dict[str, str]:
        return {
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "unset"),
            "hybridize": "static_alloc, static_shape",
            "NVIDIA_TF32_OVERRIDE": os.environ["NVIDIA_TF32_OVERRIDE"],
            "MXNET_ENFORCE_DETERMINISM": os.environ["MXNET_ENFORCE_DETERMINISM"],
        }

    def close(self) -> None:
        mx.nd.waitall()


def choose_contexts(accelerator: Accelerator, devices: int) -> list[mx.Context]:
    """The contexts of all replicas; CPU contexts are threads' queues of the one processor.

    Raises:
        PtbenchError: if MXNet sees fewer GPUs than `devices`.
    """
    if accelerator == "cpu":
        return [mx.cpu(r) for r in range(devices)]
    if (found := mx.context.num_gpus()) < devices:
        raise PtbenchError(f"MXNet sees {found} GPUs where devices={devices} were asked for")
    return [mx.gpu(r) for r in range(devices)]


def random_seed(*words: int) -> int:
    """A seed that is far from those of other words; MXNet's streams overlap for close seeds."""
    return int(np.random.SeedSequence(words).generate_state(1)[0]) >> 1  # a C int


def to_device(array: npt.NDArray[Any], context: mx.Context) -> mx.nd.NDArray:
    """A copy on the context, complete when this returns."""
    return mx.nd.array(array, ctx=context, dtype=array.dtype)


def as_scalar(array: mx.nd.NDArray) -> Scalar:
    """The same number [1] as MXNet's NumPy kind of array, which float() understands."""
    return array.as_np_ndarray()


def carried(state: list[list[mx.nd.NDArray]]) -> list[list[mx.nd.NDArray]]:
    """The same state without its past, so that no gradient flows back into the last window."""
    return [[a.detach() for a in layer] for layer in state]


def is_transposed(name: str) -> bool:
    """Whether Gluon stores [4 hidden, inputs] where the canonical shape is the transpose."""
    return name.endswith((".input", ".recurrent"))


def canonical(name: str, array: mx.nd.NDArray) -> npt.NDArray[np.float32]:
    """A parameter or gradient as the contract shapes it."""
    value = array.asnumpy()
    return np.ascontiguousarray(value.T) if is_transposed(name) else value
