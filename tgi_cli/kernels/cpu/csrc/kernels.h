// The kernels one instruction-set variant offers, as a table of plain functions on raw pointers.
//
// Shapes are row-major. Order of summation of an output element depends on its own inputs alone: not on
// the number of rows, nor on how work is split over threads.
#pragma once

#include <cstdint>

#include "pool.h"

namespace tgi {

using bf16 = uint16_t;

constexpr int kPanel = 32;     // output features per packed panel
constexpr int kBlock = 16;     // tokens per KV block
constexpr int kTileKeys = 64;  // keys per attention tile, at absolute positions

enum class Epilogue : int32_t {
  kStoreFloat = 0,   // out fp32 [m, n]
  kStoreBf16 = 1,    // out bf16 [m, n]
  kAddFloat = 2,     // out fp32 [m, n] += result
  kSiluMul = 3,      // rows of w alternate 16 gate, 16 up; out bf16 [m, n / 2]
  kGeluTanhMul = 4,  // likewise with the tanh form of GELU
};

// How a matrix [n, k] is stored. The grouped forms hold unsigned codes of 8 or 4 bits in panels of 32
// outputs, with a scale and perhaps a minimum for each output and 32 (or 16) inputs; see
// grouped.inc.h. Integers are multiplied by activations that are rounded to 8 bits per 32 inputs, unless
// `wide_activations` says otherwise; floats are decoded and multiplied by bf16 activations.
enum class Form : int32_t {
  kRows = 0,      // bf16 [n][k], for Embed alone
  kBf16 = 1,      // bf16 [ceil(n / 32)][k / 2][32][2]
  kInt8 = 2,      // (code - 128) * half scale
  kInt4 = 3,      // (code - 8) * half scale
  kInt4Min = 4,   // code * half scale + half minimum
  kInt4MinF = 5,  // code * float scale + float minimum
  kInt8MinF = 6,  // likewise with 8 bits
  kInt8F16 = 7,   // (code - 128) * float scale, one for each 16 inputs
  // Wide: a float scale (and minimum) for each Matrix::group inputs.
  kInt4Wide = 8,      // (code - 8) * scale
  kInt4WideMin = 9,   // code * scale + minimum
  kInt8Wide = 10,     // (code - 128) * scale
  kInt8WideMin = 11,  // code * scale + minimum
  kNf4 = 12,          // value of the code * scale; bitsandbytes' NormalFloat
  kFp4 = 13,          // likewise bitsandbytes' 4-bit float
  kE2m1 = 14,         // likewise E2M1, the 4-bit float of MXFP4
  kE4m3 = 15,         // likewise the 8-bit float E4M3; no code is NaN
  // Not wide:
  kMxfp4 = 16,  // value of the E2M1 code * bf16 scale
};

struct Matrix {
  const void* data;
  int64_t n, k;  // k is even, and a multiple of 32 in grouped forms
  int32_t form;
  int32_t group;             // inputs that share a scale in wide forms: a multiple of 32 that divides k
  int32_t wide_activations;  // multiply by bf16 activations
  const int32_t* order;      // [k] or null: stored input i is order[i] of the activations; grouped forms alone
};

struct Gemm {
  const uint16_t* x;  // bf16 [m, ldx]
  Matrix w;
  const float* bias;  // [n] or null, in packed row order
  void* out;
  int64_t m, ldx, ldo;
  int32_t epilogue;
};

// Panels out of rows that are given as codes [n, k], scales and minima [n, groups].
struct PackGrouped {
  Matrix w;  // `data` is written
  const uint8_t* codes;
  const void* scales;   // fp16 or fp32, as the form has them
  const void* minima;   // null where the form has none
};

// What an adapter adds to some columns of a matrix's result: scale * (x @ a.T) @ b. Sixteen columns lie
// together, the next sixteen `stride` further on.
struct LoraPart {
  const uint16_t* a;        // bf16 [rank, k]
  const uint16_t* b;        // bf16 [rank, columns]
  int64_t rank, columns;    // columns is a multiple of 16
  int64_t first, stride;    // the first column's place in the result; 16 but for interleaved matrices
  float scale;
};

struct LoraParts {
  const LoraPart* parts;
  int64_t count;
};

// Adds what the adapters of `rows` say to rows of `out`; see lora.inc.h.
struct Lora {
  const uint16_t* x;                  // bf16 [m, k], k a multiple of 16
  float* out;                         // [m, ldo]
  const int64_t* rows;                // [count], those that have an adapter
  const int32_t* slots;               // [m], the adapter of each row
  const LoraParts* const* adapters;   // by slot, then by matrix of the model
  int64_t count, k, ldo, index;       // index of the matrix
};

// act(gate) * up for rows that alternate 16 gate, 16 up.
struct Activate {
  const float* x;  // [rows, 2 * n]
  uint16_t* out;   // bf16 [rows, n]
  int64_t rows, n;
  int32_t activation;  // Epilogue::kSiluMul or kGeluTanhMul
};

// How keys and values are cached; kv_forms.inc.h has the layouts. In forms of 8 bits every token and
// head has an fp32 scale of its own.
enum class KvForm : int32_t { kBf16 = 0, kHalf = 1, kFloat = 2, kInt8 = 3, kE4m3 = 4, kE5m2 = 5 };

struct RmsNorm {
  const float* x;       // [rows, ldx]
  const float* weight;  // [dim], any offset already added
  void* out;            // bf16 [rows, dim], or fp32 if out_float
  int64_t rows, dim, ldx;
  float eps;
  int32_t out_float;
};

struct RopeStore {
  float* qkv;                 // [tokens, (heads + 2 * kv_heads) * head_dim]; overwritten
  const float* cos_sin;       // [max_position, head_dim]: cos of rotary_dim / 2 angles, then sin
  const float* q_norm;        // [head_dim] or null
  const float* k_norm;        // [head_dim] or null
  const int64_t* positions;   // [tokens]
  const int64_t* slots;       // [tokens]
  uint16_t* q;                // bf16 out [tokens, heads, head_dim]
  void* k_cache;              // blocks of [kv_heads] in kv_form
  void* v_cache;
  int64_t tokens, heads, kv_heads, head_dim, rotary_dim;
  float eps;
  int32_t kv_form;
};

struct Attention {
  const uint16_t* q;            // bf16 [tokens, heads, head_dim]
  const void* k_cache;          // as in RopeStore
  const void* v_cache;
  const int32_t* block_tables;  // [seqs, table_stride]
  const int32_t* seq_lens;      // [seqs]
  const int32_t* query_start;   // [seqs + 1]
  uint16_t* out;                // bf16 [tokens, heads, head_dim]
  int64_t seqs, table_stride, heads, kv_heads, head_dim;
  int64_t window;               // 0: none
  float scale, softcap;         // softcap 0: none
  int32_t kv_form;
  const float* slopes;          // [heads] or null: slope * (key position - query position) is added
  const float* sinks;           // [heads] or null: a logit without a value in each softmax
};

struct Embed {
  Matrix table;        // [vocab, dim]
  const int64_t* ids;  // [tokens]
  float* out;          // [tokens, dim]
  int64_t tokens;
  float scale;
};

// Rows of logits to tokens. What a sequence asks for lies at its place in arrays over all sequences.
struct Sampling {
  float* logits;                    // [n, vocab], overwritten
  const int64_t* rows;              // [n], places in the arrays below
  const int64_t* history_lens;      // [n], tokens before this row
  const int64_t* output_positions;  // [n], how many of them are outputs
  int64_t* token_ids;               // out [n]
  uint8_t* valid;                   // out [n]: whether the highest logit was finite, before and after
  const int32_t* tokens;            // [places, token_stride], prompt and outputs
  const float* repetition;          // 1: none
  const float* frequency;           // 0: none
  const float* presence;            // 0: none
  const float* temperature;         // 1: none
  const int64_t* top_k;             // 0: none
  const double* top_p;              // 1: none
  const double* min_p;              // 0: none
  const int64_t* seeds;
  const uint8_t* greedy;            // the highest logit is taken
  int64_t n, vocab, token_stride;
};

// How fast the machine is at what kernels are made of; see probe.inc.h.
struct Probe {
  int32_t kind;      // 0: read `amount` bytes; 1: bf16 products, 2: int8 products, `amount` rounds of 12
  const void* data;  // of kind 0
  float* sink;       // [threads]
  int64_t amount;
};

struct Kernels {
  const char* name;
  void (*pack)(const uint16_t* w, int64_t n, int64_t k, uint16_t* out);
  void (*pack_grouped)(const PackGrouped&);
  int64_t (*panel_bytes)(const Matrix&);  // of kPanel outputs
  void (*gemm)(Pool&, const Gemm&);
  void (*rms_norm)(Pool&, const RmsNorm&);
  void (*rope_store)(Pool&, const RopeStore&);
  void (*attention)(Pool&, const Attention&);
  void (*rope_attention)(Pool&, const RopeStore&, const Attention&);  // one after the other
  void (*embed)(Pool&, const Embed&);
  void (*sample)(Pool&, const Sampling&);
  void (*probe)(Pool&, const Probe&);
  void (*lora)(Pool&, const Lora&);
  void (*activate)(Pool&, const Activate&);
};

// One for each variant_*.cpp: null where this CPU cannot run it.
const Kernels* kernels_avx512bf16();
const Kernels* kernels_avx512vnni();
const Kernels* kernels_avx512();
const Kernels* kernels_avx2();
const Kernels* kernels_neonbf16();
const Kernels* kernels_neondot();
const Kernels* kernels_neon();

}  // namespace tgi
