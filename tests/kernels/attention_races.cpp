// `attention_races`: threads that share out the tiles of decoding rows, for the thread sanitizer to watch.
//
// Rows are rotated, their keys and values stored and read, and results merged, all in one job. The bits
// must be those of one thread.
#include "variant.h"

#include <cstdio>
#include <cstdlib>
#include <random>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define TGI_NS avx2
#include "simd_avx2.h"
#include "simd.h"

namespace tgi::avx2 {
namespace {
#include "epilogue.inc.h"
#include "elementwise.inc.h"
#include "attention.inc.h"

constexpr int64_t kHeads = 6, kKvHeads = 2, kDim = 64, kLength = 1024, kSeqs = 4;

// Decoding rows with caches of their own: of several tiles, of one, of a tile that has just begun.
struct Rows {
  std::vector<int32_t> lens{700, 60, 65, 321}, starts{0, 1, 2, 3, 4}, table;
  std::vector<int64_t> positions, slots;
  std::vector<float> qkv, cos_sin;
  std::vector<uint16_t> keys, values, queries, out;

  Rows() {
    constexpr int64_t blocks = kLength / kBlock;
    for (int64_t i = 0; i < kSeqs * blocks; ++i) table.push_back(static_cast<int32_t>((i * 37) % (kSeqs * blocks)));
    for (int64_t s = 0; s < kSeqs; ++s) {
      const int64_t at = lens[static_cast<size_t>(s)] - 1;
      positions.push_back(at);
      slots.push_back(table[static_cast<size_t>(s * blocks + at / kBlock)] * kBlock + at % kBlock);
    }
    std::minstd_rand draw(1);
    const auto number = [&] { return static_cast<float>(draw() % 2048) / 1024.0f - 1.0f; };
    for (int64_t i = 0; i < kSeqs * (kHeads + 2 * kKvHeads) * kDim; ++i) qkv.push_back(number());
    for (int64_t i = 0; i < kLength * kDim; ++i) cos_sin.push_back(number());
    for (int64_t i = 0; i < kSeqs * kLength * kKvHeads * kDim; ++i) {
      for (auto* cache : {&keys, &values}) {
        const float value = number();
        uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        cache->push_back(static_cast<uint16_t>(bits >> 16));
      }
    }
    queries.resize(kSeqs * kHeads * kDim);
    out.resize(queries.size());
  }

  std::vector<uint16_t> attended(Pool& pool) {
    std::vector<float> used = qkv;  // keys are rotated in place
    const RopeStore rope{used.data(), cos_sin.data(), nullptr, nullptr, positions.data(), slots.data(),
                         queries.data(), keys.data(), values.data(), kSeqs, kHeads, kKvHeads, kDim, kDim,
                         1e-5f, static_cast<int32_t>(KvForm::kBf16)};
    const Attention attention{queries.data(), keys.data(), values.data(), table.data(), lens.data(), starts.data(),
                              out.data(), kSeqs, kLength / kBlock, kHeads, kKvHeads, kDim, 0, 0.125f, 0.0f,
                              static_cast<int32_t>(KvForm::kBf16), nullptr, nullptr};
    attention_in(pool, attention, Bf16Pairs{}, &rope);
    return out;
  }
};

}  // namespace

int run() {
  Rows rows;
  Pool one(1), three(3);
  const auto expected = rows.attended(one);
  for (int i = 0; i < 200; ++i)
    if (rows.attended(three) != expected) {
      std::fprintf(stderr, "wrong: other bits on three threads\n");
      return 3;
    }
  return 0;
}

}  // namespace tgi::avx2
#pragma GCC pop_options

int main() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")
             ? tgi::avx2::run()
             : 77;  // nothing was watched
}
