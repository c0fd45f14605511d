"""The contract in PyTorch: the model on its devices, its optimizer, and settings of the process."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn, profiler
from torch.nn.parallel import DistributedDataParallel

from ptbench.backends import base
from ptbench.backends.allocator import keep_memory
from ptbench.backends.pytorch import model, tuned
from ptbench.backends.pytorch.model import SLOTS, LanguageModel, LayerState
from ptbench.backends.pytorch.replicas import gathered, join_group, leave_group
from ptbench.backends.replicas import Replicated, ReplicatedBackend, meet, on_every_replica
from ptbench.corpus.batching import Batch
from ptbench.model.parameters import Parameters


class TrainingState(Replicated, list[LayerState]):
    """Every layer's state, of this replica's share of the batch."""


class PyTorchBackend(ReplicatedBackend):
    """One replica of the model; with several devices, there is one in each replica's process."""

    name = "pytorch"
    package = "torch"
    transposed = (".input", ".recurrent", "latent.weight", "prior.weight", "softmax.projection")

    def __init__(self, setup: base.Setup) -> None:
        super().__init__(setup)
        self.on_gpu = setup.accelerator == "cuda"
        self.threads = max(setup.threads // self.devices, 1)  # of each replica
        if self.on_gpu:
            self.check_devices(torch.cuda.device_count(), setup.devices_here)
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, guards nothing
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        means = tuned if self.recipe.implementation == "tuned" else model
        tuned_cpu = means is tuned and not self.on_gpu
        self.fast_products = tuned_cpu and tuned.onednn_products_are_float32()
        self.keeps_memory = tuned_cpu and keep_memory()
        self.apply_settings()

        self.rank = 0
        if self.devices > 1:
            self.take_part(setup.devices_here, join_group, leave_group)
            self.rank = dist.get_rank()
        here = self.rank % setup.devices_here
        self.device = torch.device("cuda", here) if self.on_gpu else torch.device("cpu")
        self.clip = means.clip
        nll = tuned.nll if tuned_cpu else model.nll
        self.model = LanguageModel(self.recipe, setup.vocabulary_size, self.kept, nll)
        self.model.to(self.device)
        self.trained = self.model.trained()
        for name, kept in self.gradient_masks().items():
            mask = torch.from_numpy(kept).to(self.device)
            # without gradient, what starts at zero stays there, whatever the optimizer
            self.trained[name].register_hook(mask.mul)
        self.optimizer = model.optimizer(self.recipe, list(self.trained.values()))
        for parameter in self.trained.values() if self.slots else ():
            zeros = {SLOTS[slot]: torch.zeros_like(parameter) for slot in self.slots}
            self.optimizer.state[parameter] = {"step": torch.tensor(0.0), **zeros}
        self.parallel: nn.Module = self.model
        if self.devices > 1:
            meet(self.replicas)
            device_ids = [self.device] if self.on_gpu else None
            self.parallel = DistributedDataParallel(  # buffers never change
                self.model, device_ids=device_ids, forward_sync_buffers=False
            )

    def apply_settings(self) -> None:
        """Set what another backend in this process may have set otherwise."""
        torch.set_num_threads(self.threads)
        torch.set_float32_matmul_precision("medium" if self.fast_products else "highest")

    def tensors(self, kind: str) -> dict[str, Tensor]:
        """Return the parameters or a slot, by canonical name."""
        if kind == base.PARAMETER:
            return {name: parameter.detach() for name, parameter in self.trained.items()}
        return {n: self.optimizer.state[p][SLOTS[kind]] for n, p in self.trained.items()}

    def read(self, kind: str) -> base.Arrays:
        return {name: tensor.cpu().numpy() for name, tensor in self.tensors(kind).items()}

    @on_every_replica
    def write(self, kind: str, arrays: Parameters) -> None:
        for name, tensor in self.tensors(kind).items():
            tensor.copy_(torch.from_numpy(arrays[name]))

    @on_every_replica
    def read_state(self, state: base.State) -> base.Arrays:
        parts = [part.contiguous() for layer in state for part in layer]
        whole = [gathered(part) for part in parts] if self.devices > 1 else parts
        return {n: t.cpu().numpy() for n, t in zip(self.state_widths, whole, strict=True)}

    @on_every_replica
    def make_state(self, arrays: Parameters, training: bool) -> base.State:
        if training:
            arrays = {name: self.shares(a, axis=0)[self.rank] for name, a in arrays.items()}
        tensors = [torch.from_numpy(array).to(self.device) for array in arrays.values()]
        count = len(tensors) // self.recipe.layers
        layers = [tuple(tensors[i : i + count]) for i in range(0, len(tensors), count)]
        return self.training_state(layers) if training else layers

    def training_state(self, layers: list[LayerState]) -> TrainingState:
        state = TrainingState(layers)
        if self.devices > 1:
            state.replicate()
        return state

    def objective(
        self, batch: Batch, state: base.State
    ) -> tuple[Tensor, Tensor, float, list[LayerState]]:
        """Return this replica's nll and penalty, both times a scale; the scale; and the state."""
        self.apply_settings()
        if self.recipe.drops:
            self.model.dropout.seed(self.setup.seed, self.step, self.rank, self.device)
        share = Batch(*(self.shares(array, axis=1)[self.rank] for array in batch))
        # DistributedDataParallel averages over the replicas; the objective is their sum.
        scale = self.devices / self.objective_divisor(batch)
        self.model.train()
        nll, penalty, state = self.parallel(*self.on_device(share, scale), state)
        return nll, penalty, scale, state

    def differentiate(self, batch: Batch, state: base.State) -> tuple[Tensor, list[LayerState]]:
        """Put the objective's gradient over all replicas into the parameters; see `TrainStep`."""
        self.optimizer.zero_grad()
        nll, penalty, scale, state = self.objective(batch, state)
        (nll + penalty).backward()
        return self.over_replicas(nll.detach() / scale), state

    def over_replicas(self, nll: Tensor) -> Tensor:
        """Return the sum over all replicas."""
        if self.devices > 1:
            dist.all_reduce(nll)
        return nll

    @on_every_replica
    @torch.no_grad()
    def forward_pass(self, batch: Batch, state: base.State) -> Tensor:
        nll, _, scale, _ = self.objective(batch, state)
        return self.over_replicas(nll / scale)

    @on_every_replica
    def forward_and_backward_pass(self, batch: Batch, state: base.State) -> Tensor:
        return self.differentiate(batch, state)[0]

    def on_device(self, batch: Batch, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """Return inputs, targets, and the weights of their losses."""
        weights = torch.from_numpy(batch.mask * np.float32(scale)).to(self.device)
        return self.integers(batch.inputs), self.integers(batch.targets), weights

    def integers(self, tokens: npt.NDArray[np.int32]) -> Tensor:
        """Return a copy on the device, as the integers that PyTorch's losses take."""
        return torch.from_numpy(tokens).to(self.device, torch.int64, non_blocking=True)

    @on_every_replica
    def read_gradients(self, batch: Batch, state: base.State) -> base.Arrays:
        self.differentiate(batch, state)
        return {name: p.grad.cpu().numpy() for name, p in self.trained.items()}

    @on_every_replica
    def train_step(self, batch: Batch, state: base.State, learning_rate: float) -> base.TrainStep:
        nll, after = self.differentiate(batch, state)
        norm = self.clip(list(self.trained.values()), self.recipe.clip_norm)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        for slots in self.optimizer.state.values():
            slots["step"].fill_(self.step)  # torch.optim would count from 0 in a restored run
        self.optimizer.step()
        if self.recipe.optimizer == "asgd":
            model.average(self.optimizer, self.averaged)
        self.step += 1
        return base.TrainStep(nll, norm, self.training_state(after))

    @torch.no_grad()
    def evaluate_step(self, batch: Batch, state: base.State) -> base.EvaluateStep:
        self.apply_settings()
        nll, _, state = self.model.eval()(*self.on_device(batch), state)
        return base.EvaluateStep(nll, state)

    @torch.no_grad()
    def next_token_log_probabilities(
        self, inputs: npt.NDArray[np.int32], state: base.State
    ) -> tuple[npt.NDArray[np.float32], base.State]:
        self.apply_settings()
        log_p, state = self.model.eval().log_probabilities(self.integers(inputs), state)
        return log_p.cpu().numpy(), state

    def synchronize(self) -> None:
        for device in range(self.setup.devices_here if self.on_gpu else 0):
            torch.cuda.synchronize(device)

    @on_every_replica
    def device_names(self) -> list[str]:
        if not self.on_gpu:
            return [f"cpu:{r}" for r in range(self.devices)]
        if self.setup.nodes == 1:
            return [torch.cuda.get_device_name(r) for r in range(self.devices)]
        name = torch.cuda.get_device_name(self.device).encode()[:80].ljust(80)
        names = gathered(torch.tensor([list(name)], dtype=torch.uint8, device=self.device))
        return [bytes(each).decode().rstrip() for each in names.tolist()]

    @on_every_replica
    def peak_device_memory(self) -> int | None:
        if not self.on_gpu:
            return None
        peak = torch.tensor([torch.cuda.max_memory_allocated(self.device)], device=self.device)
        return int((gathered(peak) if self.devices > 1 else peak).max())

    def operators(self, work: Callable[[], None]) -> list[base.Operator]:
        """Return this replica's, by torch.profiler: time of its own, without operators called."""
        kinds = [profiler.ProfilerActivity.CPU]
        kinds += [profiler.ProfilerActivity.CUDA] if self.on_gpu else []
        with profiler.profile(activities=kinds) as profile:
            work()
        return [
            base.Operator(
                event.key,
                event.count,
                (event.self_device_time_total if self.on_gpu else event.self_cpu_time_total) / 1e6,
            )
            for event in profile.key_averages()
        ]

    def settings(self) -> dict[str, str]:
        if self.on_gpu:
            products, allocator = "cuBLAS, TF32 off", "PyTorch's for CUDA"
        else:
            products = "oneDNN float32" if self.fast_products else "default float32"
            allocator = "glibc" + (", memory kept between steps" if self.keeps_memory else "")
        if self.recipe.precision == "bfloat16":
            products = "bfloat16, sums in float32"
        settings = {
            "matmul": products,
            "threads per replica": str(self.threads),
            "allocator": allocator,
        }
        if self.on_gpu and self.recipe.kernel == "sparse":
            settings["determinism"] = "off: cuSPARSE adds in the order of timing"
        return settings
