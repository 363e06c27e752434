"""The registered ops that a layer's own forward and backward call: `<op>_fwd` and `<op>_bwd`.

glmkern/ops/<op>.py has their schemas. No autograd is recorded inside a layer's Function."""

import torch

from glmkern import ops  # noqa: F401 (registers them)

kernels = torch.ops.glmkern
