"""Explicit time steps with a derivative of their own, for every cell and for sparse weights.

What autograd does at every time step is done once: the product with the layer's input, the factors
of the derivatives of all gates, and the weights' gradients, each one product over all time steps.
The notation is that of `numpy_oracle.py`. All gates are [time, batch, gates x width].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class DenseProduct:
    """x W^T for a matrix W [outputs, inputs] and x [batch, inputs]."""

    @staticmethod
    def matrices(weights: Tensor) -> Tensor:
        """What the other methods take as `w`; made once for all time steps."""
        return weights

    @staticmethod
    def of(w: Tensor, x: Tensor) -> Tensor:
        return x @ w.T

    @staticmethod
    def add_to(z: Tensor, w: Tensor, x: Tensor) -> Tensor:
        return z.addmm_(x, w.T)

    @staticmethod
    def input_gradient(w: Tensor, d: Tensor) -> Tensor:
        return d @ w

    @staticmethod
    def weight_gradient(d: Tensor, x: Tensor) -> Tensor:
        return d.T @ x


class KeptProduct(nn.Module):
    """The same for the kept weights of W, given row by row."""

    def __init__(self, kept: npt.NDArray[np.bool_]) -> None:
        """Args: kept: which weights there are, [inputs, outputs]."""
        super().__init__()
        self.shape = kept.T.shape
        rows, columns = np.nonzero(kept.T)
        self.count = len(rows)
        self.kept = torch.from_numpy(columns), torch.from_numpy(rows)
        of_transpose = np.lexsort((rows, columns))  # the places of W^T's weights among W's
        arrays = {
            "starts": row_starts(rows, self.shape[0]),
            "columns": columns,
            "starts_of_transpose": row_starts(columns, self.shape[1]),
            "columns_of_transpose": rows[of_transpose],
        }
        for name, array in arrays.items():  # int32 is what MKL takes
            self.register_buffer(name, torch.from_numpy(array.astype(np.int32)), persistent=False)
        self.register_buffer("of_transpose", torch.from_numpy(of_transpose), persistent=False)

    def matrix(self, weights: Tensor) -> Tensor:
        """W in CSR format."""
        return torch.sparse_csr_tensor(
            self.starts, self.columns, weights, self.shape, check_invariants=False
        )

    def matrices(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """W and W^T in CSR format."""
        transposed = torch.sparse_csr_tensor(
            self.starts_of_transpose, self.columns_of_transpose, weights[self.of_transpose],
            self.shape[::-1], check_invariants=False,
        )  # fmt: skip
        return self.matrix(weights), transposed

    def of(self, w: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        return torch.sparse.mm(w[0], x.T).T.contiguous()

    def add_to(self, z: Tensor, w: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        return z.add_(torch.sparse.mm(w[0], x.T).T)

    def input_gradient(self, w: tuple[Tensor, Tensor], d: Tensor) -> Tensor:
        return torch.sparse.mm(w[1], d.T).T

    def weight_gradient(self, d: Tensor, x: Tensor) -> Tensor:
        """The kept entries of d^T x alone."""
        pattern = self.matrix(d.new_zeros(self.count))
        return torch.sparse.sampled_addmm(pattern, d.T, x, beta=0.0).values()


def row_starts(rows: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """Where each of `count` rows starts, and the last ends, among the weights sorted by row."""
    return np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=count))])


class Recurrence(NamedTuple):
    """The recurrent product, of the previous output or what is left of it, and its bias."""

    product: Any  # DenseProduct or KeptProduct
    u: Any  # its matrices
    bias: Tensor
    mask: Tensor | None  # of the previous output, [batch, width]

    def dropped(self, h: Tensor) -> Tensor:
        return h if self.mask is None else h * self.mask

    def add_to(self, z: Tensor, h: Tensor) -> Tensor:
        return self.product.add_to(z, self.u, self.dropped(h))

    def input_gradient(self, d: Tensor) -> Tensor:
        return self.dropped(self.product.input_gradient(self.u, d))


class Trace(NamedTuple):
    """What a layer's derivative needs of its forward pass."""

    gates: Tensor  # after their non-linearities
    h: Tensor  # [time + 1, batch, width], the initial state first
    c: Tensor  # the same of an LSTM's cell state
    extra: Tensor  # [time, batch, width]: tanh(c) of an LSTM, U_n h + r_n of a GRU


def with_time(first: Tensor, time: int) -> Tensor:
    """Room for a state at all times, [time + 1, batch, width], the first one filled in."""
    states = first.new_empty(time + 1, *first.shape)
    states[0] = first
    return states


class Lstm:
    """Gates input, forget, candidate, output."""

    separate_biases = False  # the recurrent bias is but a second term of the bias

    @staticmethod
    def forward(z: Tensor, state: tuple[Tensor, ...], recurrence: Recurrence) -> Trace:
        """Args: z: W x + b, overwritten by the gates."""
        h, c = (with_time(s, len(z)) for s in state)
        tanh_c = torch.empty_like(c[1:])
        width = h.shape[-1]
        for t, z_t in enumerate(z):
            recurrence.add_to(z_t, h[t])
            i, f = z_t[:, : 2 * width].sigmoid_().chunk(2, -1)
            g, o = z_t[:, 2 * width : 3 * width].tanh_(), z_t[:, 3 * width :].sigmoid_()
            torch.mul(f, c[t], out=c[t + 1]).addcmul_(i, g)
            torch.tanh(c[t + 1], out=tanh_c[t])
            torch.mul(o, tanh_c[t], out=h[t + 1])
        return Trace(z, h, c, tanh_c)

    @staticmethod
    def backward(d_out: Tensor, trace: Trace, recurrence: Recurrence) -> tuple[Tensor, Tensor]:
        """The derivatives with respect to W x + b and U h + r at all times."""
        i, f, g, o = trace.gates.chunk(4, -1)
        c, tanh_c = trace.c[:-1], trace.extra
        to_c = o * (1 - tanh_c * tanh_c)  # from d_h
        d_z = torch.cat(  # from d_c, and the last from d_h
            [g * i * (1 - i), c * f * (1 - f), i * (1 - g * g), tanh_c * o * (1 - o)], -1
        )
        d_z_in_four = d_z.unflatten(-1, (4, -1))
        d_h, d_c = torch.zeros_like(d_out[0]), torch.zeros_like(d_out[0])
        for t in reversed(range(len(d_out))):
            d_h = d_h.add_(d_out[t])
            d_c.addcmul_(d_h, to_c[t])
            d_z_in_four[t, :, :3].mul_(d_c[:, None])
            d_z_in_four[t, :, 3].mul_(d_h)
            d_c.mul_(f[t])
            d_h = recurrence.input_gradient(d_z[t])
        return d_z, d_z


class Gru:
    """Gates reset, update, candidate; the candidate's recurrent part is reset after its product."""

    separate_biases = True

    @staticmethod
    def forward(z: Tensor, state: tuple[Tensor, ...], recurrence: Recurrence) -> Trace:
        h = with_time(state[0], len(z))
        u_n = torch.empty_like(h[1:])
        width = h.shape[-1]
        for t, z_t in enumerate(z):
            z_recurrent = recurrence.add_to(recurrence.bias.expand_as(z_t).clone(), h[t])
            u_n[t] = z_recurrent[:, 2 * width :]
            r, update = (
                z_t[:, : 2 * width].add_(z_recurrent[:, : 2 * width]).sigmoid_().chunk(2, -1)
            )
            n = z_t[:, 2 * width :].addcmul_(r, u_n[t]).tanh_()
            torch.lerp(n, h[t], update, out=h[t + 1])
        return Trace(z, h, h, u_n)

    @staticmethod
    def backward(d_out: Tensor, trace: Trace, recurrence: Recurrence) -> tuple[Tensor, Tensor]:
        r, update, n = trace.gates.chunk(3, -1)
        h, u_n = trace.h[:-1], trace.extra
        to_n = (1 - update) * (1 - n * n)
        d_recurrent = torch.cat(  # all from d_h
            [to_n * u_n * r * (1 - r), (h - n) * update * (1 - update), to_n * r], -1
        )
        d_recurrent_in_three = d_recurrent.unflatten(-1, (3, -1))
        d_h = torch.zeros_like(d_out[0])
        for t in reversed(range(len(d_out))):
            d_h = d_h.add_(d_out[t])
            d_recurrent_in_three[t].mul_(d_h[:, None])
            to_n[t].mul_(d_h)
            d_h = recurrence.input_gradient(d_recurrent[t]).addcmul_(d_h, update[t])
        d_input = torch.cat([d_recurrent[..., : -h.shape[-1]], to_n], -1)
        return d_input, d_recurrent


class Rnn:
    """The simple recurrent cell; its output is its only gate."""

    separate_biases = False

    def __init__(self, activate: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor]):
        self.activate = activate  # in place
        self.slope = slope  # of the activation, from its value

    def forward(self, z: Tensor, state: tuple[Tensor, ...], recurrence: Recurrence) -> Trace:
        h = with_time(state[0], len(z))
        for t, z_t in enumerate(z):
            h[t + 1] = self.activate(recurrence.add_to(z_t, h[t]))
        return Trace(z, h, h, h)

    def backward(
        self, d_out: Tensor, trace: Trace, recurrence: Recurrence
    ) -> tuple[Tensor, Tensor]:
        d_z = self.slope(trace.gates)
        d_h = torch.zeros_like(d_out[0])
        for t in reversed(range(len(d_out))):
            d_z[t].mul_(d_h.add_(d_out[t]))
            d_h = recurrence.input_gradient(d_z[t])
        return d_z, d_z


STEPS: dict[str, Any] = {
    "lstm": Lstm,
    "gru": Gru,
    "rnn_tanh": Rnn(torch.tanh_, lambda h: 1 - h * h),
    "rnn_relu": Rnn(torch.relu_, lambda h: (h > 0).float()),
}


class Steps(torch.autograd.Function):
    """A recurrent layer over all time steps; returns its outputs and last state.

    Truncated: nothing flows into the initial state, nor from the last one.
    """

    @staticmethod
    def forward(
        ctx: Any, cell: str, product: Any, recurrent_product: Any, x: Tensor,
        state: tuple[Tensor, ...], mask: Tensor | None,
        w: Tensor, u: Tensor, bias: Tensor, recurrent_bias: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        steps = STEPS[cell]
        if not steps.separate_biases:
            bias = bias + recurrent_bias
        w_matrices = product.matrices(w)
        recurrence = Recurrence(
            recurrent_product, recurrent_product.matrices(u), recurrent_bias, mask
        )
        z = product.of(w_matrices, x.flatten(0, 1)).add_(bias).unflatten(0, x.shape[:2])
        trace = steps.forward(z, state, recurrence)
        ctx.steps, ctx.product, ctx.w, ctx.x = steps, product, w_matrices, x
        ctx.recurrence, ctx.trace = recurrence, trace
        states = (trace.h, trace.c) if cell == "lstm" else (trace.h,)
        last = tuple(s[-1].clone() for s in states)
        ctx.mark_non_differentiable(*last)
        return trace.h[1:], *last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, *_: Any) -> tuple[Any, ...]:
        recurrence, product = ctx.recurrence, ctx.product
        d_input, d_recurrent = ctx.steps.backward(d_out, ctx.trace, recurrence)
        d_input, d_recurrent = d_input.flatten(0, 1), d_recurrent.flatten(0, 1)
        previous = recurrence.dropped(ctx.trace.h[:-1]).flatten(0, 1)
        needs = ctx.needs_input_grad
        return (
            None, None, None,
            product.input_gradient(ctx.w, d_input).view_as(ctx.x),
            None, None,
            product.weight_gradient(d_input, ctx.x.flatten(0, 1)),
            recurrence.product.weight_gradient(d_recurrent, previous),
            d_input.sum(0),
            d_recurrent.sum(0) if needs[-1] else None,
        )  # fmt: skip
