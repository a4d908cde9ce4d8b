// The kernels for AVX-512 with VNNI and BF16.
#include "variant.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,prfchw")
#define TGI_NS avx512bf16
#define TGI_VNNI 1
#define TGI_BF16 1
#include "simd_avx512.h"
#include "variant.inc.h"
#pragma GCC pop_options
#endif

namespace tgi {

const Kernels* kernels_avx512bf16() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16"))
    return &avx512bf16::kTable;
#endif
  return nullptr;
}

}  // namespace tgi
