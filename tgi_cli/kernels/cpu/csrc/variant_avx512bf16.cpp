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
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma")
#define TGI_ISA 3
#define TGI_VNNI 1
#include "simd.h"

namespace tgi::avx512bf16 {
#include "epilogue.inc.h"
#include "gemm.inc.h"
#include "grouped.inc.h"
#include "gemm_q.inc.h"
#include "gemm_x.inc.h"
#include "elementwise.inc.h"
#include "attention.inc.h"
#include "sampling.inc.h"
#include "probe.inc.h"
}  // namespace tgi::avx512bf16
#pragma GCC pop_options

namespace tgi {
const Kernels* kernels_avx512bf16() {
  static const Kernels table = {"avx512bf16",          avx512bf16::pack,       avx512bf16::pack_grouped, avx512bf16::gemm,
                                avx512bf16::rms_norm, avx512bf16::rope_store, avx512bf16::attention,    avx512bf16::embed,
                                avx512bf16::sample,          avx512bf16::probe};
  return &table;
}
}  // namespace tgi
#else
namespace tgi {
const Kernels* kernels_avx512bf16() { return nullptr; }
}  // namespace tgi
#endif
