// How cached keys and values look in memory and in registers. Included once per instruction set.
//
// A unit is what one 32-bit lane takes from the cache: two neighbours (features of a key, tokens of a
// value) or, where products are fp32, one number. A block holds for each KV head the keys as
// [head_dim / kPair][16 tokens][kPair], the values as [16 / kPair tokens][head_dim][kPair]; in forms of
// 8 bits the scales of its 16 tokens follow. Every form is read exactly as it was rounded.

// bf16 by bf16.
struct Bf16Pairs {
  using Sum = vf;
  static constexpr int kPair = 2, kUnit = 4;  // numbers of a unit, and its bytes
  static constexpr bool kScaled = false;
  vi load(const char* p) const { return load_pairs(p); }
  static void multiply(vf& sum, vi a, vi b) { dot2(sum, a, b); }
};

// E4M3 and E5M2 by bf16. Moved into place, exponents keep their own bias: a number reads as itself
// times 2^-120 or 2^-112. Half of that is put into the other factor, so that no product is subnormal,
// and the rest into the sum. Codes are normal or zero.
struct Fp8Pairs {
  using Sum = vf;
  static constexpr int kPair = 2, kUnit = 2;
  static constexpr bool kScaled = true;
  static constexpr float kFactor = 0x1p60f;
  int shift;
  int32_t mask;
  float rest;
  vi load(const char* p) const { return bit_and(shift_left(widen_bytes(p), shift), set1_int(mask)); }
  static void multiply(vf& sum, vi a, vi b) { dot2(sum, a, b); }
};

// int8 by int16, exactly: 512 products stay below 2^31.
struct Int8Pairs {
  using Sum = vi;
  static constexpr int kPair = 2, kUnit = 2;
  static constexpr bool kScaled = true;
  static constexpr float kMost = 32767.0f;
  vi load(const char* p) const { return widen_bytes(p); }
  static void multiply(vi& sum, vi a, vi b) { dot2_int(sum, a, b); }
};

// fp16 and fp32 by fp32.
struct Halves {
  using Sum = vf;
  static constexpr int kPair = 1, kUnit = 2;
  static constexpr bool kScaled = false;
  vi load(const char* p) const { return cast_bits(load_half(reinterpret_cast<const uint16_t*>(p))); }
  static void multiply(vf& sum, vi a, vi b) { sum = fma(from_bits(a), from_bits(b), sum); }
};

struct Floats {
  using Sum = vf;
  static constexpr int kPair = 1, kUnit = 4;
  static constexpr bool kScaled = false;
  vi load(const char* p) const { return load_pairs(p); }
  static void multiply(vf& sum, vi a, vi b) { sum = fma(from_bits(a), from_bits(b), sum); }
};

inline vf to_floats(vf x) { return x; }
inline vf to_floats(vi x) { return int_to_float(x); }

// Bytes of one KV head in a block.
inline int64_t head_bytes(KvForm form, int64_t dim) {
  switch (form) {
    case KvForm::kBf16:
    case KvForm::kHalf: return dim * kBlock * 2;
    case KvForm::kFloat: return dim * kBlock * 4;
    default: return (dim + 4) * kBlock;
  }
}

// Largest magnitude of a row, and NaN if any of it is not finite.
struct Extent {
  float most, fault;
};

inline Extent extent(const float* x, int64_t dim) {
  vf most = zero(), faults = zero();
  for (int64_t i = 0; i < dim; i += kLanes) {
    const vf v = load(x + i);
    most = max(most, from_bits(bit_and(cast_bits(v), set1_int(0x7fffffff))));
    faults = fma(v, zero(), faults);
  }
  return {hmax(most), sum(faults)};
}

// An 8-bit float: bits of its fraction, smallest normal and largest number; 1.5 * 2^(23 - fraction); and
// what takes its smallest normal to that of fp32.
struct SmallFloat {
  int fraction;
  float least, most, shifter, place;
};
constexpr SmallFloat kE4m3Layout = {3, 0x1p-6f, 448.0f, 0x1.8p20f, 0x1p-120f};
constexpr SmallFloat kE5m2Layout = {2, 0x1p-14f, 57344.0f, 0x1.8p21f, 0x1p-112f};

// Rounds kLanes numbers within the format's range to the nearest, even on ties; what is below the
// smallest normal becomes zero.
inline void round_to_fp8(const SmallFloat& layout, vf x, int8_t* out) {
  const vi bits = cast_bits(x);
  const vf magnitude = from_bits(bit_and(bits, set1_int(0x7fffffff)));
  // Adding the shifter times its own power of two leaves so many bits of the fraction.
  const vf power = max(from_bits(bit_and(bits, set1_int(0x7f800000))), set1(layout.least));
  const vf shifter = mul(power, set1(layout.shifter));
  const vf near = sub(add(magnitude, shifter), shifter);
  const vf rounded = zero_below(near, near, set1(layout.least));
  const vi code = shift_right(cast_bits(mul(rounded, set1(layout.place))), 23 - layout.fraction);
  const vf sign = int_to_float(bit_and(shift_right(bits, 31), set1_int(1)));
  round_to_int8(fma(sign, set1(-128.0f), int_to_float(code)), out);
}

// One token's head in the cache's form: numbers into `codes`, its scale as result (forms of 8 bits).
inline float encode_head(KvForm form, const float* x, int64_t dim, char* codes) {
  float scale = 1.0f;
  if (form == KvForm::kBf16) {
    for (int64_t i = 0; i < dim; i += kLanes) store_bf16(reinterpret_cast<bf16*>(codes) + i, load(x + i));
  } else if (form == KvForm::kHalf) {
    for (int64_t i = 0; i < dim; i += kLanes) store_half(reinterpret_cast<uint16_t*>(codes) + i, load(x + i));
  } else if (form == KvForm::kFloat) {
    std::memcpy(codes, x, static_cast<size_t>(dim) * sizeof(float));
  } else {
    const bool integer = form == KvForm::kInt8;
    const SmallFloat& layout = form == KvForm::kE4m3 ? kE4m3Layout : kE5m2Layout;
    const Extent found = extent(x, dim);
    const float least = found.most / (integer ? 127.0f : layout.most);
    scale = least > 0x1p-126f ? least : 0x1p-126f;  // also of a row of zeros
    const vf divisor = set1(scale);
    auto* out = reinterpret_cast<int8_t*>(codes);
    for (int64_t i = 0; i < dim; i += kLanes) {
      const vf y = div(load(x + i), divisor);
      if (integer)
        round_to_int8(y, out + i);
      else
        round_to_fp8(layout, y, out + i);
    }
    scale += found.fault;
  }
  return scale;
}

// Puts encoded heads of one token into a block. Neighbouring tokens may be another thread's, so
// nothing but the token's own bytes is written.
template <int kUnit, int kPair>
inline void place_key(const char* codes, int64_t dim, int64_t at, char* block) {
  for (int64_t u = 0; u < dim / kPair; ++u) std::memcpy(block + (u * kBlock + at) * kUnit, codes + u * kUnit, kUnit);
}

template <int kUnit, int kPair>
inline void place_value(const char* codes, int64_t dim, int64_t at, char* block) {
  constexpr int kSize = kUnit / kPair;
  char* out = block + at / kPair * dim * kUnit + at % kPair * kSize;
  for (int64_t i = 0; i < dim; ++i) std::memcpy(out + i * kUnit, codes + i * kSize, kSize);
}

template <bool kKey>
inline void place_head(KvForm form, const char* codes, float scale, int64_t dim, int64_t at, char* block) {
  switch (form) {
    case KvForm::kBf16:
      kKey ? place_key<4, 2>(codes, dim, at, block) : place_value<4, 2>(codes, dim, at, block);
      break;
    case KvForm::kHalf:
      kKey ? place_key<2, 1>(codes, dim, at, block) : place_value<2, 1>(codes, dim, at, block);
      break;
    case KvForm::kFloat:
      kKey ? place_key<4, 1>(codes, dim, at, block) : place_value<4, 1>(codes, dim, at, block);
      break;
    default:
      kKey ? place_key<2, 2>(codes, dim, at, block) : place_value<2, 2>(codes, dim, at, block);
      std::memcpy(block + dim * kBlock + at * 4, &scale, 4);
  }
}
