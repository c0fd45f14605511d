"""The contract's `Backend` over Gluon's blocks and `gluon.Trainer`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

# First, for it sets what MXNet and CUDA's libraries read when they load.
from ptbench.backends.mxnet.devices import (  # isort: skip
    as_scalar,
    choose_contexts,
    graph_flags,
    random_seed,
    settings,
    to_device,
)

import mxnet as mx
from mxnet import autograd, gluon

from ptbench.backends.base import Backend, EvaluateStep, State, TrainStep
from ptbench.backends.contract__LEFT import Feature, Mask, Tokens, device_columns, objective_divisor
from ptbench.backends.mxnet.heads import ActivationPenalty, ChunkedLoss
from ptbench.backends.mxnet.layers import Array, States, drop
from ptbench.backends.mxnet.model import (
    LanguageModel,
    NegativeLogLikelihood,
    output_loss,
    stored_parameters,
)
from ptbench.backends.mxnet.optimizer import make_optimizer
from ptbench.model.optimizers import OPTIMIZER_SLOTS, rate_and_epsilon
from ptbench.model.parameters import Parameters, check_parameters, kept_weights, state_widths
from ptbench.model.recipe import Accelerator, Recipe

# Tell the draws that all replicas share from others with the same seed and step.
WORDS_STREAM = 1
WEIGHTS_STREAM = 2


class MXNetBackend(Backend):
    """Gluon on one context for each replica; MXNet's engine runs all of it in the background."""

    name = "mxnet"
    package = "mxnet"
    features = (
        Feature("embedding", True, "gluon.nn.Embedding"),
        Feature("LSTM layer", True, "gluon.rnn.LSTM, its second bias frozen at zero if unwanted"),
        Feature("GRU and simple recurrent layers", True, "gluon.rnn.GRU and gluon.rnn.RNN"),
        Feature("explicit time steps", True, "gluon.rnn.LSTMCell and others in contrib.foreach"),
        Feature(
            "sparse LSTM",
            False,
            "mxnet.layers.SparseLSTM: nd.sparse.dot, gradients by autograd.Function",
        ),
        Feature("mixture of softmaxes", False, "mxnet.heads.MixtureHead and MixtureLoss"),
        Feature(
            "weight tying and factorised output",
            True,
            "gluon.nn.Dense(params=embedding.params), and a second gluon.nn.Dense",
        ),
        Feature("dropout", True, "nd.Dropout"),
        Feature("locked dropout", True, "nd.Dropout(axes)"),
        Feature("word dropout", False, "mask of rows in mxnet.model.LanguageModel"),
        Feature(
            "recurrent dropout",
            False,
            "mxnet.layers.TimeSteps, also in place of the fused layers, which have none",
        ),
        Feature(
            "weight dropout",
            False,
            "MXNetBackend.dropped_weights: any layer's matrix is masked in place for a step",
        ),
        Feature("activation regularisation", False, "mxnet.heads.ActivationPenalty"),
        Feature("softmax cross-entropy", True, "nd.log_softmax and nd.pick"),
        Feature("SGD", True, "gluon.Trainer and optimizer.SGD"),
        Feature("Adam", False, "gluon.Trainer and Adam, over nd.adam_update"),
        Feature("RMSProp", False, "gluon.Trainer and RMSProp"),
        Feature("averaged SGD", False, "gluon.Trainer and AveragedSGD, over optimizer.SGD"),
        Feature("weight decay", True, "optimizer.Optimizer(wd)"),
        Feature("gradient clipping by global norm", True, "gluon.utils.clip_global_norm"),
        Feature("uniform initialisation", True, "init.Uniform and init.LSTMBias"),
        Feature(
            "Keras' default initialisation", True, "init.Uniform, init.Xavier and init.Orthogonal"
        ),
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
        kept = kept_weights(recipe, vocabulary_size, seed)
        self.model = LanguageModel(recipe, vocabulary_size, kept)
        self.loss = output_loss(recipe, vocabulary_size, self.model)
        self.nll = NegativeLogLikelihood(self.model, self.loss)
        mx.random.seed(random_seed(seed))
        self.nll.initialize(ctx=self.contexts)
        self.stored = stored_parameters(self.model, self.loss, recipe, vocabulary_size, kept)
        self.trained = [stored.parameter for stored in self.stored.values()]
        self.recurrent = [
            stored.parameter for name, stored in self.stored.items() if name.endswith(".recurrent")
        ]

        # What runs as one graph: all of it, or where logits are many the model, and its loss by
        # chunks. An autograd.Function, as the sparse layers have it, can be in no graph.
        self.chunked = ChunkedLoss(self.loss, recipe.mixtures)
        tokens = recipe.sequence_length * recipe.global_batch_size(devices) // devices
        self.in_chunks = recipe.implementation == "tuned" and self.chunked.needed(tokens)
        in_graph = self.loss if recipe.kernel == "sparse" else self.nll
        in_graph.hybridize(**graph_flags(recipe))
        self.penalty = ActivationPenalty(recipe)
        self.penalty.hybridize(**graph_flags(recipe))
        self.added = list(self.loss.collect_params().values()) if self.in_chunks else []
        for parameter in self.added:
            parameter.grad_req = "add"

        # 0 where a sparse model has no weight, in Gluon's shape
        self.gradient_masks = [
            (stored.parameter, context, to_device(stored.stored(stored.kept), context))
            for stored in self.stored.values()
            if stored.kept is not None and not stored.packed
            for context in self.contexts
        ]
        if self.gradient_masks:
            self.load_parameters(self.parameters())  # zeros where there are no weights
        self.slots = {
            (index, context): [
                mx.nd.zeros(parameter.shape, ctx=context) for _ in OPTIMIZER_SLOTS[recipe.optimizer]
            ]
            for index, parameter in enumerate(self.trained)
            for context in self.contexts
        }
        self.trainer = gluon.Trainer(
            self.trained,
            make_optimizer(recipe, self.slots),
            kvstore="device" if accelerator == "cuda" else "local",
            update_on_kvstore=False,  # the summed gradient is clipped before the update
        )

    # ---- parameters

    def parameters(self) -> Parameters:
        return {
            name: stored.canonical(stored.parameter.data(self.contexts[0]))
            for name, stored in self.stored.items()
        }

    def load_parameters(self, parameters: Mapping[str, npt.NDArray[Any]]) -> None:
        check_parameters(parameters, self.recipe, self.vocabulary_size)
        for name, stored in self.stored.items():
            stored.parameter.set_data(mx.nd.array(stored.stored(parameters[name])))

    # ---- training

    def initial_state(self, batch_size: int, training: bool) -> State:
        """One list of each layer's [h, c] or [h] per replica; a single list if not for training."""
        if not training:
            return self.zero_state(batch_size, self.contexts[0])
        return [
            self.zero_state(columns.stop - columns.start, context)
            for columns, context in zip(
                device_columns(batch_size, self.devices), self.contexts, strict=True
            )
        ]

    def zero_state(self, batch_size: int, context: mx.Context) -> list[States]:
        return [layer.begin_state(batch_size, ctx=context) for layer in self.model.layers]

    def dropped_words(self, training: bool, context: mx.Context) -> list[mx.nd.NDArray]:
        """What the embedding's rows are multiplied by [vocabulary, 1], if the recipe drops any.

        The same on all replicas.
        """
        if not self.recipe.word_dropout:
            return []
        keep = 1 - self.recipe.word_dropout if training else 1.0
        rng = np.random.default_rng([self.seed, self.step, WORDS_STREAM])
        kept = rng.random((self.vocabulary_size, 1)) < keep
        return [to_device((kept / keep).astype(np.float32), context)]

    @contextlib.contextmanager
    def dropped_weights(self) -> Iterator[None]:
        """Drop some recurrent weights in place, so that any layer takes what is left, fused or not.

        The next step's, the same on all replicas. At the end the weights are whole again, and the
        gradients found meanwhile are with respect to them.
        """
        if not self.recipe.weight_dropout:
            yield
            return
        dropped = []
        for context in self.contexts:
            mx.random.seed(random_seed(self.seed, self.step, 0, WEIGHTS_STREAM), ctx=context)
            for parameter in self.recurrent:
                weight = parameter.data(context)
                with autograd.train_mode():
                    kept = drop(mx.nd, mx.nd.ones_like(weight), self.recipe.weight_dropout)
                dropped.append((weight, weight.copy(), parameter.grad(context), kept))
                weight *= kept
        try:
            yield
        finally:
            for weight, whole, gradient, kept in dropped:
                whole.copyto(weight)
                gradient *= kept

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
        words = [self.dropped_words(True, context) for context in self.contexts]
        for parameter in self.added:
            parameter.zero_grad()
        nlls, states = [], []
        heads: list[Array] = []
        head_gradients: list[Array] = []
        with self.dropped_weights():
            for replica, context in enumerate(self.contexts):
                if self.recipe.drops:
                    mx.random.seed(random_seed(self.seed, self.step, replica), ctx=context)
                x, y, real = (share[replica] for share in shares)
                arguments = (state[replica], *words[replica])
                if self.in_chunks:
                    with autograd.record():
                        outputs, final, penalized = self.model(x, *arguments)
                    nll, gradients = self.chunked.with_gradients(
                        outputs, y.reshape(-1), real.reshape(-1), divisor
                    )
                    heads += outputs
                    head_gradients += gradients
                else:
                    with autograd.record():
                        nll, final, penalized = self.nll(x, y, real, *arguments)
                        heads.append(nll / divisor)
                    head_gradients.append(mx.nd.ones_like(nll))
                if self.recipe.penalizes:
                    with autograd.record():
                        heads.append(self.penalty(*penalized, real) / divisor)
                    head_gradients.append(mx.nd.ones_like(nll))
                nlls.append(nll)
                states.append(final)
            autograd.backward(heads, head_gradients)
        for parameter, context, kept in self.gradient_masks:
            parameter.grad(context)[:] *= kept
        self.trainer.allreduce_grads()
        nll = mx.nd.add_n(*[n.as_in_context(self.contexts[0]) for n in nlls])
        return nll, [carried(s) for s in states]

    def gradients(self, inputs: Tokens, targets: Tokens, mask: Mask, state: State) -> Parameters:
        self.forward_backward(inputs, targets, mask, state)
        return {
            name: stored.canonical(stored.parameter.grad(self.contexts[0]))
            for name, stored in self.stored.items()
        }

    def train_step(
        self,
        inputs: Tokens,
        targets: Tokens,
        mask: Mask,
        state: State,
        learning_rate: float,
        averaged: int = 1,
    ) -> TrainStep:
        nll, final = self.forward_backward(inputs, targets, mask, state)
        # Every replica holds the same summed gradient, so each finds the same norm by itself.
        norms = [
            gluon.utils.clip_global_norm(
                [p.grad(context) for p in self.trained],
                math.inf if self.recipe.clip_norm is None else self.recipe.clip_norm,
                check_isfinite=False,  # looking would wait for the device
            )
            for context in self.contexts
        ]
        rate, epsilon = rate_and_epsilon(self.recipe, learning_rate, self.step)
        self.trainer.set_learning_rate(rate)
        self.trainer.optimizer.epsilon = epsilon
        self.trainer.optimizer.averaged = averaged
        self.trainer.update(batch_size=1)
        self.step += 1
        return TrainStep(as_scalar(nll), as_scalar(norms[0]), final)

    # ---- evaluation

    def evaluate_step(
        self, inputs: Tokens, targets: Tokens, mask: Mask, state: State
    ) -> EvaluateStep:
        x, y, real = (to_device(a, self.contexts[0]) for a in (inputs, targets, mask))
        words = self.dropped_words(False, self.contexts[0])
        if self.in_chunks:
            outputs, final, _ = self.model(x, state, *words)
            nll = self.chunked(outputs, y.reshape(-1), real.reshape(-1))
        else:
            nll, final, _ = self.nll(x, y, real, state, *words)
        return EvaluateStep(as_scalar(nll), final)

    def next_token_log_probabilities(
        self, inputs: Tokens, state: State
    ) -> tuple[npt.NDArray[np.float32], State]:
        words = self.dropped_words(False, self.contexts[0])
        outputs, final, _ = self.model(to_device(inputs, self.contexts[0]), state, *words)
        log_p = self.loss.log_probabilities(mx.nd, *outputs)
        return log_p.asnumpy().reshape(*inputs.shape, self.vocabulary_size), final

    # ---- snapshots

    def snapshot(self, state: State) -> dict[str, npt.NDArray[Any]]:
        saved: dict[str, npt.NDArray[Any]] = {
            f"parameter.{name}": p for name, p in self.parameters().items()
        }
        for index, (name, stored) in enumerate(self.stored.items()):
            arrays = self.slots[index, self.contexts[0]]
            for slot, array in zip(OPTIMIZER_SLOTS[self.recipe.optimizer], arrays, strict=True):
                saved[f"optimizer.{slot}.{name}"] = stored.canonical(array)
        replicas = [flat(replica) for replica in state]
        for index, (name, width) in enumerate(state_widths(self.recipe).items()):
            # fused layers have [1, batch, width]
            parts = [arrays[index].asnumpy().reshape(-1, width) for arrays in replicas]
            saved[name] = np.concatenate(parts)
        return {**saved, "step": np.array(self.step)}

    def restore(self, snapshot: Mapping[str, npt.NDArray[Any]]) -> State:
        self.load_parameters({name: snapshot[f"parameter.{name}"] for name in self.stored})
        for index, (name, stored) in enumerate(self.stored.items()):
            for context in self.contexts:
                arrays = self.slots[index, context]
                for slot, array in zip(OPTIMIZER_SLOTS[self.recipe.optimizer], arrays, strict=True):
                    array[:] = mx.nd.array(stored.stored(snapshot[f"optimizer.{slot}.{name}"]))
        self.step = int(snapshot["step"])
        saved = [snapshot[name] for name in state_widths(self.recipe)]
        state = self.initial_state(len(saved[0]), training=True)
        columns = device_columns(len(saved[0]), self.devices)
        for replica, block in zip(state, columns, strict=True):
            for array, value in zip(flat(replica), saved, strict=True):
                array[:] = mx.nd.array(value[block].reshape(array.shape))
        return state

    # ---- housekeeping

    def synchronize(self) -> None:
        mx.nd.waitall()

    def device_names(self) -> list[str]:
        return [f"{c.device_type}:{c.device_id}" for c in self.contexts]

    def peak_device_memory(self) -> int | None:
        """All that is in use, CUDA's own included: MXNet keeps no count, but frees nothing."""
        if self.accelerator == "cpu":
            return None
        memory = [mx.context.gpu_memory_info(c.device_id) for c in self.contexts]
        return max(total - free for free, total in memory)

    def settings(self) -> dict[str, str]:
        return settings(self.recipe)

    def close(self) -> None:
        mx.nd.waitall()


def carried(state: list[States]) -> list[States]:
    """The same state without its past, so that no gradient flows back into the last window."""
    return [[a.detach() for a in layer] for layer in state]


def flat(state: list[States]) -> States:
    """One replica's arrays in the order of `state_widths`."""
    return [array for layer in state for array in layer]
