// GEMM of grouped weights by bf16 activations. And the choice between all GEMMs. Included once per
// instruction set, inside its namespace.
//
// Codes become bf16 pairs in registers, exactly but for NF4. Products of the inputs that share a scale add
// up in one fp32 chain, in the order of the pairs, and those sums, times their scales, in another; minima
// follow, times the sum of the group's activations. Where there are many rows a panel is decoded once, to
// the same pairs: an output element is the same bits either way.
//
// Of every four inputs the first and third make a pair, then the second and fourth: so bytes and nibbles
// lie in words. Activations are put in that order before.

// Values of 4-bit codes times a factor that makes them nearly or quite exact in bf16.
struct CodeTable {
  bf16 values[16];
  float inverse;  // of the factor
};

constexpr CodeTable code_table(const float (&values)[16], float factor) {
  CodeTable made{{}, 1.0f / factor};
  for (int i = 0; i < 16; ++i) {
    const auto bits = __builtin_bit_cast(uint32_t, values[i] * factor);
    made.values[i] = static_cast<bf16>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
  }
  return made;
}

constexpr CodeTable integer_table(int zero) {
  float values[16] = {};
  for (int i = 0; i < 16; ++i) values[i] = static_cast<float>(i - zero);
  return code_table(values, 1.0f);
}

template <class G>
constexpr CodeTable table_of() {
  switch (G::kCodes) {
    case Codes::kNf4: return code_table(kNf4Values, 1.437f);  // of all up to 2 the least squared error
    case Codes::kFp4: return code_table(kFp4Values, 12.0f);
    case Codes::kE2m1: return code_table(kE2m1Values, 1.0f);
    default: return integer_table(G::kZero);
  }
}

template <class G>
inline constexpr CodeTable kTableOf = table_of<G>();

// What a form is to the tiles, so that they need not be compiled for each.
struct Stream {
  const CodeTable* table;          // of 4-bit codes
  float zero;                      // of 8-bit integers
  int64_t groups, parts, inputs;   // of a row, of a group, of a part
  int64_t group_bytes, code_bytes; // of a panel's group
  int64_t scale_bytes;             // of a panel's scales of one part
  bool half, minimum;

  vf scales(const uint8_t* tail, int vector) const {
    if (half) return load_half(reinterpret_cast<const uint16_t*>(tail) + vector * kLanes);
    return load(reinterpret_cast<const float*>(tail) + vector * kLanes);
  }
};

template <class G>
inline Stream stream_of(const Matrix& w, G) {
  const int64_t runs = G::runs(w), bytes = runs * G::kCodeBytes;
  return {&kTableOf<G>,         static_cast<float>(G::kZero), w.k / kRun / runs, G::kParts, runs * kRun / G::kParts,
          bytes + G::kTailBytes, bytes,                        G::kScaleBytes,    G::kScaleBytes == kPanel * 2, G::kMinimum};
}

// Kinds of codes. A step is kBytes, of all outputs of a panel, and gives kPairs pairs of inputs for each.
struct NibbleCodes {
  static constexpr int kPairs = 4;
  static constexpr int64_t kBytes = kPanel * 4;
  PairTable table;
  explicit NibbleCodes(const Stream& s) : table(make_table(s.table->values)) {}
  void pairs(const uint8_t* at, int vector, vi (&out)[kPairs]) const {
    nibble_pairs(table, load_pairs(at + vector * kLanes * 4), out);
  }
};

struct ByteCodes {
  static constexpr int kPairs = 2;
  static constexpr int64_t kBytes = kPanel * 4;
  float zero;
  explicit ByteCodes(const Stream& s) : zero(s.zero) {}
  void pairs(const uint8_t* at, int vector, vi (&out)[kPairs]) const {
    byte_pairs(load_pairs(at + vector * kLanes * 4), zero, out);
  }
};

struct FloatCodes {  // E4M3
  static constexpr int kPairs = 2;
  static constexpr int64_t kBytes = kPanel * 4;
  explicit FloatCodes(const Stream&) {}
  void pairs(const uint8_t* at, int vector, vi (&out)[kPairs]) const {
    e4m3_pairs(load_pairs(at + vector * kLanes * 4), out);
  }
};

struct DecodedCodes {  // pairs already
  static constexpr int kPairs = 2;
  static constexpr int64_t kBytes = kPanel * 8;
  explicit DecodedCodes(const Stream&) {}
  void pairs(const uint8_t* at, int vector, vi (&out)[kPairs]) const {
    for (int p = 0; p < kPairs; ++p) out[p] = load_pairs(at + (p * kPanel + vector * kLanes) * 4);
  }
};

// Activations in the order of the pairs, and their sums.
struct PairedRows {
  bf16* x;      // [m, k]
  float* sums;  // [m, groups], where there are minima
};

inline void pair_row(const Gemm& g, const Stream& s, int64_t row, const PairedRows& made) {
  const int64_t runs = g.w.k / kRun, each = runs / s.groups;
  vf total = zero();
  for (int64_t i = 0; i < runs; ++i) {
    bf16 gathered[kRun];
    const bf16* from = run_of(g, row, i, gathered);
    bf16* to = made.x + row * g.w.k + i * kRun;
    for (int j = 0; j < kRun; j += 4) {
      uint64_t four;
      std::memcpy(&four, from + j, 8);
      four = (four & 0xffff00000000ffffu) | (four & 0xffff0000u) << 16 | (four >> 16 & 0xffff0000u);
      std::memcpy(to + j, &four, 8);
    }
    if (!s.minimum) continue;
    for (int j = 0; j < kRun; j += kLanes) total = add(total, load_bf16(from + j));
    if ((i + 1) % each == 0) {
      made.sums[row * s.groups + i / each] = sum(total);
      total = zero();
    }
  }
}

// What a tile reads: rows of activations and one panel.
struct TileSource {
  const bf16* x;      // of the first row
  const float* sums;
  int64_t k;          // between rows
  const uint8_t* codes;
  const uint8_t* tails;
  int64_t code_stride;  // between groups
};

// kVectors of a panel's outputs, beginning at vector `first`, for kRows rows: into acc[kRows][kPanel / kLanes],
// which is memory, so that registers are left for the sums of a group.
template <class Kind, int kRows, int kVectors>
__attribute__((noinline)) inline void stream_tile(const Stream& s, const TileSource& source, int first, Lookahead ahead,
                                                  vf* acc) {
  constexpr int kPer = kPanel / kLanes;
  const Kind kind(s);
  const bf16* x = source.x;
  const vf inverse = set1(s.table->inverse);
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) acc[r * kPer + first + v] = zero();
  for (int64_t group = 0; group < s.groups; ++group) {
    const uint8_t* codes = source.codes + group * source.code_stride;
    const uint8_t* tail = source.tails + group * s.group_bytes;
    for (int64_t part = 0; part < s.parts; ++part) {
      vf within[kRows][kVectors];
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) within[r][v] = zero();
      for (int64_t left = s.inputs; left > 0; left -= 2 * Kind::kPairs) {
        prefetch(ahead.at);
        prefetch(ahead.at + 64);
        ahead.at += ahead.stride;
        vi pairs[kVectors][Kind::kPairs];
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) kind.pairs(codes, first + v, pairs[v]);
#pragma GCC unroll 16
        for (int p = 0; p < Kind::kPairs; ++p)
#pragma GCC unroll 16
          for (int r = 0; r < kRows; ++r) {
            const vi a = broadcast_pair(x + r * source.k + 2 * p);
#pragma GCC unroll 16
            for (int v = 0; v < kVectors; ++v) dot2(within[r][v], pairs[v][p], a);
          }
        codes += Kind::kBytes;
        x += 2 * Kind::kPairs;
      }
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        const vf scale = mul(s.scales(tail, first + v), inverse);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          vf& total = acc[r * kPer + first + v];
          total = fma(within[r][v], scale, total);
        }
      }
      tail += s.scale_bytes;
    }
    if (!s.minimum) continue;
    for (int v = 0; v < kVectors; ++v) {
      const vf minimum = s.scales(tail, first + v);
      for (int r = 0; r < kRows; ++r) {
        vf& total = acc[r * kPer + first + v];
        total = fma(minimum, set1(source.sums[r * s.groups + group]), total);
      }
    }
  }
}

template <class Kind>
inline void stream_block(const Gemm& g, const Stream& s, const PairedRows& given, TileSource source, int64_t row,
                         int64_t rows, int64_t panel, const char* next, int64_t next_bytes) {
  constexpr int kPer = kPanel / kLanes;
  // Tiles of nearly equal heights: 10 rows are 5 and 5 and not 8 and 2.
  const int64_t all = (rows + kCodeRows - 1) / kCodeRows;
  const int64_t steps = g.w.k / (2 * Kind::kPairs);
  for (int64_t tile = 0; tile < all; ++tile) {
    const int64_t height = (rows + all - tile - 1) / (all - tile);
    source.x = given.x + row * g.w.k;
    source.sums = given.sums + row * s.groups;
    vf acc[kCodeRows * kPer];
    with_count<kCodeRows>(height, [&](auto n) {
      constexpr int kRows = decltype(n)::value;
      constexpr int kVectors = kRows == 1 ? kLoneVectors : kQuantVectors;
      Lookahead ahead = {next, 0};
      if (next_bytes > 0) ahead = {next + tile * next_bytes / all, next_bytes / all / steps + 1};
      for (int first = 0; first < kPer; first += kVectors) {
        stream_tile<Kind, kRows, kVectors>(s, source, first, ahead, acc);
        ahead.stride = 0;
      }
    });
    for (int64_t r = 0; r < height; ++r) gemm_finish(g, row + r, panel, acc + r * kPer);
    row += height;
    rows -= height;
  }
}

// A panel as pairs: [k / 2][32][2], in the order of the pairs.
template <class Kind>
__attribute__((noinline)) inline void decode_panel(const Stream& s, const uint8_t* codes, uint8_t* out) {
  const Kind kind(s);
  for (int64_t group = 0; group < s.groups; ++group) {
    const uint8_t* at = codes + group * s.group_bytes;
    for (const uint8_t* end = at + s.code_bytes; at < end; at += Kind::kBytes, out += Kind::kPairs * kPanel * 4)
      for (int v = 0; v < kPanel / kLanes; ++v) {
        vi pairs[Kind::kPairs];
        kind.pairs(at, v, pairs);
        for (int p = 0; p < Kind::kPairs; ++p) store_pairs(out + (p * kPanel + v * kLanes) * 4, pairs[p]);
      }
  }
}

template <class Kind>
inline void gemm_stream(Pool& pool, const Gemm& g, const Stream& s) {
  const int64_t panel_bytes = s.groups * s.group_bytes, decoded = g.w.k * kPanel * 2;
  const bool decodes = g.m > 2 * kCodeRows;
  const int64_t room = decodes ? pool.size() * decoded : 0, paired = g.m * g.w.k * 2;
  auto* memory = static_cast<uint8_t*>(
      pool.scratch(static_cast<size_t>(room + paired + (s.minimum ? g.m * s.groups * 4 : 0))));
  const PairedRows given = {reinterpret_cast<bf16*>(memory + room), reinterpret_cast<float*>(memory + room + paired)};
  constexpr int64_t kRows = 4;
  pool.parallel((g.m + kRows - 1) / kRows, [&](int64_t item, int) {
    const int64_t end = (item + 1) * kRows < g.m ? (item + 1) * kRows : g.m;
    for (int64_t row = item * kRows; row < end; ++row) pair_row(g, s, row, given);
  });
  split_work(pool, g, kCodeRows * 16, 1, [&](int64_t row, int64_t rows, int64_t panel, int64_t panels, int worker) {
    uint8_t* own = memory + worker * decoded;
    for (const int64_t end = panel + panels; panel < end; ++panel) {
      const auto* packed = static_cast<const uint8_t*>(g.w.data) + panel * panel_bytes;
      TileSource source = {nullptr, nullptr, g.w.k, packed, packed + s.code_bytes, s.group_bytes};
      const auto* next = reinterpret_cast<const char*>(packed);
      if (rows > 2 * kCodeRows) {
        decode_panel<Kind>(s, packed, own);
        source.codes = own;
        source.code_stride = s.parts * s.inputs * kPanel * 2;
        stream_block<DecodedCodes>(g, s, given, source, row, rows, panel, next + panel_bytes,
                                   panel + 1 < end ? panel_bytes : 0);
      } else if (rows > kCodeRows) {
        stream_block<Kind>(g, s, given, source, row, rows, panel, next + panel_bytes, panel + 1 < end ? panel_bytes : 0);
      } else {  // looks ahead in its own stream
        stream_block<Kind>(g, s, given, source, row, rows, panel, next + kAheadBytes, panel_bytes);
      }
    }
  });
}

void gemm(Pool& pool, const Gemm& g) {
  if (g.m <= 0) return;
  if (static_cast<Form>(g.w.form) == Form::kBf16) return gemm_bf16(pool, g);
  visit_grouped(g.w, [&](auto grouped) {
    using G = decltype(grouped);
    if constexpr (G::kCodes == Codes::kInteger)
      if (!g.w.wide_activations) return gemm_grouped(pool, g, grouped);
    const Stream s = stream_of(g.w, grouped);
    if constexpr (G::kCodes == Codes::kE4m3)
      gemm_stream<FloatCodes>(pool, g, s);
    else if constexpr (G::kBits == 8)
      gemm_stream<ByteCodes>(pool, g, s);
    else
      gemm_stream<NibbleCodes>(pool, g, s);
  });
}
