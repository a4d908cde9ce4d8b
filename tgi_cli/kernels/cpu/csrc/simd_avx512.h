// What simd.h asks of an instruction set, here in AVX-512 (F, BW, DQ, VL), with VNNI and BF16 where TGI_VNNI
// and TGI_BF16 say so: g++ 12 does not. It also spills around their intrinsics, hence the assembly.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "kernels.h"

namespace tgi::TGI_NS {

constexpr int kLanes = 16;
// Accumulators of a tile: 24 of 32 registers, with those of a group where groups are wide.
constexpr int kMaxRows = 6;  // of bf16 activations, by
constexpr int kGroup = 2;  // panels
constexpr int kQuantVectors = 2;  // of a panel (of a lone row kLoneVectors), by
constexpr int kQuantRows = 6;  // of int8 activations, or
constexpr int kQuantWideRows = 4;  // in wide forms
constexpr int kLoneVectors = 2;
constexpr int kCodeRows = 8;  // of bf16 activations by codes, and kQuantVectors
constexpr int kRowGroup = 6;  // of queries, by
constexpr int kValueVectors = 4;  // of values
constexpr bool kScalesToZero = true;  // scale_by_power, for any power far below
template <int kBits>
constexpr int kDotOffset = 0;  // what dot4 takes off every code

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
inline vf reciprocal(vf x) {  // 14 bits, doubled by a step of Newton's
  const vf r = _mm512_rcp14_ps(x);
  return _mm512_fmadd_ps(r, _mm512_fnmadd_ps(x, r, _mm512_set1_ps(1.0f)), r);
}
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
inline vf zero_below(vf value, vf x, vf low) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, low, _CMP_GE_OQ), value); }
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
inline void store_half(uint16_t* p, vf x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline void store_words(int16_t* p, vf x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(x)));
}
inline vi widen_bytes(const void* p) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
}
#if TGI_VNNI
inline void dot2_int(vi& acc, vi a, vi b) { asm("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b)); }
template <int kBits>
inline void dot4(vi& acc, vi codes, vi bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(bytes));
}
#else
inline void dot2_int(vi& acc, vi a, vi b) { acc = _mm512_add_epi32(acc, _mm512_madd_epi16(a, b)); }
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

#if TGI_BF16
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


// Codes as bf16 pairs, for products with bf16 activations; simd.h says which.

using PairTable = vi;  // 16 words, twice: what lies above a nibble does not matter
inline PairTable make_table(const bf16* values) {
  return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
}
inline vi nibble_pair(PairTable table, vi codes, int i) {
  return _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, static_cast<unsigned>(i % 2 * 8 + i / 2 * 4)), table);
}
// Words of the lower or upper halves of each 16 bytes.
inline vi unpack(vi low, vi high, int i) {
  return i == 0 ? _mm512_unpacklo_epi8(low, high) : _mm512_unpackhi_epi8(low, high);
}
// The exponent takes its new bias; subnormals, which have none, come from a table of 8.
inline vi e4m3_pair(vi codes, int i) {
  alignas(64) static constexpr bf16 kSubnormals[32] = {
      0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60, 0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60,
      0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60, 0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60};
  const vi subnormals = _mm512_load_si512(kSubnormals), bias = _mm512_set1_epi16(0x3c00);
  const vi sign = _mm512_set1_epi16(static_cast<int16_t>(0x8000)), rest = _mm512_set1_epi16(0x07f0);
  const vi twice = unpack(codes, codes, i);  // the code in both bytes
  const __mmask32 none = _mm512_testn_epi16_mask(twice, _mm512_set1_epi16(0x7800));
  vi magnitude = _mm512_add_epi16(_mm512_and_si512(_mm512_srli_epi16(twice, 4), rest), bias);
  magnitude = _mm512_mask_permutexvar_epi16(magnitude, none, twice, subnormals);
  return _mm512_ternarylogic_epi32(sign, twice, magnitude, 0xca);  // sign ? twice : magnitude
}

// The same with the tables of 128 bytes that AVX512_VBMI looks up, as assembly, since g++ is not told of it.
inline bool has_byte_tables() { return __builtin_cpu_supports("avx512vbmi"); }
struct ByteTable {  // of 128 words: their low bytes, then their high ones
  vi low[2], high[2];
};
inline ByteTable make_byte_table(const uint8_t (&bytes)[2][128]) {
  return {{load_pairs(bytes[0]), load_pairs(bytes[0] + 64)}, {load_pairs(bytes[1]), load_pairs(bytes[1] + 64)}};
}
inline vi look_up(const vi (&table)[2], vi index) {
  asm("vpermi2b %2, %1, %0" : "+v"(index) : "v"(table[0]), "v"(table[1]));
  return index;
}
struct FoundBytes {  // of words
  vi low, high;
};
// For bytes with a sign above seven bits.
inline FoundBytes look_up(const ByteTable& table, vi codes) {
  asm("" : "+v"(codes));  // or else it is loaded three times
  const vi sign = _mm512_set1_epi8(static_cast<char>(0x80));
  const vi high = _mm512_ternarylogic_epi32(look_up(table.high, codes), codes, sign, 0xd8);  // sign ? codes : found
  return {look_up(table.low, codes), high};
}

// For sampling.

constexpr int kWideLanes = 8;  // fp64 lanes
using vd = __m512d;
inline vi bit_xor(vi a, vi b) { return _mm512_xor_si512(a, b); }
inline vi add_int(vi a, vi b) { return _mm512_add_epi32(a, b); }
inline vi count_up() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
inline uint32_t at_least(vi x, int32_t low) {  // one bit per lane
  return _mm512_cmpge_epi32_mask(x, _mm512_set1_epi32(low));
}
inline uint32_t is_nan(vf x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); }
inline uint32_t at_least(vf x, vf low) { return _mm512_cmp_ps_mask(x, low, _CMP_GE_OQ); }
inline void multiply_words(vi x, uint32_t factor, vi& high, vi& low) {
  const vi f = _mm512_set1_epi32(static_cast<int>(factor));
  const vi even = _mm512_mul_epu32(x, f), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), f);
  high = _mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd);
  low = _mm512_mask_mov_epi32(even, 0xaaaa, _mm512_slli_epi64(odd, 32));
}
inline vd set1_wide(double x) { return _mm512_set1_pd(x); }
inline vd widen(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
inline vd add(vd a, vd b) { return _mm512_add_pd(a, b); }
inline vd sub(vd a, vd b) { return _mm512_sub_pd(a, b); }
inline vd mul(vd a, vd b) { return _mm512_mul_pd(a, b); }
inline vd fma(vd a, vd b, vd c) { return _mm512_fmadd_pd(a, b, c); }
inline vd max(vd a, vd b) { return _mm512_max_pd(a, b); }
inline vd round_even(vd x) { return _mm512_roundscale_pd(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline vd scale_by_power(vd x, vd n) { return _mm512_scalef_pd(x, n); }
inline vd zero_below(vd value, vd x, vd low) { return _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(x, low, _CMP_GE_OQ), value); }
inline void store(double* p, vd x) { _mm512_storeu_pd(p, x); }
inline void store_whole(int32_t* p, vd x) {  // rounded towards zero
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvttpd_epi32(x));
}
inline vd min(vd a, vd b) { return _mm512_min_pd(a, b); }

}  // namespace tgi::TGI_NS
