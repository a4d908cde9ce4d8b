// Paged attention for prefill, decode and mixtures: one rule for all of them.
//
// Keys come in tiles of 64 at absolute positions. Each tile gives (max, sum, accumulator) on its own,
// and tiles merge in order, so a result does not depend on chunking, on who computed which tile, or on
// which sequences read a tile together.
// Included once per instruction set.

#include "attention_tile.inc.h"

constexpr int64_t kItemRows = 48;   // query rows that share a visit of a tile
constexpr int64_t kSharedSeqs = 8;  // sequences of one item that may share tiles

// A run of query tokens of one sequence, or the single tokens of several, against one KV head.
struct AttentionItem {
  int32_t seq, seqs;     // first sequence, how many
  int32_t first, count;  // query tokens of the sequence, where it is one
  int32_t kv_head, kv_heads;
  int32_t tile, tiles;  // which tiles, if only some: their partial results are kept
  int64_t part;         // index of the first of them
};

// The tile at `index` of a sequence for one KV head; keys first_visible .. last_key are readable.
inline Tile find_tile(const Attention& a, int64_t seq, int64_t kv_head, int64_t index, int64_t first_visible,
                      int64_t last_key) {
  const int32_t* table = a.block_tables + seq * a.table_stride;
  const int64_t bytes = head_bytes(static_cast<KvForm>(a.kv_form), a.head_dim);
  Tile tile;
  tile.first_key = index * kTileKeys;
  tile.low = static_cast<int>(first_visible > tile.first_key ? first_visible - tile.first_key : 0);
  const int64_t high = last_key - tile.first_key;
  tile.high = static_cast<int>(high < kTileKeys - 1 ? high : kTileKeys - 1);
  for (int b = 0; b < kTileBlocks; ++b) {
    // Blocks past the end stand in as the tile's last one: their keys are masked.
    const int64_t at = index * kTileBlocks + (b <= tile.high / kBlock ? b : tile.high / kBlock);
    const int64_t offset = (table[at] * a.kv_heads + kv_head) * bytes;
    tile.keys[b] = static_cast<const char*>(a.k_cache) + offset;
    tile.values[b] = static_cast<const char*>(a.v_cache) + offset;
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

// A query in the units that its products take; `out` holds it where that is not how it is given. The
// result is what products have to be multiplied by.
inline float prepare_query(const Bf16Pairs&, const bf16* q, int64_t, char*, const char** used) {
  *used = reinterpret_cast<const char*>(q);
  return 1.0f;
}

inline float prepare_query(const Fp8Pairs& form, const bf16* q, int64_t dim, char* out, const char** used) {
  for (int64_t i = 0; i < dim; i += kLanes)
    store_bf16(reinterpret_cast<bf16*>(out) + i, mul(load_bf16(q + i), set1(Fp8Pairs::kFactor)));
  *used = out;
  return form.rest;
}

inline float prepare_query(const Int8Pairs&, const bf16* q, int64_t dim, char* out, const char** used) {
  vf most = zero(), faults = zero();
  for (int64_t i = 0; i < dim; i += kLanes) {
    const vf x = load_bf16(q + i);
    most = max(most, max(x, sub(zero(), x)));
    faults = fma(x, zero(), faults);
  }
  const float largest = hmax(most);
  const vf factor = set1(largest > 0 ? Int8Pairs::kMost / largest : 0.0f);
  for (int64_t i = 0; i < dim; i += kLanes)
    store_words(reinterpret_cast<int16_t*>(out) + i, mul(load_bf16(q + i), factor));
  *used = out;
  return largest / Int8Pairs::kMost + sum(faults);
}

template <class Form>  // those of fp32
inline float prepare_query(const Form&, const bf16* q, int64_t dim, char* out, const char** used) {
  for (int64_t i = 0; i < dim; i += kLanes) store(reinterpret_cast<float*>(out) + i, load_bf16(q + i));
  *used = out;
  return 1.0f;
}

// Rows of `count` query tokens: their sums in `acc`, their queries perhaps in `queries`.
template <class Form>
inline void start_rows(const Attention& a, const Form& form, int64_t seq, int64_t kv_head, int64_t first,
                       int64_t count, float* acc, char* queries, TileRow* rows) {
  const int64_t group = a.heads / a.kv_heads, dim = a.head_dim;
  const int64_t start = a.query_start[seq];
  const int64_t base = a.seq_lens[seq] - (a.query_start[seq + 1] - start);
  std::memset(acc, 0, static_cast<size_t>(count * group * dim) * sizeof(float));
  for (int64_t r = 0; r < count * group; ++r) {
    const int64_t t = r / group, head = kv_head * group + r % group;
    TileRow& row = rows[r];
    row.position = base + first + t;
    row.max = -INFINITY;
    row.sum = 0.0f;
    row.acc = acc + r * dim;
    row.factor = prepare_query(form, a.q + ((start + first + t) * a.heads + head) * dim, dim,
                               queries + r * dim * 4 / Form::kPair, &row.q);
    row.slope = a.slopes != nullptr ? a.slopes[head] * kLog2e : 0.0f;
  }
}

inline void finish_rows(const Attention& a, int64_t seq, int64_t kv_head, int64_t first, int64_t count,
                        TileRow* rows) {
  const int64_t group = a.heads / a.kv_heads, dim = a.head_dim;
  for (int64_t r = 0; r < count * group; ++r) {
    const int64_t token = a.query_start[seq] + first + r / group, head = kv_head * group + r % group;
    float kept = 1.0f;
    if (a.sinks != nullptr) {  // merges like a tile of one key whose value is zero
      const float sink = a.sinks[head] * kLog2e, one = 1.0f;
      float unused;
      merge_scales(1, rows + r, &sink, &one, &kept, &unused);
    }
    const vf inverse = set1(kept / rows[r].sum);
    bf16* out = a.out + (token * a.heads + head) * dim;
    for (int64_t i = 0; i < dim; i += kLanes) store_bf16(out + i, mul(load(rows[r].acc + i), inverse));
  }
}

template <class Form>
inline void attend_span(const Attention& a, const Form& form, TileRow* rows, int count, const Tile& tile, const Tile* next) {
  // A token before all the tile's keys has no share in it.
  while (count > 0 && rows->position < tile.first_key) ++rows, --count;
  const bool whole = tile.low == 0 && a.window == 0 && count > 0 &&
                     rows->position >= tile.first_key + kTileKeys - 1;
  // Forms of single numbers take the masked way always: the other one is not compiled for them.
  if (whole && Form::kPair == 2) {
    attend_rows<Form::kPair == 1>(a, form, rows, count, tile, next);
  } else {
    attend_rows<true>(a, form, rows, count, tile, next);
  }
}

// A run of query tokens of one sequence over tiles begin .. end - 1.
template <class Form>
inline void attend_run(const Attention& a, const Form& form, int64_t seq, int64_t kv_head, const Span& span,
                       int64_t begin, int64_t end, TileRow* rows, int count) {
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
    attend_span(a, form, rows, count, tile, later);
    tile = next;
  }
}

// The tiles of an item each for itself: `rows_of(t)` has the rows of its tile t, which are as they start.
template <class Form, class RowsOf>
inline void attend_apart(const Attention& a, const Form& form, const AttentionItem& item, int count,
                         const RowsOf& rows_of) {
  const Span span = visible_span(a, item.seq, item.first, item.count);
  const auto find = [&](int32_t t) {
    return find_tile(a, item.seq, item.kv_head, item.tile + t, span.first_visible, span.last_key);
  };
  Tile tile = find(0);
  for (int32_t t = 0; t < item.tiles; ++t) {
    const Tile next = find(t + 1 < item.tiles ? t + 1 : t);
    attend_span(a, form, rows_of(t), count, tile, t + 1 < item.tiles && count <= kFewRows ? &next : nullptr);
    tile = next;
  }
}

// Single tokens of several sequences; a tile that neighbours have in common is visited once for them.
template <class Form>
inline void attend_shared(const Attention& a, const Form& form, const AttentionItem& item, int64_t kv_head,
                          TileRow* rows) {
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
      attend_span(a, form, rows + s * group, static_cast<int>(same * group), tile, nullptr);
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
    const auto heads = static_cast<int64_t>(whole.size()) * a.kv_heads;
    const int64_t cuts = threads > 1 && heads < 4 * threads ? (4 * threads + heads - 1) / heads : 0;
    for (auto item = whole.rbegin(); item != whole.rend(); ++item) {  // long tails of prefills first
      if (!by_head) {
        items.push_back(*item);
        continue;
      }
      for (int32_t h = 0; h < a.kv_heads; ++h) {
        AttentionItem one = *item;
        one.kv_head = h;
        one.kv_heads = 1;
        add(a, one, cuts);
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

// What is read of a head's first tile, some hundred lines: asked for while its new token is made ready.
inline void fetch_tile(const Tile& tile, const char* const* blocks, int64_t bytes) {
  for (int b = 0; b <= tile.high / kBlock; ++b)
    for (int64_t line = 0; line < bytes; line += 64) prefetch(blocks[b] + line);
}

// `rope`, if not null: the tokens are yet to be rotated and stored.
template <class Form>
void attention_in(Pool& pool, const Attention& a, const Form& form, const RopeStore* rope) {
  const AttentionPlan plan(a, pool.size());
  // A lone token whose heads are items of their own is made ready head by head, with what reads it.
  const bool by_head = rope != nullptr && rope->tokens == 1 && plan.split.empty() &&
                       plan.items.size() == static_cast<size_t>(a.kv_heads);
  if (rope != nullptr && !by_head) rope_store(pool, *rope);
  const int64_t group = a.heads / a.kv_heads, dim = a.head_dim;
  const int64_t most = group > kItemRows ? group : kItemRows;  // rows of an item
  const int64_t part_rows = kItemRows / 4 > group ? kItemRows / 4 : group;
  const int64_t num_rows = most * pool.size() + plan.parts * part_rows;
  const int64_t query_bytes = dim * 4 / Form::kPair;
  const size_t floats = (static_cast<size_t>(num_rows * dim) * sizeof(float) + 63) / 64 * 64;
  const size_t queries_size = (static_cast<size_t>(num_rows * query_bytes) + 63) / 64 * 64;
  auto* memory = static_cast<char*>(
      pool.scratch(floats + queries_size + static_cast<size_t>(num_rows) * sizeof(TileRow)));
  auto* acc = reinterpret_cast<float*>(memory);
  char* queries = memory + floats;
  auto* rows = reinterpret_cast<TileRow*>(memory + floats + queries_size);
  const int64_t first_part = most * pool.size();

  // Rows `at` and following of the memory, for some query tokens of a sequence.
  const auto start = [&](const AttentionItem& item, int64_t s, int64_t h, int64_t at) {
    start_rows(a, form, item.seq + s, h, item.first, item.count, acc + at * dim, queries + at * query_bytes,
               rows + at);
  };

  pool.parallel(static_cast<int64_t>(plan.items.size()), [&](int64_t i, int worker) {
    const AttentionItem& item = plan.items[static_cast<size_t>(i)];
    const int count = static_cast<int>(item.count * group);
    if (item.tiles > 0) {
      attend_apart(a, form, item, count, [&](int32_t t) {
        const int64_t at = first_part + (item.part + t) * part_rows;
        start(item, 0, item.kv_head, at);
        return rows + at;
      });
      return;
    }
    if (by_head) {
      const Span span = visible_span(a, 0, 0, 1);
      const Tile tile = find_tile(a, 0, item.kv_head, span.begin(), span.first_visible, span.last_key);
      const int64_t bytes = head_bytes(static_cast<KvForm>(a.kv_form), dim);
      fetch_tile(tile, tile.keys, bytes);
      for (int64_t h = item.kv_head * group; h < (item.kv_head + 1) * group; ++h) rope_query(*rope, 0, h);
      fetch_tile(tile, tile.values, bytes);
      store_key_value(*rope, 0, item.kv_head);
    }
    const int64_t own = worker * most;
    for (int64_t h = item.kv_head; h < item.kv_head + item.kv_heads; ++h) {
      for (int64_t s = 0; s < item.seqs; ++s) start(item, s, h, own + s * count);
      if (item.seqs > 1) {
        attend_shared(a, form, item, h, rows + own);
      } else {
        const Span span = visible_span(a, item.seq, item.first, item.count);
        attend_run(a, form, item.seq, h, span, span.begin(), span.end(), rows + own, count);
      }
      for (int64_t s = 0; s < item.seqs; ++s)
        finish_rows(a, item.seq + s, h, item.first, item.count, rows + own + s * count);
    }
  });

  pool.parallel(static_cast<int64_t>(plan.split.size()), [&](int64_t i, int worker) {
    const AttentionItem& item = plan.split[static_cast<size_t>(i)];
    const int count = static_cast<int>(item.count * group);
    TileRow* own = rows + worker * most;
    start(item, 0, item.kv_head, worker * most);
    for (int32_t t = 0; t < item.tiles; ++t) {
      const TileRow* part = rows + first_part + (item.part + t) * part_rows;
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

inline void attention_after(Pool& pool, const Attention& a, const RopeStore* rope) {
  switch (static_cast<KvForm>(a.kv_form)) {
    case KvForm::kBf16: attention_in(pool, a, Bf16Pairs{}, rope); break;
    case KvForm::kHalf: attention_in(pool, a, Halves{}, rope); break;
    case KvForm::kFloat: attention_in(pool, a, Floats{}, rope); break;
    case KvForm::kInt8: attention_in(pool, a, Int8Pairs{}, rope); break;
    case KvForm::kE4m3: attention_in(pool, a, Fp8Pairs{4, static_cast<int32_t>(0x87f087f0u), 0x1p60f}, rope); break;
    case KvForm::kE5m2: attention_in(pool, a, Fp8Pairs{5, static_cast<int32_t>(0x8fe08fe0u), 0x1p52f}, rope); break;
  }
}

void attention(Pool& pool, const Attention& a) { attention_after(pool, a, nullptr); }

void rope_attention(Pool& pool, const RopeStore& rope, const Attention& a) { attention_after(pool, a, &rope); }
