"""One place selects the kernels of an op: a choice can be forced, is restored and is recorded."""

from __future__ import annotations

import pytest
import torch

from backbones import kernels
from tests.support.imports import loaded_modules


@torch.no_grad()  # with gradients, the choice depends on the number of threads
def test_kernels_are_forced_restored_and_recorded():
    q = torch.randn(1, 2, 3, 4)

    def ran() -> list[str]:
        kernels.reset_used()
        assert kernels.used() == {}
        kernels.attention(q, q, q, bias=None)
        return kernels.used()["attention"]

    assert ran() == ["sdpa"]

    # A forced choice holds inside its block, even if the block ends by an error.
    with pytest.raises(KeyError), kernels.use(attention="reference"):
        with kernels.use(attention="sdpa"):
            assert ran() == ["sdpa"]
        assert ran() == ["reference"]
        raise KeyError
    assert ran() == ["sdpa"]

    # All choices that ran are recorded.
    with kernels.use(attention="reference"):
        kernels.attention(q, q, q)
    assert kernels.used() == {"attention": ["reference", "sdpa"]}


def test_a_forced_choice_that_cannot_run_is_refused():
    q = torch.randn(1, 2, 3, 4)
    with kernels.use(attention="flash"), pytest.raises(ValueError, match="forced to 'flash'"):
        kernels.attention(q, q, q)


def test_the_compiler_and_shared_tensors_are_imported_only_where_they_are_used():
    """Their imports take longer than that of everything else beside torch."""
    heavy = {"torch._dynamo", "torch.distributed.tensor", "torch.distributed.fsdp", "sympy"}
    loaded_modules(
        f"""
        import sys
        import experiments.engine.jobs.execute
        assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)
        """
    )


def test_a_compiled_graph_tells_at_every_call_what_it_runs():
    """Traced once, it is called with other kernels in between, and after the record was cleared."""
    q = torch.randn(1, 2, 3, 4)
    compiled = torch.compile(kernels.attention, backend="eager", fullgraph=True)

    def ran(**forced: str) -> dict[str, list[str]]:
        kernels.reset_used()
        with kernels.use(**forced):
            compiled(q, q, q)
        return kernels.used()

    # Two choices are two graphs: the record of what ran decides nothing.
    torch._dynamo.utils.counters.clear()
    for _ in range(2):
        assert ran() == {"attention": ["sdpa"]}
        assert ran(attention="reference") == {"attention": ["reference"]}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize(
    "choices, words",
    [
        (
            {"attend": "sdpa"},
            "unknown kernel 'attend'; known: adaln, adaln_pointwise_gelu, adamw",
        ),
        (
            {"attention": "fast"},
            "no implementation 'fast'; known: flash, efficient, rows, sdpa, reference",
        ),
    ],
)
def test_unknown_kernels_list_the_known(choices: dict[str, str], words: str):
    with pytest.raises(ValueError, match=words), kernels.use(**choices):
        pass
