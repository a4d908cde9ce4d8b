// Paged attention for prefill, decode and mixtures: one rule for all of them.
//
// Keys come in tiles of 64 at absolute positions. Each tile gives (max, sum, accumulator) on its own,
// and tiles merge in order, so a result does not depend on chunking, on who computed which tile, or on
// which sequences read a tile together. Few rows: attention_streams.inc.h.
// Included once per instruction set.

#include "attention_tile.inc.h"

constexpr int64_t kItemRows = 48;   // query rows that share a visit of a tile
constexpr int64_t kSharedSeqs = 8;  // sequences of one item that may share tiles
constexpr int64_t kLong = 8;        // tiles from which on those of a lone item are shared out one by one
constexpr int64_t kPartRows = 32768;  // results kept of tiles where there is work for all, some 10 MB

// A run of query tokens of one sequence, or the single tokens of several, against one KV head.
struct AttentionItem {
  int32_t seq, seqs;     // first sequence, how many
  int32_t first, count;  // query tokens of the sequence, where it is one
  int32_t kv_head, kv_heads;
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

// Rows of `count` query tokens, as far as queries go, which are perhaps in `queries`. `q`: those of the
// first token for this KV head.
template <class Form>
inline void start_queries(const Attention& a, const Form& form, int64_t seq, int64_t kv_head, int64_t first,
                          int64_t count, const bf16* q, char* queries, TileRow* rows) {
  const int64_t group = a.heads / a.kv_heads, dim = a.head_dim;
  const int64_t base = a.seq_lens[seq] - (a.query_start[seq + 1] - a.query_start[seq]);
  for (int64_t r = 0; r < count * group; ++r) {
    const int64_t t = r / group, head = r % group;
    TileRow& row = rows[r];
    row.position = base + first + t;
    row.factor = prepare_query(form, q + (t * a.heads + head) * dim, dim, queries + r * dim * 4 / Form::kPair, &row.q);
    row.slope = a.slopes != nullptr ? a.slopes[kv_head * group + head] * kLog2e : 0.0f;
  }
}

// Rows that have not seen a key; their sums are in `acc`.
inline void clear_rows(TileRow* rows, int64_t count, float* acc, int64_t dim) {
  std::memset(acc, 0, static_cast<size_t>(count * dim) * sizeof(float));
  for (int64_t r = 0; r < count; ++r) {
    rows[r].max = -INFINITY;
    rows[r].sum = 0.0f;
    rows[r].acc = acc + r * dim;
  }
}

inline const bf16* query(const Attention& a, int64_t token, int64_t kv_head) {
  return a.q + (token * a.heads + kv_head * (a.heads / a.kv_heads)) * a.head_dim;
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

// A run of query tokens of one sequence.
template <class Form>
inline void attend_run(const Attention& a, const Form& form, int64_t seq, int64_t kv_head, const Span& span,
                       TileRow* rows, int count) {
  for (int64_t index = span.begin(); index < span.end(); ++index) {
    const Tile tile = find_tile(a, seq, kv_head, index, span.first_visible, span.last_key);
    Tile next;
    const Tile* later = nullptr;
    if (count <= kFewRows && (index + 1 < span.end() || kv_head + 1 < a.kv_heads)) {
      later = &next;
      next = index + 1 < span.end() ? find_tile(a, seq, kv_head, index + 1, span.first_visible, span.last_key)
                                    : find_tile(a, seq, kv_head + 1, span.begin(), span.first_visible, span.last_key);
    }
    attend_span(a, form, rows, count, tile, later);
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

// What is read of a tile, some hundred lines: asked for while queries and the new token are made ready.
inline void fetch_tile(const Tile& tile, const char* const* blocks, int64_t bytes) {
  for (int b = 0; b <= tile.high / kBlock; ++b)
    for (int64_t line = 0; line < bytes; line += 64) prefetch(blocks[b] + line);
}

// Splits the work: runs of tokens, and sequences that begin with the same blocks together.
struct AttentionPlan {
  std::vector<AttentionItem> items;
  bool streamed;  // few rows each, alone with their keys: items are for all heads, tiles are what is shared out

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
                         static_cast<int32_t>(a.kv_heads)});
      s += seqs;
    }
    int64_t tiles = 0, most = 0;
    for (const AttentionItem& item : whole) {
      const Span span = visible_span(a, item.seq, item.first, item.count);
      tiles += span.end() - span.begin();
      most = std::max(most, item.count * group);
    }
    const bool spare = static_cast<int64_t>(whole.size()) < 4 * threads;  // items may leave threads without work
    streamed = (whole.size() > 1 || tiles >= kLong) && (spare || tiles * a.kv_heads * most <= kPartRows) &&
               std::all_of(whole.begin(), whole.end(), [&](const AttentionItem& item) {
                 return item.seqs == 1 && (item.count == 1 || item.count * group <= kItemRows / 4);
               });
    if (streamed) {
      items = std::move(whole);
      return;
    }
    // The heads of a block lie side by side: they are read by one thread where there is work for all.
    for (auto item = whole.rbegin(); item != whole.rend(); ++item) {  // long tails of prefills first
      if (!spare) {
        items.push_back(*item);
        continue;
      }
      for (int32_t h = 0; h < a.kv_heads; ++h) {
        AttentionItem one = *item;
        one.kv_head = h;
        one.kv_heads = 1;
        items.push_back(one);
      }
    }
  }

  static bool shares_start(const Attention& a, int64_t s, int64_t other) {
    return other < a.seqs && a.window == 0 && a.query_start[s + 1] - a.query_start[s] == 1 &&
           a.query_start[other + 1] - a.query_start[other] == 1 && a.seq_lens[s] > kTileKeys &&
           a.seq_lens[other] > kTileKeys &&
           std::memcmp(a.block_tables + s * a.table_stride, a.block_tables + other * a.table_stride,
                       kTileBlocks * sizeof(int32_t)) == 0;
  }
};

#include "attention_streams.inc.h"

// `rope`, if not null: the tokens are yet to be rotated and stored.
template <class Form>
void attention_in(Pool& pool, const Attention& a, const Form& form, const RopeStore* rope) {
  const AttentionPlan plan(a, pool.size());
  if (plan.streamed) return attend_streams(pool, a, form, plan.items, rope);
  // A lone token whose heads are items of their own is made ready head by head, with what reads it.
  const bool by_head = rope != nullptr && rope->tokens == 1 && plan.items.size() == static_cast<size_t>(a.kv_heads);
  if (rope != nullptr && !by_head) rope_store(pool, *rope);
  const int64_t group = a.heads / a.kv_heads, dim = a.head_dim;
  const int64_t most = group > kItemRows ? group : kItemRows;  // rows of an item
  const int64_t num_rows = most * pool.size();
  const int64_t query_bytes = dim * 4 / Form::kPair;
  const size_t floats = (static_cast<size_t>(num_rows * dim) * sizeof(float) + 63) / 64 * 64;
  const size_t queries_size = (static_cast<size_t>(num_rows * query_bytes) + 63) / 64 * 64;
  auto* memory = static_cast<char*>(
      pool.scratch(floats + queries_size + static_cast<size_t>(num_rows) * sizeof(TileRow)));
  auto* acc = reinterpret_cast<float*>(memory);
  char* queries = memory + floats;
  auto* rows = reinterpret_cast<TileRow*>(memory + floats + queries_size);

  pool.parallel(static_cast<int64_t>(plan.items.size()), [&](int64_t i, int worker) {
    const AttentionItem& item = plan.items[static_cast<size_t>(i)];
    const int count = static_cast<int>(item.count * group);
    const int64_t own = worker * most;
    if (by_head) {
      const Span span = visible_span(a, 0, 0, 1);
      const Tile tile = find_tile(a, 0, item.kv_head, span.begin(), span.first_visible, span.last_key);
      const int64_t bytes = head_bytes(static_cast<KvForm>(a.kv_form), dim);
      fetch_tile(tile, tile.keys, bytes);
      for (int64_t h = item.kv_head * group; h < (item.kv_head + 1) * group; ++h)
        rope_query(*rope, 0, h, rope->q + h * dim);
      fetch_tile(tile, tile.values, bytes);
      store_key_value(*rope, 0, item.kv_head);
    }
    for (int64_t h = item.kv_head; h < item.kv_head + item.kv_heads; ++h) {
      for (int64_t s = 0; s < item.seqs; ++s) {
        const int64_t at = own + s * count;
        start_queries(a, form, item.seq + s, h, item.first, item.count,
                      query(a, a.query_start[item.seq + s] + item.first, h), queries + at * query_bytes, rows + at);
        clear_rows(rows + at, count, acc + at * dim, dim);
      }
      if (item.seqs > 1) {
        attend_shared(a, form, item, h, rows + own);
      } else {
        attend_run(a, form, item.seq, h, visible_span(a, item.seq, item.first, item.count), rows + own, count);
      }
      for (int64_t s = 0; s < item.seqs; ++s)
        finish_rows(a, item.seq + s, h, item.first, item.count, rows + own + s * count);
    }
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
