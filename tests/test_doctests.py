"""The examples in docstrings are run."""

from __future__ import annotations

import doctest
import importlib.util
import pkgutil

import pytest

import lightning_moe

# Triton comes with CUDA builds of torch only.
MISSING = set() if importlib.util.find_spec("triton") else {"lightning_moe.dispatch.triton_kernels"}
NAMES = ["lightning_moe"] + [module.name for module in pkgutil.walk_packages(lightning_moe.__path__, "lightning_moe.")]
# Where DESIGN 8 and the docstrings promise a worked example.
WITH_EXAMPLES = {
    "lightning_moe.dispatch.permute",
    "lightning_moe.nn.capacity",
    "lightning_moe.nn.layer",
    "lightning_moe.parallel.topology",
}


@pytest.mark.parametrize("name", sorted({*NAMES} - MISSING))
@pytest.mark.filterwarnings("ignore:MoE layers are trained with no AuxLossCallback")
def test_examples_of(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), raise_on_error=False)
    assert result.failed == 0
    assert result.attempted > 0 or name not in WITH_EXAMPLES


def test_all_modules_are_there() -> None:
    assert set(NAMES) >= WITH_EXAMPLES
