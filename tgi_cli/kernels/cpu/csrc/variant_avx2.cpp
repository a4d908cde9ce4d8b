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
#pragma GCC target("avx2,fma,f16c")
#define TGI_ISA 1
#define TGI_VNNI 0
#include "simd.h"

namespace tgi::avx2 {
#include "epilogue.inc.h"
#include "gemm.inc.h"
#include "grouped.inc.h"
#include "gemm_q.inc.h"
#include "gemm_x.inc.h"
#include "elementwise.inc.h"
#include "attention.inc.h"
#include "sampling.inc.h"
#include "probe.inc.h"
}  // namespace tgi::avx2
#pragma GCC pop_options

namespace tgi {
const Kernels* kernels_avx2() {
  static const Kernels table = {"avx2",          avx2::pack,       avx2::pack_grouped, avx2::gemm,
                                avx2::rms_norm, avx2::rope_store, avx2::attention,    avx2::embed,
                                avx2::sample,          avx2::probe};
  return &table;
}
}  // namespace tgi
#else
namespace tgi {
const Kernels* kernels_avx2() { return nullptr; }
}  // namespace tgi
#endif
