// Norm, rotary embedding with KV store, embedding gather. Included once per instruction set.

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

// One head: optional norm, then rotation of the first rotary_dim features (halves, as in GPT-NeoX).
inline void rotate_head(const float* x, const float* norm, const float* cos_sin, int64_t dim, int64_t rotary,
                        float eps, float* out) {
  const float inverse = norm != nullptr ? 1.0f / std::sqrt(mean_square(x, dim) + eps) : 1.0f;
  const int64_t half = rotary / 2;
  for (int64_t i = 0; i < dim; ++i) out[i] = norm != nullptr ? x[i] * inverse * norm[i] : x[i];
  for (int64_t i = 0; i < half; ++i) {
    const float c = cos_sin[i], s = cos_sin[half + i];
    const float a = out[i], b = out[i + half];
    out[i] = std::fma(a, c, -(b * s));
    out[i + half] = std::fma(b, c, a * s);
  }
}

void rope_store(Pool& pool, const RopeStore& a) {
  constexpr int64_t kTokens = 4;
  const int64_t dim = a.head_dim;
  const int64_t width = (a.heads + 2 * a.kv_heads) * dim;
  const int64_t block_elements = a.kv_heads * dim * kBlock;
  pool.parallel((a.tokens + kTokens - 1) / kTokens, [&](int64_t item, int) {
    const int64_t end = (item + 1) * kTokens < a.tokens ? (item + 1) * kTokens : a.tokens;
    float head[512];
    for (int64_t t = item * kTokens; t < end; ++t) {
      const float* qkv = a.qkv + t * width;
      const float* angles = a.cos_sin + a.positions[t] * a.rotary_dim;
      for (int64_t h = 0; h < a.heads; ++h) {
        rotate_head(qkv + h * dim, a.q_norm, angles, dim, a.rotary_dim, a.eps, head);
        bf16* q = a.q + (t * a.heads + h) * dim;
        for (int64_t i = 0; i + kLanes <= dim; i += kLanes) store_bf16(q + i, load(head + i));
      }
      const int64_t block = a.slots[t] / kBlock, at = a.slots[t] % kBlock;
      for (int64_t h = 0; h < a.kv_heads; ++h) {
        rotate_head(qkv + (a.heads + h) * dim, a.k_norm, angles, dim, a.rotary_dim, a.eps, head);
        bf16* k = a.k_cache + block * block_elements + h * dim * kBlock;
        for (int64_t i = 0; i < dim; i += 2) {
          k[(i / 2 * kBlock + at) * 2] = to_bf16(head[i]);
          k[(i / 2 * kBlock + at) * 2 + 1] = to_bf16(head[i + 1]);
        }
        const float* value = qkv + (a.heads + a.kv_heads + h) * dim;
        bf16* v = a.v_cache + block * block_elements + h * dim * kBlock + at / 2 * dim * 2 + at % 2;
        for (int64_t i = 0; i < dim; ++i) v[i * 2] = to_bf16(value[i]);
      }
    }
  });
}
