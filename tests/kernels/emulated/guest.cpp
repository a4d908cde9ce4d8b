// `guest LIBRARY FILE ADDRESS BYTES`: calls functions of the kernels' library for another process, whose
// heap (shared_heap.c) it maps at the same address. Knows no kernel: a call is a name and up to five
// integers or pointers. Tells the variants first.
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

struct Call {
  char name[24];
  uint64_t arguments[5];
};

int main(int, char** argv) {
  void* library = dlopen(argv[1], RTLD_NOW);
  if (library == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  const auto variants = reinterpret_cast<const char* (*)()>(dlsym(library, "tgi_variants"));
  std::printf("%s\n", variants());
  std::fflush(stdout);
  const int file = std::atoi(argv[2]);
  if (file < 0) return 0;
  void* const address = reinterpret_cast<void*>(std::strtoull(argv[3], nullptr, 0));
  const size_t bytes = std::strtoull(argv[4], nullptr, 0);
  if (mmap(address, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE | MAP_FIXED_NOREPLACE, file, 0) != address) {
    std::perror("mmap");
    return 1;
  }
  for (Call call; std::fread(&call, sizeof call, 1, stdin) == 1;) {
    using Function = uint64_t (*)(uint64_t, uint64_t, uint64_t, uint64_t, uint64_t);
    const auto function = reinterpret_cast<Function>(dlsym(library, call.name));
    if (function == nullptr) return 1;
    const uint64_t* a = call.arguments;
    const uint64_t result = function(a[0], a[1], a[2], a[3], a[4]);
    if (write(STDOUT_FILENO, &result, sizeof result) != sizeof result) return 1;
  }
  return 0;
}
