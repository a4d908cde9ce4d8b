// Sums and gathers between processes of one machine, through memory that they share.
//
// Every rank makes the same calls in the same order. A sum adds the ranks' values in the order of the
// ranks, whatever the size of the message, so it has the same bits on every rank and in every batch.
// Waiting spins, then yields, then sleeps; it ends when somebody raises the abort flag.
//
// Order of memory: a rank writes its slot and the size, then releases `sent`; the others acquire it
// before they read either. Reading is over before a rank releases its next message, and a slot is
// written again only after that one of every rank was acquired. The flag and `progress` carry no data
// and are read relaxed. tests/kernels/races.cpp has the thread sanitizer watch this.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "pool.h"

namespace tgi {

class Collective {
 public:
  static constexpr int kMaxRanks = 64;

  // Bytes of shared memory for `world` ranks and messages of up to `capacity` bytes in one piece.
  static size_t bytes(int world, size_t capacity);

  // `memory` is zeroed before the first rank comes, and outlives the object.
  Collective(void* memory, int rank, int world, size_t capacity);

  // Where the next sum's values may be written to save a copy; null if n floats do not fit.
  float* staging(int64_t n);

  // into = (accumulate ? into : 0) + the sum of x over all ranks. False: aborted. x may be staging(n).
  bool all_reduce(Pool* pool, const float* x, float* into, int64_t n, bool accumulate);

  // Rows of all ranks side by side: out [rows, sum of columns], from x [rows, columns[rank]].
  bool all_gather(const float* x, float* out, int64_t rows, const int64_t* columns);

  void abort() { header_->aborted.store(1, std::memory_order_release); }
  bool aborted() const { return header_->aborted.load(std::memory_order_relaxed) != 0; }
  // Messages that a rank has sent; it stands still on a rank that hangs.
  uint64_t progress(int rank) const { return header_->ranks[rank].sent.load(std::memory_order_relaxed); }

 private:
  struct alignas(64) Line {
    std::atomic<uint64_t> sent;
    uint64_t bytes[2];  // of the message in either slot, to notice ranks that run different programs
  };
  struct alignas(64) Header {
    std::atomic<uint32_t> aborted;
    Line ranks[kMaxRanks];
  };

  char* slot(int rank, uint64_t message) const {
    return data_ + (static_cast<size_t>(rank) * 2 + (message & 1)) * capacity_;
  }
  // Publishes what lies in the own slot, then waits for the same message of every rank.
  bool exchange(size_t bytes);

  Header* header_;
  char* data_;
  const int rank_, world_;
  const size_t capacity_;
  uint64_t next_ = 0;  // number of the next message
};

// How a step reaches the other ranks, whoever carries the messages. `abort` makes further calls fail.
struct Ranks {
  void* self;
  float* (*staging)(void* self, int64_t n);
  // 0, or 1 if the sum was given up.
  int32_t (*all_reduce)(void* self, void* pool, const float* x, float* into, int64_t n, int32_t accumulate);
  int64_t first_token, num_tokens;  // rows of the token table that this rank holds
};

}  // namespace tgi
