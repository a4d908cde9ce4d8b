#include "pool.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tgi {
namespace {

// Long enough to bridge the Python and sampling between two steps' kernels would waste a core; this
// only bridges the gaps between kernels of one step.
constexpr auto kSpin = std::chrono::microseconds(60);
// Items last some 10 to 100 us; who holds one for longer has probably lost the core.
constexpr auto kCallerSpin = std::chrono::microseconds(40);
// Sleeping for a quarter of a window means a lost core more often than not, and so does a delay of all
// threads together of nearly half of it: then fewer threads take part, and from time to time one more
// is tried again, ever later. Long enough that a core lost for some milliseconds now and then is borne:
// fewer threads would cost more.
constexpr auto kWindow = std::chrono::milliseconds(100);
constexpr auto kTrial = std::chrono::milliseconds(25);
constexpr auto kNarrow = std::chrono::milliseconds(200);
constexpr auto kNarrowMost = std::chrono::milliseconds(1600);
constexpr double kSleptShare = 0.25, kDelayShare = 0.45;
// Of what `look_ahead` names a thread fetches so much, a few lines between two looks for work: far less
// than the second-level cache, and more than it gets done in the gaps between two kernels.
constexpr int64_t kFetchMost = 128 * 1024;
constexpr int64_t kFetchLines = 4;

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void futex_wait(std::atomic<uint32_t>* word, uint32_t expected) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAIT_PRIVATE, expected, nullptr, nullptr, 0);
}

void futex_wake(std::atomic<uint32_t>* word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
}

// Rounding to nearest, exceptions masked, denormals kept: the same in every thread, so that a result
// does not depend on which thread computed it.
inline void set_float_mode() {
#if defined(__x86_64__)
  _mm_setcsr(0x1f80);
#elif defined(__aarch64__)
  asm volatile("msr fpcr, %0" ::"r"(uint64_t{0}));
#endif
}

}  // namespace

Pool::Pool(int num_threads)
    : width_(num_threads), window_start_(Clock::now()), narrow_until_(window_start_), narrow_(kNarrow),
      delay_(num_threads) {
  for (int i = 1; i < num_threads; ++i) threads_.emplace_back([this, i] { work(i); });
}

Pool::~Pool() {
  stop_.store(true, std::memory_order_seq_cst);
  wake_.fetch_add(1, std::memory_order_seq_cst);
  futex_wake(&wake_);
  for (auto& thread : threads_) thread.join();
  std::free(scratch_);
}

void* Pool::scratch(size_t bytes) {
  if (bytes > scratch_bytes_) {
    std::free(scratch_);
    scratch_bytes_ = (bytes + bytes / 2 + 63) / 64 * 64;
    scratch_ = std::aligned_alloc(64, scratch_bytes_);
    if (scratch_ == nullptr) std::abort();  // 1.5 bytes per activation of a step; nothing can go on
  }
  return scratch_;
}

uint32_t Pool::claim_and_run(uint32_t epoch, int worker) {
  // The job was written before its epoch was published and is rewritten only kJobs epochs later; a
  // successful claim proves that the epoch was still current after the job was read. Claims acquire
  // what the ticket's store released, and the caller acquires from `done_` what every item wrote.
  const Job& job = jobs_[epoch % kJobs];
  const Body body = job.body.load(std::memory_order_relaxed);
  void* const context = job.context.load(std::memory_order_relaxed);
  const uint32_t items = job.items.load(std::memory_order_relaxed);
  uint32_t ran = 0;
  uint64_t ticket = ticket_.load(std::memory_order_acquire);
  while (static_cast<uint32_t>(ticket >> 32) == epoch && static_cast<uint32_t>(ticket) < items) {
    if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel,
                                       std::memory_order_acquire))
      continue;
    body(context, static_cast<uint32_t>(ticket), worker);
    const uint32_t done = done_.fetch_add(1, std::memory_order_seq_cst) + 1;
    if (done == items && caller_sleeps_.load(std::memory_order_seq_cst) != 0) futex_wake(&done_);
    ++ran;
    ticket = ticket_.load(std::memory_order_acquire);
  }
  return ran;
}

void Pool::run(int64_t items, Body body, void* context) {
  if (items <= 0) return;
  const auto started = Clock::now();
  const int caller = caller_.load(std::memory_order_relaxed);
  if (caller == 0) delay_.join(0);
  if (items > 1 && !threads_.empty()) adapt(started);
  if (items == 1 || threads_.empty() || width_.load(std::memory_order_relaxed) <= 1) {
    for (int64_t i = 0; i < items; ++i) body(context, i, caller);
    return;
  }
  const uint32_t epoch = static_cast<uint32_t>(ticket_.load(std::memory_order_relaxed) >> 32) + 1;
  Job& job = jobs_[epoch % kJobs];
  job.body.store(body, std::memory_order_relaxed);
  job.context.store(context, std::memory_order_relaxed);
  job.items.store(static_cast<uint32_t>(items), std::memory_order_relaxed);
  done_.store(0, std::memory_order_relaxed);
  ticket_.store(static_cast<uint64_t>(epoch) << 32, std::memory_order_seq_cst);
  wake();
  const uint32_t ran = claim_and_run(epoch, caller);
  wait_for(static_cast<uint32_t>(items), started, ran);
}

// Either the caller sees the last item done before it sleeps, or who does it sees that the caller
// sleeps: each announces before it looks.
void Pool::wait_for(uint32_t items, Clock::time_point started, uint32_t ran) {
  if (done_.load(std::memory_order_acquire) == items) return;
  const auto began = Clock::now();
  for (int spins = 1; done_.load(std::memory_order_acquire) < items; ++spins) {
    fetch_some(caller_.load(std::memory_order_relaxed), &fetched_);
    relax();
    if ((spins & 63) == 0 && Clock::now() - began > kCallerSpin) break;
  }
  if (done_.load(std::memory_order_acquire) == items) return;
  caller_sleeps_.store(1, std::memory_order_seq_cst);
  for (uint32_t done; (done = done_.load(std::memory_order_seq_cst)) < items;) futex_wait(&done_, done);
  caller_sleeps_.store(0, std::memory_order_seq_cst);
  // Who works on an item for no longer than the caller did on each of its own has its core: items of
  // a long prompt last milliseconds.
  const auto waited = Clock::now() - began;
  const auto item = ran > 0 ? (began - started) / ran : Clock::duration::zero();
  if (waited > item) slept_ += waited - item;
}

void Pool::fetch_some(int worker, Fetched* fetched) const {
  const char* data = ahead_.load(std::memory_order_acquire);
  if (data == nullptr) return;
  if (data != fetched->data) *fetched = {data, 0};
  const int64_t share = ahead_share_.load(std::memory_order_relaxed);
  if (fetched->bytes >= (share < kFetchMost ? share : kFetchMost)) return;
  // The workers claim behind the caller, in whatever order; with two threads that is one order.
  const int caller = caller_.load(std::memory_order_relaxed);
  const int turn = worker == caller ? 0 : worker == 0 ? caller : worker;
  const char* at = data + turn * share + fetched->bytes;
  for (int64_t i = 0; i < kFetchLines; ++i) __builtin_prefetch(at + i * 64, 0, 2);
  fetched->bytes += kFetchLines * 64;
}

// Called before each job of more than one item.
void Pool::adapt(Clock::time_point now) {
  const int width = width_.load(std::memory_order_relaxed);
  const Clock::duration window = trial_ ? kTrial : kWindow, counted = now - window_start_;
  const bool wait_over = width < size() && now >= narrow_until_;
  if (counted < window && !wait_over) return;
  const auto delay = delay_.since_last();
  const bool lost = slept_ > counted * kSleptShare || delay > counted * kDelayShare;
  // A window that is long over says what was, not what is.
  if (counted < 2 * window && lost) {
    if (width > 1) width_.store(width - 1, std::memory_order_relaxed);
    narrow_until_ = now + narrow_;
    narrow_ = std::min<Clock::duration>(2 * narrow_, kNarrowMost);
    trial_ = false;
  } else if (wait_over) {
    width_.store(width + 1, std::memory_order_relaxed);
    narrow_until_ = now + kTrial;
    trial_ = true;
  } else {
    if (!trial_ && width == size()) narrow_ = kNarrow;
    trial_ = false;
  }
  window_start_ = now;
  slept_ = Clock::duration::zero();
}

void Pool::wake() {
  if (sleepers_.load(std::memory_order_seq_cst) == 0) return;
  wake_.fetch_add(1, std::memory_order_seq_cst);
  futex_wake(&wake_);
}

bool Pool::delegate(Task task, void* context) {
  if (threads_.empty()) return false;
  if (delegated_.load(std::memory_order_seq_cst) == kNone) {
    delay_.join(0);
    task_ = task, task_context_ = context;
  }
  if (delegated_.exchange(kAsked, std::memory_order_seq_cst) == kNone) wake();
  return true;
}

void Pool::run_delegated() {
  for (uint32_t running = kRunning;; running = kRunning) {
    delegated_.store(kRunning, std::memory_order_seq_cst);
    caller_.store(1, std::memory_order_relaxed);
    task_(task_context_);
    caller_.store(0, std::memory_order_relaxed);
    if (delegated_.compare_exchange_strong(running, kNone, std::memory_order_seq_cst)) break;
  }
  wake();  // who waits for the end of it
}

template <class F>
void Pool::take_part(int worker, F over) {
  uint32_t seen = 0;
  Fetched fetched;
  while (!over()) {
    const auto deadline = Clock::now() + kSpin;
    bool found = false;
    for (int spins = 0; !over(); ++spins) {
      const uint32_t epoch = static_cast<uint32_t>(ticket_.load(std::memory_order_acquire) >> 32);
      if (epoch != seen) {
        seen = epoch;
        if (worker < width_.load(std::memory_order_relaxed)) found = claim_and_run(epoch, worker) > 0;
        if (found) break;
      }
      fetch_some(worker, &fetched);
      relax();
      if ((spins & 63) == 63 && Clock::now() > deadline) break;
    }
    if (found) continue;
    // Sleep protocol: announce, look once more, then wait on a word read before that look. Who
    // publishes a job, or ends what is waited for, does so before it reads `sleepers_`, so one of the
    // two sees the other.
    const uint32_t word = wake_.load(std::memory_order_seq_cst);
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    const uint32_t epoch = static_cast<uint32_t>(ticket_.load(std::memory_order_seq_cst) >> 32);
    if (epoch == seen && !over()) futex_wait(&wake_, word);
    sleepers_.fetch_sub(1, std::memory_order_seq_cst);
  }
}

void Pool::assist(bool (*over)(void* context), void* context) {
  take_part(0, [over, context] { return over(context); });
}

void Pool::work(int worker) {
  set_float_mode();
  delay_.join(worker);
  while (!stop_.load(std::memory_order_seq_cst)) {
    take_part(worker, [this, worker] {
      return stop_.load(std::memory_order_seq_cst) ||
             (worker == 1 && delegated_.load(std::memory_order_seq_cst) == kAsked);
    });
    if (worker == 1 && delegated_.load(std::memory_order_seq_cst) == kAsked) run_delegated();
  }
}

}  // namespace tgi
