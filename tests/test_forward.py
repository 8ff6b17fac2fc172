"""Outputs: every case x dtype x memory format within the error budget against float64."""

import pytest
import torch

from attnkern import testing


@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
def test_outputs_are_within_the_budget(call, target, dtype, channels_last):
    tensors = call.inputs(target, dtype, channels_last=channels_last)
    got = testing.run(call.spec.function, tensors, call.case.options, impl=target.impl).outputs
    want = testing.expected(call.spec, call.case, tensors, testing.noise_like(got))
    for index, output in enumerate(got):
        eager, oracle = want.eager.outputs[index], want.oracle.outputs[index]
        ratio = testing.error_ratio(output, eager, oracle, want.errors[f"output {index}"])
        assert ratio <= 2, f"output {index}: {ratio}"
    with torch.no_grad():  # another path: no autograd node, no bit mask
        for inference, training in zip(
            testing.as_tuple(call.run(target, tensors)), got, strict=True
        ):
            projects = call.spec.name == "query_attention_pool"  # by torch, before the kernels
            if target.impl == "reference" or projects:  # matmul folds other dims for a gradient
                torch.testing.assert_close(inference, training)
            else:
                assert torch.equal(inference, training)


def test_outputs_have_the_dtype_shape_and_strides_of_eager(call, target, dtype):
    for channels_last in (False, True):
        tensors = call.inputs(target, dtype, channels_last=channels_last)
        y = testing.as_tuple(call.run(target, tensors))[0]
        eager = testing.as_tuple(call.spec.eager(**tensors, **call.case.options))[0]
        accumulated = torch.promote_types(dtype, torch.float32)
        assert y.dtype == (accumulated if call.spec.name == "squeeze" else dtype)
        assert y.shape == eager.shape
        if call.spec.name != "squeeze":
            assert y.stride() == eager.stride()
