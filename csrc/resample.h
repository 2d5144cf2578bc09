// Where the outputs of bilinear upsampling by two come from, and where its inputs go. Positions are exact: output o
// of an axis of `size` inputs lies at o * (size - 1) / (2 * size - 1), whose whole part and remainder are below.
#pragma once

#include "numbers.h"

namespace scoat {

// Output o = first_weight * input[first] + second_weight * input[second].
struct Source {
  int64_t first, second;
  float first_weight, second_weight;
};

SCOAT_BOTH float inverse_of(int64_t size) { return 1.0f / float(2 * size - 1); }

// Weights of inputs k and k + 1 in the outputs 2k + 1 and 2k + 2, the two between them.
template <typename Int>
SCOAT_BOTH float odd_first(Int k, Int size, float inverse) {
  return float(size + k) * inverse;
}
template <typename Int>
SCOAT_BOTH float odd_second(Int k, Int size, float inverse) {
  return float(size - 1 - k) * inverse;
}
template <typename Int>
SCOAT_BOTH float even_first(Int k, Int, float inverse) {
  return float(k + 1) * inverse;
}
template <typename Int>
SCOAT_BOTH float even_second(Int k, Int size, float inverse) {
  return float(2 * size - 2 - k) * inverse;
}

SCOAT_BOTH Source source_of(int64_t output, int64_t size, float inverse) {
  const int64_t k = (output + 1) / 2 - 1;  // from -1, where output 0 is input 0 alone
  const bool odd = output % 2 == 1;
  const float first = odd ? odd_first(k, size, inverse) : even_first(k, size, inverse);
  const float second = odd ? odd_second(k, size, inverse) : even_second(k, size, inverse);
  return {k < 0 ? 0 : k, k + 1 < size ? k + 1 : k, first, second};
}

// Weights of input k in the outputs 2k - 1, 2k, 2k + 1 and 2k + 2; 0 where there is no such output.
struct Targets {
  float weight[4];
};

SCOAT_BOTH Targets targets_of(int64_t k, int64_t size, float inverse) {
  return {{k > 0 ? odd_second(k - 1, size, inverse) : 0.0f, even_second(k - 1, size, inverse),
           odd_first(k, size, inverse), k + 1 < size ? even_first(k, size, inverse) : 0.0f}};
}

SCOAT_BOTH float interpolate(float y00, float y01, float y10, float y11, float row0, float row1, float column0,
                             float column1) {
  return column0 * (row0 * y00 + row1 * y10) + column1 * (row0 * y01 + row1 * y11);
}

}  // namespace scoat
