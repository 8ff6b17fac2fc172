"""Runs every operator's cases, forward and backward, on the GPU: the target of compute-sanitizer.

Shapes are the small ones of the cases, since a sanitizer slows a kernel by up to a hundred times.
"""

import torch

from attnkern import _select
from attnkern.testing import run, specs

device = torch.device("cuda")
calls = 0
for spec in specs():
    for case in spec.cases:
        for dtype in (torch.float32, torch.bfloat16):
            for impl in ("native", "triton"):
                reason = _select.refuse(impl, device, dtype)
                if reason is not None:
                    raise SystemExit(f"{spec.name}: {impl} cannot be sanitized: {reason}")
                for channels_last in (False, True):
                    tensors = case.inputs(dtype, device, channels_last=channels_last)
                    run(spec.function, tensors, case.options, impl=impl)
                    calls += 1
torch.cuda.synchronize()
print(f"{calls} calls, forward and backward")
