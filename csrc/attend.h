// Attention of a step on everything that a layer holds: pages where they lie, and the raw tail.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "attend_kernels.h"
#include "isa.h"

namespace fibkv {

// Consecutive spans of equal form, for a range of batch rows and of KV heads.
struct Run {
  int row0, row1;
  int head0, head1;
  int start;   // first token
  int tokens;  // of a span
  int spans;
  const Side* key;
  const Side* value;
  const KeySpace* space;  // of the keys, for all KV heads of the layer; or null
  Rectangle key_rectangle, value_rectangle;
  std::vector<const uint8_t*> keys, values;  // [rows][spans] base pointers
};

// float32 or bfloat16 numbers [batch][query_heads][length][dim], the last axis without gaps.
struct Query {
  const void* rows;
  Form form;
  int64_t batch_stride, head_stride, query_stride;  // in elements
  int batch, query_heads, kv_heads, length, dim;
  int past;  // query i is at position past + i
};

struct Mask {
  const uint8_t* allowed;  // one byte a token, or null
  const float* added;      // or null
  int64_t batch_stride, head_stride, query_stride;  // in elements
  bool causal;             // without a mask: query i sees tokens up to its own position
};

// In the original space; queries that see nothing get zeros and -inf.
struct Output {
  void* rows;  // [batch][query_heads][length][value_dim], float32 or bfloat16
  Form form;
  float* lse;  // [batch][query_heads][length]
  int value_dim;
};

void attend(const AttendKernels& kernels, const std::vector<const Run*>& runs, const Query& query, const Mask& mask,
            const Softmax& softmax, int threads, const Output& out);

// The kernels of an instruction set for queries of a form.
const AttendKernels& attend_kernels(Isa isa, Form form);

}  // namespace fibkv
