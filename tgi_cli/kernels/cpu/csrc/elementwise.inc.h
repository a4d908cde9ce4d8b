// Norm, rotary embedding with KV store, embedding gather. Included once per instruction set.

#include "kv_forms.inc.h"

inline float mean_square(const float* x, int64_t dim) {
  vf total = zero();
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) {
    const vf v = load(x + i);
    total = fma(v, v, total);
  }
  if (i < dim) {
    float tail[kLanes] = {};
    std::memcpy(tail, x + i, static_cast<size_t>(dim - i) * sizeof(float));
    const vf v = load(tail);
    total = fma(v, v, total);
  }
  return sum(total) / static_cast<float>(dim);
}

void rms_norm(Pool& pool, const RmsNorm& a) {
  constexpr int64_t kRows = 8;
  pool.parallel((a.rows + kRows - 1) / kRows, [&](int64_t item, int) {
    const int64_t end = (item + 1) * kRows < a.rows ? (item + 1) * kRows : a.rows;
    for (int64_t row = item * kRows; row < end; ++row) {
      const float* x = a.x + row * a.ldx;
      const float inverse = 1.0f / std::sqrt(mean_square(x, a.dim) + a.eps);
      const vf factor = set1(inverse);
      int64_t i = 0;
      if (a.out_float) {
        float* out = static_cast<float*>(a.out) + row * a.dim;
        for (; i + kLanes <= a.dim; i += kLanes)
          store(out + i, mul(mul(load(x + i), factor), load(a.weight + i)));
        for (; i < a.dim; ++i) out[i] = x[i] * inverse * a.weight[i];
      } else {
        bf16* out = static_cast<bf16*>(a.out) + row * a.dim;
        for (; i + kLanes <= a.dim; i += kLanes)
          store_bf16(out + i, mul(mul(load(x + i), factor), load(a.weight + i)));
        for (; i < a.dim; ++i) out[i] = to_bf16(x[i] * inverse * a.weight[i]);
      }
    }
  });
}

// One head in place: optional norm, then rotation of the first rotary_dim features (halves, as in
// GPT-NeoX).
inline void rotate_head(float* x, const float* norm, const float* cos_sin, int64_t dim, int64_t rotary,
                        float eps) {
  const int64_t half = rotary / 2;
  if (norm != nullptr) {
    const vf factor = set1(1.0f / std::sqrt(mean_square(x, dim) + eps));
    for (int64_t i = 0; i < dim; i += kLanes) store(x + i, mul(mul(load(x + i), factor), load(norm + i)));
  }
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const vf c = load(cos_sin + i), s = load(cos_sin + half + i);
    const vf a = load(x + i), b = load(x + half + i);
    store(x + i, fma(a, c, sub(zero(), mul(b, s))));
    store(x + half + i, fma(b, c, mul(a, s)));
  }
  for (; i < half; ++i) {
    const float c = cos_sin[i], s = cos_sin[half + i];
    const float a = x[i], b = x[half + i];
    x[i] = std::fma(a, c, -(b * s));
    x[half + i] = std::fma(b, c, a * s);
  }
}

// A query head of a token, rotated, in bf16.
inline void rope_query(const RopeStore& a, int64_t t, int64_t h, bf16* q) {
  const int64_t dim = a.head_dim;
  alignas(64) float x[512];
  std::memcpy(x, a.qkv + (t * (a.heads + 2 * a.kv_heads) + h) * dim, static_cast<size_t>(dim) * sizeof(float));
  rotate_head(x, a.q_norm, a.cos_sin + a.positions[t] * a.rotary_dim, dim, a.rotary_dim, a.eps);
  for (int64_t i = 0; i < dim; i += kLanes) store_bf16(q + i, load(x + i));
}

// Key and value of a token's KV head into the cache.
inline void store_key_value(const RopeStore& a, int64_t t, int64_t h) {
  const auto form = static_cast<KvForm>(a.kv_form);
  const int64_t dim = a.head_dim, block = a.slots[t] / kBlock, at = a.slots[t] % kBlock;
  const int64_t place = (block * a.kv_heads + h) * head_bytes(form, dim);
  alignas(64) char codes[512 * 4];
  float* key = a.qkv + (t * (a.heads + 2 * a.kv_heads) + a.heads + h) * dim;
  rotate_head(key, a.k_norm, a.cos_sin + a.positions[t] * a.rotary_dim, dim, a.rotary_dim, a.eps);
  float scale = encode_head(form, key, dim, codes);
  place_head<true>(form, codes, scale, dim, at, static_cast<char*>(a.k_cache) + place);
  scale = encode_head(form, key + a.kv_heads * dim, dim, codes);
  place_head<false>(form, codes, scale, dim, at, static_cast<char*>(a.v_cache) + place);
}

void rope_store(Pool& pool, const RopeStore& a) {
  constexpr int64_t kTokens = 8;
  pool.parallel((a.tokens + kTokens - 1) / kTokens, [&](int64_t item, int) {
    const int64_t end = (item + 1) * kTokens < a.tokens ? (item + 1) * kTokens : a.tokens;
    for (int64_t t = item * kTokens; t < end; ++t) {
      for (int64_t h = 0; h < a.heads; ++h) rope_query(a, t, h, a.q + (t * a.heads + h) * a.head_dim);
      for (int64_t h = 0; h < a.kv_heads; ++h) store_key_value(a, t, h);
    }
  });
}
