"""The C++ decoder layers against the reference that defines them, and a row against itself alone."""

from __future__ import annotations

import pytest
import torch

from decoder_cases import decoder_case
from kernel_cases import needs_compiler
from polyhead_core.kernels import dispatch

pytestmark = needs_compiler

CPU = torch.device("cpu")


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("transposed_keys", [False, True])
def test_layers_equal_the_reference(seed: int, transposed_keys: bool) -> None:
    settings = {"num_layers": 2, "head_norms": seed >= 3, "transposed_keys": transposed_keys, "adapters": seed != 1}
    first, second = (decoder_case(seed, CPU, **settings) for _ in range(2))
    expected = first.by_reference()
    stack = dispatch.decoder_stack(second.shape, CPU)
    assert stack is not None
    second.assert_same_as(first, second.by(stack), expected)


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("num_threads", [2, 7])
def test_the_number_of_threads_changes_no_bit(num_threads: int, adapters: bool) -> None:
    """Seven are more than there are rows: then panels are shared as they are done."""
    usual = torch.get_num_threads()
    results = []
    try:
        for number in (1, num_threads):
            torch.set_num_threads(number)
            case = decoder_case(4, CPU, num_layers=2, adapters=adapters)
            stack = dispatch.decoder_stack(case.shape, CPU)
            assert stack is not None
            results.append((case.by(stack), case.keys_and_values()))
    finally:
        torch.set_num_threads(usual)
    assert all(map(torch.equal, *results))
