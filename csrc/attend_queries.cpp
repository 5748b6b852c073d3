#include "attend_queries.h"

#include <algorithm>
#include <numeric>

#include "index.h"
#include "row_forms.h"

namespace fibkv {
namespace {

KeyReader reader_for(const Run& run) { return {run.key, run.space && run.space->queries ? run.space : nullptr}; }

}  // namespace

size_t Queries::Memory::nbytes() const {
  size_t total = biases.capacity() * sizeof(float);
  for (const std::vector<uint8_t>& queries : prepared) total += queries.capacity();
  return total;
}

Queries::Queries(const AttendKernels& kernels, const std::vector<const Run*>& runs, const Query& query, Memory& memory)
    : k_(kernels), query_(query), memory_(memory), groups_(query.query_heads / query.kv_heads),
      width_(padded_dim(query.dim)) {
  for (const Run* run : runs) {
    add_once(readers_, reader_for(*run));
    add_once(spaces_, reader_for(*run).query_space());
    if (run->space) add_once(biased_, run->space);
  }
  memory_.biases.resize(biased_.size() * rows());
  memory_.prepared.resize(std::max(memory_.prepared.size(), readers_.size()));
  for (size_t i = 0; i < readers_.size(); ++i) {
    prepared_bytes_.push_back(k_.prepared_bytes(*readers_[i].side, std::min(kQueryBlock, per_head())));
    memory_.prepared[i].resize(prepared_bytes_[i] * blocks() * heads());
  }
}

int Queries::reader_of(const Run& run) const { return index_of(readers_, reader_for(run)); }

const float* Queries::biases(const KeySpace* space, size_t row) const {
  return space ? memory_.biases.data() + index_of(biased_, space) * rows() + row : nullptr;
}

void Queries::prepare(int head, int block, std::vector<float>& scratch) {
  const int first = block * kQueryBlock, n = std::min(kQueryBlock, per_head() - first);
  const size_t size = static_cast<size_t>(n) * width_;
  scratch.resize(std::max(scratch.size(), 3 * size));
  float* rows = scratch.data();
  read(head, first, n, rows);
  for (size_t i = 0; i < biased_.size(); ++i) {
    const float* mean = biased_[i]->mean + static_cast<size_t>(head % query_.kv_heads) * query_.dim;
    float* biases = memory_.biases.data() + i * this->rows() + static_cast<size_t>(head) * per_head() + first;
    for (int q = 0; q < n; ++q) biases[q] = std::inner_product(mean, mean + query_.dim, rows + q * width_, 0.0f);
  }
  for (const QuerySpace& space : spaces_) {
    const float* queries = turned(space, head, rows, n, rows + size, rows + 2 * size);
    for (size_t i = 0; i < readers_.size(); ++i) {
      if (!(readers_[i].query_space() == space)) continue;
      k_.prepare(*readers_[i].side, queries, n, place(static_cast<int>(i), head, block));
    }
  }
}

// Queries [first, first + n) of a KV head of a row as padded rows.
void Queries::read(int head, int first, int n, float* rows) const {
  const int row = head / query_.kv_heads, group = head % query_.kv_heads * groups_;
  for (int i = first; i < first + n; ++i, rows += width_) {
    const int64_t at = row * query_.batch_stride + (group + i / query_.length) * query_.head_stride +
                       i % query_.length * query_.query_stride;
    read_row(query_.form, element_at(query_.rows, query_.form, at), query_.dim, rows);
    std::fill(rows + query_.dim, rows + width_, 0.0f);
  }
}

// n padded rows of a KV head in a space: themselves, or in one of two places that have room for them.
const float* Queries::turned(const QuerySpace& where, int head, const float* rows, int n, float* once,
                             float* twice) const {
  if (where.space) {
    k_.rotate(where.space->queries[head % query_.kv_heads], rows, n, once);
    rows = once;
  }
  if (where.rotation) {
    k_.rotate(*where.rotation, rows, n, twice);
    rows = twice;
  }
  return rows;
}

}  // namespace fibkv
