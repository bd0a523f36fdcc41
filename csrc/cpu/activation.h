// The activations that stand behind a product, as functions of lanes.
#pragma once

#include "gelu.h"

namespace clinfast {
namespace CLINFAST_ISA {

static inline Vec tanh_of(Vec x) {
  // (1 - e) / (1 + e) with e = exp(-2 |x|) loses nothing where e is far from 1; near 0 the odd series is exact.
  Vec t = abs(x), e = exp(t * Vec::set(-2.0f));
  Vec far = (Vec::set(1.0f) - e) / (Vec::set(1.0f) + e);
  Vec square = t * t;
  Vec p = Vec::set(-0.0088632355f);
  p = fma(p, square, Vec::set(0.0218694885f));
  p = fma(p, square, Vec::set(-0.053968254f));
  p = fma(p, square, Vec::set(0.13333333f));
  p = fma(p, square, Vec::set(-0.33333333f));
  Vec near = fma(p * square, t, t);
  return copy_sign(select_less(t, Vec::set(0.3f), near, far), x);
}

// x / (1 + e^-x), with e of a negative number only.
static inline Vec silu_of(Vec x) {
  Vec e = exp(Vec::zero() - abs(x));
  return select_less(x, Vec::zero(), x * e, x) / (Vec::set(1.0f) + e);
}

// Calls f with the activation as a function of lanes.
template <typename T, typename F> static inline void with_activation(Activation activation, F &&f) {
  switch (activation) {
    case Activation::gelu: return f([](Vec x) { return gelu_of<T, GeluKind::erf>(x); });
    case Activation::gelu_tanh: return f([](Vec x) { return gelu_of<T, GeluKind::tanh>(x); });
    case Activation::relu: return f([](Vec x) { return max(x, Vec::zero()); });
    case Activation::tanh: return f([](Vec x) { return tanh_of(x); });
    case Activation::silu: return f([](Vec x) { return silu_of(x); });
    default: return f([](Vec x) { return x; });
  }
}

}  // namespace CLINFAST_ISA
}  // namespace clinfast
