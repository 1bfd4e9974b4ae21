"""The weights with which a mixer's output at one token sums its values at the other tokens.

There are three kinds. `attention` is a softmax over the tokens. `implied attention` is the factor
that another mixer puts on the values, given all that does not come from the values: the sizes
|A_ij|, scaled to a sum of 1. `receptive field` is the size of a convolution's kernel. Depthwise
convolutions of the values beside a mixer's main path, and gates after it, are left out.

N images, h heads, S tokens of the sequence, T = H W tokens of the grid, R queries. `place` (T,) is
the position in the sequence of each token of the grid, in row-major order.

Every class has `kind`, `heads`, `rows(head, queries)` -> (N, R, T), which sums to 1 over T, and
`floats`, the working memory of a row of one image.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ATTENTION = "attention"
IMPLIED = "implied attention"
FIELD = "receptive field"
KINDS = (ATTENTION, IMPLIED, FIELD)


def normalised(sizes: Tensor) -> Tensor:
    """Divide sizes (..., T) >= 0 by their sum.

    Raises:
        ValueError: if a sum is zero or not finite.
    """
    total = sizes.sum(-1, keepdim=True)
    if not (total.isfinite() & (total > 0)).all():
        raise ValueError(
            "a token has weights that are not finite or all zero; "
            "the network's weights are untrained, diverged or of another network"
        )
    return sizes / total


class Softmax:
    """softmax(scale q k^T + bias).

    Args:
        q: queries (N, h, S, e).
        k: keys (N, h, S', e).
        place: of the tokens among the queries, and among the keys unless `keys` is given.
        bias: added to the logits, or a boolean mask of the pairs that are kept.
        scale: of the logits; 1 / sqrt(e) by default.
        keys: place of the tokens among the keys.
    """

    kind = ATTENTION

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        place: Tensor,
        bias: Tensor | None = None,
        scale: float | None = None,
        keys: Tensor | None = None,
    ) -> None:
        self.q = q
        self.k = k
        self.place = place
        self.bias = bias
        self.scale = q.shape[-1] ** -0.5 if scale is None else scale
        self.keys = place if keys is None else keys
        self.heads = q.shape[1]
        self.floats = 3 * k.shape[2]

    def rows(self, head: int, queries: Tensor) -> Tensor:
        at = self.place[queries]
        logits = (self.q[:, head, at] * self.scale) @ self.k[:, head].mT  # (N, R, S')
        if self.bias is not None:
            bias = self.bias.expand(*self.q.shape[:3], self.k.shape[2])[:, head, at]
            if bias.dtype == torch.bool:
                logits = logits.masked_fill(~bias, -torch.inf)
            else:
                logits = logits + bias
        return normalised(logits.float().softmax(-1)[..., self.keys])


class Written:
    """Weights (N, h, S, S) of a softmax that the network wrote out."""

    kind = ATTENTION

    def __init__(self, weights: Tensor, place: Tensor) -> None:
        self.weights = weights
        self.place = place
        self.heads = weights.shape[1]
        self.floats = 2 * weights.shape[3]

    def rows(self, head: int, queries: Tensor) -> Tensor:
        return normalised(self.weights[:, head, self.place[queries]][..., self.place].float())


class Partitioned:
    """Attention inside cells of the grid, such as windows.

    Args:
        inner: weights (N*P, h, L, L), in which each cell is a sequence of its own.
        cells: the tokens of each cell, (P, L).
    """

    def __init__(self, inner: Softmax | Written, cells: Tensor) -> None:
        self.inner = inner
        self.cells = cells
        self.kind = inner.kind
        self.heads = inner.heads
        self.floats = inner.floats * len(cells) + 2 * cells.numel()
        # For every token, its position in the flattened cells.
        self.slot = torch.empty(cells.numel(), dtype=torch.long, device=cells.device)
        self.slot[cells.flatten()] = torch.arange(cells.numel(), device=cells.device)

    def rows(self, head: int, queries: Tensor) -> Tensor:
        num_cells, length = self.cells.shape
        cell = self.slot[queries] // length
        place = self.slot[queries] % length

        # Keep, of every query's row in all cells, the row in the query's own cell.
        inside = self.inner.rows(head, place).unflatten(0, (-1, num_cells))  # (N, P, R, L)
        each = torch.arange(len(queries), device=queries.device)
        inside = inside[:, cell, each]  # (N, R, L)

        rows = inside.new_zeros(*inside.shape[:2], self.cells.numel())
        return rows.scatter_(-1, self.cells[cell].expand(inside.shape), inside)


class Agents:
    """Two softmaxes in a row: agents gather from the tokens, queries read from the agents."""

    kind = IMPLIED

    def __init__(self, gather: Softmax, read: Softmax) -> None:
        self.gather = gather
        self.read = read
        self.heads = read.heads
        self.floats = 3 * gather.k.shape[2]

    def rows(self, head: int, queries: Tensor) -> Tensor:
        agents = torch.arange(self.gather.q.shape[2], device=queries.device)
        return normalised(self.read.rows(head, queries) @ self.gather.rows(head, agents))


class Linear:
    """Products q_i . k_j of non-negative features (N, h, S, e)."""

    kind = IMPLIED

    def __init__(self, q: Tensor, k: Tensor, place: Tensor) -> None:
        self.q = q
        self.k = k
        self.place = place
        self.heads = q.shape[1]
        self.floats = 2 * len(place)

    def rows(self, head: int, queries: Tensor) -> Tensor:
        return normalised(self.q[:, head, self.place[queries]] @ self.k[:, head, self.place].mT)


class GatedLinear:
    """sum_c q_ic k_jc exp(sum_{j < l <= i} g_lc) for j <= i.

    The arguments are those of kernels.gated_linear.
    """

    kind = IMPLIED

    def __init__(self, q: Tensor, k: Tensor, g: Tensor, place: Tensor) -> None:
        self.q = q.float()
        self.k = k.float()
        self.decay = g.double().cumsum(2)
        self.place = place
        self.heads = q.shape[1]
        self.floats = 4 * len(place) * q.shape[-1]

    def rows(self, head: int, queries: Tensor) -> Tensor:
        i = self.place[queries]
        j = self.place
        between = self.decay[:, head, i, None] - self.decay[:, head, None, j]  # (N, R, T, e)
        between = between.masked_fill((j > i[:, None])[..., None], -torch.inf).exp()
        q = self.q[:, head, i].double()
        k = self.k[:, head, j].double()
        return normalised(torch.einsum("nrc,njc,nrjc->nrj", q, k, between).abs())


class ScanInputs(NamedTuple):
    """The arguments of kernels.selective_scan, without the values."""

    delta: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor
    z: Tensor
    bias: Tensor


class Scan:
    """A selective scan, all channels together.

    The weight is sum_d |silu(z_id) A^d_ij|, where for j <= i

        A^d_ij = sum_s c_is b_js exp(a_ds sum_{j < l <= i} dt_ld) dt_jd + D_d [i = j].
    """

    kind = IMPLIED
    heads = 1

    def __init__(self, inputs: ScanInputs, place: Tensor) -> None:
        self.dt = F.softplus(inputs.delta.double() + inputs.bias[:, None])  # (N, D, S)
        self.passed = self.dt.cumsum(-1)
        self.gate = F.silu(inputs.z.double()).abs()
        self.a = inputs.a.double()
        self.b = inputs.b.double()
        self.c = inputs.c.double()
        self.d = inputs.d.double()
        self.place = place
        self.floats = 8 * len(place) * self.dt.shape[1]

    def rows(self, head: int, queries: Tensor) -> Tensor:
        return normalised(self.sizes(queries))

    def sizes(self, queries: Tensor) -> Tensor:
        """Return the weights of queries (R,) before they are scaled to a sum of 1: (N, R, T)."""
        # The time between two tokens; infinite for later ones, so that with a < 0 they add nothing.
        i = self.place[queries]
        j = self.place
        passed = self.passed[:, :, i, None] - self.passed[:, :, None, j]  # (N, D, R, T)
        passed = passed.masked_fill(j > i[:, None], torch.inf)

        total = torch.zeros_like(passed)
        for s in range(self.a.shape[1]):
            states = self.c[:, None, s, i, None] * self.b[:, None, s, None, j]  # (N, 1, R, T)
            total += states * torch.exp(passed * self.a[:, s, None, None])

        total = total * self.dt[:, :, None, j] + self.d[:, None, None] * (i[:, None] == j)
        return (self.gate[:, :, i, None] * total).abs().sum(1)


class Both:
    """Two scans whose outputs add up."""

    kind = IMPLIED
    heads = 1

    def __init__(self, first: Scan, second: Scan) -> None:
        self.scans = (first, second)
        self.floats = first.floats + second.floats

    def rows(self, head: int, queries: Tensor) -> Tensor:
        first, second = self.scans
        return normalised(first.sizes(queries) + second.sizes(queries))


class Kernel:
    """The mean size of a depthwise kernel (C, 1, k, k) at every offset, cut at the border."""

    kind = FIELD
    heads = 1

    def __init__(self, kernel: Tensor, grid: tuple[int, int], images: int) -> None:
        self.size = kernel.detach().abs().mean((0, 1))  # (k, k)
        self.grid = grid
        self.images = images
        self.floats = 6 * grid[0] * grid[1]

    def rows(self, head: int, queries: Tensor) -> Tensor:
        # The offset of every token from every query, counted from the kernel's corner.
        width = self.grid[1]
        half = self.size.shape[0] // 2
        token = torch.arange(self.grid[0] * width, device=queries.device)
        down = token // width - (queries // width)[:, None] + half  # (R, T)
        right = token % width - (queries % width)[:, None] + half

        inside = (down >= 0) & (down <= 2 * half) & (right >= 0) & (right <= 2 * half)
        sizes = self.size[down.clamp(0, 2 * half), right.clamp(0, 2 * half)] * inside
        return normalised(sizes).expand(self.images, -1, -1)


Weights = Softmax | Written | Partitioned | Agents | Linear | GatedLinear | Scan | Both | Kernel
