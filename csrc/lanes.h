// A register of floats, as wide as in the instruction set that is compiled for.
#pragma once

namespace scoat {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

using Lanes = float __attribute__((vector_size(LANES * sizeof(float))));  // wider ones go through memory

}  // namespace scoat
