// `pool_width`: how many threads of a pool take part, where one of two has its core and where it has not.
//
// Items sleep, so that it does not matter what else the machine does: an item whose core is lost is one
// that takes twenty times as long as the caller's.
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
  return 0;
}
