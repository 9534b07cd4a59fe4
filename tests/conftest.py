"""What holds for all tests."""

import torch

# The tensors of nearly all tests are too small to be divided among threads, which only wait for
# each other then. Benchmarks take as many threads as there are.
torch.set_num_threads(1)
