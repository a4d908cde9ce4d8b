// The kernels for one instruction set. Standard headers come first, so that none of their inline
// functions is compiled for it.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#include "kernels.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")
#define TGI_ISA 2
#define TGI_VNNI 1
#include "simd.h"

namespace tgi::avx512vnni {
#include "epilogue.inc.h"
#include "gemm.inc.h"
#include "grouped.inc.h"
#include "gemm_q.inc.h"
#include "gemm_x.inc.h"
#include "elementwise.inc.h"
#include "attention.inc.h"
#include "sampling.inc.h"
#include "probe.inc.h"
}  // namespace tgi::avx512vnni
#pragma GCC pop_options

namespace tgi {
const Kernels* kernels_avx512vnni() {
  static const Kernels table = {"avx512vnni",          avx512vnni::pack,       avx512vnni::pack_grouped, avx512vnni::gemm,
                                avx512vnni::rms_norm, avx512vnni::rope_store, avx512vnni::attention,    avx512vnni::embed,
                                avx512vnni::sample,          avx512vnni::probe};
  return &table;
}
}  // namespace tgi
#else
namespace tgi {
const Kernels* kernels_avx512vnni() { return nullptr; }
}  // namespace tgi
#endif
