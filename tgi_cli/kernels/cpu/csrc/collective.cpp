#include "collective.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tgi {
namespace {

constexpr int kSpins = 4000;    // about 40 us: longer than ranks that compute the same differ
constexpr int kYields = 20000;  // some milliseconds when nobody else wants the core

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

constexpr int64_t kPiece = 1 << 14;  // floats of one work item

// The compiler is told not to vectorize by itself (see pyproject.toml).
using Floats = float __attribute__((vector_size(32), aligned(4), may_alias));
constexpr int64_t kFloats = 8;

void add_to(float* sum, const float* part, int64_t n) {
  int64_t i = 0;
  for (; i + kFloats <= n; i += kFloats)
    *reinterpret_cast<Floats*>(sum + i) += *reinterpret_cast<const Floats*>(part + i);
  for (; i < n; ++i) sum[i] += part[i];
}

template <class F>
void in_pieces(Pool* pool, int64_t n, F&& f) {
  const int64_t items = (n + kPiece - 1) / kPiece;
  auto piece = [&](int64_t item, int) { f(item * kPiece, std::min(n, (item + 1) * kPiece)); };
  if (pool == nullptr || items <= 1) {
    for (int64_t i = 0; i < items; ++i) piece(i, 0);
  } else {
    pool->parallel(items, std::move(piece));
  }
}

}  // namespace

size_t Collective::bytes(int world, size_t capacity) {
  return sizeof(Header) + static_cast<size_t>(world) * 2 * capacity;
}

Collective::Collective(void* memory, int rank, int world, size_t capacity)
    : header_(static_cast<Header*>(memory)),
      data_(static_cast<char*>(memory) + sizeof(Header)),
      rank_(rank),
      world_(world),
      capacity_(capacity) {}

float* Collective::staging(int64_t n) {
  if (static_cast<size_t>(n) * sizeof(float) > capacity_) return nullptr;
  return reinterpret_cast<float*>(slot(rank_, next_));
}

// A slot is written again two messages later. By then every rank has sent the message in between, so
// it has read this one.
bool Collective::exchange(size_t bytes) {
  Line& own = header_->ranks[rank_];
  own.bytes[next_ & 1] = bytes;
  own.sent.store(next_ + 1, std::memory_order_release);
  for (int rank = 0; rank < world_; ++rank) {
    Line& peer = header_->ranks[rank];
    for (int turn = 0; peer.sent.load(std::memory_order_acquire) <= next_; ++turn) {
      if (aborted()) return false;
      if (turn < kSpins)
        relax();
      else if (turn < kYields)
        std::this_thread::yield();
      else
        std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
    if (peer.bytes[next_ & 1] != bytes) {
      abort();
      return false;
    }
  }
  ++next_;
  return !aborted();
}

bool Collective::all_reduce(Pool* pool, const float* x, float* into, int64_t n, bool accumulate) {
  const int64_t most = static_cast<int64_t>(capacity_ / sizeof(float));
  for (int64_t start = 0; start < n; start += most) {
    const int64_t count = std::min(most, n - start);
    float* own = reinterpret_cast<float*>(slot(rank_, next_));
    if (x + start != own)
      in_pieces(pool, count, [&](int64_t from, int64_t to) {
        std::memcpy(own + from, x + start + from, static_cast<size_t>(to - from) * sizeof(float));
      });
    const uint64_t message = next_;
    if (!exchange(static_cast<size_t>(count) * sizeof(float))) return false;
    in_pieces(pool, count, [&](int64_t from, int64_t to) {
      constexpr int64_t kRun = 512;
      float sum[kRun];
      for (int64_t at = from; at < to; at += kRun) {
        const int64_t run = std::min(kRun, to - at);
        std::memcpy(sum, slot(0, message) + at * sizeof(float), static_cast<size_t>(run) * sizeof(float));
        for (int rank = 1; rank < world_; ++rank)
          add_to(sum, reinterpret_cast<const float*>(slot(rank, message)) + at, run);
        float* out = into + start + at;
        if (accumulate)
          add_to(out, sum, run);
        else
          std::memcpy(out, sum, static_cast<size_t>(run) * sizeof(float));
      }
    });
  }
  return true;
}

bool Collective::all_gather(const float* x, float* out, int64_t rows, const int64_t* columns) {
  int64_t width = 0, widest = 0;
  for (int rank = 0; rank < world_; ++rank) {
    width += columns[rank];
    widest = std::max(widest, columns[rank]);
  }
  // Pieces of a row: as many columns of every rank as fit into a slot, then as many rows of them.
  const int64_t most = static_cast<int64_t>(capacity_ / sizeof(float));
  const int64_t run = std::min(widest, most);
  const int64_t together = run > 0 ? std::max<int64_t>(1, most / run) : rows;
  for (int64_t row = 0; row < rows; row += together) {
    const int64_t count = std::min(together, rows - row);
    for (int64_t column = 0; column < widest; column += run) {
      const int64_t mine = std::clamp<int64_t>(columns[rank_] - column, 0, run);
      float* own = reinterpret_cast<float*>(slot(rank_, next_));
      for (int64_t i = 0; i < count; ++i)
        std::memcpy(own + i * mine, x + (row + i) * columns[rank_] + column,
                    static_cast<size_t>(mine) * sizeof(float));
      const uint64_t message = next_;
      // Ranks may hold different numbers of columns; the piece is what they agree on.
      if (!exchange(static_cast<size_t>(count * run) * sizeof(float))) return false;
      int64_t offset = column;
      for (int rank = 0; rank < world_; ++rank) {
        const int64_t theirs = std::clamp<int64_t>(columns[rank] - column, 0, run);
        const float* part = reinterpret_cast<const float*>(slot(rank, message));
        for (int64_t i = 0; i < count; ++i)
          std::memcpy(out + (row + i) * width + offset, part + i * theirs,
                      static_cast<size_t>(theirs) * sizeof(float));
        offset += columns[rank];
      }
    }
  }
  return true;
}

}  // namespace tgi

extern "C" {

int64_t tgi_collective_bytes(int world, int64_t capacity) {
  return static_cast<int64_t>(tgi::Collective::bytes(world, static_cast<size_t>(capacity)));
}

void* tgi_collective(void* memory, int rank, int world, int64_t capacity) {
  return new tgi::Collective(memory, rank, world, static_cast<size_t>(capacity));
}

void tgi_collective_close(void* self) { delete static_cast<tgi::Collective*>(self); }

float* tgi_collective_staging(void* self, int64_t n) { return static_cast<tgi::Collective*>(self)->staging(n); }

// 0, or 1 if it was given up.
int32_t tgi_collective_all_reduce(void* self, void* pool, const float* x, float* into, int64_t n,
                                  int32_t accumulate) {
  return !static_cast<tgi::Collective*>(self)->all_reduce(static_cast<tgi::Pool*>(pool), x, into, n,
                                                          accumulate != 0);
}

int32_t tgi_collective_all_gather(void* self, const float* x, float* out, int64_t rows,
                                  const int64_t* columns) {
  return !static_cast<tgi::Collective*>(self)->all_gather(x, out, rows, columns);
}

void tgi_collective_abort(void* self) { static_cast<tgi::Collective*>(self)->abort(); }

int32_t tgi_collective_aborted(void* self) { return static_cast<tgi::Collective*>(self)->aborted(); }

uint64_t tgi_collective_progress(void* self, int rank) {
  return static_cast<tgi::Collective*>(self)->progress(rank);
}

}  // extern "C"
