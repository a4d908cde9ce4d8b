// The C interface, called through ctypes: a context holds the thread pool and the chosen variant.
#include <cstring>
#include <string>
#include <vector>

#include "ahead.h"
#include "kernels.h"
#include "program.h"

namespace {

struct Context {
  Context(int threads, const tgi::Kernels* chosen) : pool(threads), kernels(chosen), ahead(pool, *chosen) {}
  tgi::Pool pool;
  const tgi::Kernels* kernels;
  tgi::Ahead ahead;
};

// The context for anything but steps ahead, of which none runs any more.
Context* settled(void* context) {
  auto* c = static_cast<Context*>(context);
  c->ahead.settle();
  return c;
}

// The variants this CPU can run, best first.
std::vector<const tgi::Kernels*> found_variants() {
  std::vector<const tgi::Kernels*> found;
  for (const tgi::Kernels* each :
       {tgi::kernels_avx512bf16(), tgi::kernels_avx512vnni(), tgi::kernels_avx512(), tgi::kernels_avx2(),
        tgi::kernels_neonbf16(), tgi::kernels_neondot(), tgi::kernels_neon()})
    if (each != nullptr) found.push_back(each);
  return found;
}

}  // namespace

extern "C" {

// The names of the variants this CPU can run, best first, separated by commas.
const char* tgi_variants() {
  static const std::string names = [] {
    std::string all;
    for (const tgi::Kernels* each : found_variants()) all += (all.empty() ? "" : ",") + std::string(each->name);
    return all;
  }();
  return names.c_str();
}

// Null if the variant is unknown or this CPU cannot run it.
void* tgi_context(const char* variant, int threads) {
  if (threads < 1) return nullptr;
  for (const tgi::Kernels* each : found_variants())
    if (std::strcmp(each->name, variant) == 0) return new Context(threads, each);
  return nullptr;
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
    auto* c = settled(context);                           \
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
  auto* c = settled(context);
  tgi::run_step(c->pool, *c->kernels, *program, *input);
}

void tgi_ahead_start(void* context, const tgi::AheadStart* from) { static_cast<Context*>(context)->ahead.start(*from); }

void tgi_ahead_want(void* context, int64_t steps) { static_cast<Context*>(context)->ahead.want(steps); }

int tgi_ahead_finish(void* context, int64_t* token_ids, uint8_t* valid) {
  return static_cast<Context*>(context)->ahead.finish(token_ids, valid) ? 1 : 0;
}

void tgi_ahead_settle(void* context) { static_cast<Context*>(context)->ahead.settle(); }

}  // extern "C"
