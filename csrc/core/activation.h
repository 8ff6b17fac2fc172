// Activations and gates of the operators; attnkern/ops/*/reference.py has their values and derivatives.
#pragma once

namespace attnkern {

enum class Act : int { identity, relu, relu6, leaky_relu, silu, hardswish, gelu, mish, prelu };
enum class Gate : int { identity, sigmoid, hard_sigmoid, relu, tanh };

}  // namespace attnkern
