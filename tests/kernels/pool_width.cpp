// `pool_width`: how many threads of a pool take part, where one of two has its core and where it has not.
//
// Items sleep, so that it does not matter what else the machine does: an item whose core is lost is one
// that takes twenty times as long as the caller's. Only at the end do they compute, on one core for both.
#include <sched.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "pool.h"

namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

void check(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "wrong: %s\n", what);
  std::exit(3);
}

// Jobs of `items` for a while; what the width was at the end, and the least that it was.
struct Seen {
  int last, least;
};

template <class Item>
Seen run(tgi::Pool& pool, int64_t items, milliseconds time, const Item& item) {
  Seen seen{pool.width(), pool.width()};
  for (const auto end = Clock::now() + time; Clock::now() < end;) {
    pool.parallel(items, [&](int64_t, int worker) { std::this_thread::sleep_for(item(worker)); });
    seen.last = pool.width();
    if (seen.last < seen.least) seen.least = seen.last;
  }
  return seen;
}

}  // namespace

int main() {
  tgi::Pool pool(2);
  const auto even = [](int worker) { return milliseconds(worker == 0 ? 6 : 9); };
  const auto lost = [](int worker) { return milliseconds(worker == 0 ? 1 : 20); };
  // The caller waits for a third of the time, though for less than an item: the other has its core.
  check(run(pool, 2, milliseconds(600), even).least == 2, "long items are no lost core");
  check(run(pool, 4, milliseconds(600), lost).least == 1, "a lost core makes it narrow");
  check(run(pool, 2, milliseconds(800), even).last == 2, "and it gets wide again");
  // A core that is lost once in a while is borne.
  int64_t jobs = 0;
  const auto sometimes = [&](int worker) { return milliseconds(worker == 1 && ++jobs % 60 == 0 ? 12 : 2); };
  check(run(pool, 4, milliseconds(600), sometimes).least == 2, "a core is lost for a moment");
  // Threads that wait for a core: only the scheduler knows.
  if (access("/proc/thread-self/schedstat", R_OK) != 0) return 0;
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(sched_getcpu(), &one);
  check(sched_setaffinity(0, sizeof one, &one) == 0, "one core for all");
  tgi::Pool crowded(2);
  const auto end = Clock::now() + milliseconds(800);
  int least = 2;
  while (Clock::now() < end) {
    crowded.parallel(8, [](int64_t, int) {
      for (const auto over = Clock::now() + std::chrono::microseconds(50); Clock::now() < over;) {
      }
    });
    if (crowded.width() < least) least = crowded.width();
  }
  check(least == 1, "two threads on one core");
  return 0;
}
