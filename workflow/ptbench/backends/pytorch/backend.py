"""The contract in PyTorch: one replica here, the others told to do the same."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ptbench.backends.base import Backend, EvaluateStep, State, TrainStep
from ptbench.backends.contract__LEFT import Feature, Mask, Tokens, slot_names
from ptbench.backends.pytorch.devices import Followers
from ptbench.backends.pytorch.layers import LayerState
from ptbench.backends.pytorch.replica import Replica
from ptbench.errors import PtbenchError
from ptbench.model.parameters import Parameters, check_parameters, state_widths
from ptbench.model.recipe import Accelerator, Recipe


class TrainingState:
    """Recurrent state spread over the replicas: this process's part, and the others' name of it."""

    handles = itertools.count()

    def __init__(self, local: list[LayerState]) -> None:
        self.local = local
        self.handle = next(TrainingState.handles)


class PyTorchBackend(Backend):
    """See the module and the contract."""

    name = "pytorch"
    package = "torch"
    features = (
        Feature("embedding", True, "torch.nn.Embedding"),
        Feature("LSTM layer", True, "torch.nn.LSTM"),
        Feature("GRU and simple recurrent layers", True, "torch.nn.GRU, torch.nn.RNN"),
        Feature("explicit time steps", True, "torch.nn.LSTMCell, GRUCell, RNNCell"),
        Feature("sparse LSTM", False, "SparseLayer, of torch.sparse_csr_tensor"),
        Feature("mixture of softmaxes", False, "Head, with torch.logsumexp"),
        Feature("weight tying and factorised output", True, "torch.nn.Linear, its weight assigned"),
        Feature("dropout", True, "torch.nn.Dropout"),
        Feature("locked dropout", False, "Dropout, of torch.nn.Dropout on ones"),
        Feature("word dropout", False, "LanguageModel.run, with torch.Tensor.bernoulli_"),
        Feature(
            "recurrent dropout", False, "CellLayer; the fused layers cannot, so by explicit steps"
        ),
        Feature("weight dropout", False, "call_layer, with torch.func.functional_call"),
        Feature("activation regularisation", False, "activation_penalty, with torch.Tensor.diff"),
        Feature("softmax cross-entropy", True, "torch.nn.functional.cross_entropy"),
        Feature("SGD", True, "torch.optim.SGD"),
        Feature("Adam", True, "torch.optim.Adam"),
        Feature("RMSProp", True, "torch.optim.RMSprop"),
        Feature("averaged SGD", False, "average, with torch.Tensor.lerp_, after torch.optim.SGD"),
        Feature("weight decay", True, "torch.optim.Optimizer(weight_decay)"),
        Feature("gradient clipping by global norm", True, "torch.nn.utils.clip_grad_norm_"),
        Feature("uniform initialisation", True, "torch.nn.init.uniform_"),
        Feature(
            "Keras' default initialisation", True, "torch.nn.init.xavier_uniform_, orthogonal_"
        ),
        Feature("learning-rate change", True, "optimizer.param_groups"),
        Feature("data parallel", False, "Followers, around DistributedDataParallel"),
        Feature("truncated back-propagation with carried state", True, "torch.Tensor.detach"),
        Feature("deterministic per-step randomness", True, "torch.manual_seed"),
        Feature("saving parameters", False, "a dictionary of arrays, written by safetensors"),
    )

    instances = itertools.count()

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
        if accelerator == "cuda" and torch.cuda.device_count() < devices:
            raise PtbenchError(
                f"pytorch was asked for {devices} GPUs and sees {torch.cuda.device_count()}"
            )
        self.identifier = next(PyTorchBackend.instances)
        arguments = (recipe, vocabulary_size, seed, accelerator, threads)
        self.followers = Followers.of(devices, accelerator) if devices > 1 else None
        self.tell("create", *arguments)
        self.replica = Replica(*arguments, 0, devices)

    def tell(self, method: str, *arguments: Any) -> None:
        """Have the other replicas do what this one is about to do."""
        if self.followers:
            self.followers.tell(self.identifier, method, *arguments)

    def new_state(self, local: list[LayerState]) -> TrainingState:
        """A state whose parts on the followers are dropped when this one is."""
        state = TrainingState(local)
        if self.followers:
            name = (self.identifier, state.handle)
            weakref.finalize(state, self.followers.release, name)
        return state

    def parameters(self) -> Parameters:
        return self.replica.parameters()

    def load_parameters(self, parameters: Mapping[str, npt.NDArray[Any]]) -> None:
        check_parameters(parameters, self.recipe, self.vocabulary_size)
        self.tell("load_parameters", dict(parameters), self.step)
        self.replica.model.load(parameters)
        self.replica.step = self.step

    def initial_state(self, batch_size: int, training: bool) -> State:
        if not training:
            return self.replica.initial_state(batch_size)
        share = batch_size // self.devices
        state = self.new_state(self.replica.initial_state(share))
        self.tell("initial_state", share, state.handle)
        return state

    def gradients(self, inputs: Tokens, targets: Tokens, mask: Mask, state: State) -> Parameters:
        self.tell("backward", inputs, targets, mask, state.handle)
        self.replica.backward(inputs, targets, mask, state.local)
        return self.replica.gradients()

    def train_step(
        self,
        inputs: Tokens,
        targets: Tokens,
        mask: Mask,
        state: State,
        learning_rate: float,
        averaged: int = 1,
    ) -> TrainStep:
        after = self.new_state([])
        batch, update = (inputs, targets, mask), (learning_rate, averaged)
        self.tell("train_step", *batch, state.handle, after.handle, *update)
        result = self.replica.train_step(*batch, state.local, *update)
        after.local = result.state
        self.step = self.replica.step
        return TrainStep(result.nll, result.gradient_norm, after)

    @torch.no_grad()
    def evaluate_step(
        self, inputs: Tokens, targets: Tokens, mask: Mask, state: State
    ) -> EvaluateStep:
        self.replica.settings.apply()
        model = self.replica.model.eval()
        nll, _, state = self.replica.loss(model, inputs, targets, mask, state, 1.0, {})
        return EvaluateStep(nll, state)

    @torch.no_grad()
    def next_token_log_probabilities(
        self, inputs: Tokens, state: State
    ) -> tuple[npt.NDArray[np.float32], State]:
        self.replica.settings.apply()
        model = self.replica.model.eval()
        log_probabilities, state = model.log_probabilities(self.replica.tensor(inputs), state)
        return log_probabilities.cpu().numpy(), state

    def snapshot(self, state: State) -> dict[str, npt.NDArray[Any]]:
        parts = [self.replica.state_arrays(state.local)]
        if self.followers:
            parts += self.followers.ask(self.identifier, "send_state", state.handle)
        saved = {f"parameter.{name}": value for name, value in self.parameters().items()}
        saved |= {f"optimizer.{name}": value for name, value in self.replica.slots().items()}
        saved |= {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return {**saved, "step": np.array(self.step)}

    def restore(self, snapshot: Mapping[str, npt.NDArray[Any]]) -> State:
        prefix = "parameter."
        self.step = int(snapshot["step"])
        self.load_parameters(
            {n.removeprefix(prefix): v for n, v in snapshot.items() if n.startswith(prefix)}
        )
        names = [f"{slot}.{n}" for slot, n in slot_names(self.recipe, self.vocabulary_size)]
        slots = {name: snapshot[f"optimizer.{name}"] for name in names}
        self.tell("load_slots", slots)
        self.replica.load_slots(slots)
        arrays: list[dict[str, npt.NDArray[Any]]] = [{} for _ in range(self.devices)]
        for name in state_widths(self.recipe):
            parts = np.split(snapshot[name], self.devices)
            for replica, part in zip(arrays, parts, strict=True):
                replica[name] = part
        state = self.new_state(self.replica.load_state(arrays[0]))
        self.tell("load_state", arrays, state.handle)
        return state

    def synchronize(self) -> None:
        if self.accelerator == "cuda":
            for device in range(self.devices):
                torch.cuda.synchronize(device)

    def device_names(self) -> list[str]:
        if self.accelerator == "cuda":
            return [torch.cuda.get_device_name(r) for r in range(self.devices)]
        return [f"cpu:{r}" for r in range(self.devices)]

    def peak_device_memory(self) -> int | None:
        if self.accelerator == "cpu":
            return None
        peaks = [self.replica.peak_memory()]
        if self.followers:
            peaks += self.followers.ask(self.identifier, "send_peak_memory")
        return max(peaks)

    def settings(self) -> dict[str, str]:
        own = {"implementation": self.recipe.implementation}
        return own | self.replica.settings.report()

    def close(self) -> None:
        self.tell("close")
