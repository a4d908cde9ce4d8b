// Vectors of fp32 and of bf16 pairs for one instruction set, chosen by TGI_ISA before inclusion:
//   1 = AVX2 + FMA + F16C, 2 = AVX-512 (F, BW, DQ, VL), 3 = AVX-512 + VNNI + BF16.
// TGI_VNNI says whether vpdpbusd is there, which 2 may have and 3 has.
// Everything is in a namespace of its own per instruction set, so variants can be linked together.
//
// dot2 adds the two products of a bf16 pair to each fp32 lane. On variant 3 it is one vdpbf16ps, which
// g++ 12 spills around when written as an intrinsic; elsewhere it is two FMAs, even product first.
// dot4<bits> adds the four products of unsigned codes and signed bytes to each int32 lane, exactly.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include <immintrin.h>

#if TGI_ISA == 1
#define TGI_NS avx2
#elif TGI_ISA == 2 && TGI_VNNI
#define TGI_NS avx512vnni
#elif TGI_ISA == 2
#define TGI_NS avx512
#elif TGI_ISA == 3
#define TGI_NS avx512bf16
#endif

namespace tgi::TGI_NS {

using bf16 = uint16_t;

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
// What is wanted much later: into the second-level cache, which has more misses in flight.
inline void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

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

#if TGI_ISA >= 2

constexpr int kLanes = 16;
using vf = __m512;
using vi = __m512i;  // 16 pairs of bf16, or 16 int32

inline vf zero() { return _mm512_setzero_ps(); }
inline vf set1(float x) { return _mm512_set1_ps(x); }
inline vf load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, vf x) { _mm512_storeu_ps(p, x); }
inline vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
inline vf sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
inline vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
inline vf div(vf a, vf b) { return _mm512_div_ps(a, b); }
inline vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
inline vf max(vf a, vf b) { return _mm512_max_ps(a, b); }
inline vf min(vf a, vf b) { return _mm512_min_ps(a, b); }
inline vi load_pairs(const void* p) { return _mm512_loadu_si512(p); }
inline vi broadcast_pair(const void* p) {
  int32_t pair;
  std::memcpy(&pair, p, 4);
  return _mm512_set1_epi32(pair);
}
inline vi blank(vi x, uint32_t mask) { return _mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(mask))); }
// Lane order of the sum is fixed: halves, then quarters, and so on.
inline float sum(vf x) { return _mm512_reduce_add_ps(x); }
inline float hmax(vf x) { return _mm512_reduce_max_ps(x); }
inline vf load_bf16(const bf16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
inline vf keep(vf x, vf other, int count) {  // lanes [0, count) of x, the rest of other
  const __mmask16 mask = count >= 16 ? 0xffff : static_cast<__mmask16>((1u << (count < 0 ? 0 : count)) - 1);
  return _mm512_mask_mov_ps(other, mask, x);
}
inline vf round_even(vf x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline vf scale_by_power(vf x, vf n) { return _mm512_scalef_ps(x, n); }
inline void store_pairs(void* p, vi x) { _mm512_storeu_si512(p, x); }
// table[codes], for 16 values and codes below 16
inline vf lookup(const float* table, vi codes) { return _mm512_permutexvar_ps(codes, load(table)); }
inline vf from_bits(vi x) { return _mm512_castsi512_ps(x); }
inline vi cast_bits(vf x) { return _mm512_castps_si512(x); }
inline vi shift_left(vi x, int bits) { return _mm512_slli_epi32(x, static_cast<unsigned>(bits)); }
inline vi bit_or(vi a, vi b) { return _mm512_or_si512(a, b); }

inline vf load_half(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline vi set1_int(int32_t x) { return _mm512_set1_epi32(x); }
inline vi bit_and(vi a, vi b) { return _mm512_and_si512(a, b); }
inline vi shift_right(vi x, int bits) { return _mm512_srli_epi32(x, static_cast<unsigned>(bits)); }
inline vf int_to_float(vi x) { return _mm512_cvtepi32_ps(x); }
inline int32_t round_to_int8(vf x, int8_t* out) {  // stores kLanes bytes, returns their sum
  const vi rounded = _mm512_cvtps_epi32(x);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtsepi32_epi8(rounded));
  return _mm512_reduce_add_epi32(rounded);
}
#if TGI_VNNI
template <int kBits>
inline void dot4(vi& acc, vi codes, vi bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(bytes));
}
#else
template <int kBits>
inline void dot4(vi& acc, vi codes, vi bytes) {
  vi products;
  if (kBits == 4) {  // pairs of products stay below 2 * 15 * 128: no saturation
    products = _mm512_madd_epi16(_mm512_maddubs_epi16(codes, bytes), _mm512_set1_epi16(1));
  } else {
    const vi even = _mm512_madd_epi16(_mm512_and_si512(codes, _mm512_set1_epi16(0xff)),
                                      _mm512_srai_epi16(_mm512_slli_epi16(bytes, 8), 8));
    const vi odd = _mm512_madd_epi16(_mm512_srli_epi16(codes, 8), _mm512_srai_epi16(bytes, 8));
    products = _mm512_add_epi32(even, odd);
  }
  acc = _mm512_add_epi32(acc, products);
}
#endif

#if TGI_ISA == 3
inline void dot2(vf& acc, vi a, vi b) { asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b)); }
inline void store_bf16(bf16* p, vf x) {
  const __m256bh packed = _mm512_cvtneps_pbh(x);
  std::memcpy(p, &packed, 32);
}
// Interleave two rows of fp32 into bf16 pairs: lane i = (a[i], b[i]).
inline vi make_pairs(vf a, vf b) {
  const __m512bh both = _mm512_cvtne2ps_pbh(b, a);  // a in the low half
  const __m512i index = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23,
                                         7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(index, reinterpret_cast<const __m512i&>(both));
}
#else
inline void dot2(vf& acc, vi a, vi b) {
  const vi high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  acc = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)),
                        _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)), acc);
  acc = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(a, high)),
                        _mm512_castsi512_ps(_mm512_and_si512(b, high)), acc);
}
inline vi round_bits(vf x) {  // fp32 to bf16 in the low half of each lane
  const vi bits = _mm512_castps_si512(x);
  const vi lsb = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const vi rounded =
      _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(lsb, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
}
inline void store_bf16(bf16* p, vf x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(round_bits(x)));
}
inline vi make_pairs(vf a, vf b) {
  return _mm512_or_si512(round_bits(a), _mm512_slli_epi32(round_bits(b), 16));
}
#endif

#else  // AVX2

constexpr int kLanes = 8;
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

#endif

// exp(x) for x <= 0 and moderately positive x, to about 1 ulp of fp32; far below zero it is exactly 0,
// so that a masked score (-infinity) adds nothing. Cody-Waite reduction, degree-6 minimax polynomial.
inline vf exp(vf x) {
  const vf low = set1(-87.0f);
  const vf clamped = min(max(x, low), set1(88.0f));
  const vf n = round_even(mul(clamped, set1(1.44269504088896341f)));
  vf r = fma(n, set1(-0.693359375f), clamped);
  r = fma(n, set1(2.12194440e-4f), r);
  vf p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(mul(r, r), p, add(r, set1(1.0f)));
  const vf value = scale_by_power(p, n);
#if TGI_ISA >= 2
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, low, _CMP_GE_OQ), value);
#else
  return _mm256_and_ps(_mm256_cmp_ps(x, low, _CMP_GE_OQ), value);
#endif
}

// E4M3 codes, none of them NaN: the exponent moves into place, its bias follows by a product, which makes
// subnormals right as well.
inline vf from_e4m3(vi codes) {
  const vi sign = shift_left(bit_and(codes, set1_int(0x80)), 24);
  const vf magnitude = mul(from_bits(shift_left(bit_and(codes, set1_int(0x7f)), 20)), set1(0x1p120f));
  return from_bits(bit_or(cast_bits(magnitude), sign));
}

// 2^x for x <= 0 to about 2 ulp of fp32: 1 at 0 exactly, and 0 far below. Degree-5 minimax polynomial.
inline vf exp2(vf x) {
#if TGI_ISA < 2
  x = max(x, set1(-127.0f));
#endif
  const vf n = round_even(x);
  const vf r = sub(x, n);
  vf p = set1(1.326472731e-03f);
  p = fma(p, r, set1(9.671512991e-03f));
  p = fma(p, r, set1(5.550733581e-02f));
  p = fma(p, r, set1(2.402224243e-01f));
  p = fma(p, r, set1(6.931470037e-01f));
  return scale_by_power(fma(p, r, set1(1.0f)), n);
}

}  // namespace tgi::TGI_NS
