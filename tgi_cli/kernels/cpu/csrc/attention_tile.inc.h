// Attention of a few query rows to one tile of keys. Included once per instruction set.
//
// Scores: lanes are keys, a chain over features. Values: lanes are features, a chain over keys with
// probabilities rounded as the form of the cache has them (kv_forms.inc.h): bf16; fp32; or, for int8,
// 16 bits of the tile's largest. Scales of values are part of the probabilities. Exponents are to the
// base 2, log2(e) is in the scale.

constexpr int kScoreVectors = kTileKeys / kLanes;
constexpr int kTileBlocks = kTileKeys / kBlock;
constexpr int kFewRows = 4;         // up to so many rows wait for memory and look ahead
constexpr float kHidden = -1e30f;   // finite, so that its difference to a maximum is no NaN

// By exp: exact limits at both ends, since exp saturates.
inline vf tanh(vf x) {
  const vf e = exp(mul(set1(2.0f), max(min(x, set1(20.0f)), set1(-20.0f))));
  return sub(set1(1.0f), div(set1(2.0f), add(e, set1(1.0f))));
}

alignas(64) constexpr float kKeyIndex[kTileKeys] = {
    0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
    22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43,
    44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};

struct TileRow {
  const char* q;     // units of the form
  int64_t position;  // keys 0 .. position are visible
  float max, sum;
  float* acc;    // [head_dim]
  float factor;  // of the row's products with keys
  float slope;   // ALiBi's, to the base 2
};

// The tile's blocks for one KV head, and which of its keys hold data of this sequence. What lies in
// the others (stale blocks, the null block) may be anything and is never multiplied.
struct Tile {
  int64_t first_key;
  const char* keys[kTileBlocks];
  const char* values[kTileBlocks];
  int low, high;  // keys low .. high of the tile are readable
};

// A number of every token of a block, behind its codes.
inline const float* block_scales(const char* codes, int64_t dim) {
  return reinterpret_cast<const float*>(codes + dim * kBlock);
}

// Adds weights begin .. end - 1 times values; `mask` blanks one half of each pair or none.
template <int kRows, int kVectors, class Form>
inline void add_values(const Form& form, const Tile& tile, const uint32_t (*weights)[kTileKeys / Form::kPair],
                       int64_t dim, int64_t d, int begin, int end, uint32_t mask,
                       typename Form::Sum (&o)[kRows][kVectors]) {
  constexpr int kUnits = kBlock / Form::kPair;
  for (int t = begin; t < end; ++t) {
    const char* at = tile.values[t / kUnits] + (t % kUnits * dim + d) * Form::kUnit;
    vi value[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) value[v] = blank(form.load(at + v * kLanes * Form::kUnit), mask);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const vi p = broadcast_pair(&weights[r][t]);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) Form::multiply(o[r][v], value[v], p);
    }
  }
}

// The same for a tile of which every key is readable.
template <int kRows, int kVectors, class Form>
inline void add_all_values(const Form& form, const Tile& tile, const Tile* next,
                           const uint32_t (*weights)[kTileKeys / Form::kPair], int64_t dim, int64_t d,
                           typename Form::Sum (&o)[kRows][kVectors]) {
  constexpr int kUnits = kBlock / Form::kPair, kBytes = kLanes * Form::kUnit;
  for (int b = 0; b < kTileBlocks; ++b) {
    const char* at = tile.values[b] + d * Form::kUnit;
    const char* later = next != nullptr ? next->values[b] + d * Form::kUnit : at;
#pragma GCC unroll 2
    for (int t = 0; t < kUnits; ++t, at += dim * Form::kUnit, later += dim * Form::kUnit) {
      if (kRows <= kFewRows && next != nullptr)
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; v += 64 / kBytes) prefetch(later + v * kBytes);
      vi value[kVectors];
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) value[v] = form.load(at + v * kBytes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const vi p = broadcast_pair(&weights[r][b * kUnits + t]);
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) Form::multiply(o[r][v], value[v], p);
      }
    }
  }
}

// Features d .. d + kVectors * kLanes of the tile's weighted values, merged into the rows.
template <int kRows, int kVectors, class Form>
inline void merge_values(const Form& form, const Tile& tile, const Tile* next,
                         const uint32_t (*weights)[kTileKeys / Form::kPair], int64_t dim, int64_t d,
                         const float* old_scale, const float* new_scale, TileRow* rows) {
  typename Form::Sum o[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) o[r][v] = typename Form::Sum{};
  constexpr bool kPairs = Form::kPair == 2;
  if (tile.low == 0 && tile.high == kTileKeys - 1) {
    add_all_values(form, tile, next, weights, dim, d, o);
  } else {
    const int begin = tile.low / Form::kPair, end = tile.high / Form::kPair + 1;
    const uint32_t head = kPairs && tile.low % 2 ? 0xffff0000u : ~0u;
    const uint32_t tail = !kPairs || tile.high % 2 ? ~0u : 0x0000ffffu;
    const int cuts[] = {begin, begin + 1, end - 1 > begin ? end - 1 : end, end};
    const uint32_t masks[] = {begin + 1 == end ? head & tail : head, ~0u, tail};
    for (int part = 0; part < 3; ++part)
      add_values(form, tile, weights, dim, d, cuts[part], cuts[part + 1], masks[part], o);
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      float* acc = rows[r].acc + d + v * kLanes;
      store(acc, fma(load(acc), set1(old_scale[r]), mul(to_floats(o[r][v]), set1(new_scale[r]))));
    }
}

// Factors of what a row has and of what comes to it; updates its maximum and sum.
inline void merge_scales(int count, TileRow* rows, const float* tile_max, const float* tile_sum,
                         float* old_scale, float* new_scale) {
  for (int from = 0; from < count; from += kLanes / 2) {
    float both[kLanes];
    for (int i = 0; i < kLanes; ++i) both[i] = kHidden;
    const int many = count - from < kLanes / 2 ? count - from : kLanes / 2;
    for (int i = 0; i < many; ++i) {
      const TileRow& row = rows[from + i];
      const float next = tile_max[from + i];
      const float m = row.max > next ? row.max : next;
      if (row.max != -INFINITY) both[i] = row.max - m;
      if (next != -INFINITY) both[kLanes / 2 + i] = next - m;
    }
    store(both, exp2(load(both)));
    for (int i = 0; i < many; ++i) {
      TileRow& row = rows[from + i];
      old_scale[from + i] = both[i];
      new_scale[from + i] = both[kLanes / 2 + i];
      row.sum = std::fma(row.sum, both[i], tile_sum[from + i] * both[kLanes / 2 + i]);
      if (tile_max[from + i] > row.max) row.max = tile_max[from + i];
    }
  }
}

// Probabilities of one row of a tile as weights of its values; what the sums have to be multiplied by.
template <class Form>
inline float store_weights(const Form&, const vf (&p)[kScoreVectors], const float*, uint32_t* out) {
#pragma GCC unroll 16
  for (int v = 0; v < kScoreVectors; ++v) store(reinterpret_cast<float*>(out) + v * kLanes, p[v]);
  return 1.0f;
}

inline float store_weights(const Bf16Pairs&, const vf (&p)[kScoreVectors], const float*, uint32_t* out) {
#pragma GCC unroll 16
  for (int v = 0; v < kScoreVectors; ++v) store_bf16(reinterpret_cast<bf16*>(out) + v * kLanes, p[v]);
  return 1.0f;
}

inline float store_weights(const Fp8Pairs& form, const vf (&p)[kScoreVectors], const float* scales,
                           uint32_t* out) {
#pragma GCC unroll 16
  for (int v = 0; v < kScoreVectors; ++v)
    store_bf16(reinterpret_cast<bf16*>(out) + v * kLanes,
               mul(mul(p[v], load(scales + v * kLanes)), set1(Fp8Pairs::kFactor)));
  return form.rest;
}

inline float store_weights(const Int8Pairs&, const vf (&p)[kScoreVectors], const float* scales, uint32_t* out) {
  vf weight[kScoreVectors];
  vf most = zero(), faults = zero();
#pragma GCC unroll 16
  for (int v = 0; v < kScoreVectors; ++v) {
    weight[v] = mul(p[v], load(scales + v * kLanes));
    most = max(most, weight[v]);
    faults = fma(weight[v], zero(), faults);
  }
  const float largest = hmax(most);
  const vf factor = set1(largest > 0 ? Int8Pairs::kMost / largest : 0.0f);
#pragma GCC unroll 16
  for (int v = 0; v < kScoreVectors; ++v)
    store_words(reinterpret_cast<int16_t*>(out) + v * kLanes, mul(weight[v], factor));
  return largest / Int8Pairs::kMost + sum(faults);  // integers cannot say that a scale was no number
}

// One tile of keys for up to kRowGroup rows. `kMasked`: some keys are hidden from some row. `next`, if
// not null, is fetched meanwhile. Not inlined: its sums need all registers.
template <int kRows, bool kMasked, class Form>
__attribute__((noinline)) void attend_tile(const Attention& a, const Form& form, TileRow* rows, const Tile& tile, const Tile* next) {
  constexpr int kPer = kBlock / kLanes;  // vectors per block (1 or 2)
  const int64_t dim = a.head_dim;
  typename Form::Sum s[kRows][kScoreVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < kScoreVectors; ++v) s[r][v] = typename Form::Sum{};
  for (int64_t i = 0; i < dim / Form::kPair; ++i) {
    if (kRows <= kFewRows && next != nullptr && (Form::kUnit == 4 || i % 2 == 0))
#pragma GCC unroll 16
      for (int v = 0; v < kScoreVectors; v += kLineVectors)
        prefetch(next->keys[v / kPer] + (i * kBlock + (v % kPer) * kLanes) * Form::kUnit);
    vi k[kScoreVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kScoreVectors; ++v)
      k[v] = form.load(tile.keys[v / kPer] + (i * kBlock + (v % kPer) * kLanes) * Form::kUnit);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const vi q = broadcast_pair(rows[r].q + i * 4);
#pragma GCC unroll 16
      for (int v = 0; v < kScoreVectors; ++v) Form::multiply(s[r][v], k[v], q);
    }
  }

  // Scales of the tile's keys and values; those of keys that are not readable may be anything.
  alignas(64) float value_scales[Form::kScaled ? kTileKeys : 1];
  vf key_scales[Form::kScaled ? kScoreVectors : 1];
  if (Form::kScaled) {
#pragma GCC unroll 16
    for (int v = 0; v < kScoreVectors; ++v) {
      const int64_t at = v % kPer * kLanes;
      key_scales[v] = load(block_scales(tile.keys[v / kPer], dim) + at);
      vf scales = load(block_scales(tile.values[v / kPer], dim) + at);
      if (kMasked)
        scales = keep(zero(), keep(scales, zero(), tile.high + 1 - v * kLanes), tile.low - v * kLanes);
      store(value_scales + v * kLanes, scales);
      if (kRows <= kFewRows && next != nullptr && at == 0) {
        prefetch(block_scales(next->keys[v / kPer], dim));
        prefetch(block_scales(next->values[v / kPer], dim));
      }
    }
  }

  const bool capped = a.softcap > 0;
  const float scale = capped ? a.scale / a.softcap : a.scale * kLog2e;
  const vf cap = set1(a.softcap * kLog2e);
  alignas(64) uint32_t weights[kRows][kTileKeys / Form::kPair];
  float tile_max[kRows], tile_sum[kRows], weight_scale[kRows];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    const int64_t visible = rows[r].position - tile.first_key + 1;  // keys [0, visible) of the tile
    const int64_t hidden = a.window > 0 ? rows[r].position - a.window + 1 - tile.first_key : 0;
    const vf factor = set1(scale * rows[r].factor);
    vf p[kScoreVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kScoreVectors; ++v) {
      p[v] = mul(to_floats(s[r][v]), factor);
      if (Form::kScaled) p[v] = mul(p[v], key_scales[v]);
      if (capped) p[v] = mul(cap, tanh(p[v]));
    }
    if (a.slopes != nullptr) {
      const vf first = set1(static_cast<float>(tile.first_key - rows[r].position)), slope = set1(rows[r].slope);
#pragma GCC unroll 16
      for (int v = 0; v < kScoreVectors; ++v) p[v] = fma(slope, add(load(kKeyIndex + v * kLanes), first), p[v]);
    }
    if (kMasked) {
#pragma GCC unroll 16
      for (int v = 0; v < kScoreVectors; ++v) {
        p[v] = keep(p[v], set1(kHidden), static_cast<int>(visible > 1000 ? 1000 : visible) - v * kLanes);
        if (hidden > 0)
          p[v] = keep(set1(kHidden), p[v], static_cast<int>(hidden > 1000 ? 1000 : hidden) - v * kLanes);
      }
    }
    vf m = p[0];
#pragma GCC unroll 16
    for (int v = 1; v < kScoreVectors; ++v) m = max(m, p[v]);
    tile_max[r] = hmax(m);
    // A tile without a visible key for this row gives zeros, which merge as nothing.
    if (kMasked && tile_max[r] == kHidden) tile_max[r] = -INFINITY;
    const vf base = set1(kMasked && tile_max[r] == -INFINITY ? 0.0f : tile_max[r]);
    vf total = zero();
#pragma GCC unroll 16
    for (int v = 0; v < kScoreVectors; ++v) {
      p[v] = exp2(sub(p[v], base));
      total = add(total, p[v]);
    }
    weight_scale[r] = store_weights(form, p, value_scales, weights[r]);
    tile_sum[r] = sum(total);
  }

  float old_scale[kRows], new_scale[kRows];
  merge_scales(kRows, rows, tile_max, tile_sum, old_scale, new_scale);
  if (Form::kScaled)
    for (int r = 0; r < kRows; ++r) new_scale[r] *= weight_scale[r];
  int64_t d = 0;
  for (; d + kValueVectors * kLanes <= dim; d += kValueVectors * kLanes)
    merge_values<kRows, kValueVectors>(form, tile, next, weights, dim, d, old_scale, new_scale, rows);
  for (; d < dim; d += kLanes)
    merge_values<kRows, 1>(form, tile, next, weights, dim, d, old_scale, new_scale, rows);
}

template <bool kMasked, class Form>
inline void attend_rows(const Attention& a, const Form& form, TileRow* rows, int count, const Tile& tile,
                        const Tile* next) {
  for (; count >= kRowGroup; count -= kRowGroup, rows += kRowGroup)
    attend_tile<kRowGroup, kMasked>(a, form, rows, tile, next);
  if constexpr (Form::kPair == 1) {  // fewer shapes of these, as every one takes its time to compile
    for (; count > 0; --count, ++rows) attend_tile<1, kMasked>(a, form, rows, tile, next);
  } else {
    with_count<kRowGroup - 1>(
        count, [&](auto n) { attend_tile<decltype(n)::value, kMasked>(a, form, rows, tile, next); });
  }
}
