// How long threads of this process that could run had no core, as the kernel's scheduler counts it
// (the second number of /proc/<pid>/task/<tid>/schedstat). A kernel without those figures says nothing.
// Knows no pool and decides nothing.
#pragma once

#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <vector>

namespace tgi {

class RunDelay {
 public:
  using Time = std::chrono::nanoseconds;

  explicit RunDelay(int threads) : threads_(static_cast<size_t>(threads)) {}
  ~RunDelay() {
    for (Thread& each : threads_) forget(each);
  }
  RunDelay(const RunDelay&) = delete;
  RunDelay& operator=(const RunDelay&) = delete;

  // The calling thread is number `thread` from now on; cheap if it was before. If another one was, then
  // nobody may be in `since_last`.
  void join(int thread) {
    static thread_local const auto id = static_cast<pid_t>(syscall(SYS_gettid));
    Thread& own = threads_[static_cast<size_t>(thread)];
    if (own.id == id) return;
    forget(own);
    own.id = id;
    char path[64];
    std::snprintf(path, sizeof path, "/proc/self/task/%d/schedstat", static_cast<int>(id));
    own.file.store(open(path, O_RDONLY | O_CLOEXEC), std::memory_order_release);
  }

  // Of all threads together, each since it was read last, at about 1 us for each; for one thread at a time.
  Time since_last() {
    Time sum{};
    for (Thread& each : threads_) {
      const int file = each.file.load(std::memory_order_acquire);
      Time now{};
      if (file < 0 || !read(file, &now)) continue;
      if (file == each.read_file && now > each.last) sum += now - each.last;
      each.read_file = file;
      each.last = now;
    }
    return sum;
  }

 private:
  struct Thread {
    pid_t id = 0;
    std::atomic<int> file{-1};
    int read_file = -1;  // where `last` is from
    Time last{};
  };

  static bool read(int file, Time* delay) {
    char text[96];
    const ssize_t size = pread(file, text, sizeof text - 1, 0);
    if (size <= 0) return false;
    text[size] = 0;
    unsigned long long value = 0;
    if (std::sscanf(text, "%*u %llu", &value) != 1) return false;
    *delay = Time(value);
    return true;
  }
  static void forget(Thread& thread) {
    const int file = thread.file.exchange(-1, std::memory_order_relaxed);
    if (file >= 0) close(file);
    thread.read_file = -1;
  }

  std::vector<Thread> threads_;
};

}  // namespace tgi
