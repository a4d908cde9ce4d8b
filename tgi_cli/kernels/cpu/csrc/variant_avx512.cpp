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
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define TGI_ISA 2
#define TGI_VNNI 0
#include "simd.h"

namespace tgi::avx512 {
#include "epilogue.inc.h"
#include "gemm.inc.h"
#include "grouped.inc.h"
#include "gemm_q.inc.h"
#include "gemm_x.inc.h"
#include "elementwise.inc.h"
#include "attention.inc.h"
#include "sampling.inc.h"
#include "probe.inc.h"
}  // namespace tgi::avx512
#pragma GCC pop_options

namespace tgi {
const Kernels* kernels_avx512() {
  static const Kernels table = {"avx512",          avx512::pack,       avx512::pack_grouped, avx512::gemm,
                                avx512::rms_norm, avx512::rope_store, avx512::attention,    avx512::embed,
                                avx512::sample,          avx512::probe};
  return &table;
}
}  // namespace tgi
#else
namespace tgi {
const Kernels* kernels_avx512() { return nullptr; }
}  // namespace tgi
#endif
