"""Where Triton kernels are tried: on the GPU, and without one in Triton's interpreter."""

from __future__ import annotations

import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    assert "triton" not in sys.modules, "Triton decides at its import whether its own functions are interpreted"
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def triton_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
