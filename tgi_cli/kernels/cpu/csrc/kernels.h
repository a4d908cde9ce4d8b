// The kernels one instruction-set variant offers, as a table of plain functions on raw pointers.
//
// Shapes are row-major. Order of summation of an output element depends on its own inputs alone: not on
// the number of rows, nor on how work is split over threads.
#pragma once

#include <cstdint>

#include "pool.h"

namespace tgi {

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

struct Gemm {
  const uint16_t* x;  // bf16 [m, ldx]
  const uint16_t* w;  // bf16 packed [ceil(n / 32)][k / 2][32][2]
  const float* bias;  // [n] or null, in packed row order
  void* out;
  int64_t m, n, k, ldx, ldo;
  int32_t epilogue;
};

struct RmsNorm {
  const float* x;       // [rows, ldx]
  const float* weight;  // [dim], any offset already added
  void* out;            // bf16 [rows, dim], or fp32 if out_float
  int64_t rows, dim, ldx;
  float eps;
  int32_t out_float;
};

struct RopeStore {
  const float* qkv;           // [tokens, (heads + 2 * kv_heads) * head_dim]
  const float* cos_sin;       // [max_position, head_dim]: cos of rotary_dim / 2 angles, then sin
  const float* q_norm;        // [head_dim] or null
  const float* k_norm;        // [head_dim] or null
  const int64_t* positions;   // [tokens]
  const int64_t* slots;       // [tokens]
  uint16_t* q;                // bf16 out [tokens, heads, head_dim]
  uint16_t* k_cache;          // blocks of [kv_heads][head_dim / 2][16 tokens][2]
  uint16_t* v_cache;          // blocks of [kv_heads][8 token pairs][head_dim][2]
  int64_t tokens, heads, kv_heads, head_dim, rotary_dim;
  float eps;
};

struct Attention {
  const uint16_t* q;            // bf16 [tokens, heads, head_dim]
  const uint16_t* k_cache;      // as in RopeStore
  const uint16_t* v_cache;
  const int32_t* block_tables;  // [seqs, table_stride]
  const int32_t* seq_lens;      // [seqs]
  const int32_t* query_start;   // [seqs + 1]
  uint16_t* out;                // bf16 [tokens, heads, head_dim]
  int64_t seqs, table_stride, heads, kv_heads, head_dim;
  int64_t window;               // 0: none
  float scale, softcap;         // softcap 0: none
};

struct Embed {
  const uint16_t* table;  // bf16 [vocab, dim], or packed as a matrix of `vocab` outputs
  const int64_t* ids;   // [tokens]
  float* out;           // [tokens, dim]
  int64_t tokens, dim;
  float scale;
  int32_t packed;
};

struct Kernels {
  const char* name;
  void (*pack)(const uint16_t* w, int64_t n, int64_t k, uint16_t* out);
  void (*gemm)(Pool&, const Gemm&);
  void (*rms_norm)(Pool&, const RmsNorm&);
  void (*rope_store)(Pool&, const RopeStore&);
  void (*attention)(Pool&, const Attention&);
  void (*embed)(Pool&, const Embed&);
};

const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512bf16();

}  // namespace tgi
