"""These tests need a GPU; `make gpu` calls them. Elsewhere they are not collected: the tests of ops
run the kernels for GPUs there too."""

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
