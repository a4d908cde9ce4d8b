// The C interface, called through ctypes: a context holds the thread pool and the chosen variant.
#include <cstring>

#include "kernels.h"
#include "program.h"

namespace {

struct Context {
  tgi::Pool pool;
  const tgi::Kernels* kernels;
};

}  // namespace

extern "C" {

// The names of the variants this CPU can run, best first, separated by commas.
const char* tgi_variants() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  if (vnni && __builtin_cpu_supports("avx512bf16")) return "avx512bf16,avx512vnni,avx512,avx2";
  if (vnni) return "avx512vnni,avx512,avx2";
  if (avx512) return "avx512,avx2";
  if (avx2) return "avx2";
#endif
  return "";
}

// Null if the variant is unknown or this CPU cannot run it.
void* tgi_context(const char* variant, int threads) {
  const char* found = std::strstr(tgi_variants(), variant);
  const size_t length = std::strlen(variant);
  if (length == 0 || found == nullptr || threads < 1) return nullptr;
  const tgi::Kernels* kernels = nullptr;
  for (const tgi::Kernels* each : {tgi::kernels_avx512bf16(), tgi::kernels_avx512vnni(),
                                   tgi::kernels_avx512(), tgi::kernels_avx2()})
    if (each != nullptr && std::strcmp(each->name, variant) == 0) kernels = each;
  if (kernels == nullptr) return nullptr;
  return new Context{tgi::Pool(threads), kernels};
}

void tgi_close(void* context) { delete static_cast<Context*>(context); }

void tgi_pack(void* context, const uint16_t* w, int64_t n, int64_t k, uint16_t* out) {
  static_cast<Context*>(context)->kernels->pack(w, n, k, out);
}

void tgi_pack_grouped(void* context, const tgi::PackGrouped* arguments) {
  static_cast<Context*>(context)->kernels->pack_grouped(*arguments);
}

#define TGI_CALL(function, type)                          \
  void tgi_##function(void* context, const tgi::type* arguments) { \
    auto* c = static_cast<Context*>(context);             \
    c->kernels->function(c->pool, *arguments);            \
  }

TGI_CALL(gemm, Gemm)
TGI_CALL(rms_norm, RmsNorm)
TGI_CALL(rope_store, RopeStore)
TGI_CALL(attention, Attention)
TGI_CALL(embed, Embed)
TGI_CALL(probe, Probe)
TGI_CALL(sample, Sampling)

void tgi_step(void* context, const tgi::Program* program, const tgi::StepInput* input) {
  auto* c = static_cast<Context*>(context);
  tgi::run_step(c->pool, *c->kernels, *program, *input);
}

}  // extern "C"
