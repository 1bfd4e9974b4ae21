"""The weights with which a mixer's output at one token adds up its values at the others, row by row.

`attention` is a softmax over the tokens. `implied attention` is what other mixers multiply the values with, given all
that does not come from the values: sizes |A_ij|, scaled to sum to 1. `receptive field` is the size of a convolution's
kernel. Depthwise convolutions of the values beside a mixer's main path and gates after it are left out.

N images, h heads, S tokens of the sequence, T = H W tokens of the grid, R queries; `place` (T,) says where in the
sequence each token of the grid, row-major, stands. `rows(head, queries)` gives (N, R, T), summing to 1 over T.
`floats` is the working memory a row and image takes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ATTENTION, IMPLIED, FIELD = "attention", "implied attention", "receptive field"
KINDS = (ATTENTION, IMPLIED, FIELD)


def normalised(sizes: Tensor) -> Tensor:
    """Sizes (..., T) >= 0 over their sum; ValueError where there is no finite sum to share out."""
    total = sizes.sum(-1, keepdim=True)
    if not (total.isfinite() & (total > 0)).all():
        raise ValueError(
            "a token has weights that are not finite or all zero; the network's weights are untrained, diverged or of another network"
        )
    return sizes / total


class Softmax:
    """softmax(scale q k^T + bias) of q (N, h, S, e) and k (N, h, S', e); `keys` is the place of the tokens in k, if another."""

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
        self.q, self.k, self.place, self.bias, self.keys = (
            q,
            k,
            place,
            bias,
            place if keys is None else keys,
        )
        self.scale = q.shape[-1] ** -0.5 if scale is None else scale
        self.heads, self.floats = q.shape[1], 3 * k.shape[2]

    def rows(self, head: int, queries: Tensor) -> Tensor:
        at = self.place[queries]
        logits = (self.q[:, head, at] * self.scale) @ self.k[:, head].mT  # (N, R, S)
        if self.bias is not None:
            bias = self.bias.expand(*self.q.shape[:3], self.k.shape[2])[:, head, at]
            logits = (
                logits.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else logits + bias
            )
        return normalised(logits.float().softmax(-1)[..., self.keys])


class Written:
    """Weights (N, h, S, S) of a softmax that the network wrote out."""

    kind = ATTENTION

    def __init__(self, weights: Tensor, place: Tensor) -> None:
        self.weights, self.place = weights, place
        self.heads, self.floats = weights.shape[1], 2 * weights.shape[3]

    def rows(self, head: int, queries: Tensor) -> Tensor:
        return normalised(self.weights[:, head, self.place[queries]][..., self.place].float())


class Partitioned:
    """Attention inside parts of the grid: `inner` (N*P, h, L, L) as one sequence a part, cells (P, L) the tokens of each."""

    def __init__(self, inner: Softmax | Written, cells: Tensor) -> None:
        self.inner, self.cells, self.kind = inner, cells, inner.kind
        self.heads, self.floats = inner.heads, inner.floats * len(cells) + 2 * cells.numel()
        self.where = torch.empty(cells.numel(), dtype=torch.long, device=cells.device)
        self.where[cells.flatten()] = torch.arange(
            cells.numel(), device=cells.device
        )  # token -> part, place in it

    def rows(self, head: int, queries: Tensor) -> Tensor:
        part, place = (
            self.where[queries] // self.cells.shape[1],
            self.where[queries] % self.cells.shape[1],
        )
        inside = self.inner.rows(head, place).unflatten(0, (-1, len(self.cells)))  # (N, P, R, L)
        inside = inside[:, part, torch.arange(len(queries), device=queries.device)]  # (N, R, L)
        rows = inside.new_zeros(*inside.shape[:2], self.cells.numel())
        return rows.scatter_(-1, self.cells[part].expand(inside.shape), inside)


class Agents:
    """Two softmaxes in a row: the queries read from the agents what these gathered from the tokens."""

    kind = IMPLIED

    def __init__(self, gather: Softmax, read: Softmax) -> None:
        self.gather, self.read = gather, read
        self.heads, self.floats = read.heads, 3 * gather.k.shape[2]

    def rows(self, head: int, queries: Tensor) -> Tensor:
        agents = torch.arange(self.gather.q.shape[2], device=queries.device)
        return normalised(self.read.rows(head, queries) @ self.gather.rows(head, agents))


class Linear:
    """q_i . k_j of non-negative features (N, h, S, e)."""

    kind = IMPLIED

    def __init__(self, q: Tensor, k: Tensor, place: Tensor) -> None:
        self.q, self.k, self.place = q, k, place
        self.heads, self.floats = q.shape[1], 2 * len(place)

    def rows(self, head: int, queries: Tensor) -> Tensor:
        return normalised(self.q[:, head, self.place[queries]] @ self.k[:, head, self.place].mT)


class GatedLinear:
    """sum_c q_ic k_jc exp(sum_{j < l <= i} g_lc) for j <= i: kernels.gated_linear, whose arguments these are."""

    kind = IMPLIED

    def __init__(self, q: Tensor, k: Tensor, g: Tensor, place: Tensor) -> None:
        self.q, self.k, self.decay, self.place = q.float(), k.float(), g.double().cumsum(2), place
        self.heads, self.floats = q.shape[1], 4 * len(place) * q.shape[-1]

    def rows(self, head: int, queries: Tensor) -> Tensor:
        i, j = self.place[queries], self.place
        between = self.decay[:, head, i, None] - self.decay[:, head, None, j]  # (N, R, T, e)
        between = between.masked_fill((j > i[:, None])[..., None], -torch.inf).exp()
        sizes = torch.einsum(
            "nrc,njc,nrjc->nrj", self.q[:, head, i].double(), self.k[:, head, j].double(), between
        ).abs()
        return normalised(sizes)


class Scan:
    """Selective scan, all channels together: sum_d |silu(z_id) A^d_ij| with

    A^d_ij = sum_s c_is b_js exp(a_ds sum_{j < l <= i} dt_ld) dt_jd + D_d [i = j] for j <= i: kernels.selective_scan.
    """

    kind, heads = IMPLIED, 1

    def __init__(
        self,
        delta: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        d: Tensor,
        z: Tensor,
        bias: Tensor,
        place: Tensor,
    ) -> None:
        self.dt = F.softplus(delta.double() + bias[:, None])  # (N, D, S)
        self.passed, self.gate = self.dt.cumsum(-1), F.silu(z.double()).abs()
        self.a, self.b, self.c, self.d, self.place = (
            a.double(),
            b.double(),
            c.double(),
            d.double(),
            place,
        )
        self.floats = 8 * len(place) * self.dt.shape[1]

    def rows(self, head: int, queries: Tensor) -> Tensor:
        return normalised(self.sizes(queries))

    def sizes(self, queries: Tensor) -> Tensor:
        i, j = self.place[queries], self.place
        passed = self.passed[:, :, i, None] - self.passed[:, :, None, j]  # (N, D, R, T)
        passed = passed.masked_fill(j > i[:, None], torch.inf)  # a < 0: nothing comes from later
        total = torch.zeros_like(passed)
        for s in range(self.a.shape[1]):
            states = self.c[:, None, s, i, None] * self.b[:, None, s, None, j]  # (N, 1, R, T)
            total += states * torch.exp(passed * self.a[:, s, None, None])
        total = total * self.dt[:, :, None, j] + self.d[:, None, None] * (i[:, None] == j)
        return (self.gate[:, :, i, None] * total).abs().sum(1)


class Both:
    """Two ways through the tokens whose outputs add up."""

    kind, heads = IMPLIED, 1

    def __init__(self, first: Scan, second: Scan) -> None:
        self.parts, self.floats = (first, second), first.floats + second.floats

    def rows(self, head: int, queries: Tensor) -> Tensor:
        return normalised(sum(part.sizes(queries) for part in self.parts))


class Kernel:
    """Mean size of a depthwise kernel (C, 1, k, k) at every offset, cut at the border of the grid."""

    kind, heads = FIELD, 1

    def __init__(self, kernel: Tensor, grid: tuple[int, int], images: int) -> None:
        self.size, self.grid, self.images = (
            kernel.detach().abs().mean((0, 1)),
            grid,
            images,
        )  # (k, k)
        self.floats = 6 * grid[0] * grid[1]

    def rows(self, head: int, queries: Tensor) -> Tensor:
        width, half = self.grid[1], self.size.shape[0] // 2
        token = torch.arange(self.grid[0] * width, device=queries.device)
        down = token // width - (queries // width)[:, None] + half  # (R, T)
        right = token % width - (queries % width)[:, None] + half
        inside = (down >= 0) & (down <= 2 * half) & (right >= 0) & (right <= 2 * half)
        sizes = self.size[down.clamp(0, 2 * half), right.clamp(0, 2 * half)] * inside
        return normalised(sizes).expand(self.images, -1, -1)


Weights = Softmax | Written | Partitioned | Agents | Linear | GatedLinear | Scan | Both | Kernel
