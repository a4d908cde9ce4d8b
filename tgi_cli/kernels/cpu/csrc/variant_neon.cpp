// The kernels for NEON of ARMv8.
#include "variant.h"

#if defined(__aarch64__)
#include <sys/auxv.h>

#pragma GCC push_options
#pragma GCC target("arch=armv8-a")
#define TGI_NS neon
#define TGI_DOTPROD 0
#define TGI_BF16 0
#include "simd_neon.h"
#include "variant.inc.h"
#pragma GCC pop_options
#endif

namespace tgi {

const Kernels* kernels_neon() {
#if defined(__aarch64__)
  if (getauxval(AT_HWCAP) & HWCAP_ASIMD) return &neon::kTable;
#endif
  return nullptr;
}

}  // namespace tgi
