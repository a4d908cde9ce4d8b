// `races pool|delegated|collective`: threads that share what kernels share, for the thread sanitizer to watch.
//
// It knows C++'s memory model and not this machine's: an order of accesses that only x86 happens to
// keep is reported too. Numbers are checked on the way. Ranks are threads here and processes in an
// engine; to the memory that they share it is the same.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "collective.h"

namespace {

void check(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "wrong: %s\n", what);
  std::exit(3);
}

// Many small jobs: workers come late, fall behind by whole jobs, sleep and are woken.
void pool() {
  tgi::Pool pool(3);
  std::vector<int64_t> values(64);
  for (int64_t job = 1; job <= 4000; ++job) {
    const int64_t items = 2 + job % 9;
    pool.parallel(items, [&](int64_t i, int) { values[static_cast<size_t>(i)] = job * i; });
    for (int64_t i = 0; i < items; ++i) check(values[static_cast<size_t>(i)] == job * i, "an item");
    if (job % 1000 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
}

// What a caller hands to the first worker, and reads when that is over or has gone on.
struct Handed {
  tgi::Pool& pool;
  int64_t wanted = 0;  // written by the caller before it asks
  std::atomic<int64_t> asked{0}, done{0};
  int64_t ended = 0;  // the worker's until it is over
  std::vector<int64_t> values = std::vector<int64_t>(64);

  void run() {
    for (int64_t job = done.load(std::memory_order_relaxed); job < asked.load(std::memory_order_seq_cst);) {
      check(job < wanted, "more than was wanted");
      pool.parallel(2 + job % 5, [&](int64_t i, int) { values[static_cast<size_t>(job % 2 * 32 + i)] = job * i; });
      done.store(++job, std::memory_order_seq_cst);
      pool.wake();
    }
    ++ended;
  }
};

// The caller asks for one job more than it waits for, goes away, lends a hand, and takes over again.
void delegated() {
  tgi::Pool pool(3);
  for (int64_t turn = 0; turn < 200; ++turn) {
    Handed handed{pool};
    handed.wanted = 12;
    int64_t taken = 0;
    for (; taken < 10; ++taken) {
      handed.asked.store(taken + 2, std::memory_order_seq_cst);
      check(pool.delegate([](void* h) { static_cast<Handed*>(h)->run(); }, &handed), "a worker");
      if (turn % 50 == 7) std::this_thread::sleep_for(std::chrono::microseconds(200));
      std::pair<Handed*, int64_t> wait{&handed, taken};
      pool.assist(
          [](void* w) {
            auto* each = static_cast<std::pair<Handed*, int64_t>*>(w);
            return each->first->done.load(std::memory_order_seq_cst) > each->second;
          },
          &wait);
      for (int64_t i = 0; i < 2 + taken % 5; ++i)
        check(handed.values[static_cast<size_t>(taken % 2 * 32 + i)] == taken * i, "a job that was waited for");
    }
    pool.assist([](void* p) { return !static_cast<tgi::Pool*>(p)->delegating(); }, &pool);
    check(handed.done.load() == 11 && handed.ended > 0, "all that was asked for");
    std::vector<int64_t> own(8);
    pool.parallel(8, [&](int64_t i, int) { own[static_cast<size_t>(i)] = turn + i; });
    check(own[7] == turn + 7, "the caller's own job");
  }
}

constexpr int kTurns = 30;
constexpr size_t kCapacity = 20000 * sizeof(float);  // more than one work item of the pool

void rank_of(void* memory, int rank, int world) {
  tgi::Pool pool(2);
  tgi::Collective end(memory, rank, world, kCapacity);
  const int64_t sizes[] = {1, 7, 576, 20000, 50000};  // the last one goes in pieces
  std::vector<float> x(50000), into(50000);
  for (int turn = 0; turn < kTurns; ++turn) {
    for (int64_t n : sizes) {
      float* from = turn % 2 ? end.staging(n) : x.data();
      if (from == nullptr) from = x.data();
      for (int64_t i = 0; i < n; ++i) from[i] = static_cast<float>(rank + turn + i % 5);
      std::fill(into.begin(), into.begin() + n, 1.0f);
      check(end.all_reduce(&pool, from, into.data(), n, true), "a sum was given up");
      for (int64_t i = 0; i < n; ++i)
        check(into[static_cast<size_t>(i)] ==
                  static_cast<float>(1 + world * (turn + i % 5) + world * (world - 1) / 2),
              "a sum");
    }
    std::vector<int64_t> columns;
    for (int each = 0; each < world; ++each) columns.push_back(1 + 3 * each);
    const int64_t own = columns[static_cast<size_t>(rank)], rows = 4;
    int64_t width = 0;
    for (int64_t each : columns) width += each;
    std::vector<float> part(static_cast<size_t>(rows * own), static_cast<float>(rank + turn));
    std::vector<float> all(static_cast<size_t>(rows * width));
    check(end.all_gather(part.data(), all.data(), rows, columns.data()), "a gather was given up");
    for (int64_t row = 0, at = 0; row < rows; ++row)
      for (int each = 0; each < world; ++each)
        for (int64_t i = 0; i < columns[static_cast<size_t>(each)]; ++i, ++at)
          check(all[static_cast<size_t>(at)] == static_cast<float>(each + turn), "a gather");
  }
  // The others never come to this one; the thread that watches progress ends it.
  if (rank == 0) check(!end.all_reduce(&pool, x.data(), into.data(), 5, false), "an abort");
}

void collective(int world) {
  const size_t bytes = (tgi::Collective::bytes(world, kCapacity) + 63) / 64 * 64;
  void* memory = std::aligned_alloc(64, bytes);
  std::memset(memory, 0, bytes);
  std::vector<std::thread> ranks;
  for (int rank = 0; rank < world; ++rank) ranks.emplace_back(rank_of, memory, rank, world);
  tgi::Collective watcher(memory, 0, world, kCapacity);
  for (uint64_t last = 0, same = 0; same < 40 || watcher.progress(1) < kTurns;) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    const uint64_t now = watcher.progress(0);
    same = now == last && now > watcher.progress(1) ? same + 1 : 0;
    last = now;
  }
  watcher.abort();
  for (auto& rank : ranks) rank.join();
  std::free(memory);
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 2 && std::string(arguments[1]) == "pool") {
    pool();
  } else if (count == 2 && std::string(arguments[1]) == "delegated") {
    delegated();
  } else {
    collective(2);
    collective(3);
  }
  return 0;
}
