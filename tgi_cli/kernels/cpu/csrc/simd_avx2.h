// What simd.h asks of an instruction set, here in AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "kernels.h"

namespace tgi::TGI_NS {

constexpr int kLanes = 8;
// Accumulators of a tile: 8 of 16 registers.
constexpr int kMaxRows = 2;  // of bf16 activations, by
constexpr int kGroup = 1;  // panels
constexpr int kQuantVectors = 2;  // of a panel (of a lone row kLoneVectors), by
constexpr int kQuantRows = 2;  // of int8 activations, or
constexpr int kQuantWideRows = 2;  // in wide forms
constexpr int kLoneVectors = 2;
constexpr int kCodeRows = 4;  // of bf16 activations by codes, and kQuantVectors
constexpr int kRowGroup = 2;  // of queries, by
constexpr int kValueVectors = 4;  // of values
constexpr bool kScalesToZero = false;  // scale_by_power, for any power far below
template <int kBits>
constexpr int kDotOffset = 0;  // what dot4 takes off every code

using vf = __m256;
using vi = __m256i;

inline vf zero() { return _mm256_setzero_ps(); }
inline vf set1(float x) { return _mm256_set1_ps(x); }
inline vf load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, vf x) { _mm256_storeu_ps(p, x); }
inline vf add(vf a, vf b) { return _mm256_add_ps(a, b); }
inline vf sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
inline vf mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
inline vf div(vf a, vf b) { return _mm256_div_ps(a, b); }
inline vf reciprocal(vf x) { return div(set1(1.0f), x); }
inline vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
inline vf max(vf a, vf b) { return _mm256_max_ps(a, b); }
inline vf min(vf a, vf b) { return _mm256_min_ps(a, b); }
inline vi load_pairs(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline vi broadcast_pair(const void* p) {
  int32_t pair;
  std::memcpy(&pair, p, 4);
  return _mm256_set1_epi32(pair);
}
inline vi blank(vi x, uint32_t mask) { return _mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(mask))); }
inline float sum(vf x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
inline float hmax(vf x) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}
inline vf load_bf16(const bf16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(
      _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
inline vf keep(vf x, vf other, int count) {
  const vi lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const vi mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane);
  return _mm256_blendv_ps(other, x, _mm256_castsi256_ps(mask));
}
inline vf zero_below(vf value, vf x, vf low) { return _mm256_and_ps(_mm256_cmp_ps(x, low, _CMP_GE_OQ), value); }
inline vf round_even(vf x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline vf load_half(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline vi set1_int(int32_t x) { return _mm256_set1_epi32(x); }
inline void store_pairs(void* p, vi x) { _mm256_storeu_si256(static_cast<vi*>(p), x); }
inline vf lookup(const float* table, vi codes) { return _mm256_i32gather_ps(table, codes, 4); }
inline vf from_bits(vi x) { return _mm256_castsi256_ps(x); }
inline vi cast_bits(vf x) { return _mm256_castps_si256(x); }
inline vi shift_left(vi x, int bits) { return _mm256_slli_epi32(x, bits); }
inline vi bit_or(vi a, vi b) { return _mm256_or_si256(a, b); }
inline vi bit_and(vi a, vi b) { return _mm256_and_si256(a, b); }
inline vi shift_right(vi x, int bits) { return _mm256_srli_epi32(x, bits); }
inline vf int_to_float(vi x) { return _mm256_cvtepi32_ps(x); }
inline int32_t round_to_int8(vf x, int8_t* out) {  // stores kLanes bytes, returns their sum
  const vi rounded = _mm256_cvtps_epi32(x);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_packs_epi16(words, words));
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
inline void store_half(uint16_t* p, vf x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline void store_words(int16_t* p, vf x) {
  const vi rounded = _mm256_cvtps_epi32(x);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi32(_mm256_castsi256_si128(rounded),
                                                                  _mm256_extracti128_si256(rounded, 1)));
}
inline vi widen_bytes(const void* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
inline vi unpack_half(vi bytes, int i) {
  const vi none = _mm256_setzero_si256();
  return i == 0 ? _mm256_unpacklo_epi8(bytes, none) : _mm256_unpackhi_epi8(bytes, none);
}
inline void dot2_int(vi& acc, vi a, vi b) { acc = _mm256_add_epi32(acc, _mm256_madd_epi16(a, b)); }
template <int kBits>
inline void dot4(vi& acc, vi codes, vi bytes) {
  vi products;
  if (kBits == 4) {  // pairs of products stay below 2 * 15 * 128: no saturation
    products = _mm256_madd_epi16(_mm256_maddubs_epi16(codes, bytes), _mm256_set1_epi16(1));
  } else {
    const vi even = _mm256_madd_epi16(_mm256_and_si256(codes, _mm256_set1_epi16(0xff)),
                                      _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8));
    const vi odd = _mm256_madd_epi16(_mm256_srli_epi16(codes, 8), _mm256_srai_epi16(bytes, 8));
    products = _mm256_add_epi32(even, odd);
  }
  acc = _mm256_add_epi32(acc, products);
}
inline vf scale_by_power(vf x, vf n) {
  const vi e = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(x, _mm256_castsi256_ps(e));
}
inline void dot2(vf& acc, vi a, vi b) {
  const vi high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  acc = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)),
                        _mm256_castsi256_ps(_mm256_slli_epi32(b, 16)), acc);
  acc = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(a, high)),
                        _mm256_castsi256_ps(_mm256_and_si256(b, high)), acc);
}
inline vi round_bits(vf x) {
  const vi bits = _mm256_castps_si256(x);
  const vi lsb = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const vi rounded =
      _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(lsb, _mm256_set1_epi32(0x7fff))), 16);
  const vf nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  return _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded),
                                              _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc0)), nan));
}
inline void store_bf16(bf16* p, vf x) {
  const vi packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(round_bits(x), round_bits(x)), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline vi make_pairs(vf a, vf b) {
  return _mm256_or_si256(round_bits(a), _mm256_slli_epi32(round_bits(b), 16));
}


// Nibbles as bf16 pairs, for products with bf16 activations; simd.h says which.

struct PairTable {  // of 16 words
  vi low, high;     // bytes, in both halves
};
inline PairTable make_table(const bf16* values) {
  alignas(16) uint8_t low[16], high[16];
  for (int i = 0; i < 16; ++i) {
    low[i] = static_cast<uint8_t>(values[i]);
    high[i] = static_cast<uint8_t>(values[i] >> 8);
  }
  return {_mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(low))),
          _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(high)))};
}
inline vi nibble_pair(const PairTable& table, vi codes, int i) {
  const vi index = _mm256_and_si256(i < 2 ? codes : _mm256_srli_epi16(codes, 4), _mm256_set1_epi8(15));
  const vi low = _mm256_shuffle_epi8(table.low, index), high = _mm256_shuffle_epi8(table.high, index);
  const vi even = _mm256_set1_epi16(0xff);
  if (i % 2 == 0) return _mm256_or_si256(_mm256_and_si256(low, even), _mm256_slli_epi16(high, 8));
  return _mm256_or_si256(_mm256_srli_epi16(low, 8), _mm256_andnot_si256(even, high));
}

// For sampling.

constexpr int kWideLanes = 4;
using vd = __m256d;
inline vi bit_xor(vi a, vi b) { return _mm256_xor_si256(a, b); }
inline vi add_int(vi a, vi b) { return _mm256_add_epi32(a, b); }
inline vi count_up() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
inline uint32_t lane_bits(vf x) { return static_cast<uint32_t>(_mm256_movemask_ps(x)); }
inline uint32_t at_least(vi x, int32_t low) {
  return lane_bits(_mm256_castsi256_ps(_mm256_cmpgt_epi32(x, _mm256_set1_epi32(low - 1))));
}
inline uint32_t is_nan(vf x) { return lane_bits(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)); }
inline uint32_t at_least(vf x, vf low) { return lane_bits(_mm256_cmp_ps(x, low, _CMP_GE_OQ)); }
inline void multiply_words(vi x, uint32_t factor, vi& high, vi& low) {
  const vi f = _mm256_set1_epi32(static_cast<int>(factor));
  const vi even = _mm256_mul_epu32(x, f), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), f);
  high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
}
inline vd set1_wide(double x) { return _mm256_set1_pd(x); }
inline vd widen(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
inline vd add(vd a, vd b) { return _mm256_add_pd(a, b); }
inline vd sub(vd a, vd b) { return _mm256_sub_pd(a, b); }
inline vd mul(vd a, vd b) { return _mm256_mul_pd(a, b); }
inline vd fma(vd a, vd b, vd c) { return _mm256_fmadd_pd(a, b, c); }
inline vd max(vd a, vd b) { return _mm256_max_pd(a, b); }
inline vd round_even(vd x) { return _mm256_round_pd(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline vd scale_by_power(vd x, vd n) {  // n + bias becomes the low bits of a number near 2^52
  const vd biased = add(n, set1_wide(4503599627370496.0 + 1023.0));
  return mul(x, _mm256_castsi256_pd(_mm256_slli_epi64(_mm256_castpd_si256(biased), 52)));
}
inline vd zero_below(vd value, vd x, vd low) { return _mm256_and_pd(_mm256_cmp_pd(x, low, _CMP_GE_OQ), value); }
inline void store(double* p, vd x) { _mm256_storeu_pd(p, x); }
inline void store_whole(int32_t* p, vd x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvttpd_epi32(x)); }
inline vd min(vd a, vd b) { return _mm256_min_pd(a, b); }

}  // namespace tgi::TGI_NS
