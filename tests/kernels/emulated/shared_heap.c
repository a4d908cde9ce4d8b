// malloc in memory that another process can map at the same address.
//
// Preloaded into the Python that runs the conformance tests: tensors and ctypes structures lie here, so
// kernels in an emulated process work on them in place, through the pointers they are given. Blocks are
// powers of two with a free list for each; nothing is given back. Not for programs that fork and go on.
#define _GNU_SOURCE
#include <errno.h>
#include <malloc.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static char* const kStart = (char*)0x200000000000;
static const size_t kBytes = (size_t)64 << 30;  // sparse

typedef struct {  // before every block
  void* start;    // of the piece it was cut from
  uint64_t power;
} Header;

static atomic_flag lock = ATOMIC_FLAG_INIT;
static int file = -1;
static char* unused;
static void* freed[64];

int shared_heap_file(void) { return file; }
void* shared_heap_start(void) { return kStart; }
size_t shared_heap_bytes(void) { return kBytes; }

static void* take(uint64_t power) {
  while (atomic_flag_test_and_set_explicit(&lock, memory_order_acquire)) sched_yield();
  if (file < 0) {
    file = memfd_create("shared-heap", 0);
    if (file < 0 || ftruncate(file, (off_t)kBytes) != 0 ||
        mmap(kStart, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE | MAP_FIXED_NOREPLACE, file, 0) != kStart)
      abort();
    unused = kStart;
  }
  void* piece = freed[power];
  if (piece != NULL) {
    memcpy(&freed[power], piece, sizeof(void*));
  } else if ((size_t)(kStart + kBytes - unused) >= (size_t)1 << power) {
    piece = unused;
    unused += (size_t)1 << power;
  }
  atomic_flag_clear_explicit(&lock, memory_order_release);
  return piece;
}

static Header* header_of(void* block) { return (Header*)block - 1; }

void* memalign(size_t alignment, size_t bytes) {
  if (alignment < sizeof(Header)) alignment = sizeof(Header);
  if (bytes > kBytes / 4 || alignment > kBytes / 4) {
    errno = ENOMEM;
    return NULL;
  }
  uint64_t power = 5;
  while (((size_t)1 << power) < bytes + alignment + sizeof(Header)) ++power;
  char* piece = take(power);
  if (piece == NULL) {
    errno = ENOMEM;
    return NULL;
  }
  char* block = (char*)(((uintptr_t)piece + sizeof(Header) + alignment - 1) / alignment * alignment);
  *header_of(block) = (Header){piece, power};
  return block;
}

void* malloc(size_t bytes) { return memalign(sizeof(Header), bytes); }
void* aligned_alloc(size_t alignment, size_t bytes) { return memalign(alignment, bytes); }
void* valloc(size_t bytes) { return memalign(4096, bytes); }
int posix_memalign(void** out, size_t alignment, size_t bytes) {
  *out = memalign(alignment, bytes);
  return *out == NULL ? ENOMEM : 0;
}

void free(void* block) {
  if (block == NULL) return;
  const Header header = *header_of(block);
  while (atomic_flag_test_and_set_explicit(&lock, memory_order_acquire)) sched_yield();
  memcpy(header.start, &freed[header.power], sizeof(void*));
  freed[header.power] = header.start;
  atomic_flag_clear_explicit(&lock, memory_order_release);
}

size_t malloc_usable_size(void* block) {
  if (block == NULL) return 0;
  const Header header = *header_of(block);
  return (size_t)((char*)header.start + ((size_t)1 << header.power) - (char*)block);
}

void* calloc(size_t count, size_t bytes) {
  size_t all;
  if (__builtin_mul_overflow(count, bytes, &all)) return NULL;
  void* block = malloc(all);
  return block == NULL ? NULL : memset(block, 0, all);
}

void* realloc(void* block, size_t bytes) {
  const size_t held = malloc_usable_size(block);
  if (block != NULL && bytes <= held) return block;
  void* moved = malloc(bytes);
  if (moved == NULL) return NULL;
  if (block != NULL) memcpy(moved, block, held);
  free(block);
  return moved;
}
