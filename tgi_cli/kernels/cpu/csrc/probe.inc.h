// What the machine can do, to compare kernels with: bytes read a second, and products of the instructions
// that the GEMMs are made of, from registers. Included once per instruction set.

// Calls step(i) for accumulators 0 .. 11, often enough to hide the latency of any instruction.
template <class Step>
inline void twelve(int64_t rounds, const Step& step) {
  for (int64_t n = 0; n < rounds; ++n) {
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) step(i);
  }
}

// Elements of `sink` keep the compiler from dropping the work.
void probe(Pool& pool, const Probe& a) {
  const int64_t threads = pool.size();
  pool.parallel(threads, [&](int64_t item, int) {
    float last[kLanes] = {};
    if (a.kind == 0) {
      const int64_t part = a.amount / threads / 256 * 256;
      const auto* p = static_cast<const uint8_t*>(a.data) + item * part;
      vi sums[4] = {set1_int(0), set1_int(0), set1_int(0), set1_int(0)};
      for (int64_t i = 0; i + 4 * kLanes * 4 <= part; i += 4 * kLanes * 4)
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
          prefetch(p + i + v * kLanes * 4 + kAheadBytes);
          sums[v] = bit_or(sums[v], load_pairs(p + i + v * kLanes * 4));
        }
      store(last, from_bits(bit_or(bit_or(sums[0], sums[1]), bit_or(sums[2], sums[3]))));
    } else if (a.kind == 1) {
      vf acc[12];
      const vi ones = set1_int(0x3f803f80);
#pragma GCC unroll 12
      for (int i = 0; i < 12; ++i) acc[i] = zero();
      twelve(a.amount, [&](int i) { dot2(acc[i], ones, ones); });
#pragma GCC unroll 12
      for (int i = 1; i < 12; ++i) acc[0] = add(acc[0], acc[i]);
      store(last, acc[0]);
    } else {
      vi acc[12];
      const vi ones = set1_int(0x01010101);
#pragma GCC unroll 12
      for (int i = 0; i < 12; ++i) acc[i] = set1_int(0);
      twelve(a.amount, [&](int i) { dot4<8>(acc[i], ones, ones); });
#pragma GCC unroll 12
      for (int i = 1; i < 12; ++i) acc[0] = bit_or(acc[0], acc[i]);
      store(last, from_bits(acc[0]));
    }
    a.sink[item] = last[0];
  });
}
