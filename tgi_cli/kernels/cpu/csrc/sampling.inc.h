// From logits to tokens, row by row: penalties, temperature, truncation, Gumbel draw. Included once per
// instruction set.
//
// A row is worked on by one thread and in an order of its own, so neighbours and threads change nothing.
// The definitions are those of engine/stages.py, engine/draw.py and kernels/ops.py, step by step with the
// same roundings; probabilities are sums of exponentials in fp64, where another order changes no decision.

constexpr int64_t kChunk = 64;  // ids that share a maximum and one vector of Philox counters
constexpr float kMostNoise = 16.6356f;  // just above the noise of the largest uniform

struct SamplingSpace {  // of one worker
  float* maxima;    // [chunks]
  float* ranked;    // [vocab]: values picked out, or maxima to be ranked
  uint8_t* marks;   // [vocab / 8]
  double* masses;   // [kBins]
};
constexpr int kBins = 4096;
constexpr double kBinsPerUnit = 100.0;  // of distance from the highest logit

inline int64_t chunks_of(int64_t vocab) { return (vocab + kChunk - 1) / kChunk; }

inline int64_t space_bytes(int64_t vocab) {
  const int64_t bytes = (chunks_of(vocab) + vocab) * 4 + (vocab + 7) / 8 + kBins * 8;
  return (bytes + 4 * 64 + 63) / 64 * 64;
}

inline SamplingSpace space_of(char* memory, int64_t vocab) {
  const auto after = [](char* p, int64_t bytes) { return p + (bytes + 63) / 64 * 64; };
  char* ranked = after(memory, chunks_of(vocab) * 4);
  char* masses = after(ranked, vocab * 4);
  char* marks = after(masses, kBins * 8);
  return {reinterpret_cast<float*>(memory), reinterpret_cast<float*>(ranked),
          reinterpret_cast<uint8_t*>(marks), reinterpret_cast<double*>(masses)};
}

// Divide by `temperature` unless it is 1, write the maximum of each chunk, and return that of all; NaN
// if any logit is NaN.
inline float scan(float* row, int64_t vocab, float temperature, float* maxima) {
  const vf divisor = set1(temperature);
  uint32_t nan = 0;
  float most = -INFINITY;
  for (int64_t start = 0; start < vocab; start += kChunk) {
    alignas(64) float padded[kChunk];
    float* p = row + start;
    const int64_t count = vocab - start < kChunk ? vocab - start : kChunk;
    if (count < kChunk) {
      for (int64_t i = 0; i < kChunk; ++i) padded[i] = i < count ? p[i] : -INFINITY;
      p = padded;
    }
    vf best = set1(-INFINITY);
    for (int64_t i = 0; i < kChunk; i += kLanes) {
      vf x = load(p + i);
      if (temperature != 1.0f) {
        x = div(x, divisor);
        store(p + i, x);
      }
      nan |= is_nan(x);
      best = max(best, x);
    }
    if (count < kChunk) std::memcpy(row + start, padded, static_cast<size_t>(count) * sizeof(float));
    const float chunk = hmax(best);
    maxima[start / kChunk] = chunk;
    if (chunk > most) most = chunk;
  }
  return nan != 0 ? NAN : most;
}

inline int64_t first_equal(const float* row, int64_t vocab, const float* maxima, float value) {
  int64_t chunk = 0;
  while (maxima[chunk] != value) ++chunk;
  int64_t id = chunk * kChunk;
  while (row[id] != value) ++id;
  return id < vocab ? id : vocab - 1;
}

// Repetition over prompt and outputs, then frequency per occurrence and presence once over outputs.
inline void penalize(float* row, int64_t vocab, const int32_t* tokens, int64_t known, int64_t outputs,
                     float repetition, float frequency, float presence, uint8_t* marks) {
  const auto inside = [vocab](int64_t id) { return id >= 0 && id < vocab; };
  const auto first_time = [marks](int64_t id) {
    const uint8_t bit = static_cast<uint8_t>(1u << (id & 7));
    const bool fresh = (marks[id >> 3] & bit) == 0;
    marks[id >> 3] |= bit;
    return fresh;
  };
  const size_t marks_bytes = static_cast<size_t>((vocab + 7) / 8);
  if (repetition != 1.0f) {
    std::memset(marks, 0, marks_bytes);
    for (int64_t i = 0; i < known; ++i) {
      const int64_t id = tokens[i];
      if (inside(id) && first_time(id)) row[id] = row[id] < 0 ? row[id] * repetition : row[id] / repetition;
    }
  }
  if ((frequency == 0.0f && presence == 0.0f) || outputs == 0) return;
  const int32_t* drawn = tokens + known - outputs;
  for (int64_t i = 0; i < outputs; ++i)
    if (inside(drawn[i])) row[drawn[i]] += -frequency;
  std::memset(marks, 0, marks_bytes);
  for (int64_t i = 0; i < outputs; ++i)
    if (inside(drawn[i]) && first_time(drawn[i])) row[drawn[i]] -= presence;
}

// Copies the values from `low` up to, and not with, `high` to `out`.
inline int64_t pick(const float* row, int64_t vocab, const float* maxima, float low, float high, float* out) {
  const vf from = set1(low), to = set1(high);
  int64_t count = 0;
  for (int64_t start = 0; start < vocab; start += kChunk) {
    if (maxima[start / kChunk] < low) continue;
    const int64_t end = start + kChunk < vocab ? start + kChunk : vocab;
    int64_t i = start;
    for (; i + kLanes <= end; i += kLanes) {
      const vf x = load(row + i);
      for (uint32_t lanes = at_least(x, from) & ~at_least(x, to); lanes != 0; lanes &= lanes - 1)
        out[count++] = row[i + __builtin_ctz(lanes)];
    }
    for (; i < end; ++i)
      if (row[i] >= low && !(row[i] >= high)) out[count++] = row[i];
  }
  return count;
}

// A value that at least `rank` logits reach, by the maxima of chunks; minus infinity if they are too few.
inline float reached_by(int64_t rank, int64_t vocab, const SamplingSpace& space) {
  const int64_t chunks = chunks_of(vocab);
  if (rank > chunks) return -INFINITY;
  std::memcpy(space.ranked, space.maxima, static_cast<size_t>(chunks) * sizeof(float));
  std::nth_element(space.ranked, space.ranked + rank - 1, space.ranked + chunks, std::greater<float>());
  return space.ranked[rank - 1];
}

template <class F>
inline void each_mass(const float* row, int64_t vocab, float most, F&& take) {  // kWideLanes masses at a time
  const vd highest = set1_wide(static_cast<double>(most));
  const auto give = [&](const float* values, int64_t count) {
    const vd below = sub(widen(values), highest);
    take(exp_wide(below), below, count);
  };
  int64_t i = 0;
  for (; i + kWideLanes <= vocab; i += kWideLanes) give(row + i, kWideLanes);
  if (i == vocab) return;
  float tail[kWideLanes];
  for (int64_t j = 0; j < kWideLanes; ++j) tail[j] = i + j < vocab ? row[i + j] : -INFINITY;
  give(tail, vocab - i);
}

inline double total_mass(const float* row, int64_t vocab, float most) {
  vd total = set1_wide(0.0);
  each_mass(row, vocab, most, [&](vd mass, vd, int64_t) { total = add(total, mass); });
  double lanes[kWideLanes], sum = 0.0;
  store(lanes, total);
  for (double lane : lanes) sum += lane;
  return sum;
}

// Of `count` values, sorted downwards here: the last one before which less than `target` has been
// reached, where `before` is the mass of all higher ones. `found` says that the target is among them.
inline float last_kept(float* values, int64_t count, float most, double before, double target, bool& found) {
  std::sort(values, values + count, std::greater<float>());
  double reached = before;
  for (int64_t i = 0; i < count; ++i) {
    reached += std::exp(static_cast<double>(values[i]) - static_cast<double>(most));
    if (reached >= target) {
      found = true;
      return values[i];
    }
  }
  found = false;
  return -INFINITY;
}

// The nucleus of a row where it is wide: masses by distance from the highest logit, then one bin sorted.
inline float wide_nucleus(const float* row, int64_t vocab, float most, double target, const SamplingSpace& space) {
  const vd scale = set1_wide(-kBinsPerUnit), last = set1_wide(kBins - 1);
  for (int i = 0; i < kBins; ++i) space.masses[i] = 0.0;
  each_mass(row, vocab, most, [&](vd mass, vd below, int64_t count) {
    double lanes[kWideLanes];
    int32_t bins[kWideLanes];
    store(lanes, mass);
    store_whole(bins, min(mul(below, scale), last));
    for (int64_t i = 0; i < count; ++i) space.masses[bins[i]] += lanes[i];
  });
  const auto bin_of = [most](float value) {  // as above
    const double below = static_cast<double>(value) - static_cast<double>(most);
    const double bin = below * -kBinsPerUnit;
    return bin < kBins - 1 ? static_cast<int>(bin) : kBins - 1;
  };
  const auto edge = [most](int bin) { return most - static_cast<float>(bin / kBinsPerUnit); };
  const float margin = 1e-6f * (std::fabs(most) + 50.0f);  // fp32 edges may cut beside those in fp64
  double before = 0.0;
  for (int bin = 0; bin < kBins; before += space.masses[bin++]) {
    // A hair early, as sums in another order may differ in the last bits; the sorted walk decides.
    if (before + space.masses[bin] < target * (1.0 - 1e-12)) continue;
    bool found = false;
    const float low = bin == kBins - 1 ? -INFINITY : edge(bin + 1) - margin;
    const int64_t near = pick(row, vocab, space.maxima, low, edge(bin) + margin, space.ranked);
    const float* end = std::remove_if(space.ranked, space.ranked + near, [&](float v) { return bin_of(v) != bin; });
    const int64_t count = end - space.ranked;
    const float value = last_kept(space.ranked, count, most, before, target, found);
    if (found) return value;
  }
  return -INFINITY;
}

// The smallest logit that top-k, top-p of what it left, and min-p all keep.
inline float truncate(const float* row, int64_t vocab, float most, int64_t top_k, double top_p, double min_p,
                      const SamplingSpace& space) {
  const float low = most + static_cast<float>(std::log(min_p));  // log(0) is minus infinity
  const bool limited = top_k > 0 && top_k < vocab;
  float kept = -INFINITY;
  if (limited) {
    const float bound = reached_by(top_k, vocab, space);
    int64_t count = pick(row, vocab, space.maxima, bound, INFINITY, space.ranked);
    std::nth_element(space.ranked, space.ranked + top_k - 1, space.ranked + count, std::greater<float>());
    kept = space.ranked[top_k - 1];
    if (top_p < 1.0) {
      std::sort(space.ranked, space.ranked + top_k, std::greater<float>());
      double whole = 0.0;
      for (int64_t i = 0; i < top_k; ++i)
        whole += std::exp(static_cast<double>(space.ranked[i]) - static_cast<double>(most));
      bool found = false;
      const float value = last_kept(space.ranked, top_k, most, 0.0, top_p * whole, found);
      if (found) kept = value;
    }
  } else if (top_p < 1.0) {
    constexpr int64_t kNarrow = 256;
    const double target = top_p * total_mass(row, vocab, most);
    bool found = false;
    if (kNarrow <= chunks_of(vocab)) {
      const float bound = reached_by(kNarrow, vocab, space);
      const int64_t count = pick(row, vocab, space.maxima, bound, INFINITY, space.ranked);
      kept = last_kept(space.ranked, count, most, 0.0, target, found);
    }
    if (!found) kept = wide_nucleus(row, vocab, most, target, space);
  }
  return kept > low ? kept : low;
}

struct Counter {  // of Philox4x32-10, but for the ids; see Ops.gumbel_noise
  uint32_t position_low, position_high, key_low, key_high;
};

inline void philox(vi quads, const Counter& counter, vi out[4]) {
  vi c0 = quads, c1 = set1_int(static_cast<int32_t>(counter.position_low));
  vi c2 = set1_int(static_cast<int32_t>(counter.position_high)), c3 = set1_int(0);
  uint32_t k0 = counter.key_low, k1 = counter.key_high;
  for (int round = 0; round < 10; ++round) {
    vi high0, low0, high1, low1;
    multiply_words(c0, 0xD2511F53u, high0, low0);
    multiply_words(c2, 0xCD9E8D57u, high1, low1);
    c0 = bit_xor(bit_xor(high1, c1), set1_int(static_cast<int32_t>(k0)));
    c2 = bit_xor(bit_xor(high0, c3), set1_int(static_cast<int32_t>(k1)));
    c1 = low1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

inline float gumbel(int32_t bits) {  // of the upper 23 bits of a word
  return static_cast<float>(-std::log(-std::log((static_cast<double>(bits) + 0.5) * 0x1p-23)));
}

// The highest logit plus noise among those at or above `low`; of equals the lowest id.
//
// Noise is monotonic in the random bits, so bits too low for the best score so far, by the highest logit
// of a chunk, are passed over before a logarithm is taken. Bounds leave room for their own rounding.
inline int64_t draw(const float* row, int64_t vocab, const float* maxima, int64_t likeliest, float low,
                    const Counter& counter) {
  int32_t words[4][kLanes];
  const auto fill = [&](int64_t first_quad) {
    vi random[4];
    philox(add_int(set1_int(static_cast<int32_t>(first_quad)), count_up()), counter, random);
    for (int j = 0; j < 4; ++j) {
      const vi bits = shift_right(random[j], 9);
      std::memcpy(words[j], &bits, sizeof bits);
    }
  };
  int64_t best_id = likeliest;
  fill(likeliest / 4);
  float best = row[likeliest] + gumbel(words[likeliest % 4][0]);
  for (int64_t chunk = 0; chunk * kChunk < vocab; ++chunk) {
    const float most = maxima[chunk];
    if (!(most >= low) || most + kMostNoise < best) continue;
    const float needed = best - most - 1e-4f * (1.0f + std::fabs(best));
    const float uniform = std::exp(-std::exp(-needed)) - 2e-6f;
    const int32_t bound = uniform <= 0.0f ? 0 : static_cast<int32_t>(uniform * 0x1p23f);
    for (int64_t quad = chunk * (kChunk / 4); quad < (chunk + 1) * (kChunk / 4); quad += kLanes) {
      fill(quad);
      for (int j = 0; j < 4; ++j) {
        vi bits;
        std::memcpy(&bits, words[j], sizeof bits);
        for (uint32_t lanes = at_least(bits, bound); lanes != 0; lanes &= lanes - 1) {
          const int lane = __builtin_ctz(lanes);
          const int64_t id = (quad + lane) * 4 + j;
          if (id >= vocab || !(row[id] >= low) || row[id] == -INFINITY) continue;
          if (row[id] + kMostNoise < best) continue;
          const float score = row[id] + gumbel(words[j][lane]);
          if (score > best || (score == best && id < best_id)) best = score, best_id = id;
        }
      }
    }
  }
  return best_id;
}

inline void sample_row(const Sampling& a, int64_t index, const SamplingSpace& space) {
  const int64_t at = a.rows[index];
  float* row = a.logits + index * a.vocab;
  float most = scan(row, a.vocab, 1.0f, space.maxima);
  bool valid = std::isfinite(most);
  a.token_ids[index] = 0;
  a.valid[index] = valid;
  if (!valid) return;
  const float temperature = a.temperature[at];
  const bool penalized = a.repetition[at] != 1.0f || a.frequency[at] != 0.0f || a.presence[at] != 0.0f;
  if (penalized)
    penalize(row, a.vocab, a.tokens + at * a.token_stride, a.history_lens[index], a.output_positions[index],
             a.repetition[at], a.frequency[at], a.presence[at], space.marks);
  if (penalized || temperature != 1.0f) {
    most = scan(row, a.vocab, temperature, space.maxima);
    a.valid[index] = std::isfinite(most);
    if (!std::isfinite(most)) return;
  }
  const int64_t likeliest = first_equal(row, a.vocab, space.maxima, most);
  a.token_ids[index] = likeliest;
  if (a.greedy[at]) return;
  float low = -INFINITY;
  if (a.top_k[at] > 0 || a.top_p[at] < 1.0 || a.min_p[at] > 0.0)
    low = truncate(row, a.vocab, most, a.top_k[at], a.top_p[at], a.min_p[at], space);
  const uint64_t seed = static_cast<uint64_t>(a.seeds[at]);
  const uint64_t position = static_cast<uint64_t>(a.output_positions[index]);
  a.token_ids[index] = draw(row, a.vocab, space.maxima, likeliest, low,
                            {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32),
                             static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
}

void sample(Pool& pool, const Sampling& a) {
  if (a.n <= 0 || a.vocab <= 0) return;
  const int64_t bytes = space_bytes(a.vocab);
  char* memory = static_cast<char*>(pool.scratch(static_cast<size_t>(bytes * pool.size())));
  pool.parallel(a.n, [&](int64_t index, int worker) {
    sample_row(a, index, space_of(memory + worker * bytes, a.vocab));
  });
}
