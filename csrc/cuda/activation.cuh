// Values and derivatives of activations and gates in float, with torch's values at the kinks; NaN propagates.
// `act` and `gate` fold away where the caller passes a constant.
#pragma once

#include <cmath>

#include "core/activation.h"
#include "cuda/platform.cuh"

namespace attnkern::cuda {

ATTNKERN_HOST_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

ATTNKERN_HOST_DEVICE float clamp_from_zero(float x, float high) {  // NaN stays
  return x <= 0.0f ? 0.0f : x >= high ? high : x;
}

ATTNKERN_HOST_DEVICE float softplus(float x) {  // torch's threshold
  return x > 20.0f ? x : log1pf(expf(x));
}

// `slope`: of leaky_relu, or prelu's weight.
ATTNKERN_HOST_DEVICE float activation(Act act, float x, float slope = 0.0f) {
  switch (act) {
    case Act::relu:
      return x <= 0.0f ? 0.0f : x;
    case Act::relu6:
      return clamp_from_zero(x, 6.0f);
    case Act::leaky_relu:
    case Act::prelu:
      return x > 0.0f ? x : slope * x;
    case Act::silu:
      return x / (1.0f + expf(-x));
    case Act::hardswish:
      return x * clamp_from_zero(x + 3.0f, 6.0f) / 6.0f;
    case Act::gelu:
      return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
    case Act::mish:
      return x * tanhf(softplus(x));
    default:
      return x;
  }
}

// The bit that the mask keeps: out_act'(u) of relu and relu6; true at NaN.
ATTNKERN_HOST_DEVICE bool mask_bit(Act act, float u) { return !(u <= 0.0f || (act == Act::relu6 && u >= 6.0f)); }

ATTNKERN_HOST_DEVICE float activation_grad(Act act, float x, float slope = 0.0f) {
  switch (act) {
    case Act::relu:
    case Act::relu6:
      return mask_bit(act, x) ? 1.0f : 0.0f;
    case Act::leaky_relu:
    case Act::prelu:
      return x > 0.0f ? 1.0f : slope;
    case Act::silu: {
      const float s = sigmoid(x);
      return s * (1.0f + x * (1.0f - s));
    }
    case Act::hardswish:
      return x <= -3.0f ? 0.0f : x >= 3.0f ? 1.0f : x / 3.0f + 0.5f;
    case Act::gelu: {
      const float density = expf(-0.5f * x * x) * 0.3989422804014327f;  // 1 / sqrt(2 pi)
      return 0.5f * (1.0f + erff(x * 0.7071067811865476f)) + x * density;
    }
    case Act::mish: {
      const float t = tanhf(softplus(x));
      return t + x * sigmoid(x) * (1.0f - t * t);
    }
    default:
      return 1.0f;
  }
}

// grad act'(x), where a derivative of 0 also stops a grad that is not finite, as torch's does.
ATTNKERN_HOST_DEVICE float activation_backward(Act act, float grad, float x, float slope = 0.0f) {
  const bool stops = act == Act::relu || act == Act::relu6 || act == Act::hardswish;
  const float derivative = activation_grad(act, x, slope);
  return stops && derivative == 0.0f ? 0.0f : grad * derivative;
}

// `slope`, `offset`: of hard_sigmoid.
ATTNKERN_HOST_DEVICE float gate_value(Gate gate, float z, float slope, float offset) {
  switch (gate) {
    case Gate::sigmoid:
      return sigmoid(z);
    case Gate::hard_sigmoid:
      return clamp_from_zero(slope * z + offset, 1.0f);
    case Gate::relu:
      return z <= 0.0f ? 0.0f : z;
    case Gate::tanh:
      return tanhf(z);
    default:
      return z;
  }
}

ATTNKERN_HOST_DEVICE float gate_grad(Gate gate, float z, float slope, float offset) {
  switch (gate) {
    case Gate::sigmoid: {
      const float g = sigmoid(z);
      return g * (1.0f - g);
    }
    case Gate::hard_sigmoid: {
      const float v = slope * z + offset;
      return v > 0.0f && v < 1.0f ? slope : 0.0f;
    }
    case Gate::relu:
      return z <= 0.0f ? 0.0f : 1.0f;
    case Gate::tanh: {
      const float g = tanhf(z);
      return 1.0f - g * g;
    }
    default:
      return 1.0f;
  }
}

ATTNKERN_HOST_DEVICE float gate_backward(Gate gate, float grad, float z, float slope, float offset) {
  const bool stops = gate == Gate::relu || gate == Gate::hard_sigmoid;
  const float derivative = gate_grad(gate, z, slope, offset);
  return stops && derivative == 0.0f ? 0.0f : grad * derivative;
}

}  // namespace attnkern::cuda
