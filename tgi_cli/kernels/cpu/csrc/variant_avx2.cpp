// The kernels for AVX2, FMA and F16C.
#include "variant.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define TGI_NS avx2
#include "simd_avx2.h"
#include "variant.inc.h"
#pragma GCC pop_options
#endif

namespace tgi {

const Kernels* kernels_avx2() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return &avx2::kTable;
#endif
  return nullptr;
}

}  // namespace tgi
