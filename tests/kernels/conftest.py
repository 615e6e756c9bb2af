"""Where Triton kernels are tried: on the GPU, else in Triton's interpreter if Triton is installed."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch


@pytest.fixture(scope="session")
def triton_device() -> torch.device:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if torch.cuda.is_available():
        return torch.device("cuda")
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's module is imported
    return torch.device("cpu")
