// The kernels for NEON with dot products of bf16 pairs and of mixed bytes (FEAT_BF16, FEAT_I8MM).
#include "variant.h"

#if defined(__aarch64__)
#include <sys/auxv.h>

#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod+bf16+i8mm")
#define TGI_NS neonbf16
#define TGI_DOTPROD 1
#define TGI_BF16 1
#include "simd_neon.h"
#include "variant.inc.h"
#pragma GCC pop_options
#endif

namespace tgi {

const Kernels* kernels_neonbf16() {
#if defined(__aarch64__)
  constexpr unsigned long kBoth = HWCAP2_BF16 | HWCAP2_I8MM;
  if ((getauxval(AT_HWCAP2) & kBoth) == kBoth) return &neonbf16::kTable;
#endif
  return nullptr;
}

}  // namespace tgi
