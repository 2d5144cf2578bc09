// The three dtypes, as bits that convert to float and back; the same on the CPU and in CUDA.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define SCOAT_BOTH __host__ __device__ __forceinline__
#else
#define SCOAT_BOTH inline
#endif

namespace scoat {

enum class DType : int { float32 = 0, float16 = 1, bfloat16 = 2 };

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

SCOAT_BOTH float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

SCOAT_BOTH uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// What a negative value becomes; NaN stays.
SCOAT_BOTH float relu(float value) { return value < 0.0f ? 0.0f : value; }

SCOAT_BOTH float to_float(float value) { return value; }

SCOAT_BOTH float to_float(BFloat value) { return float_of_bits(uint32_t(value.bits) << 16); }

SCOAT_BOTH float to_float(Half value) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(value.bits));
#else
  // without branches, so that loops over it vectorise; the product moves the exponent's bias, subnormals included
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16, rest = uint32_t(value.bits & 0x7fffu) << 13;
  const uint32_t finite = bits_of_float(float_of_bits(rest) * 0x1p112f);
  return float_of_bits(sign | (rest >= 0x0f800000u ? rest | 0x7f800000u : finite));
#endif
}

template <typename T>
SCOAT_BOTH T from_float(float value);

template <>
SCOAT_BOTH float from_float<float>(float value) {
  return value;
}

template <>
SCOAT_BOTH BFloat from_float<BFloat>(float value) {
#ifdef __CUDA_ARCH__
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  const uint32_t bits = bits_of_float(value);  // to the nearest, ties to even
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
#endif
}

template <>
SCOAT_BOTH Half from_float<Half>(float value) {
#ifdef __CUDA_ARCH__
  return {__half_as_ushort(__float2half_rn(value))};
#else
  const uint32_t bits = bits_of_float(value), sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
  const uint32_t normal = ((size + 0xfffu + ((size >> 13) & 1u)) >> 13) - (112u << 10);
  const uint32_t subnormal = bits_of_float(float_of_bits(size) + 0.5f) - bits_of_float(0.5f);  // units of 2^-24
  uint32_t half = size < 0x38800000u ? subnormal : normal;                                     // below 2^-14
  half = size >= 0x477ff000u ? 0x7c00u : half;  // from 65520 on: infinite
  return {uint16_t(sign | (size > 0x7f800000u ? 0x7e00u : half))};
#endif
}

}  // namespace scoat
