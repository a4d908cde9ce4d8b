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
  Scale scale;
  bool minimum;

  vf scales(const uint8_t* tail, int vector) const {
    return load_scales(scale, tail + vector * kLanes * scale_size(scale));
  }
};

template <class G>
inline Stream stream_of(const Matrix& w, G) {
  const int64_t runs = G::runs(w), bytes = runs * G::kCodeBytes;
  return {&kTableOf<G>,         static_cast<float>(G::kZero), w.k / kRun / runs, G::kParts, runs * kRun / G::kParts,
          bytes + G::kTailBytes, bytes,                        G::kScaleBytes,    G::kScale, G::kMinimum};
}

// Kinds of codes. A step is kBytes, of all outputs of a panel, and gives kPairs pairs of inputs for each.
struct PackedCodes {
  static constexpr int64_t kBytes = kPanel * 4;
  using Vector = vi;
  static vi load(const uint8_t* at, int vector) { return load_pairs(at + vector * kLanes * 4); }
};

struct NibbleCodes : PackedCodes {
  static constexpr int kPairs = 4;
  PairTable table;
  explicit NibbleCodes(const Stream& s) : table(make_table(s.table->values)) {}
  vi pair(vi codes, int i) const { return nibble_pair(table, codes, i); }
};

struct ByteCodes : PackedCodes {
  static constexpr int kPairs = 2;
  float zero;
  explicit ByteCodes(const Stream& s) : zero(s.zero) {}
  vi pair(vi codes, int i) const { return byte_pair(codes, zero, i); }
};

struct FloatCodes : PackedCodes {  // E4M3
  static constexpr int kPairs = 2;
  explicit FloatCodes(const Stream&) {}
  vi pair(vi codes, int i) const { return e4m3_pair(codes, i); }
};

// The bf16 numbers of E4M3 codes without a sign, by byte.
struct FloatBytes {
  alignas(64) uint8_t bytes[2][128];
};

constexpr FloatBytes float_bytes() {
  FloatBytes made{};
  for (int code = 0; code < 128; ++code) {
    const int exponent = code >> 3, mantissa = code & 7;
    float value = static_cast<float>(exponent == 0 ? mantissa : 8 + mantissa) / 1024;
    for (int e = exponent == 0 ? 1 : exponent; e > 0; --e) value *= 2;
    const auto bits = __builtin_bit_cast(uint32_t, value);
    made.bytes[0][code] = static_cast<uint8_t>(bits >> 16);
    made.bytes[1][code] = static_cast<uint8_t>(bits >> 24);
  }
  return made;
}

inline constexpr FloatBytes kFloatBytes = float_bytes();

#if TGI_BF16 && defined(__x86_64__)
struct TableFloatCodes : PackedCodes {  // E4M3 where tables hold 128 bytes
  static constexpr int kPairs = 2;
  ByteTable table;
  using Vector = FoundBytes;
  explicit TableFloatCodes(const Stream&) : table(make_byte_table(kFloatBytes.bytes)) {}
  Vector load(const uint8_t* at, int vector) const { return look_up(table, PackedCodes::load(at, vector)); }
  vi pair(Vector found, int i) const { return unpack(found.low, found.high, i); }
};
#endif

struct DecodedCodes {  // pairs already
  static constexpr int kPairs = 2;
  static constexpr int64_t kBytes = kPanel * 4 * kPairs;
  using Vector = const uint8_t*;
  explicit DecodedCodes(const Stream&) {}
  static Vector load(const uint8_t* at, int vector) { return at + vector * kLanes * 4; }
  vi pair(Vector codes, int i) const { return load_pairs(codes + i * kPanel * 4); }
};

// Activations in the order of the pairs, and their sums.
struct PairedRows {
  bf16* x;      // [m, ldx]
  int64_t ldx;
  float* sums;  // [m, groups], where there are minima
};

inline void pair_row(const Gemm& g, const Stream& s, int64_t row, const PairedRows& made) {
  const int64_t runs = g.w.k / kRun, each = runs / s.groups;
  vf total = zero();
  for (int64_t i = 0; i < runs; ++i) {
    bf16 gathered[kRun];
    const bf16* from = run_of(g, row, i, gathered);
    bf16* to = made.x + row * made.ldx + i * kRun;
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

// What a tile reads: rows of activations and neighbouring panels.
struct TileSource {
  const bf16* x;      // of the first row
  const float* sums;
  int64_t ldx;
  const uint8_t* codes;
  const uint8_t* tails;
  int64_t code_stride, panel_stride, tail_stride;  // between groups, panels' codes, panels' tails
};

// What it fetches meanwhile: `step` bytes on with each step, `tail` more with each group. Where it comes to
// `end` of the first panel it goes on `jump` bytes later: in the tile behind this one.
struct StreamAhead {
  const char* at;
  int64_t step, tail;
  const char* end;
  int64_t jump;
};

// kPanels panels' outputs, kVectors of each from vector `first` on, for kRows rows: into
// acc[kPanels][kRows][kPanel / kLanes], which is memory, so that registers are left for the sums of a group.
template <class Kind, int kRows, int kPanels, int kVectors>
__attribute__((noinline)) inline void stream_tile(const Stream& s, const TileSource& source, int first,
                                                  StreamAhead ahead, vf* acc) {
  constexpr int kPer = kPanel / kLanes, kAll = kPanels * kVectors;
  const Kind kind(s);
  const bf16* x = source.x;
  const vf inverse = set1(s.table->inverse);
  const auto total = [&](int r, int v) -> vf& {
    return acc[(v / kVectors * kRows + r) * kPer + first + v % kVectors];
  };
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kAll; ++v) total(r, v) = zero();
  for (int64_t group = 0; group < s.groups; ++group) {
    const uint8_t* codes = source.codes + group * source.code_stride;
    const uint8_t* tail = source.tails + group * s.group_bytes;
    const auto scales = [&](int v) { return s.scales(tail + v / kVectors * source.tail_stride, first + v % kVectors); };
    for (int64_t part = 0; part < s.parts; ++part) {
      vf within[kRows][kAll];
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < kAll; ++v) within[r][v] = zero();
      for (int64_t left = s.inputs; left > 0; left -= 2 * Kind::kPairs) {
#pragma GCC unroll 4
        for (int line = 0; line < 2; ++line) prefetch(ahead.at + line * 64);
        if (kPanels > 1)
#pragma GCC unroll 4
          for (int line = 0; line < 2; ++line) prefetch(ahead.at + source.tail_stride + line * 64);
        ahead.at += ahead.step;
        if (ahead.at >= ahead.end) {
          ahead.at += ahead.jump;
          ahead.end = ahead.at + source.panel_stride;  // not again
        }
        typename Kind::Vector code[kAll];
#pragma GCC unroll 16
        for (int v = 0; v < kAll; ++v)
          code[v] = kind.load(codes + v / kVectors * source.panel_stride, first + v % kVectors);
#pragma GCC unroll 16
        for (int p = 0; p < Kind::kPairs; ++p) {
          vi pair[kAll];
#pragma GCC unroll 16
          for (int v = 0; v < kAll; ++v) pair[v] = kind.pair(code[v], p);
#pragma GCC unroll 16
          for (int r = 0; r < kRows; ++r) {
            const vi a = broadcast_pair(x + r * source.ldx + 2 * p);
#pragma GCC unroll 16
            for (int v = 0; v < kAll; ++v) dot2(within[r][v], pair[v], a);
          }
        }
        codes += Kind::kBytes;
        x += 2 * Kind::kPairs;
      }
#pragma GCC unroll 16
      for (int v = 0; v < kAll; ++v) {
        const vf scale = mul(scales(v), inverse);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) total(r, v) = fma(within[r][v], scale, total(r, v));
      }
      tail += s.scale_bytes;
    }
    for (int64_t line = 0; line < ahead.tail; line += 64) {
      prefetch(ahead.at + line);
      if (kPanels > 1) prefetch(ahead.at + source.tail_stride + line);
    }
    ahead.at += ahead.tail;
    if (!s.minimum) continue;
    for (int v = 0; v < kAll; ++v) {
      const vf minimum = scales(v);
      for (int r = 0; r < kRows; ++r)
        total(r, v) = fma(minimum, set1(source.sums[r * s.groups + group]), total(r, v));
    }
  }
}

// Few rows take kGroup panels together: a chain of products for each output is too slow alone.
constexpr int code_panels(int rows) { return rows <= kCodeRows / 2 ? kGroup : 1; }

template <class Kind, int kRows, int kPanels>
inline void stream_rows(const Gemm& g, const Stream& s, const TileSource& source, int64_t row, int64_t panel,
                        StreamAhead ahead) {
  constexpr int kPer = kPanel / kLanes;
  constexpr int kVectors = kRows == 1 ? kLoneVectors : kQuantVectors;
  vf acc[kPanels * kRows * kPer];
  if (kRows > 1) expect_result(g, row, kRows, panel, kPanels);
  for (int first = 0; first < kPer; first += kVectors) {
    stream_tile<Kind, kRows, kPanels, kVectors>(s, source, first, ahead, acc);
    ahead.step = ahead.tail = 0;
  }
  for (int p = 0; p < kPanels; ++p) gemm_finish(g, row, kRows, panel + p, acc + p * kRows * kPer, kPer);
}

// kPanels panels for all rows, kMost at a time. `next`: the packed panels to fetch meanwhile, or null.
template <class Kind, int kPanels, int kMost>
inline void stream_block(const Gemm& g, const Stream& s, const PairedRows& given, TileSource source, int64_t row,
                         int64_t rows, int64_t panel, const uint8_t* next) {
  // Tiles of nearly equal heights: 10 rows are 5 and 5 and not 8 and 2.
  const int64_t all = (rows + kMost - 1) / kMost;
  const int64_t share = (s.groups * s.group_bytes + all - 1) / all;
  const int64_t step = share * 2 * Kind::kPairs / g.w.k + 1;
  for (int64_t tile = 0; tile < all; ++tile) {
    const int64_t height = (rows + all - tile - 1) / (all - tile);
    source.x = given.x + row * given.ldx;
    source.sums = given.sums + row * s.groups;
    StreamAhead ahead = {reinterpret_cast<const char*>(next), 0, 0, nullptr, 0};
    if (next != nullptr) ahead = {ahead.at + tile * share, step, 0, nullptr, 0};
    with_count<kMost>(height, [&](auto n) {
      stream_rows<Kind, decltype(n)::value, kPanels>(g, s, source, row, panel, ahead);
    });
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
        const auto some = kind.load(at, v);
#pragma GCC unroll 4
        for (int p = 0; p < Kind::kPairs; ++p) store_pairs(out + (p * kPanel + v * kLanes) * 4, kind.pair(some, p));
      }
  }
}

// A few rows: one tile, which looks ahead in its own stream.
template <class Kind>
inline void stream_few(const Gemm& g, const Stream& s, const TileSource& source, int64_t panel, int64_t panels) {
  const auto* codes = reinterpret_cast<const char*>(source.codes);
  const StreamAhead ahead = {codes + kAheadBytes * 3 / 2, Kind::kBytes, s.group_bytes - s.code_bytes,
                             codes + source.panel_stride, (panels - 1) * source.panel_stride};
  with_count<kCodeRows>(g.m, [&](auto n) {
    constexpr int kRows = decltype(n)::value;
    if (panels == 1)
      stream_rows<Kind, kRows, 1>(g, s, source, 0, panel, ahead);
    else if constexpr (code_panels(kRows) > 1)
      stream_rows<Kind, kRows, code_panels(kRows)>(g, s, source, 0, panel, ahead);
  });
}

template <class Kind>
inline void gemm_stream(Pool& pool, const Gemm& g, const Stream& s) {
  constexpr int kDecodedRows = kGroup > 1 ? kMaxRows : kCodeRows;
  const int64_t panel_bytes = s.groups * s.group_bytes, decoded = g.w.k * kPanel * 2;
  const int64_t ldx = g.w.k + kRun;  // a power of two would put all rows into the same lines of the cache
  const bool few = g.m <= kCodeRows, decodes = g.m > 2 * kCodeRows;
  const int64_t room = decodes ? pool.size() * kGroup * decoded : 0, paired = g.m * ldx * 2;
  auto* memory = static_cast<uint8_t*>(
      pool.scratch(static_cast<size_t>(room + paired + (s.minimum ? g.m * s.groups * 4 : 0))));
  const PairedRows given = {reinterpret_cast<bf16*>(memory + room), ldx,
                            reinterpret_cast<float*>(memory + room + paired)};
  constexpr int64_t kRows = 4;
  pool.parallel((g.m + kRows - 1) / kRows, [&](int64_t item, int) {
    const int64_t end = (item + 1) * kRows < g.m ? (item + 1) * kRows : g.m;
    for (int64_t row = item * kRows; row < end; ++row) pair_row(g, s, row, given);
  });
  const int64_t group = decodes ? kGroup : few ? code_panels(static_cast<int>(g.m)) : 1;
  split_work(pool, g, kCodeRows * 16, group, [&](const Part& part) {
    const int64_t row = part.row, rows = part.rows, end = part.panel + part.panels;
    for (int64_t panel = part.panel; panel < end;) {
      const int64_t count = panel + group <= end ? group : 1;
      const auto* packed = static_cast<const uint8_t*>(g.w.data) + panel * panel_bytes;
      const int64_t after = part.after(panel, count);
      const uint8_t* next = after < 0 ? nullptr : packed + (after - panel) * panel_bytes;
      TileSource source = {given.x,       given.sums,  ldx,        packed, packed + s.code_bytes,
                           s.group_bytes, panel_bytes, panel_bytes};
      if (decodes) {
        uint8_t* own = memory + part.worker * kGroup * decoded;
        for (int64_t p = 0; p < count; ++p) decode_panel<Kind>(s, packed + p * panel_bytes, own + p * decoded);
        source.codes = own;
        source.code_stride = decoded / s.groups;
        source.panel_stride = decoded;
        if (count == 1)
          stream_block<DecodedCodes, 1, kDecodedRows>(g, s, given, source, row, rows, panel, next);
        else if constexpr (kGroup > 1)
          stream_block<DecodedCodes, kGroup, kDecodedRows>(g, s, given, source, row, rows, panel, next);
      } else if (few) {
        stream_few<Kind>(g, s, source, panel, count);
      } else {
        stream_block<Kind, 1, kCodeRows>(g, s, given, source, row, rows, panel, next);
      }
      panel += count;
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
    if constexpr (G::kCodes == Codes::kE4m3) {
#if TGI_BF16 && defined(__x86_64__)
      if (has_byte_tables()) return gemm_stream<TableFloatCodes>(pool, g, s);
#endif
      gemm_stream<FloatCodes>(pool, g, s);
    } else if constexpr (G::kBits == 8) {
      gemm_stream<ByteCodes>(pool, g, s);
    } else {
      gemm_stream<NibbleCodes>(pool, g, s);
    }
  });
}

int64_t panel_bytes(const Matrix& w) {
  int64_t bytes = w.k * kPanel * 2;
  visit_grouped(w, [&](auto grouped) { bytes = decltype(grouped)::panel_bytes(w); });
  return bytes;
}
