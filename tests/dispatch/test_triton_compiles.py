"""The Triton kernels through the whole compiler, down to machine code of A100 and H100, which takes no GPU.

The interpreter of ``test_triton_kernels.py`` knows neither types nor layouts; what a GPU computes and how fast is for
``tests/strategies/test_cuda.py`` and ``benchmarks/kernels.py``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_triton_kernels.py")
VERSIONS = {"_gather_rows_kernel": 1, "_sum_rows_kernel": 2, "_unpermute_backward_kernel": 1, "_pack_rows_kernel": 2}


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("capability", ["80", "90"], ids="sm_{}".format)
def test_every_kernel_becomes_machine_code(capability: str, tmp_path: Path) -> None:
    paths = {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment = os.environ | paths | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, SCRIPT, capability], env=environment, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("Triton was built for other GPUs than NVIDIA's")
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout)
    assert len(compiled) == 8
    for case, kernels in compiled.items():
        assert {name: len(versions) for name, versions in kernels.items()} == VERSIONS, case
        if case.endswith(" 2048"):  # rows are written 16 bytes at a time: else no kernel comes near the memory's speed
            for stores in [*kernels["_gather_rows_kernel"], *kernels["_sum_rows_kernel"]]:
                assert stores, case
                assert all(".v4.b32" in store or ".v2.b64" in store for store in stores), (case, stores)
