"""The language model in PyTorch: nn.LSTM layers, torch.optim, DistributedDataParallel.

One process drives each replica. This process is replica 0; the others are started by the first
backend that needs them, repeat every call that trains on their own columns of the batch, and meet
this one in DistributedDataParallel's all-reduce.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import itertools
import multiprocessing
import os
import tempfile
import weakref
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

# Large tensors would otherwise be mapped from and returned to the system at every step, and page
# faults cost a third of the time of a small model. Must precede the import (glibc's malloc.h).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
with contextlib.suppress(OSError, AttributeError):
    ctypes.CDLL("libc.so.6").mallopt(M_MMAP_MAX, 0)
    ctypes.CDLL("libc.so.6").mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # needed for deterministic cuBLAS

import torch  # noqa: E402
import torch.distributed  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

from ptbench.backends.contract import (  # noqa: E402
    OPTIMIZER_SLOTS,
    Backend,
    EvaluateStep,
    Feature,
    Mask,
    Parameters,
    State,
    Tokens,
    TrainStep,
    check_parameters,
    device_columns,
    objective_divisor,
    slot_names,
)
from ptbench.configuration.models import Accelerator, Recipe  # noqa: E402
from ptbench.errors import PtbenchError  # noqa: E402

IGNORED = -100  # target that cross_entropy leaves out (its default ignore_index)

# torch.optim's names of the contract's slots
SLOTS = {"first_moment": "exp_avg", "second_moment": "exp_avg_sq", "mean_square": "square_avg"}


class LayerState(NamedTuple):
    """State of one LSTM layer, each [1, batch, hidden]."""

    h: Tensor
    c: Tensor


class LanguageModel(nn.Module):
    """Embedding, LSTM layers and output layer, dropout after all but the last."""

    def __init__(self, recipe: Recipe, vocabulary_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, recipe.embedding_size)
        widths = [recipe.embedding_size] + [recipe.hidden_size] * recipe.layers
        # One nn.LSTM per layer: dropout inside a fused stack is not reproducible on a GPU.
        self.layers = nn.ModuleList(nn.LSTM(n, m) for n, m in itertools.pairwise(widths))
        self.softmax = nn.Linear(recipe.hidden_size, vocabulary_size)
        self.dropout = nn.Dropout(recipe.dropout)
        for layer in self.layers:  # PyTorch has two biases per gate; one is enough
            nn.init.zeros_(layer.bias_hh_l0).requires_grad_(False)

    def forward(self, inputs: Tensor, state: list[LayerState]) -> tuple[Tensor, list[LayerState]]:
        """Logits [time, batch, vocabulary] of the next words, and the state after the last."""
        x = self.dropout(self.embedding(inputs))
        final = []
        for layer, layer_state in zip(self.layers, state, strict=True):
            x, after = layer(x, layer_state)
            final.append(LayerState(*(s.detach() for s in after)))
            x = self.dropout(x)
        return self.softmax(x), final

    def canonical(self) -> dict[str, tuple[nn.Parameter, bool]]:
        """Each trained parameter by its canonical name, and whether it is stored transposed."""
        names = {"embedding": (self.embedding.weight, False)}
        for index, layer in enumerate(self.layers):
            names[f"rnn.{index}.input"] = (layer.weight_ih_l0, True)
            names[f"rnn.{index}.recurrent"] = (layer.weight_hh_l0, True)
            names[f"rnn.{index}.bias"] = (layer.bias_ih_l0, False)
        names["softmax.weight"] = (self.softmax.weight, False)
        names["softmax.bias"] = (self.softmax.bias, False)
        return names


def initialize(model: LanguageModel, recipe: Recipe, seed: int) -> None:
    """`initialization: native`: uniform weights and softmax bias, zero recurrent biases."""
    torch.manual_seed(seed)
    for name, (parameter, _) in model.canonical().items():
        if name.startswith("rnn.") and name.endswith(".bias"):
            nn.init.zeros_(parameter)
            nn.init.constant_(
                parameter[recipe.hidden_size : 2 * recipe.hidden_size], recipe.forget_bias
            )  # gates are ordered i, f, g, o
        else:
            nn.init.uniform_(parameter, -recipe.initialization_scale, recipe.initialization_scale)


def optimizer_of(recipe: Recipe, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The recipe's optimizer; torch.optim's own definitions are the contract's."""
    common = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, **common)
    common["eps"] = recipe.optimizer_epsilon
    if recipe.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, alpha=recipe.rmsprop_decay, **common)
    return torch.optim.Adam(parameters, betas=(recipe.adam_beta1, recipe.adam_beta2), **common)


def choose_matmul(accelerator: Accelerator) -> str:
    """Use oneDNN's float32 products on the CPU where they are truly float32; say what is used.

    PyTorch reaches oneDNN, about twice as fast as MKL on AMD, by the setting that also permits
    bfloat16 on a CPU that has it in its matrix units; so the error is measured.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if accelerator == "cuda":
        return "cuBLAS, TF32 off"
    torch.set_float32_matmul_precision("medium")
    a, b = torch.rand(256, 256, generator=torch.Generator().manual_seed(0)).split(128)
    exact = a.double() @ b.double().T
    error = ((a @ b.T).double() - exact).norm() / exact.norm()
    if error < 1e-6:  # float32 rounds at 6e-8, bfloat16 at 4e-3
        return "oneDNN float32"
    torch.set_float32_matmul_precision("highest")
    return "default float32"


class Replica:
    """The model and its optimizer on one device; rank 0 of 1 where there is but one."""

    def __init__(
        self, recipe: Recipe, vocabulary_size: int, seed: int, accelerator: Accelerator,
        threads: int, rank: int, devices: int,
    ) -> None:  # fmt: skip
        self.recipe, self.seed, self.rank, self.devices = recipe, seed, rank, devices
        self.step = 0
        torch.set_num_threads(max(threads // devices, 1))
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, guards nothing
        self.matmul = choose_matmul(accelerator)
        self.device = torch.device(accelerator, rank) if accelerator == "cuda" else "cpu"
        self.model = LanguageModel(recipe, vocabulary_size)
        initialize(self.model, recipe, seed)
        self.model.to(self.device)
        self.trained = [parameter for parameter, _ in self.model.canonical().values()]
        self.parallel = (
            DistributedDataParallel(
                self.model, device_ids=[self.device] if accelerator == "cuda" else None
            )
            if devices > 1
            else self.model
        )
        self.optimizer = optimizer_of(recipe, self.trained)

    def initial_state(self, batch_size: int) -> list[LayerState]:
        shape = (1, batch_size, self.recipe.hidden_size)
        return [
            LayerState(
                torch.zeros(shape, device=self.device), torch.zeros(shape, device=self.device)
            )
            for _ in self.model.layers
        ]

    def nll(
        self, model: nn.Module, inputs: Tokens, targets: Tokens, mask: Mask,
        state: list[LayerState],
    ) -> tuple[Tensor, list[LayerState]]:  # fmt: skip
        """Summed negative log-likelihood of the real tokens."""
        logits, state = model(self.tensor(inputs), state)
        real_targets = self.tensor(np.where(mask > 0, targets, IGNORED))
        nll = functional.cross_entropy(
            logits.flatten(0, 1), real_targets.flatten(), reduction="sum", ignore_index=IGNORED
        )
        return nll, state

    def backward(
        self, inputs: Tokens, targets: Tokens, mask: Mask, state: list[LayerState]
    ) -> tuple[Tensor, list[LayerState]]:
        """Put the objective's gradient, summed over replicas, into every parameter's grad."""
        if self.recipe.dropout:
            entropy = [self.seed, self.step, self.rank]
            torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))
        divisor = objective_divisor(self.recipe, mask)
        mine = device_columns(mask.shape[1], self.devices)[self.rank]
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        nll, state = self.nll(
            self.parallel, inputs[:, mine], targets[:, mine], mask[:, mine], state
        )
        # DistributedDataParallel averages over the replicas; the objective is their sum.
        (nll * (self.devices / divisor)).backward()
        nll = nll.detach()
        if self.devices > 1:
            torch.distributed.all_reduce(nll)
        return nll, state

    def train_step(
        self, inputs: Tokens, targets: Tokens, mask: Mask, state: list[LayerState],
        learning_rate: float,
    ) -> TrainStep:  # fmt: skip
        nll, state = self.backward(inputs, targets, mask, state)
        limit = self.recipe.clip_norm
        norm = nn.utils.clip_grad_norm_(self.trained, float("inf") if limit is None else limit)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()
        self.step += 1
        return TrainStep(nll, norm, state)

    def load_parameters(self, parameters: Mapping[str, npt.NDArray[Any]]) -> None:
        with torch.no_grad():
            for name, (parameter, transposed) in self.model.canonical().items():
                value = torch.from_numpy(np.array(parameters[name], np.float32))
                parameter.copy_(value.T if transposed else value)

    def slots(self) -> dict[str, npt.NDArray[np.float32]]:
        """The optimizer's arrays, `{slot}.{parameter}`, each a copy in canonical shape.

        torch.optim makes them, zero, in its first step.
        """
        arrays = {}
        for slot in OPTIMIZER_SLOTS[self.recipe.optimizer]:
            for name, (parameter, transposed) in self.model.canonical().items():
                kept = self.optimizer.state[parameter].get(SLOTS[slot], torch.zeros_like(parameter))
                arrays[f"{slot}.{name}"] = canonical_array(kept, transposed)
        return arrays

    def load_slots(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Replace the optimizer's arrays, named as `slots` does, and its count of steps."""
        if not arrays:
            return
        state: dict[int, dict[str, Tensor]] = {}
        for index, (name, (_, transposed)) in enumerate(self.model.canonical().items()):
            values = {
                SLOTS[slot]: torch.from_numpy(np.array(arrays[f"{slot}.{name}"], np.float32))
                for slot in OPTIMIZER_SLOTS[self.recipe.optimizer]
            }
            state[index] = {k: v.T.contiguous() if transposed else v for k, v in values.items()}
            state[index]["step"] = torch.tensor(float(self.step))
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def load_state(self, arrays: npt.NDArray[np.float32]) -> list[LayerState]:
        """Args: arrays: [layer, (h, c), batch, hidden], this replica's columns."""
        return [
            LayerState(*(torch.from_numpy(s[None].copy()).to(self.device) for s in layer))
            for layer in arrays
        ]

    def tensor(self, tokens: npt.NDArray[Any]) -> Tensor:
        """A copy on the device, as the integers that PyTorch's losses want."""
        return torch.from_numpy(tokens).to(self.device, torch.int64, non_blocking=True)


def canonical_array(tensor: Tensor, transposed: bool) -> npt.NDArray[np.float32]:
    """A parameter, gradient or slot as the contract shapes it, as a copy."""
    return (tensor.T if transposed else tensor).detach().cpu().contiguous().numpy().copy()


def state_array(state: list[LayerState]) -> npt.NDArray[np.float32]:
    """A replica's state as [layer, (h, c), batch, hidden]."""
    return np.stack([[s[0].cpu().numpy() for s in layer] for layer in state])


class TrainingState:
    """Recurrent state spread over the replicas: this process's part, and the others' name of it."""

    handles = itertools.count()

    def __init__(self, local: list[LayerState]) -> None:
        self.local = local
        self.handle = next(TrainingState.handles)


class Followers:
    """The processes of replicas 1 to N - 1, which do what this one does, on their own device."""

    _started: ClassVar[dict[int, Followers]] = {}

    @classmethod
    def of(cls, devices: int, accelerator: Accelerator) -> Followers:
        """Those of this process, started when first asked for."""
        if devices not in cls._started:
            cls._started[devices] = cls(devices, accelerator)
        return cls._started[devices]

    def __init__(self, devices: int, accelerator: Accelerator) -> None:
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory(prefix="ptbench-")
        rendezvous = Path(self.folder.name) / "rendezvous"
        self.connections: list[Connection] = []
        self.processes = []
        for rank in range(1, devices):
            ours, theirs = context.Pipe()
            arguments = (theirs, rendezvous, rank, devices, accelerator)
            process = context.Process(target=follow, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)
        join_group(rendezvous, 0, devices, accelerator)
        self.released: list[tuple[int, int]] = []  # states that nothing here refers to any more
        atexit.register(self.stop)

    def release(self, name: tuple[int, int]) -> None:
        """Have the followers drop a state with the next thing that they are told."""
        self.released.append(name)

    def tell(self, backend: int, method: str, *arguments: Any) -> None:
        """Have every follower do something; their answers are not waited for."""
        released, self.released = self.released, []
        for connection in self.connections:
            connection.send((backend, method, arguments, released))

    def ask(self, backend: int, method: str, *arguments: Any) -> list[Any]:
        """Have every follower do something and return its answer."""
        self.tell(backend, method, *arguments)
        return [connection.recv() for connection in self.connections]

    def stop(self) -> None:
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(10)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        self.folder.cleanup()


def join_group(rendezvous: Path, rank: int, devices: int, accelerator: Accelerator) -> None:
    """Meet the other replicas' processes, all on this machine."""
    if accelerator == "cpu":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        "nccl" if accelerator == "cuda" else "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=devices,
        timeout=timedelta(minutes=10),
    )


def follow(
    connection: Connection, rendezvous: Path, rank: int, devices: int, accelerator: Accelerator
) -> None:
    """A follower's life: do as told until replica 0 closes the connection or dies."""
    join_group(rendezvous, rank, devices, accelerator)
    replicas: dict[int, Replica] = {}
    states: dict[tuple[int, int], list[LayerState]] = {}  # by backend and handle

    def create(
        backend: int, recipe: Recipe, vocabulary_size: int, seed: int, accelerator: Accelerator,
        threads: int,
    ) -> None:  # fmt: skip
        replicas[backend] = Replica(
            recipe, vocabulary_size, seed, accelerator, threads, rank, devices
        )

    def load_parameters(backend: int, parameters: Parameters, step: int) -> None:
        replicas[backend].load_parameters(parameters)
        replicas[backend].step = step

    def load_slots(backend: int, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        replicas[backend].load_slots(arrays)

    def initial_state(backend: int, batch_size: int, handle: int) -> None:
        states[backend, handle] = replicas[backend].initial_state(batch_size)

    def load_state(backend: int, arrays: npt.NDArray[np.float32], handle: int) -> None:
        mine = device_columns(arrays.shape[2], devices)[rank]
        states[backend, handle] = replicas[backend].load_state(arrays[:, :, mine])

    def send_state(backend: int, handle: int) -> None:
        connection.send(state_array(states[backend, handle]))

    def train_step(
        backend: int, inputs: Tokens, targets: Tokens, mask: Mask, learning_rate: float,
        before: int, after: int,
    ) -> None:  # fmt: skip
        state = states[backend, before]
        step = replicas[backend].train_step(inputs, targets, mask, state, learning_rate)
        states[backend, after] = step.state

    def backward(backend: int, inputs: Tokens, targets: Tokens, mask: Mask, before: int) -> None:
        replicas[backend].backward(inputs, targets, mask, states[backend, before])

    def close(backend: int) -> None:
        del replicas[backend]

    methods: dict[str, Callable[..., None]] = {
        function.__name__: function
        for function in (
            create, load_parameters, load_slots, initial_state, load_state, send_state, train_step,
            backward, close,
        )
    }  # fmt: skip
    with contextlib.suppress(EOFError):
        while True:
            backend, method, arguments, released = connection.recv()
            for key in released:
                states.pop(key, None)
            methods[method](backend, *arguments)


class PyTorchBackend(Backend):
    """See the module and the contract."""

    name = "pytorch"
    package = "torch"
    features = (
        Feature("embedding", True, "torch.nn.Embedding"),
        Feature("LSTM layer", True, "torch.nn.LSTM"),
        Feature("dropout", True, "torch.nn.Dropout"),
        Feature("softmax cross-entropy", True, "torch.nn.functional.cross_entropy"),
        Feature("SGD", True, "torch.optim.SGD"),
        Feature("Adam", True, "torch.optim.Adam"),
        Feature("RMSProp", True, "torch.optim.RMSprop"),
        Feature("weight decay", True, "torch.optim.Optimizer(weight_decay)"),
        Feature("gradient clipping by global norm", True, "torch.nn.utils.clip_grad_norm_"),
        Feature("uniform initialisation", True, "torch.nn.init.uniform_"),
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
        return {
            name: canonical_array(p, transposed)
            for name, (p, transposed) in self.replica.model.canonical().items()
        }

    def load_parameters(self, parameters: Mapping[str, npt.NDArray[Any]]) -> None:
        check_parameters(parameters, self.recipe, self.vocabulary_size)
        self.tell("load_parameters", dict(parameters), self.step)
        self.replica.load_parameters(parameters)
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
        return {
            name: canonical_array(p.grad, transposed)
            for name, (p, transposed) in self.replica.model.canonical().items()
        }

    def train_step(
        self, inputs: Tokens, targets: Tokens, mask: Mask, state: State, learning_rate: float
    ) -> TrainStep:
        after = self.new_state([])
        self.tell("train_step", inputs, targets, mask, learning_rate, state.handle, after.handle)
        result = self.replica.train_step(inputs, targets, mask, state.local, learning_rate)
        after.local = result.state
        self.step = self.replica.step
        return TrainStep(result.nll, result.gradient_norm, after)

    @torch.no_grad()
    def evaluate_step(
        self, inputs: Tokens, targets: Tokens, mask: Mask, state: State
    ) -> EvaluateStep:
        model = self.replica.model.eval()
        return EvaluateStep(*self.replica.nll(model, inputs, targets, mask, state))

    @torch.no_grad()
    def next_token_log_probabilities(
        self, inputs: Tokens, state: State
    ) -> tuple[npt.NDArray[np.float32], State]:
        logits, state = self.replica.model.eval()(self.replica.tensor(inputs), state)
        return functional.log_softmax(logits, dim=-1).cpu().numpy(), state

    def snapshot(self, state: State) -> dict[str, npt.NDArray[Any]]:
        parts = [state_array(state.local)]
        if self.followers:
            parts += self.followers.ask(self.identifier, "send_state", state.handle)
        saved = {f"parameter.{name}": value for name, value in self.parameters().items()}
        saved |= {f"optimizer.{name}": value for name, value in self.replica.slots().items()}
        return {**saved, "step": np.array(self.step), "state": np.concatenate(parts, axis=2)}

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
        arrays = snapshot["state"]
        mine = device_columns(arrays.shape[2], self.devices)[0]
        state = self.new_state(self.replica.load_state(arrays[:, :, mine]))
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

    def settings(self) -> dict[str, str]:
        return {
            "matmul": self.replica.matmul,
            "threads per replica": str(max(self.threads // self.devices, 1)),
            "allocator": "glibc, memory kept between steps",
        }

    def close(self) -> None:
        self.tell("close")
