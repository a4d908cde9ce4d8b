// Paged attention for prefill, decode and mixtures: one rule for all of them.
//
// Keys come in tiles of 64 at absolute positions. Each tile gives (max, sum, accumulator) on its own,
// and tiles merge in order, so a result does not depend on chunking or on who computed which tile.
// Scores: lanes are keys, a chain over head_dim pairs. Values: lanes are features, a chain over key
// pairs with probabilities rounded to bf16. Included once per instruction set.

constexpr int kScoreVectors = kTileKeys / kLanes;
constexpr int kRowGroup = TGI_ISA >= 2 ? 6 : 2;
constexpr int kMaxHeadDim = 512;

struct TileRow {
  const bf16* q;     // [head_dim]
  int64_t position;  // keys 0 .. position are visible
  float max, sum;
  float* acc;  // [head_dim]
};

// The tile's blocks for one KV head, and which of its keys hold data of this sequence. What lies in
// the others (stale blocks, the null block) may be anything and is never multiplied.
struct Tile {
  int64_t first_key;
  const bf16* keys[kTileKeys / kBlock];
  const bf16* values[kTileKeys / kBlock];
  int low, high;  // keys low .. high of the tile are readable
};

// Adds probability pairs begin .. end - 1 times values; `mask` blanks one half of each pair or none.
template <int kRows, int kVectors>
inline void add_values(const Tile& tile, const uint32_t (*pairs)[kTileKeys / 2], int64_t dim, int64_t d,
                       int begin, int end, uint32_t mask, vf (&o)[kRows][kVectors]) {
  for (int t = begin; t < end; ++t) {
    const bf16* at = tile.values[t / (kBlock / 2)] + (t % (kBlock / 2) * dim + d) * 2;
    vi value[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) value[v] = blank(load_pairs(at + v * kLanes * 2), mask);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const vi p = broadcast_pair(&pairs[r][t]);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) dot2(o[r][v], value[v], p);
    }
  }
}

// Features d .. d + kVectors * kLanes of the tile's weighted values, merged into the rows.
template <int kRows, int kVectors>
inline void merge_values(const Tile& tile, const uint32_t (*pairs)[kTileKeys / 2], int64_t dim, int64_t d,
                         const float* old_scale, const float* new_scale, TileRow* rows) {
  vf o[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) o[r][v] = zero();
  int begin = tile.low / 2, end = tile.high / 2 + 1;
  const uint32_t head = tile.low % 2 ? 0xffff0000u : ~0u, tail = tile.high % 2 ? ~0u : 0x0000ffffu;
  if (begin + 1 == end) {
    add_values(tile, pairs, dim, d, begin, end, head & tail, o);
  } else {
    add_values(tile, pairs, dim, d, begin, begin + 1, head, o);
    add_values(tile, pairs, dim, d, begin + 1, end - 1, ~0u, o);
    add_values(tile, pairs, dim, d, end - 1, end, tail, o);
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      float* acc = rows[r].acc + d + v * kLanes;
      store(acc, fma(load(acc), set1(old_scale[r]), mul(o[r][v], set1(new_scale[r]))));
    }
}

// One tile of keys for up to kRowGroup rows.
template <int kRows>
inline void attend_tile(const Attention& a, TileRow* rows, const Tile& tile) {
  const int64_t first_key = tile.first_key;
  const bf16* const* keys = tile.keys;
  constexpr int kPer = kBlock / kLanes;  // vectors per block (1 or 2)
  const int64_t dim = a.head_dim;
  float scores[kRows][kTileKeys];
  {
    vf s[kRows][kScoreVectors];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < kScoreVectors; ++v) s[r][v] = zero();
    for (int64_t i = 0; i < dim; i += 2) {
      vi k[kScoreVectors];
#pragma GCC unroll 16
      for (int v = 0; v < kScoreVectors; ++v)
        k[v] = load_pairs(keys[v / kPer] + (i / 2 * kBlock + (v % kPer) * kLanes) * 2);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const vi q = broadcast_pair(rows[r].q + i);
#pragma GCC unroll 16
        for (int v = 0; v < kScoreVectors; ++v) dot2(s[r][v], k[v], q);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < kScoreVectors; ++v) store(&scores[r][v * kLanes], s[r][v]);
  }

  alignas(64) uint32_t pairs[kRows][kTileKeys / 2];  // probabilities as bf16 pairs
  float tile_max[kRows], tile_sum[kRows];
  const vf minus_infinity = set1(-INFINITY);
  for (int r = 0; r < kRows; ++r) {
    const int64_t visible = rows[r].position - first_key + 1;  // keys [0, visible) of the tile
    const int64_t hidden = a.window > 0 ? rows[r].position - a.window + 1 - first_key : 0;
    vf m = minus_infinity;
    for (int v = 0; v < kScoreVectors; ++v) {
      vf s = mul(load(&scores[r][v * kLanes]), set1(a.scale));
      if (a.softcap > 0) s = mul(set1(a.softcap), tanh(div(s, set1(a.softcap))));
      s = keep(s, minus_infinity, static_cast<int>(visible > 1000 ? 1000 : visible) - v * kLanes);
      if (hidden > 0) s = keep(minus_infinity, s, static_cast<int>(hidden > 1000 ? 1000 : hidden) - v * kLanes);
      store(&scores[r][v * kLanes], s);
      m = max(m, s);
    }
    tile_max[r] = hmax(m);
    vf total = zero();
    const vf base = set1(tile_max[r]);
    // A tile without a visible key for this row gives zeros, which merge as nothing.
    const bool empty = tile_max[r] == -INFINITY;
    for (int v = 0; v < kScoreVectors; ++v) {
      const vf p = empty ? zero() : exp(sub(load(&scores[r][v * kLanes]), base));
      total = add(total, p);
      store_bf16(reinterpret_cast<bf16*>(pairs[r]) + v * kLanes, p);
    }
    tile_sum[r] = sum(total);
  }

  float old_scale[kRows], new_scale[kRows];
  for (int r = 0; r < kRows; ++r) {
    const float m = rows[r].max > tile_max[r] ? rows[r].max : tile_max[r];
    float both[kLanes] = {};
    both[0] = rows[r].max == -INFINITY ? -INFINITY : rows[r].max - m;
    both[1] = tile_max[r] == -INFINITY ? -INFINITY : tile_max[r] - m;
    store(both, exp(load(both)));
    old_scale[r] = both[0];
    new_scale[r] = both[1];
    rows[r].sum = std::fma(rows[r].sum, old_scale[r], tile_sum[r] * new_scale[r]);
    rows[r].max = m;
  }

  constexpr int kWide = 4;
  int64_t d = 0;
  for (; d + kWide * kLanes <= dim; d += kWide * kLanes)
    merge_values<kRows, kWide>(tile, pairs, dim, d, old_scale, new_scale, rows);
  for (; d < dim; d += kLanes) merge_values<kRows, 1>(tile, pairs, dim, d, old_scale, new_scale, rows);
}

inline void attend_rows(const Attention& a, TileRow* rows, int count, const Tile& tile) {
  for (; count >= kRowGroup; count -= kRowGroup, rows += kRowGroup) attend_tile<kRowGroup>(a, rows, tile);
  switch (count) {
    case 1: attend_tile<1>(a, rows, tile); break;
#if TGI_ISA >= 2
    case 2: attend_tile<2>(a, rows, tile); break;
    case 3: attend_tile<3>(a, rows, tile); break;
    case 4: attend_tile<4>(a, rows, tile); break;
    case 5: attend_tile<5>(a, rows, tile); break;
#endif
    default: break;
  }
}

// A run of query tokens of one sequence against one KV head.
inline void attend_queries(const Attention& a, int64_t seq, int64_t kv_head, int64_t first, int64_t count,
                           float* acc, TileRow* rows) {
  const int64_t group = a.heads / a.kv_heads, dim = a.head_dim;
  const int64_t start = a.query_start[seq];
  const int64_t queries = a.query_start[seq + 1] - start;
  const int64_t base = a.seq_lens[seq] - queries;  // position of the first query token of this step
  const int num_rows = static_cast<int>(count * group);
  std::memset(acc, 0, static_cast<size_t>(num_rows * dim) * sizeof(float));
  for (int64_t t = 0; t < count; ++t)
    for (int64_t h = 0; h < group; ++h) {
      const int64_t token = start + first + t;
      rows[t * group + h] = {a.q + (token * a.heads + kv_head * group + h) * dim, base + first + t, -INFINITY,
                             0.0f, acc + (t * group + h) * dim};
    }
  const int64_t last_key = base + first + count - 1;
  const int64_t first_visible = a.window > 0 && base + first >= a.window ? base + first - a.window + 1 : 0;
  const int32_t* table = a.block_tables + seq * a.table_stride;
  const int64_t block_elements = a.kv_heads * dim * kBlock, offset = kv_head * dim * kBlock;
  constexpr int kTileBlocks = kTileKeys / kBlock;
  Tile tile;
  for (int64_t index = first_visible / kTileKeys; index * kTileKeys <= last_key; ++index) {
    tile.first_key = index * kTileKeys;
    tile.low = static_cast<int>(first_visible > tile.first_key ? first_visible - tile.first_key : 0);
    const int64_t high = last_key - tile.first_key;
    tile.high = static_cast<int>(high < kTileKeys - 1 ? high : kTileKeys - 1);
    for (int b = 0; b < kTileBlocks; ++b) {
      // Blocks past the end stand in as the tile's last one: their keys are masked.
      const int64_t at = index * kTileBlocks + (b <= tile.high / kBlock ? b : tile.high / kBlock);
      tile.keys[b] = a.k_cache + table[at] * block_elements + offset;
      tile.values[b] = a.v_cache + table[at] * block_elements + offset;
    }
    // A token before all the tile's keys has no share in it.
    int skip = 0;
    while (skip < num_rows && rows[skip].position < tile.first_key) ++skip;
    attend_rows(a, rows + skip, num_rows - skip, tile);
  }
  for (int r = 0; r < num_rows; ++r) {
    const vf inverse = set1(1.0f / rows[r].sum);
    const int64_t token = start + first + r / group;
    bf16* out = a.out + (token * a.heads + kv_head * group + r % group) * dim;
    for (int64_t i = 0; i < dim; i += kLanes) store_bf16(out + i, mul(load(rows[r].acc + i), inverse));
  }
}

void attention(Pool& pool, const Attention& a) {
  const int64_t group = a.heads / a.kv_heads;
  constexpr int64_t kRows = 48;
  const int64_t step = group >= kRows ? 1 : kRows / group;  // query tokens per item
  std::vector<int64_t> first_item(static_cast<size_t>(a.seqs) + 1, 0);
  for (int64_t s = 0; s < a.seqs; ++s) {
    const int64_t queries = a.query_start[s + 1] - a.query_start[s];
    first_item[s + 1] = first_item[s] + (queries + step - 1) / step * a.kv_heads;
  }
  const int64_t rows_per_item = step * group;
  const size_t per_worker = static_cast<size_t>(rows_per_item * a.head_dim);
  std::vector<float> acc(per_worker * static_cast<size_t>(pool.size()));
  std::vector<TileRow> rows(static_cast<size_t>(rows_per_item) * static_cast<size_t>(pool.size()));
  const int64_t items = first_item[a.seqs];
  pool.parallel(items, [&](int64_t reversed, int worker) {
    const int64_t item = items - 1 - reversed;  // long tails of prefills first
    const int64_t seq =
        std::upper_bound(first_item.begin(), first_item.end(), item) - first_item.begin() - 1;
    const int64_t local = item - first_item[seq];
    const int64_t first = local / a.kv_heads * step;
    const int64_t queries = a.query_start[seq + 1] - a.query_start[seq];
    const int64_t count = first + step <= queries ? step : queries - first;
    attend_queries(a, seq, local % a.kv_heads, first, count, acc.data() + per_worker * worker,
                   rows.data() + rows_per_item * worker);
  });
}
