// Paged attention for prefill, decode and mixtures: one rule for all of them.
//
// Keys come in tiles of 64 at absolute positions. Each tile gives (max, sum, accumulator) on its own,
// and tiles merge in order, so a result does not depend on chunking, on who computed which tile, or on
// which sequences read a tile together.
// Scores: lanes are keys, a chain over head_dim pairs. Values: lanes are features, a chain over key
// pairs with probabilities rounded to bf16. Exponents are to the base 2, log2(e) is in the scale.
// Included once per instruction set.

constexpr int kScoreVectors = kTileKeys / kLanes;
constexpr int kTileBlocks = kTileKeys / kBlock;
constexpr int64_t kItemRows = 48;   // query rows that share a visit of a tile
constexpr int64_t kSharedSeqs = 8;  // sequences of one item that may share tiles
constexpr int kFewRows = 4;         // up to so many rows wait for memory and look ahead
constexpr float kHidden = -1e30f;   // finite, so that its difference to a maximum is no NaN

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
  const bf16* keys[kTileBlocks];
  const bf16* values[kTileBlocks];
  int low, high;  // keys low .. high of the tile are readable
};

// A run of query tokens of one sequence, or the single tokens of several, against one KV head.
struct AttentionItem {
  int32_t seq, seqs;     // first sequence, how many
  int32_t first, count;  // query tokens of the sequence, where it is one
  int32_t kv_head, kv_heads;
  int32_t tile, tiles;  // which tiles, if only some: their partial results are kept
  int64_t part;         // index of the first of them
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

// The same for a tile of which every key is readable.
template <int kRows, int kVectors>
inline void add_all_values(const Tile& tile, const Tile* next, const uint32_t (*pairs)[kTileKeys / 2], int64_t dim,
                           int64_t d, vf (&o)[kRows][kVectors]) {
  for (int b = 0; b < kTileBlocks; ++b) {
    const bf16* at = tile.values[b] + d * 2;
    const bf16* later = next != nullptr ? next->values[b] + d * 2 : at;
#pragma GCC unroll 2
    for (int t = 0; t < kBlock / 2; ++t, at += dim * 2, later += dim * 2) {
      if (kRows <= kFewRows && next != nullptr)
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; v += kLineVectors) prefetch(later + v * kLanes * 2);
      vi value[kVectors];
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) value[v] = load_pairs(at + v * kLanes * 2);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const vi p = broadcast_pair(&pairs[r][b * (kBlock / 2) + t]);
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) dot2(o[r][v], value[v], p);
      }
    }
  }
}

// Features d .. d + kVectors * kLanes of the tile's weighted values, merged into the rows.
template <int kRows, int kVectors>
inline void merge_values(const Tile& tile, const Tile* next, const uint32_t (*pairs)[kTileKeys / 2], int64_t dim,
                         int64_t d, const float* old_scale, const float* new_scale, TileRow* rows) {
  vf o[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) o[r][v] = zero();
  if (tile.low == 0 && tile.high == kTileKeys - 1) {
    add_all_values(tile, next, pairs, dim, d, o);
  } else {
    const int begin = tile.low / 2, end = tile.high / 2 + 1;
    const uint32_t head = tile.low % 2 ? 0xffff0000u : ~0u, tail = tile.high % 2 ? ~0u : 0x0000ffffu;
    if (begin + 1 == end) {
      add_values(tile, pairs, dim, d, begin, end, head & tail, o);
    } else {
      add_values(tile, pairs, dim, d, begin, begin + 1, head, o);
      add_values(tile, pairs, dim, d, begin + 1, end - 1, ~0u, o);
      add_values(tile, pairs, dim, d, end - 1, end, tail, o);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      float* acc = rows[r].acc + d + v * kLanes;
      store(acc, fma(load(acc), set1(old_scale[r]), mul(o[r][v], set1(new_scale[r]))));
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

// One tile of keys for up to kRowGroup rows. `kMasked`: some keys are hidden from some row. `next`, if
// not null, is fetched meanwhile.
template <int kRows, bool kMasked>
inline void attend_tile(const Attention& a, TileRow* rows, const Tile& tile, const Tile* next) {
  constexpr int kPer = kBlock / kLanes;  // vectors per block (1 or 2)
  const int64_t dim = a.head_dim;
  vf s[kRows][kScoreVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < kScoreVectors; ++v) s[r][v] = zero();
  for (int64_t i = 0; i < dim; i += 2) {
    if (kRows <= kFewRows && next != nullptr)
#pragma GCC unroll 16
      for (int v = 0; v < kScoreVectors; v += kLineVectors)
        prefetch(next->keys[v / kPer] + (i / 2 * kBlock + (v % kPer) * kLanes) * 2);
    vi k[kScoreVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kScoreVectors; ++v)
      k[v] = load_pairs(tile.keys[v / kPer] + (i / 2 * kBlock + (v % kPer) * kLanes) * 2);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const vi q = broadcast_pair(rows[r].q + i);
#pragma GCC unroll 16
      for (int v = 0; v < kScoreVectors; ++v) dot2(s[r][v], k[v], q);
    }
  }

  constexpr float kLog2e = 1.44269504088896341f;
  const bool capped = a.softcap > 0;
  const vf scale = set1(capped ? a.scale / a.softcap : a.scale * kLog2e);
  const vf cap = set1(a.softcap * kLog2e);
  alignas(64) uint32_t pairs[kRows][kTileKeys / 2];  // probabilities as bf16 pairs
  float tile_max[kRows], tile_sum[kRows];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    const int64_t visible = rows[r].position - tile.first_key + 1;  // keys [0, visible) of the tile
    const int64_t hidden = a.window > 0 ? rows[r].position - a.window + 1 - tile.first_key : 0;
#pragma GCC unroll 16
    for (int v = 0; v < kScoreVectors; ++v) {
      s[r][v] = mul(s[r][v], scale);
      if (capped) s[r][v] = mul(cap, tanh(s[r][v]));
      if (kMasked) {
        s[r][v] = keep(s[r][v], set1(kHidden), static_cast<int>(visible > 1000 ? 1000 : visible) - v * kLanes);
        if (hidden > 0)
          s[r][v] = keep(set1(kHidden), s[r][v], static_cast<int>(hidden > 1000 ? 1000 : hidden) - v * kLanes);
      }
    }
    vf m = s[r][0];
#pragma GCC unroll 16
    for (int v = 1; v < kScoreVectors; ++v) m = max(m, s[r][v]);
    tile_max[r] = hmax(m);
    // A tile without a visible key for this row gives zeros, which merge as nothing.
    if (kMasked && tile_max[r] == kHidden) tile_max[r] = -INFINITY;
    const vf base = set1(kMasked && tile_max[r] == -INFINITY ? 0.0f : tile_max[r]);
    vf total = zero();
#pragma GCC unroll 16
    for (int v = 0; v < kScoreVectors; ++v) {
      const vf p = exp2(sub(s[r][v], base));
      total = add(total, p);
      store_bf16(reinterpret_cast<bf16*>(pairs[r]) + v * kLanes, p);
    }
    tile_sum[r] = sum(total);
  }

  float old_scale[kRows], new_scale[kRows];
  merge_scales(kRows, rows, tile_max, tile_sum, old_scale, new_scale);
  int64_t d = 0;
  for (; d + kValueVectors * kLanes <= dim; d += kValueVectors * kLanes)
    merge_values<kRows, kValueVectors>(tile, next, pairs, dim, d, old_scale, new_scale, rows);
  for (; d < dim; d += kLanes) merge_values<kRows, 1>(tile, next, pairs, dim, d, old_scale, new_scale, rows);
}

template <bool kMasked>
inline void attend_rows(const Attention& a, TileRow* rows, int count, const Tile& tile, const Tile* next) {
  for (; count >= kRowGroup; count -= kRowGroup, rows += kRowGroup)
    attend_tile<kRowGroup, kMasked>(a, rows, tile, next);
  with_count<kRowGroup - 1>(
      count, [&](auto n) { attend_tile<decltype(n)::value, kMasked>(a, rows, tile, next); });
}

// The tile at `index` of a sequence for one KV head; keys first_visible .. last_key are readable.
inline Tile find_tile(const Attention& a, int64_t seq, int64_t kv_head, int64_t index, int64_t first_visible,
                      int64_t last_key) {
  const int64_t dim = a.head_dim;
  const int32_t* table = a.block_tables + seq * a.table_stride;
  const int64_t block_elements = a.kv_heads * dim * kBlock, offset = kv_head * dim * kBlock;
  Tile tile;
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
  return tile;
}

struct Span {
  int64_t first_visible, last_key;
  int64_t begin() const { return first_visible / kTileKeys; }
  int64_t end() const { return last_key / kTileKeys + 1; }
};

// Keys that query tokens first .. first + count - 1 of a sequence see together.
inline Span visible_span(const Attention& a, int64_t seq, int64_t first, int64_t count) {
  const int64_t queries = a.query_start[seq + 1] - a.query_start[seq];
  const int64_t base = a.seq_lens[seq] - queries;  // position of the first query token of this step
  const int64_t hidden = a.window > 0 ? base + first - a.window + 1 : 0;
  return {hidden > 0 ? hidden : 0, base + first + count - 1};
}

inline void start_rows(const Attention& a, int64_t seq, int64_t kv_head, int64_t first, int64_t count, float* acc,
                       TileRow* rows) {
  const int64_t group = a.heads / a.kv_heads, dim = a.head_dim;
  const int64_t start = a.query_start[seq];
  const int64_t base = a.seq_lens[seq] - (a.query_start[seq + 1] - start);
  std::memset(acc, 0, static_cast<size_t>(count * group * dim) * sizeof(float));
  for (int64_t t = 0; t < count; ++t)
    for (int64_t h = 0; h < group; ++h)
      rows[t * group + h] = {a.q + ((start + first + t) * a.heads + kv_head * group + h) * dim, base + first + t,
                             -INFINITY, 0.0f, acc + (t * group + h) * dim};
}

inline void finish_rows(const Attention& a, int64_t seq, int64_t kv_head, int64_t first, int64_t count,
                        const TileRow* rows) {
  const int64_t group = a.heads / a.kv_heads, dim = a.head_dim;
  for (int64_t r = 0; r < count * group; ++r) {
    const vf inverse = set1(1.0f / rows[r].sum);
    const int64_t token = a.query_start[seq] + first + r / group;
    bf16* out = a.out + (token * a.heads + kv_head * group + r % group) * dim;
    for (int64_t i = 0; i < dim; i += kLanes) store_bf16(out + i, mul(load(rows[r].acc + i), inverse));
  }
}

inline void attend_span(const Attention& a, TileRow* rows, int count, const Tile& tile, const Tile* next) {
  // A token before all the tile's keys has no share in it.
  while (count > 0 && rows->position < tile.first_key) ++rows, --count;
  const bool whole = tile.low == 0 && a.window == 0 && count > 0 &&
                     rows->position >= tile.first_key + kTileKeys - 1;
  if (whole) {
    attend_rows<false>(a, rows, count, tile, next);
  } else {
    attend_rows<true>(a, rows, count, tile, next);
  }
}

// A run of query tokens of one sequence over tiles begin .. end - 1.
inline void attend_run(const Attention& a, int64_t seq, int64_t kv_head, const Span& span, int64_t begin, int64_t end,
                       TileRow* rows, int count) {
  Tile tile = find_tile(a, seq, kv_head, begin, span.first_visible, span.last_key);
  for (int64_t index = begin; index < end; ++index) {
    Tile next;
    const Tile* later = nullptr;
    if (count <= kFewRows && (index + 1 < end || kv_head + 1 < a.kv_heads)) {
      later = &next;
      next = index + 1 < end ? find_tile(a, seq, kv_head, index + 1, span.first_visible, span.last_key)
                             : find_tile(a, seq, kv_head + 1, span.begin(), span.first_visible, span.last_key);
    } else if (index + 1 < end) {
      next = find_tile(a, seq, kv_head, index + 1, span.first_visible, span.last_key);
    }
    attend_span(a, rows, count, tile, later);
    tile = next;
  }
}

// Single tokens of several sequences; a tile that neighbours have in common is visited once for them.
inline void attend_shared(const Attention& a, const AttentionItem& item, int64_t kv_head, TileRow* rows) {
  const int64_t group = a.heads / a.kv_heads;
  int64_t tiles = 0;
  for (int64_t s = 0; s < item.seqs; ++s) {
    const int64_t end = visible_span(a, item.seq + s, 0, 1).end();
    tiles = end > tiles ? end : tiles;
  }
  for (int64_t index = 0; index < tiles; ++index)
    for (int64_t s = 0; s < item.seqs;) {
      const Span span = visible_span(a, item.seq + s, 0, 1);
      if (index >= span.end()) {
        ++s;
        continue;
      }
      int64_t same = 1;
      const int32_t* blocks = a.block_tables + (item.seq + s) * a.table_stride + index * kTileBlocks;
      if (span.last_key >= (index + 1) * kTileKeys - 1)
        for (; s + same < item.seqs; ++same)
          if (visible_span(a, item.seq + s + same, 0, 1).last_key < (index + 1) * kTileKeys - 1 ||
              std::memcmp(blocks, blocks + same * a.table_stride, kTileBlocks * sizeof(int32_t)) != 0)
            break;
      const Tile tile = find_tile(a, item.seq + s, kv_head, index, 0, span.last_key);
      attend_span(a, rows + s * group, static_cast<int>(same * group), tile, nullptr);
      s += same;
    }
}

// Splits the work: runs of tokens; sequences that begin with the same blocks together; and if that
// leaves threads without work, the tiles of a long context.
struct AttentionPlan {
  std::vector<AttentionItem> items;
  std::vector<AttentionItem> split;  // whole items whose tiles are spread over `items`
  int64_t parts = 0;                 // partial results, one for each tile of an item in `split`

  AttentionPlan(const Attention& a, int threads) {
    const int64_t group = a.heads / a.kv_heads;
    const int32_t step = static_cast<int32_t>(group >= kItemRows ? 1 : kItemRows / group);
    std::vector<AttentionItem> whole;
    for (int64_t s = 0; s < a.seqs;) {
      const int32_t queries = a.query_start[s + 1] - a.query_start[s];
      int32_t seqs = 1;
      while (shares_start(a, s, s + seqs) && seqs < kSharedSeqs && (seqs + 1) * group <= kItemRows) ++seqs;
      for (int32_t first = 0; first < queries; first += step)
        whole.push_back({static_cast<int32_t>(s), seqs, first, first + step <= queries ? step : queries - first, 0,
                         static_cast<int32_t>(a.kv_heads), 0, 0, 0});
      s += seqs;
    }
    // The heads of a block lie side by side: they are read by one thread where there is work for all.
    const bool by_head = static_cast<int64_t>(whole.size()) < 4 * threads;
    const bool few = threads > 1 && static_cast<int64_t>(whole.size()) * a.kv_heads < 4 * threads;
    for (auto item = whole.rbegin(); item != whole.rend(); ++item) {  // long tails of prefills first
      if (!by_head) {
        items.push_back(*item);
        continue;
      }
      for (int32_t h = 0; h < a.kv_heads; ++h) {
        AttentionItem one = *item;
        one.kv_head = h;
        one.kv_heads = 1;
        add(a, one, few ? 4 * threads : 0);
      }
    }
  }

  // Adds an item for one KV head, with its tiles cut into `cuts` runs if that is not 0.
  void add(const Attention& a, AttentionItem item, int64_t cuts) {
    const Span span = visible_span(a, item.seq, item.first, item.count);
    const int64_t tiles = span.end() - span.begin();
    if (cuts == 0 || item.seqs > 1 || item.count * (a.heads / a.kv_heads) > kItemRows / 4 || tiles < 8) {
      items.push_back(item);
      return;
    }
    item.part = parts;
    item.tile = static_cast<int32_t>(span.begin());
    item.tiles = static_cast<int32_t>(tiles);
    split.push_back(item);
    const int64_t chunk = (tiles + cuts - 1) / cuts;
    for (int64_t t = 0; t < tiles; t += chunk) {
      AttentionItem run = item;
      run.tile += static_cast<int32_t>(t);
      run.tiles = static_cast<int32_t>(t + chunk < tiles ? chunk : tiles - t);
      run.part = parts + t;
      items.push_back(run);
    }
    parts += tiles;
  }

  static bool shares_start(const Attention& a, int64_t s, int64_t other) {
    return other < a.seqs && a.window == 0 && a.query_start[s + 1] - a.query_start[s] == 1 &&
           a.query_start[other + 1] - a.query_start[other] == 1 && a.seq_lens[s] > kTileKeys &&
           a.seq_lens[other] > kTileKeys &&
           std::memcmp(a.block_tables + s * a.table_stride, a.block_tables + other * a.table_stride,
                       kTileBlocks * sizeof(int32_t)) == 0;
  }
};

void attention(Pool& pool, const Attention& a) {
  const AttentionPlan plan(a, pool.size());
  const int64_t group = a.heads / a.kv_heads, dim = a.head_dim;
  const int64_t most = group > kItemRows ? group : kItemRows;  // rows of an item
  const int64_t part_rows = kItemRows / 4 > group ? kItemRows / 4 : group;
  const int64_t num_rows = most * pool.size() + plan.parts * part_rows;
  const size_t floats = (static_cast<size_t>(num_rows * dim) * sizeof(float) + 63) / 64 * 64;
  auto* acc = static_cast<float*>(pool.scratch(floats + static_cast<size_t>(num_rows) * sizeof(TileRow)));
  auto* rows = reinterpret_cast<TileRow*>(reinterpret_cast<char*>(acc) + floats);
  float* part_acc = acc + most * pool.size() * dim;
  TileRow* part_row = rows + most * pool.size();

  pool.parallel(static_cast<int64_t>(plan.items.size()), [&](int64_t i, int worker) {
    const AttentionItem& item = plan.items[static_cast<size_t>(i)];
    const int count = static_cast<int>(item.count * group);
    if (item.tiles > 0) {
      const Span span = visible_span(a, item.seq, item.first, item.count);
      for (int32_t t = 0; t < item.tiles; ++t) {
        const int64_t at = (item.part + t) * part_rows;
        start_rows(a, item.seq, item.kv_head, item.first, item.count, part_acc + at * dim, part_row + at);
        attend_run(a, item.seq, item.kv_head, span, item.tile + t, item.tile + t + 1, part_row + at, count);
      }
      return;
    }
    float* own_acc = acc + worker * most * dim;
    TileRow* own = rows + worker * most;
    for (int64_t h = item.kv_head; h < item.kv_head + item.kv_heads; ++h) {
      for (int64_t s = 0; s < item.seqs; ++s)
        start_rows(a, item.seq + s, h, item.first, item.count, own_acc + s * count * dim, own + s * count);
      if (item.seqs > 1) {
        attend_shared(a, item, h, own);
      } else {
        const Span span = visible_span(a, item.seq, item.first, item.count);
        attend_run(a, item.seq, h, span, span.begin(), span.end(), own, count);
      }
      for (int64_t s = 0; s < item.seqs; ++s)
        finish_rows(a, item.seq + s, h, item.first, item.count, own + s * count);
    }
  });

  pool.parallel(static_cast<int64_t>(plan.split.size()), [&](int64_t i, int worker) {
    const AttentionItem& item = plan.split[static_cast<size_t>(i)];
    const int count = static_cast<int>(item.count * group);
    TileRow* own = rows + worker * most;
    start_rows(a, item.seq, item.kv_head, item.first, item.count, acc + worker * most * dim, own);
    for (int32_t t = 0; t < item.tiles; ++t) {
      const TileRow* part = part_row + (item.part + t) * part_rows;
      for (int r = 0; r < count; ++r) {
        float old_scale, new_scale;
        merge_scales(1, own + r, &part[r].max, &part[r].sum, &old_scale, &new_scale);
        for (int64_t d = 0; d < dim; d += kLanes)
          store(own[r].acc + d, fma(load(own[r].acc + d), set1(old_scale),
                                    mul(load(part[r].acc + d), set1(new_scale))));
      }
    }
    finish_rows(a, item.seq, item.kv_head, item.first, item.count, own);
  });
}
