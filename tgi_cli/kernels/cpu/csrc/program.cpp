#include "program.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace tgi {
namespace {

struct Runner {
  Pool& pool;
  const Kernels& kernels;
  const Program& program;
  const StepInput& step;
  int64_t rows;  // of the residual stream: all tokens, in the end those whose logits are wanted
  bool lost = false;  // another rank is gone: the rest of the step is not worth computing
  std::vector<int32_t> slots;    // the adapter of each row, where any row has one
  std::vector<int64_t> adapted;  // rows that have one

  void find_adapters() {
    if (step.adapter_slots == nullptr) return;
    slots.resize(static_cast<size_t>(step.tokens));
    for (int64_t s = 0; s < step.seqs; ++s)
      std::fill(slots.begin() + step.query_start[s], slots.begin() + step.query_start[s + 1], step.adapter_slots[s]);
    list_adapted();
  }

  void list_adapted() {
    adapted.clear();
    for (int64_t row = 0; row < rows; ++row)
      if (slots[static_cast<size_t>(row)] > 0) adapted.push_back(row);
  }

  // Adds to `out`, which has x @ w.T, what the adapters of some rows add to it.
  void adapt(const LayerProgram& l, LoraTarget target, const uint16_t* x, const Matrix& w, float* out,
             int64_t ldo) const {
    if (adapted.empty()) return;
    const int64_t index = (&l - program.layers) * 4 + static_cast<int64_t>(target);
    kernels.lora(pool, {x, out, adapted.data(), slots.data(), program.adapters,
                        static_cast<int64_t>(adapted.size()), w.k, ldo, index});
  }

  // To be said before the product before it: threads that wait begin to fetch this matrix. For a lone row,
  // whose kernels are short.
  void next(const Matrix& w) const {
    if (step.tokens != 1) return;
    const int64_t panels = (w.n + kPanel - 1) / kPanel;  // shared out as `TileStreams` does
    pool.look_ahead(w.data, panels / pool.width() * kernels.panel_bytes(w));
  }

  void norm(const float* x, const float* weight, float eps, void* out, bool out_float) const {
    kernels.rms_norm(pool, {x, weight, out, rows, program.hidden, program.hidden, eps, out_float});
  }

  void gemm(const uint16_t* x, const Matrix& w, const float* bias, void* out, int64_t ldo,
            Epilogue epilogue) const {
    kernels.gemm(pool, {x, w, bias, out, rows, w.k, ldo, static_cast<int32_t>(epilogue)});
  }

  // The sum over all ranks of x @ w.T + bias, stored or added; `bias` is null on all but one.
  void all_reduced(const LayerProgram& l, LoraTarget target, const uint16_t* x, const Matrix& w, const float* bias,
                   float* into, bool add) {
    const Ranks& ranks = *program.ranks;
    const int64_t size = rows * program.hidden;
    float* part = ranks.staging(ranks.self, size);
    if (part == nullptr) part = step.wide;
    gemm(x, w, bias, part, program.hidden, Epilogue::kStoreFloat);
    adapt(l, target, x, w, part, program.hidden);
    lost = lost || ranks.all_reduce(ranks.self, &pool, part, into, size, add) != 0;
  }

  // The residual stream takes what a part gives, directly or through a norm of its own.
  void into_residual(const LayerProgram& l, LoraTarget target, const uint16_t* x, const Matrix& w,
                     const float* bias, const float* after) {
    const int64_t hidden = program.hidden;
    const bool add = after == nullptr;
    float* into = add ? step.residual : step.wide;
    if (program.ranks != nullptr) {
      all_reduced(l, target, x, w, bias, into, add);
    } else {
      gemm(x, w, bias, into, hidden, add ? Epilogue::kAddFloat : Epilogue::kStoreFloat);
      adapt(l, target, x, w, into, hidden);
    }
    if (add) return;
    norm(step.wide, after, l.eps, step.wide, true);
    constexpr int64_t kRows = 16;
    pool.parallel((rows + kRows - 1) / kRows, [&](int64_t item, int) {
      const int64_t end = ((item + 1) * kRows < rows ? (item + 1) * kRows : rows) * hidden;
      for (int64_t i = item * kRows * hidden; i < end; ++i) step.residual[i] += step.wide[i];
    });
  }

  // Keep the rows whose logits are wanted: they ascend, so none is overwritten before it is moved.
  void keep_logit_rows(int64_t width) {
    for (int64_t i = 0; i < step.num_logits; ++i) {
      const int64_t row = step.logit_rows[i];
      if (row == i) continue;
      const size_t bytes = static_cast<size_t>(program.hidden) * sizeof(float);
      std::memcpy(step.residual + i * program.hidden, step.residual + row * program.hidden, bytes);
      std::memcpy(step.attended + i * width, step.attended + row * width,
                  static_cast<size_t>(width) * sizeof(uint16_t));
    }
    rows = step.num_logits;
    if (adapted.empty()) return;
    for (int64_t i = 0; i < rows; ++i)
      slots[static_cast<size_t>(i)] = slots[static_cast<size_t>(step.logit_rows[i])];
    list_adapted();
  }

  // Every rank looks up the tokens it has rows for; the others' rows come as zeros and change no bit.
  void embed() {
    const Ranks* ranks = program.ranks;
    if (ranks == nullptr) {
      kernels.embed(pool,
                    {program.table, step.ids, step.residual, step.tokens, program.embedding_scale});
      return;
    }
    std::vector<int64_t> ids(step.ids, step.ids + step.tokens);
    for (int64_t& id : ids) {
      id -= ranks->first_token;
      if (id < 0 || id >= ranks->num_tokens) id = 0;
    }
    kernels.embed(pool, {program.table, ids.data(), step.residual, step.tokens, program.embedding_scale});
    for (int64_t i = 0; i < step.tokens; ++i)
      if (step.ids[i] < ranks->first_token || step.ids[i] >= ranks->first_token + ranks->num_tokens)
        std::fill_n(step.residual + i * program.hidden, program.hidden, 0.0f);
    lost = ranks->all_reduce(ranks->self, &pool, step.residual, step.residual, step.tokens * program.hidden,
                             0) != 0;
  }

  void layer(const LayerProgram& l, bool last) {
    norm(step.residual, l.attention_norm, l.eps, step.narrow, false);
    next(l.output);
    gemm(step.narrow, l.qkv, l.qkv_bias, step.wide, l.qkv.n, Epilogue::kStoreFloat);
    adapt(l, LoraTarget::kQkv, step.narrow, l.qkv, step.wide, l.qkv.n);
    const RopeStore rope = {step.wide, l.cos_sin, l.q_norm, l.k_norm, step.positions, step.slots[l.group],
                            step.queries, l.k_cache, l.v_cache, step.tokens, l.heads, l.kv_heads,
                            l.head_dim, l.rotary_dim, l.qk_eps, l.kv_form};
    // After the last layer's keys and values, only rows whose logits are wanted need the rest.
    if (last && step.logit_rows != nullptr && step.num_logits == 0) return kernels.rope_store(pool, rope);
    kernels.rope_attention(pool, rope,
                           {step.queries, l.k_cache, l.v_cache, step.block_tables[l.group], step.seq_lens,
                            step.query_start, step.attended, step.seqs, step.table_strides[l.group], l.heads,
                            l.kv_heads, l.head_dim, l.window, l.scale, l.softcap, l.kv_form, l.slopes, l.sinks});
    if (last && step.logit_rows != nullptr) keep_logit_rows(l.heads * l.head_dim);
    next(l.gate_up);
    into_residual(l, LoraTarget::kOutput, step.attended, l.output, l.output_bias, l.after_attention_norm);
    norm(step.residual, l.feed_norm, l.eps, step.narrow, false);
    next(l.down);
    if (adapted.empty()) {
      gemm(step.narrow, l.gate_up, l.gate_up_bias, step.activated, l.intermediate,
           static_cast<Epilogue>(l.activation));
    } else {
      gemm(step.narrow, l.gate_up, l.gate_up_bias, step.gated, l.gate_up.n, Epilogue::kStoreFloat);
      adapt(l, LoraTarget::kGateUp, step.narrow, l.gate_up, step.gated, l.gate_up.n);
      kernels.activate(pool, {step.gated, step.activated, rows, l.intermediate, l.activation});
    }
    next(last ? program.head : (&l + 1)->qkv);
    into_residual(l, LoraTarget::kDown, step.activated, l.down, l.down_bias, l.after_feed_norm);
  }
};

}  // namespace

bool run_step(Pool& pool, const Kernels& kernels, const Program& program, const StepInput& step,
              const std::atomic<bool>* unwanted) {
  Runner runner{pool, kernels, program, step, step.tokens};
  runner.next(program.layers[0].qkv);
  runner.find_adapters();
  runner.embed();
  for (int64_t i = 0; i < program.num_layers && !runner.lost; ++i) {
    if (unwanted != nullptr && unwanted->load(std::memory_order_relaxed)) return false;
    runner.layer(program.layers[i], i + 1 == program.num_layers);
  }
  if (step.logit_rows != nullptr && step.num_logits == 0) return true;
  runner.norm(step.residual, program.final_norm, program.final_eps, step.hidden, false);
  if (step.logit_rows != nullptr)
    runner.gemm(step.hidden, program.head, nullptr, step.logits, program.head.n, Epilogue::kStoreFloat);
  return true;
}

}  // namespace tgi
