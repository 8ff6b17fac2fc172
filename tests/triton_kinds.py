"""What every operator's kernels are given in Triton's interpreter: dtypes of maps and of weights, and a layout."""

import torch

from attnkern import testing

KINDS = {
    "float32-first": (torch.float32, torch.float32, False),
    "float32-last": (torch.float32, torch.float32, True),
    "bfloat16-first": (torch.bfloat16, torch.bfloat16, False),
    "bfloat16-last": (torch.bfloat16, torch.bfloat16, True),
    "float16-first": (torch.float16, torch.float32, False),
    "float16-last": (torch.float16, torch.float32, True),
}
FEW = ("float32-first", "bfloat16-last", "float16-first")
"""Each dtype once, and both layouts."""


def check(call, kind):
    """A case within the budget."""
    dtype, weights, last = KINDS[kind]
    tensors = call.case.inputs(dtype, weight_dtype=weights, channels_last=last)
    testing.compare(call.spec, call.case, tensors, impl="triton")
