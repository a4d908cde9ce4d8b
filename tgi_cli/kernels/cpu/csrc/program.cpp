#include "program.h"

namespace tgi {
namespace {

struct Runner {
  Pool& pool;
  const Kernels& kernels;
  const Program& program;
  const StepInput& step;

  void norm(const float* x, const float* weight, float eps, void* out, bool out_float) const {
    kernels.rms_norm(pool, {x, weight, out, step.tokens, program.hidden, program.hidden, eps, out_float});
  }

  void gemm(const uint16_t* x, const Matrix& w, const float* bias, void* out, int64_t ldo,
            Epilogue epilogue) const {
    kernels.gemm(pool, {x, w, bias, out, step.tokens, w.k, ldo, static_cast<int32_t>(epilogue)});
  }

  // The residual stream takes what a part gives, directly or through a norm of its own.
  void into_residual(const uint16_t* x, const Matrix& w, const float* bias, const float* after,
                     float eps) const {
    const int64_t hidden = program.hidden;
    if (after == nullptr) {
      gemm(x, w, bias, step.residual, hidden, Epilogue::kAddFloat);
      return;
    }
    gemm(x, w, bias, step.wide, hidden, Epilogue::kStoreFloat);
    norm(step.wide, after, eps, step.wide, true);
    constexpr int64_t kRows = 16;
    pool.parallel((step.tokens + kRows - 1) / kRows, [&](int64_t item, int) {
      const int64_t end = ((item + 1) * kRows < step.tokens ? (item + 1) * kRows : step.tokens) * hidden;
      for (int64_t i = item * kRows * hidden; i < end; ++i) step.residual[i] += step.wide[i];
    });
  }

  void layer(const LayerProgram& l) const {
    norm(step.residual, l.attention_norm, l.eps, step.narrow, false);
    gemm(step.narrow, l.qkv, l.qkv_bias, step.wide, l.qkv.n, Epilogue::kStoreFloat);
    kernels.rope_store(pool, {step.wide, l.cos_sin, l.q_norm, l.k_norm, step.positions, step.slots[l.group],
                              step.queries, l.k_cache, l.v_cache, step.tokens, l.heads, l.kv_heads,
                              l.head_dim, l.rotary_dim, l.qk_eps});
    kernels.attention(pool, {step.queries, l.k_cache, l.v_cache, step.block_tables[l.group], step.seq_lens,
                             step.query_start, step.attended, step.seqs, step.table_strides[l.group], l.heads,
                             l.kv_heads, l.head_dim, l.window, l.scale, 0.0f});
    into_residual(step.attended, l.output, l.output_bias, l.after_attention_norm, l.eps);
    norm(step.residual, l.feed_norm, l.eps, step.narrow, false);
    gemm(step.narrow, l.gate_up, l.gate_up_bias, step.activated, l.intermediate,
         static_cast<Epilogue>(l.activation));
    into_residual(step.activated, l.down, l.down_bias, l.after_feed_norm, l.eps);
  }
};

}  // namespace

void run_step(Pool& pool, const Kernels& kernels, const Program& program, const StepInput& step) {
  const Runner runner{pool, kernels, program, step};
  kernels.embed(pool, {program.table, step.ids, step.residual, step.tokens, program.embedding_scale});
  for (int64_t i = 0; i < program.num_layers; ++i) runner.layer(program.layers[i]);
  runner.norm(step.residual, program.final_norm, program.final_eps, step.hidden, false);
}

}  // namespace tgi
