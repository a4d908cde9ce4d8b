// Attention of few rows, which is done when their keys and values are read: each thread streams through a
// share of all tiles (`TileStreams`), whatever sequences they belong to. A tile's heads follow each other,
// as they do in memory.
//
// Tiles of a head that a thread takes in order from the first on merge as they come; others are kept
// apart, and who brings a head's last tile merges them in order. The same bits either way.
// Included once per instruction set.

// An item with all its heads.
struct StreamedItem {
  AttentionItem item{};
  Span span{};
  int64_t first = 0;  // number of its first tile of its first head
  int64_t head = 0;   // number of its first head

  int64_t tiles() const { return span.end() - span.begin(); }
};

// What the tiles of a KV head give for the rows of an item.
struct StreamedHead {
  int64_t chained = 0;           // so many tiles are merged in its rows, by who took the first
  std::atomic<int64_t> left{0};  // tiles that are not in yet
};

template <class Form>
class AttentionStreams {
 public:
  // `rope`: as for `attention_in`, for single tokens alone.
  AttentionStreams(Pool& pool, const Attention& a, const Form& form, const std::vector<AttentionItem>& items,
                   const RopeStore* rope)
      : a_(a), form_(form), rope_(rope), group_(a.heads / a.kv_heads), dim_(a.head_dim), items_(items.size()),
        heads_(items.size() * static_cast<size_t>(a.kv_heads)) {
    for (size_t i = 0; i < items.size(); ++i) {
      StreamedItem& own = items_[i];
      own.item = items[i];
      own.span = visible_span(a, own.item.seq, own.item.first, own.item.count);
      own.first = tiles_;
      own.head = static_cast<int64_t>(i) * a.kv_heads;
      for (int64_t h = 0; h < a.kv_heads; ++h)
        heads_[static_cast<size_t>(own.head + h)].left.store(own.tiles(), std::memory_order_relaxed);
      tiles_ += own.tiles() * a.kv_heads;
      most_ = std::max(most_, own.item.count * group_);
    }
    // Rows: of each thread the queries of an item, of each head, of each tile apart.
    const int64_t threads = pool.size(), query_rows = most_ * a.kv_heads;
    head_rows_ = threads * query_rows;
    part_rows_ = head_rows_ + static_cast<int64_t>(heads_.size()) * most_;
    const int64_t rows = part_rows_ + tiles_ * most_;
    rotated_at_ = query_rows * dim_ * 4 / Form::kPair;
    own_bytes_ = (rotated_at_ + (rope == nullptr ? 0 : group_ * a.kv_heads * dim_ * 2) + 63) / 64 * 64;
    const size_t floats = static_cast<size_t>((rows - head_rows_) * dim_) * sizeof(float);
    const size_t queries = static_cast<size_t>(threads * own_bytes_);
    char* memory = static_cast<char*>(pool.scratch(floats + queries + static_cast<size_t>(rows) * sizeof(TileRow)));
    acc_ = reinterpret_cast<float*>(memory) - head_rows_ * dim_;
    queries_ = memory + floats;
    rows_ = reinterpret_cast<TileRow*>(memory + floats + queries);
  }

  int64_t tiles() const { return tiles_; }

  // Takes part as `worker`, with share `share` of `streams`.
  void run(TileStreams& streams, int64_t share, int worker) {
    if (streams.done()) return;  // another thread has been quicker
    Own own{worker, std::vector<int64_t>(static_cast<size_t>(a_.kv_heads), kUnready)};
    const int64_t begin = streams.first(share), end = streams.first(share + 1);
    streams.run(share, [&](int64_t number) { visit(&own, number, number >= begin && number + 1 < end); });
    leave(&own);
  }

 private:
  static constexpr int64_t kUnready = -2, kReady = -1;  // the latter: the queries of a head

  // What a thread is about.
  struct Own {
    int worker;
    std::vector<int64_t> chained;  // by head, tiles that it takes in order from the first on; or the above
    size_t at = 0;                 // the item of its last tile
    bool begun = false;
  };

  Tile tile_of(const StreamedItem& item, int64_t t, int64_t h) const {
    return find_tile(a_, item.item.seq, h, item.span.begin() + t, item.span.first_visible, item.span.last_key);
  }
  int64_t query_row(const Own& own, int64_t h) const { return (own.worker * a_.kv_heads + h) * most_; }

  void visit(Own* own, int64_t number, bool goes_on) {
    size_t at = own->at;
    while (number < items_[at].first) --at;
    while (at + 1 < items_.size() && number >= items_[at + 1].first) ++at;
    if (at != own->at) leave(own);
    own->at = at;
    const StreamedItem& item = items_[at];
    const int64_t t = (number - item.first) / a_.kv_heads, h = (number - item.first) % a_.kv_heads;
    const int64_t count = item.item.count * group_;
    const Tile tile = tile_of(item, t, h);
    int64_t& chained = own->chained[static_cast<size_t>(h)];
    if (chained == kUnready) make_ready(own, item, h, tile);
    if (rope_ != nullptr && t + 1 == item.tiles()) store_key_value(*rope_, item.item.seq, h);
    if (chained >= 0 && chained != t) close(own, item, h);
    TileRow* rows = rows_ + head_rows_ + (item.head + h) * most_;
    if (t == 0) {
      clear(*own, h, head_rows_ + (item.head + h) * most_, count);
      chained = 0;
    } else if (chained < 0) {
      rows = clear(*own, h, part_rows_ + number * most_, count);
    }
    Tile next;
    const Tile* later = nullptr;
    if (goes_on && count <= kFewRows) {
      later = &next;
      next = h + 1 < a_.kv_heads        ? tile_of(item, t, h + 1)
             : t + 1 < item.tiles() ? tile_of(item, t + 1, 0)
                                    : tile_of(items_[at + 1], 0, 0);
    }
    attend_span(a_, form_, rows, static_cast<int>(count), tile, later);
    if (chained >= 0) {
      ++chained;
    } else {
      bring(item, h, 1);
    }
  }

  // The queries of a head; before all, the first tile is asked for meanwhile.
  void make_ready(Own* own, const StreamedItem& item, int64_t h, const Tile& tile) {
    const AttentionItem& one = item.item;
    const int64_t token = a_.query_start[one.seq] + one.first, bytes = head_bytes(static_cast<KvForm>(a_.kv_form), dim_);
    if (!own->begun) fetch_tile(tile, tile.keys, bytes);
    char* queries = queries_ + own->worker * own_bytes_;
    const bf16* q = query(a_, token, h);
    if (rope_ != nullptr) {
      auto* rotated = reinterpret_cast<bf16*>(queries + rotated_at_) + h * group_ * dim_;
      for (int64_t g = 0; g < group_; ++g) rope_query(*rope_, token, h * group_ + g, rotated + g * dim_);
      q = rotated;
    }
    if (!own->begun) fetch_tile(tile, tile.values, bytes);
    own->begun = true;
    start_queries(a_, form_, one.seq, h, one.first, one.count, q, queries + h * most_ * dim_ * 4 / Form::kPair,
                  rows_ + query_row(*own, h));
    own->chained[static_cast<size_t>(h)] = kReady;
  }

  // The rows at `at` for head `h`, with sums of their own.
  TileRow* clear(const Own& own, int64_t h, int64_t at, int64_t count) {
    std::memcpy(rows_ + at, rows_ + query_row(own, h), static_cast<size_t>(count) * sizeof(TileRow));
    clear_rows(rows_ + at, count, acc_ + at * dim_, dim_);
    return rows_ + at;
  }

  void leave(Own* own) {
    for (int64_t h = 0; h < a_.kv_heads; ++h) {
      if (own->chained[static_cast<size_t>(h)] >= 0) close(own, items_[own->at], h);
      own->chained[static_cast<size_t>(h)] = kUnready;
    }
  }

  void close(Own* own, const StreamedItem& item, int64_t h) {
    int64_t& chained = own->chained[static_cast<size_t>(h)];
    heads_[static_cast<size_t>(item.head + h)].chained = chained;
    bring(item, h, chained);
    chained = kReady;
  }

  // So many tiles of a head are in. Who brings the last of them sees all, and ends it.
  void bring(const StreamedItem& item, int64_t h, int64_t tiles) {
    StreamedHead& head = heads_[static_cast<size_t>(item.head + h)];
    if (head.left.fetch_sub(tiles, std::memory_order_acq_rel) > tiles) return;
    const int64_t count = item.item.count * group_;
    TileRow* rows = rows_ + head_rows_ + (item.head + h) * most_;
    for (int64_t t = head.chained; t < item.tiles(); ++t) {
      const TileRow* part = rows_ + part_rows_ + (item.first + t * a_.kv_heads + h) * most_;
      for (int64_t r = 0; r < count; ++r) {
        float old_scale, new_scale;
        merge_scales(1, rows + r, &part[r].max, &part[r].sum, &old_scale, &new_scale);
        for (int64_t d = 0; d < dim_; d += kLanes)
          store(rows[r].acc + d,
                fma(load(rows[r].acc + d), set1(old_scale), mul(load(part[r].acc + d), set1(new_scale))));
      }
    }
    finish_rows(a_, item.item.seq, h, item.item.first, item.item.count, rows);
  }

  const Attention& a_;
  const Form& form_;
  const RopeStore* rope_;
  const int64_t group_, dim_;
  std::vector<StreamedItem> items_;
  std::vector<StreamedHead> heads_;
  int64_t most_ = 0, tiles_ = 0, own_bytes_, rotated_at_, head_rows_, part_rows_;
  float* acc_;  // of row 0; rows of queries alone have none
  char* queries_;
  TileRow* rows_;
};

template <class Form>
inline void attend_streams(Pool& pool, const Attention& a, const Form& form, const std::vector<AttentionItem>& items,
                           const RopeStore* rope) {
  // A token is made ready with what reads it, if it is the only one of its sequence.
  const bool single = std::all_of(items.begin(), items.end(), [&](const AttentionItem& item) {
    return a.query_start[item.seq + 1] - a.query_start[item.seq] == 1;
  });
  if (rope != nullptr && !single) {
    rope_store(pool, *rope);
    rope = nullptr;
  }
  AttentionStreams<Form> attention(pool, a, form, items, rope);
  TileStreams streams(attention.tiles(), pool.width());
  pool.parallel(streams.count(), [&](int64_t share, int worker) { attention.run(streams, share, worker); });
}
