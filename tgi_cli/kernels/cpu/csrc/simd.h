// What the kernels compute with, built on the vectors of one instruction set: simd_avx2.h, simd_avx512.h
// or simd_neon.h, which a variant includes first. Such a file holds, in a namespace of its own:
//   vf, vi, vd     vectors of kLanes fp32, of as many int32 or bf16 pairs, and of kWideLanes fp64
//   kMaxRows ...   the tiles whose accumulators fit its registers
//   dot2           adds the two products of a bf16 pair to each fp32 lane: one instruction, or two FMAs,
//                  even product first
//   dot4<bits>     adds the four products of unsigned codes, less kDotOffset<bits>, and signed bytes above
//                  -128 to each int32 lane, exactly
//   dot2_int       adds the two products of a pair of words to each int32 lane, exactly
//   widen_bytes    signed bytes as words; store_words rounds to words and saturates
//   unpack_half    the lower or upper eight of each 16 bytes as words
//   nibble_pair    bf16 pair i of four, out of a PairTable, for the eight nibbles of each lane: of bytes 0 and 2,
//                  then 1 and 3, the low halves first
//   keep, blank    choose lanes by count, bits by mask; at_least, is_nan give one bit for each lane
// and loads, stores, arithmetic and conversions, all rounding to nearest even.
// Sums over lanes have an order of their own, the same at every call.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels.h"

namespace tgi::TGI_NS {

constexpr float kLog2e = 1.44269504088896341f;
constexpr int kLineVectors = 16 / kLanes;  // vectors in a cache line

// Into the second-level cache: it has more misses in flight, and what is fetched is wanted much later.
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
inline void prefetch_near(const void* p) { __builtin_prefetch(p, 0, 3); }  // into the first-level cache
inline void prefetch_written(void* p) { __builtin_prefetch(p, 1, 3); }      // likewise, to be written

// Calls call(std::integral_constant<int, n>{}) where 1 <= n <= kMost.
template <int kMost, class Call>
inline void with_count(int64_t n, const Call& call) {
  if constexpr (kMost > 0) {
    if (n == kMost) return call(std::integral_constant<int, kMost>{});
    with_count<kMost - 1>(n, call);
  }
}

inline float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// Round to nearest even; NaN stays NaN.
inline bf16 to_bf16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<bf16>((bits >> 16) | 0x40);
  return static_cast<bf16>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

// exp(x) for x <= 0 and moderately positive x, to about 1 ulp of fp32; far below zero it is exactly 0,
// so that a masked score (-infinity) adds nothing. Cody-Waite reduction, degree-6 minimax polynomial.
inline vf exp(vf x) {
  const vf low = set1(-87.0f);
  const vf clamped = min(max(x, low), set1(88.0f));
  const vf n = round_even(mul(clamped, set1(kLog2e)));
  vf r = fma(n, set1(-0.693359375f), clamped);
  r = fma(n, set1(2.12194440e-4f), r);
  vf p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(mul(r, r), p, add(r, set1(1.0f)));
  return zero_below(scale_by_power(p, n), x, low);
}

// E4M3 codes, none of them NaN: the exponent moves into place, its bias follows by a product, which makes
// subnormals right as well.
inline vf from_e4m3(vi codes) {
  const vi sign = shift_left(bit_and(codes, set1_int(0x80)), 24);
  const vf magnitude = mul(from_bits(shift_left(bit_and(codes, set1_int(0x7f)), 20)), set1(0x1p120f));
  return from_bits(bit_or(cast_bits(magnitude), sign));
}

// Numbers that bf16 has, as pairs.
inline vi exact_pairs(vf even, vf odd) {
  return bit_or(shift_right(cast_bits(even), 16), blank(cast_bits(odd), 0xffff0000u));
}

// Bytes of each lane, less `zero`, as a bf16 pair: 0 and 2, or 1 and 3.
inline vi byte_pair(vi codes, float zero, int i) {
  const vi low = set1_int(0xff), magic = set1_int(0x4b000000);  // 2^23
  const vf taken = set1(8388608.0f + zero);
  const vi even = i == 0 ? codes : shift_right(codes, 8), odd = shift_right(codes, i == 0 ? 16 : 24);
  return exact_pairs(sub(from_bits(bit_or(bit_and(even, low), magic)), taken),
                     sub(from_bits(bit_or(bit_and(odd, low), magic)), taken));
}

// The same for E4M3 codes, which grouped.inc.h lays out for it; an instruction set may have a way of its own.
template <class Vector>
inline vi e4m3_pair(Vector codes, int i) {
  const vi words = unpack_half(codes, i);
  return exact_pairs(from_e4m3(words), from_e4m3(shift_right(words, 16)));
}

// 2^x for x <= 127 to about 2 ulp of fp32: 1 at 0 exactly, and 0 far below. Degree-5 minimax polynomial.
inline vf exp2(vf x) {
  if (!kScalesToZero) x = max(set1(-127.0f), x);  // the second if it is NaN
  const vf n = round_even(x);
  const vf r = sub(x, n);
  vf p = set1(1.326472731e-03f);
  p = fma(p, r, set1(9.671512991e-03f));
  p = fma(p, r, set1(5.550733581e-02f));
  p = fma(p, r, set1(2.402224243e-01f));
  p = fma(p, r, set1(6.931470037e-01f));
  return scale_by_power(fma(p, r, set1(1.0f)), n);
}

// exp(x) for x <= 0 to about 1 ulp of fp64, 0 below -708: Cody-Waite reduction, Taylor to degree 13.
inline vd exp_wide(vd x) {
  const vd low = set1_wide(-708.0);
  const vd clamped = max(x, low);
  const vd n = round_even(mul(clamped, set1_wide(1.4426950408889634)));
  vd r = fma(n, set1_wide(-6.93147180369123816490e-01), clamped);
  r = fma(n, set1_wide(-1.90821492927058770002e-10), r);
  double factorial = 6227020800.0;  // 13!
  vd p = set1_wide(1.0 / factorial);
  for (int k = 13; k >= 1; --k) {
    factorial /= k;
    p = fma(p, r, set1_wide(1.0 / factorial));
  }
  return zero_below(scale_by_power(p, n), x, low);
}

}  // namespace tgi::TGI_NS
