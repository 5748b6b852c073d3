// The queries of a step as tiles read them: taken to the spaces of the keys, and prepared for their sides.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "attend.h"

namespace fibkv {

// A space that logits are computed in: a key space, if it turns queries, then a rotation; each may be null.
struct QuerySpace {
  const KeySpace* space;
  const Rotation* rotation;
  bool operator==(const QuerySpace& other) const { return space == other.space && rotation == other.rotation; }
};

// What reads keys: their side, and the space that turns queries, or null.
struct KeyReader {
  const Side* side;
  const KeySpace* space;
  QuerySpace query_space() const { return {space, side->space()}; }
  bool operator==(const KeyReader& other) const { return side == other.side && space == other.space; }
};

class Queries {
 public:
  // What tiles read, kept from call to call.
  struct Memory {
    std::vector<std::vector<uint8_t>> prepared;  // [readers], [rows][KV heads][blocks] of prepared queries
    std::vector<float> biases;                   // [key spaces][query rows]: <query, mean>
    size_t nbytes() const;
  };

  Queries(const AttendKernels& kernels, const std::vector<const Run*>& runs, const Query& query, Memory& memory);

  // KV heads of all rows.
  int heads() const { return query_.batch * query_.kv_heads; }
  // Queries that share a KV head of a row: query i is position i % length of query head i / length of its group.
  int per_head() const { return groups_ * query_.length; }
  // Blocks of at most kQueryBlock of them, each of one task.
  int blocks() const { return (per_head() + kQueryBlock - 1) / kQueryBlock; }
  size_t rows() const { return static_cast<size_t>(heads()) * per_head(); }

  // Prepares a block of queries of KV head `head`, counted through the rows, for every reader; `scratch` is a thread's
  // own.
  void prepare(int head, int block, std::vector<float>& scratch);

  // What reads the keys of a run.
  int reader_of(const Run& run) const;
  const uint8_t* prepared(int reader, int head, int block) const { return place(reader, head, block); }
  // What is added to the logits of queries from a row on, or null where keys have no mean.
  const float* biases(const KeySpace* space, size_t row) const;

 private:
  uint8_t* place(int reader, int head, int block) const {
    return memory_.prepared[reader].data() + (static_cast<size_t>(head) * blocks() + block) * prepared_bytes_[reader];
  }
  void read(int head, int first, int n, float* rows) const;
  const float* turned(const QuerySpace& where, int head, const float* rows, int n, float* once, float* twice) const;

  const AttendKernels& k_;
  const Query& query_;
  Memory& memory_;
  int groups_, width_;
  std::vector<KeyReader> readers_;
  std::vector<QuerySpace> spaces_;
  std::vector<const KeySpace*> biased_;
  std::vector<size_t> prepared_bytes_;  // [readers]: of one block of queries
};

}  // namespace fibkv
