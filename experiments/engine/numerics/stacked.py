"""Networks of one architecture as one: their weights lie on each other, and run side by side."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from backbones import kernels


class Stack(nn.Module):
    """Several networks of one architecture, each with its own weights and its own samples.

    Every weight has a leading axis of members. A batch holds the samples of the first member, then
    those of the second. PyTorch maps its own operators alone over an axis, so the reference kernels
    run.

    Attributes:
        members: number of networks.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        """Copy the weights of networks.

        Raises:
            ValueError: the networks differ in more than their weights.
        """
        super().__init__()
        _require_alike(networks)
        self.members = len(networks)
        weights, buffers = stack_module_state(list(networks))
        self._names = list(weights)
        self.weights = nn.ParameterList(weights.values())
        self._buffers_of_members = buffers
        # What the weights are put into; a list hides it, since it has no weights of its own.
        self._form = [copy.deepcopy(networks[0]).to("meta")]

    def forward(self, *inputs: Tensor) -> Tensor:
        """Map inputs (M * N, ...) of M members to their outputs (M * N, ...)."""
        parts = [x.unflatten(0, (self.members, -1)) for x in inputs]
        weights = dict(zip(self._names, self.weights, strict=True))
        with kernels.use(**kernels.references()):
            output = vmap(self._run_member)(weights, self._buffers_of_members, *parts)
        return output.flatten(0, 1)

    def _run_member(
        self, weights: dict[str, Tensor], buffers: dict[str, Tensor], *inputs: Tensor
    ) -> Tensor:
        output: Tensor = functional_call(self._form[0], (weights, buffers), inputs)
        return output

    def weights_of(self, member: int) -> dict[str, Tensor]:
        """Return the weights of a member by their names in its own network."""
        return {
            name: weight[member].detach()
            for name, weight in zip(self._names, self.weights, strict=True)
        }


def _require_alike(networks: Sequence[nn.Module]) -> None:
    """Raise ValueError unless all networks have the layers and shapes of the first one."""
    first, *others = [(str(network), _shapes_of(network)) for network in networks]
    for number, other in enumerate(others, start=2):
        if other != first:
            raise ValueError(
                f"member {number} of a stack differs in architecture from the first: stack "
                "trainings that differ in their seeds alone"
            )


def _shapes_of(network: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in network.state_dict().items()}
