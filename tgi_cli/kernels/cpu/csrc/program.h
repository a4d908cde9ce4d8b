// A whole step of a dense decoder in one call: embedding, layers, final norm, and logits where asked.
//
// The structs mirror kernels/cpu/program.py field by field; all pointers belong to the caller.
#pragma once

#include <atomic>
#include <cstdint>

#include "collective.h"
#include "kernels.h"

namespace tgi {

struct LayerProgram {
  const float* attention_norm;       // [hidden]
  Matrix qkv;
  const float* qkv_bias;             // or null
  const float* q_norm;               // [head_dim] or null
  const float* k_norm;
  const float* cos_sin;              // [max_position, head_dim]
  Matrix output;
  const float* output_bias;          // or null
  const float* after_attention_norm; // [hidden] or null
  const float* feed_norm;            // [hidden]
  Matrix gate_up;                    // rows alternate 16 gate, 16 up
  const float* gate_up_bias;         // or null
  Matrix down;
  const float* down_bias;            // or null
  const float* after_feed_norm;      // [hidden] or null
  void* k_cache;
  void* v_cache;
  const float* slopes;               // see Attention
  const float* sinks;
  int64_t heads, kv_heads, head_dim, rotary_dim, window, intermediate, group;
  float scale, qk_eps, eps;
  float softcap;
  int32_t activation;                // Epilogue::kSiluMul or kGeluTanhMul
  int32_t kv_form;                   // see KvForm
};

// The matrices of a layer that an adapter may add to; four a layer, in this order.
enum class LoraTarget : int64_t { kQkv = 0, kOutput = 1, kGateUp = 2, kDown = 3 };

struct Program {
  const LayerProgram* layers;
  Matrix table;                      // see Embed
  const float* final_norm;
  int64_t num_layers, hidden;
  float embedding_scale, final_eps;
  Matrix head;                       // [vocab, hidden]
  const Ranks* ranks;                // null where one process holds the whole model
  const LoraParts* const* adapters;  // by slot (the first is not read), then 4 * layer + LoraTarget
};

struct StepInput {
  const int64_t* ids;                // [tokens]
  const int64_t* positions;          // [tokens]
  const int32_t* seq_lens;           // [seqs]
  const int32_t* query_start;        // [seqs + 1]
  const int64_t* const* slots;       // per KV group: [tokens]
  const int32_t* const* block_tables;  // per KV group: [seqs, table_strides[g]]
  const int64_t* table_strides;
  float* residual;                   // workspace [tokens, hidden]
  float* wide;                       // workspace [tokens, max of qkv width and hidden]
  uint16_t* narrow;                  // workspace [tokens, hidden]
  uint16_t* queries;                 // workspace [tokens, max heads * head_dim]
  uint16_t* attended;                // workspace like queries
  uint16_t* activated;               // workspace [tokens, max intermediate]
  uint16_t* hidden;                  // out [tokens, hidden], or [num_logits, hidden] with `logit_rows`
  int64_t tokens, seqs;
  const int64_t* logit_rows;         // [num_logits], ascending token rows; null: `hidden` of all rows
  float* logits;                     // out [num_logits, vocab] with `logit_rows`
  int64_t num_logits;
  const int32_t* adapter_slots;      // [seqs], 0: none; null where no sequence has an adapter
  float* gated;                      // workspace [tokens, 2 * max intermediate], with `adapter_slots` alone
};

// False if it was given up between two layers, as `unwanted` had become true.
bool run_step(Pool& pool, const Kernels& kernels, const Program& program, const StepInput& step,
              const std::atomic<bool>* unwanted = nullptr);

}  // namespace tgi
