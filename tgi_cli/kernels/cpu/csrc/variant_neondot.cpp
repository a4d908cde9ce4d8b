// The kernels for NEON with dot products of bytes (FEAT_DotProd).
#include "variant.h"

#if defined(__aarch64__)
#include <sys/auxv.h>

#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#define TGI_NS neondot
#define TGI_DOTPROD 1
#define TGI_BF16 0
#include "simd_neon.h"
#include "variant.inc.h"
#pragma GCC pop_options
#endif

namespace tgi {

const Kernels* kernels_neondot() {
#if defined(__aarch64__)
  if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) return &neondot::kTable;
#endif
  return nullptr;
}

}  // namespace tgi
