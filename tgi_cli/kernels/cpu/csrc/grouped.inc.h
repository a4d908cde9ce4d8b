// Matrices of 8- and 4-bit codes with a scale for each group of inputs: how they lie in memory, are
// packed and decoded. Included once per instruction set, inside its namespace.
//
// A panel of 32 outputs is a stream of groups, each: codes in runs of 32 inputs, 32 scales (twice 32 with
// one for each 16 inputs), 32 minima if the form has them. A group is one run, or in wide forms as many
// as `Matrix::group` says. A run of 8-bit codes: [8 times 4 inputs][32 outputs][4]; of 4-bit codes:
// [4 times 8 inputs][32 outputs][4], the first four inputs in the low halves of the bytes, the others
// above. Of E4M3 four outputs' bytes lie by pairs of inputs, [first and third, second and fourth][4
// outputs][2]: so bytes of a pair become words by unpacking, without shifts.

constexpr int kRun = 32;

enum class Codes { kInteger, kNf4, kFp4, kE2m1, kE4m3 };

// NF4 and FP4 are bitsandbytes' (Dettmers et al., 2023), E2M1 that of the OCP microscaling formats.
alignas(64) constexpr float kNf4Values[16] = {
    -1.0f,           -0.6961928009986877f,  -0.5250730514526367f,  -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f,  0.16093020141124725f,  0.24611230194568634f,  0.33791524171829224f,
    0.44070982933044434f,  0.5626170039176941f,   0.7229568362236023f,   1.0f};
alignas(64) constexpr float kFp4Values[16] = {
    0.0f,  0.0052083334885537624f,  0.6666666865348816f,  1.0f,  0.3333333432674408f,  0.5f,  0.1666666716337204f,  0.25f,
    -0.0f, -0.0052083334885537624f, -0.6666666865348816f, -1.0f, -0.3333333432674408f, -0.5f, -0.1666666716337204f, -0.25f};
alignas(64) constexpr float kE2m1Values[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                               -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

// Of scales and minima. bf16 holds the powers of two of MXFP4, all that fp32 has, and fp16 does not.
enum class Scale { kFloat, kHalf, kBf16 };

constexpr int64_t scale_size(Scale scale) { return scale == Scale::kFloat ? 4 : 2; }

inline vf load_scales(Scale scale, const uint8_t* at) {  // kLanes of them
  const auto* words = reinterpret_cast<const uint16_t*>(at);
  if (scale == Scale::kHalf) return load_half(words);
  if (scale == Scale::kBf16) return load_bf16(words);
  return load(reinterpret_cast<const float*>(at));
}

// kSpan inputs share a scale where groups are not wide: 32 or 16.
template <int kBitsOf, Codes kCodesOf, int kSpan, Scale kScaleOf, bool kMinimumOf, bool kWideOf = false>
struct Grouped {
  static constexpr int kBits = kBitsOf;
  static constexpr Codes kCodes = kCodesOf;
  static constexpr Scale kScale = kScaleOf;
  static constexpr bool kMinimum = kMinimumOf;
  static constexpr bool kWide = kWideOf;
  static constexpr int kParts = kRun / kSpan;  // scales of an output in a group
  static constexpr int kZero = kMinimum || kCodes != Codes::kInteger ? 0 : kBits == 4 ? 8 : 128;
  static constexpr int64_t kCodeBytes = kPanel * kRun * kBits / 8;  // of a run
  static constexpr int64_t kScaleBytes = kPanel * scale_size(kScale);
  static constexpr int64_t kTailBytes = kScaleBytes * (kParts + (kMinimum ? 1 : 0));
  static constexpr int64_t kGroupBytes = kCodeBytes + kTailBytes;  // where not wide

  static int64_t runs(const Matrix& w) { return kWide ? w.group / kRun : 1; }  // of a group
  static int64_t panel_bytes(const Matrix& w) {
    return w.k / kRun / runs(w) * (runs(w) * kCodeBytes + kTailBytes);
  }
  // Codes of the run that begins at input 32 * run, and the scales of its group.
  static const uint8_t* codes(const Matrix& w, int64_t panel, int64_t run) {
    const int64_t each = runs(w);
    return static_cast<const uint8_t*>(w.data) + panel * panel_bytes(w) +
           run / each * (each * kCodeBytes + kTailBytes) + run % each * kCodeBytes;
  }
  static const uint8_t* tail(const Matrix& w, int64_t panel, int64_t run) {
    const int64_t each = runs(w);
    return codes(w, panel, run / each * each) + each * kCodeBytes;
  }

  // Where in a run an input's byte lies.
  static int64_t place(int64_t output, int64_t input) {
    const int64_t four = input / (kBits == 8 ? 4 : 8) * kPanel * 4, i = input % 4;
    if (kCodes == Codes::kE4m3) return four + output / 4 * 16 + i % 2 * 8 + output % 4 * 2 + i / 2;
    return four + output * 4 + i;
  }

  static vf scales(const uint8_t* tail, int row, int output) {  // kLanes of them
    return load_scales(kScale, tail + row * kScaleBytes + output * scale_size(kScale));
  }
  // What codes in the low bits of each lane stand for, before scale and minimum.
  static vf values(vi codes) {
    switch (kCodes) {
      case Codes::kNf4: return lookup(kNf4Values, codes);
      case Codes::kFp4: return lookup(kFp4Values, codes);
      case Codes::kE2m1: return lookup(kE2m1Values, codes);
      case Codes::kE4m3: return from_e4m3(codes);
      default: return sub(int_to_float(codes), set1(static_cast<float>(kZero)));
    }
  }
};

// Calls visit(Grouped<...>{}) for a grouped form.
template <class Visitor>
inline void visit_grouped(const Matrix& w, const Visitor& visit) {
  constexpr Codes kInteger = Codes::kInteger;
  constexpr Scale kFloat = Scale::kFloat, kHalf = Scale::kHalf;
  switch (static_cast<Form>(w.form)) {
    case Form::kInt8: return visit(Grouped<8, kInteger, 32, kHalf, false>{});
    case Form::kInt4: return visit(Grouped<4, kInteger, 32, kHalf, false>{});
    case Form::kInt4Min: return visit(Grouped<4, kInteger, 32, kHalf, true>{});
    case Form::kInt4MinF: return visit(Grouped<4, kInteger, 32, kFloat, true>{});
    case Form::kInt8MinF: return visit(Grouped<8, kInteger, 32, kFloat, true>{});
    case Form::kInt8F16: return visit(Grouped<8, kInteger, 16, kFloat, false>{});
    case Form::kInt4Wide: return visit(Grouped<4, kInteger, 32, kFloat, false, true>{});
    case Form::kInt4WideMin: return visit(Grouped<4, kInteger, 32, kFloat, true, true>{});
    case Form::kInt8Wide: return visit(Grouped<8, kInteger, 32, kFloat, false, true>{});
    case Form::kInt8WideMin: return visit(Grouped<8, kInteger, 32, kFloat, true, true>{});
    case Form::kNf4: return visit(Grouped<4, Codes::kNf4, 32, kFloat, false, true>{});
    case Form::kFp4: return visit(Grouped<4, Codes::kFp4, 32, kFloat, false, true>{});
    case Form::kE2m1: return visit(Grouped<4, Codes::kE2m1, 32, kFloat, false, true>{});
    case Form::kE4m3: return visit(Grouped<8, Codes::kE4m3, 32, kFloat, false, true>{});
    case Form::kMxfp4: return visit(Grouped<4, Codes::kE2m1, 32, Scale::kBf16, false>{});
    default: return;
  }
}

// One output's weights, times `factor`, in fp32: a row of a table.
template <class G>
inline void decode_row(const Matrix& w, int64_t output, float factor, float* out, G) {
  const int64_t panel = output / kPanel, column = output % kPanel;
  const int first = static_cast<int>(column) / kLanes * kLanes, lane = static_cast<int>(column) % kLanes;
  for (int64_t run = 0; run < w.k / kRun; ++run, out += kRun) {
    const uint8_t* at = G::codes(w, panel, run);
    const uint8_t* tail = G::tail(w, panel, run);
    float scales[G::kParts + 1];  // and the minimum
    for (int i = 0; i < G::kParts + (G::kMinimum ? 1 : 0); ++i) {
      float all[kLanes];
      store(all, G::scales(tail, i, first));
      scales[i] = all[lane];
    }
    int32_t codes[kRun];
    for (int i = 0; i < kRun; ++i) {
      const int byte = at[G::place(column, i)];
      codes[i] = G::kBits == 8 ? byte : byte >> (i % 8 < 4 ? 0 : 4) & 15;
    }
    for (int i = 0; i < kRun; i += kLanes) {
      vf value = mul(G::values(load_pairs(codes + i)), set1(scales[i * G::kParts / kRun]));
      if (G::kMinimum) value = add(value, set1(scales[G::kParts]));
      store(out + i, mul(value, set1(factor)));
    }
  }
}

// Missing outputs of the last panel have the code 0 and the scale 0.
template <class G>
inline void pack_panels(const PackGrouped& a, G) {
  constexpr int64_t size = scale_size(G::kScale);
  const int64_t each = G::runs(a.w), groups = a.w.k / kRun / each;
  auto* out = static_cast<uint8_t*>(const_cast<void*>(a.w.data));
  const int64_t panels = (a.w.n + kPanel - 1) / kPanel;
  std::memset(out, 0, static_cast<size_t>(panels * G::panel_bytes(a.w)));
  for (int64_t n = 0; n < a.w.n; ++n) {
    const int64_t j = n % kPanel;
    for (int64_t run = 0; run < a.w.k / kRun; ++run) {
      auto* to = const_cast<uint8_t*>(G::codes(a.w, n / kPanel, run));
      const uint8_t* codes = a.codes + n * a.w.k + run * kRun;
      for (int64_t i = 0; i < kRun; i += 4) {
        if (G::kBits == 8 && G::kCodes == Codes::kInteger) {
          std::memcpy(to + G::place(j, i), codes + i, 4);
        } else {
          const int64_t shift = G::kBits == 8 ? 0 : i % 8;
          for (int64_t b = i; b < i + 4; ++b) to[G::place(j, b)] |= static_cast<uint8_t>(codes[b] << shift);
        }
      }
    }
    for (int64_t g = 0; g < groups; ++g) {
      auto* at = const_cast<uint8_t*>(G::tail(a.w, n / kPanel, g * each)) + j * size;
      const auto* scales = static_cast<const uint8_t*>(a.scales);
      for (int part = 0; part < G::kParts; ++part)
        std::memcpy(at + part * G::kScaleBytes, scales + ((n * groups + g) * G::kParts + part) * size,
                    static_cast<size_t>(size));
      if (G::kMinimum)
        std::memcpy(at + G::kParts * G::kScaleBytes,
                    static_cast<const uint8_t*>(a.minima) + (n * groups + g) * size, static_cast<size_t>(size));
    }
  }
}

void pack_grouped(const PackGrouped& a) {
  visit_grouped(a.w, [&](auto grouped) { pack_panels(a, grouped); });
}

void embed(Pool& pool, const Embed& a) {
  const auto form = static_cast<Form>(a.table.form);
  const int64_t dim = a.table.k;
  constexpr int64_t kTokens = 8;
  pool.parallel((a.tokens + kTokens - 1) / kTokens, [&](int64_t item, int) {
    const int64_t end = (item + 1) * kTokens < a.tokens ? (item + 1) * kTokens : a.tokens;
    for (int64_t t = item * kTokens; t < end; ++t) {
      float* out = a.out + t * dim;
      const int64_t id = a.ids[t];
      const bool panels = form == Form::kBf16;
      if (panels || form == Form::kRows) {
        // Consecutive pairs of a row lie one panel width apart when packed.
        const bf16* row = static_cast<const bf16*>(a.table.data) +
                          (panels ? (id / kPanel * (dim / 2) * kPanel + id % kPanel) * 2 : id * dim);
        const int64_t stride = panels ? 2 * kPanel : 2;
        for (int64_t i = 0; i < dim / 2; ++i) {
          out[2 * i] = a.scale * to_float(row[i * stride]);
          out[2 * i + 1] = a.scale * to_float(row[i * stride + 1]);
        }
      } else {
        visit_grouped(a.table, [&](auto grouped) { decode_row(a.table, id, a.scale, out, grouped); });
      }
    }
  });
}
