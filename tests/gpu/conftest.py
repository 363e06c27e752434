"""These tests run kernels on a GPU; `make gpu` calls them. Elsewhere they are not collected: the
host's compiler runs the same kernels in tests/cuda_on_host."""

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
