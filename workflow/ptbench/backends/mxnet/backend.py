"""The `Backend` of MXNet: contexts, settings of the process, training and evaluation steps."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import mxnet as mx
import numpy as np
import numpy.typing as npt
from mxnet import autograd, gluon

from ptbench.backends import base
from ptbench.backends.allocator import keep_memory
from ptbench.backends.mxnet import model, tuned
from ptbench.corpus.batching import Batch
from ptbench.model.optimizers import rate_and_epsilon
from ptbench.model.parameters import Parameters

SHARED_MASKS_STREAM = 3  # separates masks that all replicas share from their own

# how the names of a recurrent layer's parameters end: the last part of their canonical names
GATE_PARAMETERS = {
    "i2h_weight": "input",
    "h2h_weight": "recurrent",
    "i2h_bias": "bias",
    "h2h_bias": "recurrent_bias",
}


class MXNetBackend(base.Backend):
    """Gluon on one context for each replica; MXNet's engine runs all of it in the background."""

    name = "mxnet"
    package = "mxnet"
    transposed = (".input", ".recurrent", "latent.weight", "prior.weight", "softmax.projection")

    def __init__(self, setup: base.Setup) -> None:
        super().__init__(setup)
        recipe = self.recipe
        self.tuned = recipe.implementation == "tuned"
        on_gpu = setup.accelerator == "cuda"
        # first of all, so that it holds for the threads of MXNet's engine
        self.memory_is_kept = self.tuned and not on_gpu and keep_memory(arenas=1)
        if on_gpu:
            self.check_devices(mx.context.num_gpus(), self.devices)
        # those of the CPU are queues of one processor
        self.contexts = [mx.gpu(r) if on_gpu else mx.cpu(r) for r in range(self.devices)]
        self.model = model.LanguageModel(recipe, self.shapes, self.kept)
        self.output = model.output_layer(recipe, self.shapes, self.model.embedding)
        self.penalty = model.Penalty(recipe)
        self.trained = self._trained_parameters()
        flags = tuned.GRAPH if self.tuned else {}
        if recipe.kernel != "sparse":  # its autograd.Function cannot be in a graph
            self.model.hybridize(**flags)
        self.output.hybridize(**flags)
        self.penalty.hybridize(**flags)
        for block in (self.model, self.output):
            block.initialize(mx.init.Zero(), ctx=self.contexts)
        rows = recipe.global_batch_size(self.devices) // self.devices * recipe.sequence_length
        rows *= max(recipe.mixtures, 1)
        self.in_chunks = self.tuned and rows > tuned.CHUNK_ROWS
        self.nll = tuned.nll if self.in_chunks else model.nll
        if self.in_chunks:  # each chunk adds to these gradients
            self.output.collect_params().setattr("grad_req", "add")

        self.drop_words = model.Dropout(recipe.word_dropout)
        self.drop_weights = model.Dropout(recipe.weight_dropout)
        self.masks = [
            (self.trained[name], context, to_device(mask, context))
            for name, mask in self.gradient_masks().items()
            for context in self.contexts
        ]
        self.optimizer = model.optimizer(recipe)
        if self.tuned:
            self.optimizer.aggregate_num = tuned.AGGREGATED_PARAMETERS
        if self.slots:
            self.optimizer.slots = {
                (index, context): [mx.nd.zeros(parameter.shape, context) for _ in self.slots]
                for index, parameter in enumerate(self.trained.values())
                for context in self.contexts
            }
        self.trainer = gluon.Trainer(
            list(self.trained.values()),
            self.optimizer,
            kvstore="device" if on_gpu else "local",
            update_on_kvstore=False,  # the summed gradient is clipped before the update
        )

    def _trained_parameters(self) -> dict[str, gluon.Parameter]:
        """Return Gluon's parameters by canonical name; a bias the recipe does not have stays 0."""
        head, output = self.model.head, self.output
        found = {"embedding": self.model.embedding.weight}
        for index, layer in enumerate(self.model.layers):
            for name, parameter in layer.collect_params().items():
                kind = GATE_PARAMETERS["_".join(name.split("_")[-2:])]
                found[f"rnn.{index}.{kind}"] = parameter
                if f"rnn.{index}.{kind}" not in self.shapes:
                    parameter.grad_req = "null"
        if head.latent is not None:
            found["latent.weight"], found["latent.bias"] = head.latent.weight, head.latent.bias
            found["prior.weight"] = head.prior.weight
        if head.projection is not None:
            found["softmax.projection"] = head.projection.weight
        found["softmax.weight"], found["softmax.bias"] = output.weight, output.bias
        return {name: found[name] for name in self.shapes}

    def _arrays(self, kind: str) -> dict[str, list[mx.nd.NDArray]]:
        """Return the arrays that `read` and `write` copy, one for each context."""
        if kind == base.PARAMETER:
            return {name: parameter.list_data() for name, parameter in self.trained.items()}
        slot, slots = self.slots.index(kind), self.optimizer.slots
        return {
            name: [slots[index, context][slot] for context in self.contexts]
            for index, name in enumerate(self.trained)
        }

    def read(self, kind: str) -> base.Arrays:
        return {name: arrays[0].asnumpy() for name, arrays in self._arrays(kind).items()}

    def write(self, kind: str, arrays: Parameters) -> None:
        for name, replicas in self._arrays(kind).items():
            for array in replicas:
                array[:] = arrays[name]

    def read_state(self, state: base.State) -> base.Arrays:
        named = zip(self.state_widths.items(), zip(*state, strict=True), strict=True)
        return {
            name: np.concatenate([part.asnumpy().reshape(-1, width) for part in parts])
            for (name, width), parts in named
        }

    def make_state(self, arrays: Parameters, training: bool) -> base.State:
        """Return a list of all layers' states, [h, c, h, c, ...], for each replica, or one."""
        if not training:
            return self._state(list(arrays.values()), self.contexts[0])
        shares = zip(*[self.shares(array, 0) for array in arrays.values()], strict=True)
        return [self._state(s, c) for s, c in zip(shares, self.contexts, strict=True)]

    def _state(self, arrays: Any, context: mx.Context) -> list[mx.nd.NDArray]:
        # fused layers have [1, batch, width]
        batch_size = len(arrays[0])
        infos = [info for layer in self.model.layers for info in layer.state_info(batch_size)]
        return [
            to_device(array.reshape(info["shape"]), context)
            for array, info in zip(arrays, infos, strict=True)
        ]

    def dropped_words(self, training: bool, context: mx.Context) -> list[mx.nd.NDArray]:
        """Return what the embedding's rows are multiplied by [vocabulary, 1], if any are dropped.

        It is the same on all replicas.
        """
        if not self.recipe.word_dropout:
            return []
        ones = mx.nd.ones((self.setup.vocabulary_size, 1), context)
        self._seed(context, 0, SHARED_MASKS_STREAM)
        with autograd.train_mode() if training else autograd.predict_mode():
            return [self.drop_words(ones)]

    @contextlib.contextmanager
    def dropped_weights(self) -> Iterator[None]:
        """Drop recurrent weights in place, which works for every layer, fused ones included.

        The same weights are dropped on all replicas. At the end all weights are back, and gradients
        that were computed meanwhile are with respect to them.
        """
        dropped = []
        recurrent = [p for name, p in self.trained.items() if name.endswith(".recurrent")]
        for context in self.contexts if self.recipe.weight_dropout else []:
            self._seed(context, 1, SHARED_MASKS_STREAM)
            for parameter in recurrent:
                weight = parameter.data(context)
                with autograd.train_mode():
                    kept = self.drop_weights(mx.nd.ones_like(weight))
                dropped.append((weight, weight.copy(), parameter.grad(context), kept))
                weight *= kept
        try:
            yield
        finally:
            for weight, whole, gradient, kept in dropped:
                whole.copyto(weight)
                gradient *= kept

    def _seed(self, context: mx.Context, *words: int) -> None:
        """Seed a context's generator with the run's seed, the step and more words.

        MXNet's streams overlap for close seeds, so they are spread.
        """
        spread = np.random.SeedSequence([self.setup.seed, self.step, *words]).generate_state(1)[0]
        mx.random.seed(int(spread) >> 1, ctx=context)  # a C int

    def _passes(
        self, batch: Batch, state: base.State, backward: bool = True
    ) -> tuple[mx.nd.NDArray, base.State]:
        """Leave the objective's gradient, summed over replicas, in every replica's `grad`.

        Args:
            batch, state: as of `train_step`.
            backward: if false, there is no gradient.

        Returns:
            The summed nll, and the final state.
        """
        divisor = self.objective_divisor(batch) if backward else None
        mode = autograd.record if backward else autograd.train_mode
        # All uploads come first: one waits for what cpu(0) was given before, so a later one would
        # keep its replica waiting for the first.
        shares = [
            gluon.utils.split_and_load(to_device(a, self.contexts[0]), self.contexts, batch_axis=1)
            for a in batch
        ]
        words = [self.dropped_words(True, context) for context in self.contexts]
        if self.in_chunks and backward:
            self.output.collect_params().zero_grad()
        nlls, states, heads, head_gradients = [], [], [], []
        with self.dropped_weights():
            for replica, context in enumerate(self.contexts):
                if self.recipe.drops:
                    self._seed(context, replica)
                x, y, mask = (share[replica] for share in shares)
                y, real = y.reshape(-1), mask.reshape(-1)
                with mode():
                    outputs, final, penalized = self.model(x, state[replica], *words[replica])
                summed, ends, gradients = self.nll(self.output, y, real, divisor, *outputs)
                heads += ends
                head_gradients += gradients
                if penalized and backward:
                    with autograd.record():
                        heads.append(self.penalty(*penalized, mask) / divisor)
                    head_gradients.append(None)  # one
                nlls.append(summed)
                states.append([a.detach() for a in final])  # the next window's past ends here
            if backward:
                autograd.backward(heads, head_gradients)
        if backward:
            for parameter, context, kept in self.masks:
                parameter.grad(context)[:] *= kept
            self.trainer.allreduce_grads()
        return mx.nd.add_n(*[n.as_in_context(self.contexts[0]) for n in nlls]), states

    def forward_pass(self, batch: Batch, state: base.State) -> base.Scalar:
        return as_scalar(self._passes(batch, state, backward=False)[0])

    def forward_and_backward_pass(self, batch: Batch, state: base.State) -> base.Scalar:
        return as_scalar(self._passes(batch, state)[0])

    def read_gradients(self, batch: Batch, state: base.State) -> base.Arrays:
        self._passes(batch, state)
        return {name: p.grad(self.contexts[0]).asnumpy() for name, p in self.trained.items()}

    def train_step(self, batch: Batch, state: base.State, learning_rate: float) -> base.TrainStep:
        summed, final = self._passes(batch, state)
        # Every replica holds the same summed gradient, so each finds the same norm by itself.
        norms = [
            gluon.utils.clip_global_norm(
                [parameter.grad(context) for parameter in self.trained.values()],
                math.inf if self.recipe.clip_norm is None else self.recipe.clip_norm,
                check_isfinite=False,  # looking would wait for the device
            )
            for context in self.contexts
        ]
        rate, epsilon = rate_and_epsilon(self.recipe, learning_rate, self.step)
        self.trainer.set_learning_rate(rate)
        self.optimizer.epsilon, self.optimizer.averaged = epsilon, self.averaged
        self.trainer.update(batch_size=1)
        self.step += 1
        return base.TrainStep(as_scalar(summed), as_scalar(norms[0]), final)

    def _evaluate(
        self, inputs: npt.NDArray[np.int32], state: base.State
    ) -> tuple[list[mx.nd.NDArray], base.State]:
        """Return what the head gives without dropout, and the final state."""
        context = self.contexts[0]
        words = self.dropped_words(False, context)
        return self.model(to_device(inputs, context), state, *words)[:2]

    def evaluate_step(self, batch: Batch, state: base.State) -> base.EvaluateStep:
        outputs, final = self._evaluate(batch.inputs, state)
        y, mask = (to_device(a.reshape(-1), self.contexts[0]) for a in batch[1:])
        summed, *_ = self.nll(self.output, y, mask, None, *outputs)
        return base.EvaluateStep(as_scalar(summed), final)

    def next_token_log_probabilities(
        self, inputs: npt.NDArray[np.int32], state: base.State
    ) -> tuple[npt.NDArray[np.float32], base.State]:
        (features, *prior), final = self._evaluate(inputs, state)
        log_p = model.log_probabilities(self.output(features), *prior)
        return log_p.asnumpy().reshape(*inputs.shape, -1), final

    def synchronize(self) -> None:
        mx.nd.waitall()

    def device_names(self) -> list[str]:
        return [f"{c.device_type}:{c.device_id}" for c in self.contexts]

    def peak_device_memory(self) -> int | None:
        """Return all that is in use, CUDA's own included: MXNet has no count, but frees nothing."""
        if self.setup.accelerator == "cpu":
            return None
        memory = [mx.context.gpu_memory_info(c.device_id) for c in self.contexts]
        return max(total - free for free, total in memory)

    def operators(self, work: Callable[[], None]) -> list[base.Operator]:
        """Return those that MXNet's engine ran, by mx.profiler."""
        mx.nd.waitall()
        # It writes a file whatever it is asked for, in the place of whatever is there: os.devnull
        # would be gone for everybody, if root does it.
        with tempfile.TemporaryDirectory() as folder:
            mx.profiler.set_config(
                profile_symbolic=True, profile_imperative=True, aggregate_stats=True,
                filename=f"{folder}/profile.json",
            )  # fmt: skip
            mx.profiler.set_state("run")
            work()
            mx.nd.waitall()
            mx.profiler.set_state("stop")
            said = mx.profiler.dumps(reset=True, format="json")
        operators = json.loads(said)["Time"]["operator"]
        return [
            base.Operator(name, each["Count"], each["Total"] / 1e3)
            for name, each in operators.items()
            if name not in ("WaitForVar", "DeleteVariable")  # the engine's own
        ]

    def settings(self) -> dict[str, str]:
        return {
            "logits": f"at most {tuned.CHUNK_ROWS} rows at a time" if self.tuned else "all at once",
            "parameters updated at once": str(tuned.AGGREGATED_PARAMETERS) if self.tuned else "1",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "unset"),
            "memory": "kept" if self.memory_is_kept else "returned to the system",
            "hybridize": ", ".join(tuned.GRAPH) if self.tuned else "no flags",
        }

    def close(self) -> None:
        mx.nd.waitall()


def to_device(array: npt.NDArray[Any], context: mx.Context) -> mx.nd.NDArray:
    """Return a copy on the context, complete when this returns."""
    return mx.nd.array(array, ctx=context, dtype=array.dtype)


def as_scalar(array: mx.nd.NDArray) -> base.Scalar:
    """Return the same number [1] as MXNet's NumPy kind of array, which float() understands."""
    return array.as_np_ndarray()
