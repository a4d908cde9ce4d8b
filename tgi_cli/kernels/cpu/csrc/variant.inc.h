// All kernels, compiled for the instruction set of the variant that includes this, and their table.
#include "simd.h"

#define TGI_TEXT_OF(name) #name
#define TGI_TEXT(name) TGI_TEXT_OF(name)

namespace tgi::TGI_NS {
#include "epilogue.inc.h"
#include "gemm.inc.h"
#include "grouped.inc.h"
#include "gemm_q.inc.h"
#include "gemm_x.inc.h"
#include "elementwise.inc.h"
#include "attention.inc.h"
#include "sampling.inc.h"
#include "probe.inc.h"
#include "lora.inc.h"

constexpr Kernels kTable = {TGI_TEXT(TGI_NS), pack,       pack_grouped, panel_bytes,    gemm,
                            rms_norm,         rope_store, attention,    rope_attention, embed,
                            sample,           probe,      lora,         activate};
}  // namespace tgi::TGI_NS
