"""What the PyTorch that is installed can run."""

import pytest
import torch
from torch.torch_version import TorchVersion

SHARDS = TorchVersion(torch.__version__) >= "2.12"
needs_sharding = pytest.mark.skipif(not SHARDS, reason="sharded parameters need PyTorch 2.12")

needs_causal_bias = pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.9",
    reason="before, a CausalBias refuses every other function",
)
