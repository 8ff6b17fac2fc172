// Values and derivatives of activations and gates in float or double, with torch's values at the kinks; NaN propagates.
// `act` and `gate` fold away where the caller passes a constant.
#pragma once

#include <cmath>

#include "core/activation.h"
#include "cuda/platform.cuh"

namespace attnkern::cuda {

ATTNKERN_HOST_DEVICE float exponential(float x) { return expf(x); }
ATTNKERN_HOST_DEVICE double exponential(double x) { return ::exp(x); }
ATTNKERN_HOST_DEVICE float error_function(float x) { return erff(x); }
ATTNKERN_HOST_DEVICE double error_function(double x) { return ::erf(x); }
ATTNKERN_HOST_DEVICE float hyperbolic_tangent(float x) { return tanhf(x); }
ATTNKERN_HOST_DEVICE double hyperbolic_tangent(double x) { return ::tanh(x); }
ATTNKERN_HOST_DEVICE float logarithm1p(float x) { return log1pf(x); }
ATTNKERN_HOST_DEVICE double logarithm1p(double x) { return ::log1p(x); }

template <class T>
ATTNKERN_HOST_DEVICE T sigmoid(T x) {
  return T(1) / (T(1) + exponential(-x));
}

template <class T>
ATTNKERN_HOST_DEVICE T clamp_from_zero(T x, T high) {  // NaN stays
  return x <= T(0) ? T(0) : x >= high ? high : x;
}

template <class T>
ATTNKERN_HOST_DEVICE T softplus(T x) {  // torch's threshold
  return x > T(20) ? x : logarithm1p(exponential(x));
}

// `slope`: of leaky_relu, or prelu's weight.
template <class T>
ATTNKERN_HOST_DEVICE T activation(Act act, T x, T slope = T(0)) {
  switch (act) {
    case Act::relu: return x <= T(0) ? T(0) : x;
    case Act::relu6: return clamp_from_zero(x, T(6));
    case Act::leaky_relu:
    case Act::prelu: return x > T(0) ? x : slope * x;
    case Act::silu: return x / (T(1) + exponential(-x));
    case Act::hardswish: return x * clamp_from_zero(x + T(3), T(6)) / T(6);
    case Act::gelu: return T(0.5) * x * (T(1) + error_function(x * T(0.7071067811865476)));
    case Act::mish: return x * hyperbolic_tangent(softplus(x));
    default: return x;
  }
}

// The bit that the mask keeps: out_act'(u) of relu and relu6; true at NaN.
template <class T>
ATTNKERN_HOST_DEVICE bool mask_bit(Act act, T u) {
  return !(u <= T(0) || (act == Act::relu6 && u >= T(6)));
}

template <class T>
ATTNKERN_HOST_DEVICE T activation_grad(Act act, T x, T slope = T(0)) {
  switch (act) {
    case Act::relu:
    case Act::relu6: return mask_bit(act, x) ? T(1) : T(0);
    case Act::leaky_relu:
    case Act::prelu: return x > T(0) ? T(1) : slope;
    case Act::silu: {
      const T s = sigmoid(x);
      return s * (T(1) + x * (T(1) - s));
    }
    case Act::hardswish: return x <= T(-3) ? T(0) : x >= T(3) ? T(1) : x / T(3) + T(0.5);
    case Act::gelu: {
      const T density = exponential(T(-0.5) * x * x) * T(0.3989422804014327);  // 1 / sqrt(2 pi)
      return T(0.5) * (T(1) + error_function(x * T(0.7071067811865476))) + x * density;
    }
    case Act::mish: {
      const T t = hyperbolic_tangent(softplus(x));
      return t + x * sigmoid(x) * (T(1) - t * t);
    }
    default: return T(1);
  }
}

// `slope`, `offset`: of hard_sigmoid.
template <class T>
ATTNKERN_HOST_DEVICE T gate_value(Gate gate, T z, T slope, T offset) {
  switch (gate) {
    case Gate::sigmoid: return sigmoid(z);
    case Gate::hard_sigmoid: return clamp_from_zero(slope * z + offset, T(1));
    case Gate::relu: return z <= T(0) ? T(0) : z;
    case Gate::tanh: return hyperbolic_tangent(z);
    default: return z;
  }
}

template <class T>
ATTNKERN_HOST_DEVICE T gate_grad(Gate gate, T z, T slope, T offset) {
  switch (gate) {
    case Gate::sigmoid: {
      const T g = sigmoid(z);
      return g * (T(1) - g);
    }
    case Gate::hard_sigmoid: {
      const T v = slope * z + offset;
      return v > T(0) && v < T(1) ? slope : T(0);
    }
    case Gate::relu: return z <= T(0) ? T(0) : T(1);
    case Gate::tanh: {
      const T g = hyperbolic_tangent(z);
      return T(1) - g * g;
    }
    default: return T(1);
  }
}

}  // namespace attnkern::cuda
