// What simd.h asks of an instruction set, here in NEON of ARMv8, with dot products of bytes where TGI_DOTPROD
// says so, and those of bf16 pairs and of unsigned by signed bytes (FEAT_BF16, FEAT_I8MM) where TGI_BF16 does.
#pragma once

#include <arm_neon.h>

#include <cstring>

#include "kernels.h"

namespace tgi::TGI_NS {

constexpr int kLanes = 4;
// Accumulators of a tile: 16 of 32 registers, 24 in wide forms with those of a group.
constexpr int kMaxRows = 2;  // of bf16 activations, by
constexpr int kGroup = 1;  // panels
constexpr int kQuantVectors = 2;  // of a panel (of a lone row kLoneVectors), by
constexpr int kQuantRows = 4;  // of int8 activations, or
constexpr int kQuantWideRows = 4;  // in wide forms
constexpr int kLoneVectors = 8;
constexpr int kCodeRows = 6;  // of bf16 activations by codes, and kQuantVectors
constexpr int kRowGroup = 1;  // of queries, by
constexpr int kValueVectors = 8;  // of values
constexpr bool kScalesToZero = false;  // scale_by_power, for any power far below
// Signed products are what there is without usdot: codes of 8 bits are taken 128 lower.
template <int kBits>
constexpr int kDotOffset = kBits == 8 && !TGI_BF16 ? 128 : 0;

using vf = float32x4_t;
using vi = uint32x4_t;  // 4 pairs of bf16, or 4 int32

inline vf zero() { return vdupq_n_f32(0); }
inline vf set1(float x) { return vdupq_n_f32(x); }
inline vf load(const float* p) { return vld1q_f32(p); }
inline void store(float* p, vf x) { vst1q_f32(p, x); }
inline vf add(vf a, vf b) { return vaddq_f32(a, b); }
inline vf sub(vf a, vf b) { return vsubq_f32(a, b); }
inline vf mul(vf a, vf b) { return vmulq_f32(a, b); }
inline vf div(vf a, vf b) { return vdivq_f32(a, b); }
inline vf reciprocal(vf x) { return div(set1(1.0f), x); }
inline vf fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
inline vf max(vf a, vf b) { return vmaxq_f32(a, b); }
inline vf min(vf a, vf b) { return vminq_f32(a, b); }
inline vi load_pairs(const void* p) { return vreinterpretq_u32_u8(vld1q_u8(static_cast<const uint8_t*>(p))); }
inline void store_pairs(void* p, vi x) { vst1q_u8(static_cast<uint8_t*>(p), vreinterpretq_u8_u32(x)); }
inline vi broadcast_pair(const void* p) {
  uint32_t pair;
  std::memcpy(&pair, p, 4);
  return vdupq_n_u32(pair);
}
inline vi blank(vi x, uint32_t mask) { return vandq_u32(x, vdupq_n_u32(mask)); }
inline float sum(vf x) { return vaddvq_f32(x); }
inline float hmax(vf x) { return vmaxvq_f32(x); }
inline vf load_bf16(const bf16* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
inline vf keep(vf x, vf other, int count) {  // lanes [0, count) of x, the rest of other
  const int32_t lanes[4] = {0, 1, 2, 3};
  return vbslq_f32(vcgtq_s32(vdupq_n_s32(count), vld1q_s32(lanes)), x, other);
}
inline vf zero_below(vf value, vf x, vf low) {
  return vreinterpretq_f32_u32(vandq_u32(vcgeq_f32(x, low), vreinterpretq_u32_f32(value)));
}
inline vf round_even(vf x) { return vrndnq_f32(x); }
inline vf scale_by_power(vf x, vf n) {
  const int32x4_t e = vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23);
  return vmulq_f32(x, vreinterpretq_f32_s32(e));
}
// table[codes], for 16 values and codes below 16
inline vf lookup(const float* table, vi codes) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(table);
  const uint8x16x4_t all = {{vld1q_u8(bytes), vld1q_u8(bytes + 16), vld1q_u8(bytes + 32), vld1q_u8(bytes + 48)}};
  const vi index = vmlaq_n_u32(vdupq_n_u32(0x03020100u), codes, 0x04040404u);
  return vreinterpretq_f32_u8(vqtbl4q_u8(all, vreinterpretq_u8_u32(index)));
}
inline vf from_bits(vi x) { return vreinterpretq_f32_u32(x); }
inline vi cast_bits(vf x) { return vreinterpretq_u32_f32(x); }
inline vi shift_left(vi x, int bits) { return vshlq_u32(x, vdupq_n_s32(bits)); }
inline vi shift_right(vi x, int bits) { return vshlq_u32(x, vdupq_n_s32(-bits)); }
inline vi bit_or(vi a, vi b) { return vorrq_u32(a, b); }
inline vi bit_and(vi a, vi b) { return vandq_u32(a, b); }
inline vf load_half(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
inline vi set1_int(int32_t x) { return vdupq_n_u32(static_cast<uint32_t>(x)); }
inline vf int_to_float(vi x) { return vcvtq_f32_s32(vreinterpretq_s32_u32(x)); }
inline int32_t round_to_int8(vf x, int8_t* out) {  // stores kLanes bytes, returns their sum
  const int32x4_t rounded = vcvtnq_s32_f32(x);
  const int16x4_t words = vqmovn_s32(rounded);
  const int8x8_t bytes = vqmovn_s16(vcombine_s16(words, words));
  std::memcpy(out, &bytes, 4);
  return vaddvq_s32(rounded);
}

inline void store_half(uint16_t* p, vf x) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x))); }
inline void store_words(int16_t* p, vf x) { vst1_s16(p, vqmovn_s32(vcvtnq_s32_f32(x))); }
inline vi widen_bytes(const void* p) {
  return vreinterpretq_u32_s16(vmovl_s8(vld1_s8(static_cast<const int8_t*>(p))));
}
inline vi unpack_half(vi bytes, int i) {
  const uint8x16_t all = vreinterpretq_u8_u32(bytes), none = vdupq_n_u8(0);
  return vreinterpretq_u32_u8(i == 0 ? vzip1q_u8(all, none) : vzip2q_u8(all, none));
}
inline void dot2_int(vi& acc, vi a, vi b) {
  const int16x8_t x = vreinterpretq_s16_u32(a), y = vreinterpretq_s16_u32(b);
  const int32x4_t products = vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y));
  acc = vaddq_u32(acc, vreinterpretq_u32_s32(products));
}
inline int8x16_t signed_codes(vi codes, int offset) {
  const uint8x16_t bytes = vreinterpretq_u8_u32(codes);
  return vreinterpretq_s8_u8(offset == 0 ? bytes : veorq_u8(bytes, vdupq_n_u8(128)));
}

template <int kBits>
inline void dot4(vi& acc, vi codes, vi bytes) {
  const int32x4_t sums = vreinterpretq_s32_u32(acc);
  const int8x16_t signed_bytes = vreinterpretq_s8_u32(bytes);
#if TGI_BF16
  acc = vreinterpretq_u32_s32(vusdotq_s32(sums, vreinterpretq_u8_u32(codes), signed_bytes));
#elif TGI_DOTPROD
  acc = vreinterpretq_u32_s32(vdotq_s32(sums, signed_codes(codes, kDotOffset<kBits>), signed_bytes));
#else  // sums of two products stay within 2 * 128 * 127
  const int8x16_t c = signed_codes(codes, kDotOffset<kBits>);
  const int16x8_t low = vmull_s8(vget_low_s8(c), vget_low_s8(signed_bytes));
  acc = vreinterpretq_u32_s32(vpadalq_s16(sums, vpaddq_s16(low, vmull_high_s8(c, signed_bytes))));
#endif
}

#if TGI_BF16
// Rounds twice and to odd: the sum of the products, and its sum with the lane.
// As assembly, since g++ 12 writes constants of bf16 as if they were fp16.
inline void dot2(vf& acc, vi a, vi b) { asm("bfdot %0.4s, %1.8h, %2.8h" : "+w"(acc) : "w"(a), "w"(b)); }
inline uint16x4_t round_bits(vf x) { return vreinterpret_u16_bf16(vcvt_bf16_f32(x)); }
#else
inline void dot2(vf& acc, vi a, vi b) {
  const vi high = vdupq_n_u32(0xffff0000u);
  acc = fma(from_bits(vshlq_n_u32(a, 16)), from_bits(vshlq_n_u32(b, 16)), acc);
  acc = fma(from_bits(vandq_u32(a, high)), from_bits(vandq_u32(b, high)), acc);
}
inline uint16x4_t round_bits(vf x) {
  const vi bits = cast_bits(x);
  const vi lsb = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const vi rounded = vshrq_n_u32(vaddq_u32(bits, vaddq_u32(lsb, vdupq_n_u32(0x7fff))), 16);
  return vmovn_u32(vbslq_u32(vceqq_f32(x, x), rounded, vdupq_n_u32(0x7fc0)));
}
#endif
inline void store_bf16(bf16* p, vf x) { vst1_u16(p, round_bits(x)); }
// Interleave two rows of fp32 into bf16 pairs: lane i = (a[i], b[i]).
inline vi make_pairs(vf a, vf b) {
  const uint16x4_t first = round_bits(a), second = round_bits(b);
  return vreinterpretq_u32_u16(vcombine_u16(vzip1_u16(first, second), vzip2_u16(first, second)));
}

// Nibbles as bf16 pairs, for products with bf16 activations; simd.h says which.

struct PairTable {  // of 16 words
  uint8x16_t low, high;
};
inline PairTable make_table(const bf16* values) {
  const uint8x16_t first = vreinterpretq_u8_u16(vld1q_u16(values));
  const uint8x16_t second = vreinterpretq_u8_u16(vld1q_u16(values + 8));
  return {vuzp1q_u8(first, second), vuzp2q_u8(first, second)};
}
inline vi nibble_pair(const PairTable& table, vi codes, int i) {
  const uint8x16_t bytes = vreinterpretq_u8_u32(codes);
  const uint8x16_t index = i < 2 ? vandq_u8(bytes, vdupq_n_u8(15)) : vshrq_n_u8(bytes, 4);
  const uint8x16_t low = vqtbl1q_u8(table.low, index), high = vqtbl1q_u8(table.high, index);
  return vreinterpretq_u32_u8(i % 2 == 0 ? vtrn1q_u8(low, high) : vtrn2q_u8(low, high));
}

// For sampling.

constexpr int kWideLanes = 2;  // fp64 lanes
using vd = float64x2_t;
inline vi bit_xor(vi a, vi b) { return veorq_u32(a, b); }
inline vi add_int(vi a, vi b) { return vaddq_u32(a, b); }
inline vi count_up() {
  const uint32_t lanes[4] = {0, 1, 2, 3};
  return vld1q_u32(lanes);
}
inline uint32_t lane_bits(vi mask) {
  const uint32_t bits[4] = {1, 2, 4, 8};
  return vaddvq_u32(vandq_u32(mask, vld1q_u32(bits)));
}
inline uint32_t at_least(vi x, int32_t low) {  // one bit per lane
  return lane_bits(vcgeq_s32(vreinterpretq_s32_u32(x), vdupq_n_s32(low)));
}
inline uint32_t is_nan(vf x) { return lane_bits(vmvnq_u32(vceqq_f32(x, x))); }
inline uint32_t at_least(vf x, vf low) { return lane_bits(vcgeq_f32(x, low)); }
inline void multiply_words(vi x, uint32_t factor, vi& high, vi& low) {
  const uint32x4_t f = vdupq_n_u32(factor);
  const uint32x4_t first = vreinterpretq_u32_u64(vmull_u32(vget_low_u32(x), vget_low_u32(f)));
  const uint32x4_t second = vreinterpretq_u32_u64(vmull_high_u32(x, f));
  low = vuzp1q_u32(first, second);
  high = vuzp2q_u32(first, second);
}
inline vd set1_wide(double x) { return vdupq_n_f64(x); }
inline vd widen(const float* p) { return vcvt_f64_f32(vld1_f32(p)); }
inline vd add(vd a, vd b) { return vaddq_f64(a, b); }
inline vd sub(vd a, vd b) { return vsubq_f64(a, b); }
inline vd mul(vd a, vd b) { return vmulq_f64(a, b); }
inline vd fma(vd a, vd b, vd c) { return vfmaq_f64(c, a, b); }
inline vd max(vd a, vd b) { return vmaxq_f64(a, b); }
inline vd min(vd a, vd b) { return vminq_f64(a, b); }
inline vd round_even(vd x) { return vrndnq_f64(x); }
inline vd scale_by_power(vd x, vd n) {
  const int64x2_t e = vshlq_n_s64(vaddq_s64(vcvtnq_s64_f64(n), vdupq_n_s64(1023)), 52);
  return vmulq_f64(x, vreinterpretq_f64_s64(e));
}
inline vd zero_below(vd value, vd x, vd low) {
  return vreinterpretq_f64_u64(vandq_u64(vcgeq_f64(x, low), vreinterpretq_u64_f64(value)));
}
inline void store(double* p, vd x) { vst1q_f64(p, x); }
inline void store_whole(int32_t* p, vd x) { vst1_s32(p, vmovn_s64(vcvtq_s64_f64(x))); }  // towards zero

}  // namespace tgi::TGI_NS
