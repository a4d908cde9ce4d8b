// A small thread pool that waits for completed work items, never for threads.
//
// Items are claimed from one 64-bit ticket (epoch, next item); a claim succeeds only while its job is
// the current one. A worker that lost its core holds back the one item it claimed and nothing else:
// the caller works through the rest, then sleeps, which frees its core for that worker, and returns
// when all items are done. Where such waits take a large share of the time, other processes need the
// cores: fewer threads take part for a while. Workers spin briefly between jobs of one step, then
// sleep; an idle pool uses no CPU.
//
// Jobs come from one thread at a time, the caller. It may delegate that to the first worker, go about
// something else, and lend a hand with the jobs when it is back.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

#include "run_delay.h"

namespace tgi {

class Pool {
 public:
  using Body = void (*)(void* context, int64_t item, int worker);

  explicit Pool(int num_threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // Runs body(context, i, worker) once for each i in [0, items). The caller, or who took its place by
  // `delegate`, is the one thread that may call it.
  void run(int64_t items, Body body, void* context);

  template <class F>
  void parallel(int64_t items, F&& f) {
    run(items, [](void* c, int64_t i, int w) { (*static_cast<F*>(c))(i, w); }, &f);
  }

  // Memory for the kernel that is running, kept from call to call; for the calling thread to ask for
  // and for all items to use. Aligned to 64 bytes; what it held before is lost.
  void* scratch(size_t bytes);

  // What comes next in memory: from `data` on, `share` bytes for each thread, the caller first, as it is
  // the first to claim. Threads without an item fetch the beginning of their share while others still
  // work; a hint, and never more than that.
  void look_ahead(const void* data, int64_t share) {
    ahead_share_.store(share, std::memory_order_relaxed);
    ahead_.store(static_cast<const char*>(data), std::memory_order_release);
  }

  // Has the first worker call task(context), which may call `run`; from then on until `delegating` is
  // false the caller may not. Asked again while the task runs, it is called once more after that: so
  // what a task saw too late to act on is not lost. False if there is no worker.
  using Task = void (*)(void* context);
  bool delegate(Task task, void* context);
  bool delegating() const { return delegated_.load(std::memory_order_seq_cst) != kNone; }

  // The caller takes part in the jobs of the task until over(context). Who makes that true calls `wake`.
  void assist(bool (*over)(void* context), void* context);
  void wake();

  int size() const { return static_cast<int>(threads_.size()) + 1; }
  // How many threads take part now; fewer than size() while other processes need the cores.
  int width() const { return width_.load(std::memory_order_relaxed); }

 private:
  using Clock = std::chrono::steady_clock;
  // Atomic, as a worker that is late may read a job while a later one is written over it; it then
  // claims nothing. Relaxed: what publishes a job is the ticket.
  struct alignas(64) Job {
    std::atomic<Body> body{nullptr};
    std::atomic<void*> context{nullptr};
    std::atomic<uint32_t> items{0};
  };
  static constexpr uint32_t kJobs = 64;  // a stale reader may be this many jobs behind

  // How far a thread is in fetching what `look_ahead` named last.
  struct Fetched {
    const char* data = nullptr;
    int64_t bytes = 0;
  };

  enum : uint32_t { kNone, kRunning, kAsked };

  void work(int worker);
  void run_delegated();
  // Runs items of whatever jobs come, spinning between them for a moment and then sleeping.
  template <class F>
  void take_part(int worker, F over);
  void fetch_some(int worker, Fetched* fetched) const;
  // How many items it ran.
  uint32_t claim_and_run(uint32_t epoch, int worker);
  void wait_for(uint32_t items, Clock::time_point started, uint32_t ran);
  void adapt(Clock::time_point now);

  alignas(64) std::atomic<uint64_t> ticket_{0};  // epoch << 32 | next item
  alignas(64) std::atomic<uint32_t> done_{0};
  alignas(64) std::atomic<uint32_t> sleepers_{0};
  std::atomic<uint32_t> wake_{0};
  std::atomic<uint32_t> caller_sleeps_{0};
  std::atomic<uint32_t> delegated_{kNone};
  Task task_ = nullptr;  // written while nothing is delegated
  void* task_context_ = nullptr;
  std::atomic<int> caller_{0};  // which worker calls `run`
  std::atomic<int> width_;
  std::atomic<bool> stop_{false};
  Fetched fetched_;  // the caller's
  alignas(64) std::atomic<const char*> ahead_{nullptr};
  std::atomic<int64_t> ahead_share_{0};
  Job jobs_[kJobs];
  // The caller's alone: since when it counts, how long it slept since then, until when the width stays
  // reduced, and for how long it will be the next time.
  Clock::time_point window_start_, narrow_until_;
  Clock::duration slept_{}, narrow_;
  bool trial_ = false;  // one more thread takes part than did before
  RunDelay delay_;
  void* scratch_ = nullptr;
  size_t scratch_bytes_ = 0;
  std::vector<std::thread> threads_;
};

}  // namespace tgi
