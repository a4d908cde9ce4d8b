// GEMM of grouped weights by bf16 activations: panels are decoded to bf16 on the way, in a thread's own
// memory, and multiplied as gemm.inc.h does. And the choice between all GEMMs. Included once per
// instruction set, inside its namespace.

// The same product with rows gathered into `x`.
inline Gemm in_order(Pool& pool, const Gemm& g, bf16* x) {
  pool.parallel(g.m, [&](int64_t row, int) {
    for (int64_t i = 0; i < g.w.k / kRun; ++i) run_of(g, row, i, x + row * g.w.k + i * kRun);
  });
  Gemm made = g;
  made.x = x;
  made.ldx = g.w.k;
  made.w.order = nullptr;
  return made;
}

template <class G>
inline void gemm_decoded(Pool& pool, const Gemm& given, G) {
  const int64_t panel_elements = given.w.k * kPanel, decoded = pool.size() * kGroup * panel_elements;
  const int64_t gathered = given.w.order == nullptr ? 0 : given.m * given.w.k;
  auto* memory = static_cast<bf16*>(pool.scratch(static_cast<size_t>(decoded + gathered) * sizeof(bf16)));
  const Gemm g = gathered == 0 ? given : in_order(pool, given, memory + decoded);
  split_work(pool, g, kMaxRows * 16, kGroup,
             [&](int64_t row, int64_t rows, int64_t panel, int64_t panels, int worker) {
               bf16* own = memory + worker * kGroup * panel_elements;
               for (const int64_t end = panel + panels; panel < end; panel += kGroup) {
                 const int64_t count = panel + kGroup <= end ? kGroup : end - panel;
                 for (int64_t p = 0; p < count; ++p)
                   for (int64_t run = 0; run < g.w.k / kRun; ++run)
                     decode_run<G>(G::codes(g.w, panel + p, run), G::tail(g.w, panel + p, run),
                                   own + p * panel_elements + run * kRun * kPanel);
                 if (count == kGroup)
                   gemm_block<kGroup>(g, own, row, rows, panel, false);
                 else
                   gemm_block<1>(g, own, row, rows, panel, false);
               }
             });
}

void gemm(Pool& pool, const Gemm& g) {
  if (g.m <= 0) return;
  if (static_cast<Form>(g.w.form) == Form::kBf16) return gemm_bf16(pool, g);
  visit_grouped(g.w, [&](auto grouped) {
    using G = decltype(grouped);
    if constexpr (G::kCodes == Codes::kInteger)
      if (!g.w.wide_activations) return gemm_grouped(pool, g, grouped);
    gemm_decoded(pool, g, grouped);
  });
}
