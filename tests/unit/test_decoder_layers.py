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
