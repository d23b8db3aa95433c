// The argument `activation` of operators.
#pragma once

#include <string>

#include "checks.h"
#include "elementwise/launch.h"

namespace rrt {

inline elementwise::Activation check_activation(const Checks& check, const std::string& activation) {
  if (activation == "silu") return elementwise::Activation::kSilu;
  if (activation != "gelu_tanh") check.fail("activation: found ", activation, "; expected silu or gelu_tanh");
  return elementwise::Activation::kGeluTanh;
}

}  // namespace rrt
