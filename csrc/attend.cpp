// Threads, splits and merging; what happens inside a tile is the instruction set's (attend_kernels.h).
#include "attend.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>
#include <thread>

#include "row_forms.h"

namespace fibkv {
namespace {

// Queries that one task takes: enough to be worth decoding a tile for, few enough for the second-level cache.
constexpr int kQueryBlock = 128;
// A split of the context below this many tokens costs more in merging than it gains.
constexpr int kSplitTokens = 512;
// Tasks that each thread should find, so that one that is held up leaves work to the others.
constexpr int kTasksPerThread = 3;
// Heads of a page (4 KiB of 4-bit codes each) between what is read and what is prefetched.
constexpr int kAhead = 6;
// Memory that stays with a thread between calls, at most: that of a step, not of a prefill.
constexpr size_t kKeptBytes = 4 << 20;
constexpr float kNothing = -std::numeric_limits<float>::infinity();

template <typename T>
int index_of(const std::vector<T>& items, const T& item) {
  return static_cast<int>(std::find(items.begin(), items.end(), item) - items.begin());
}

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

KeyReader reader_of(const Run& run) { return {run.key, run.space && run.space->queries ? run.space : nullptr}; }

template <typename T>
void add_once(std::vector<T>& items, const T& item) {
  if (index_of(items, item) == static_cast<int>(items.size())) items.push_back(item);
}

// A block of queries of some KV heads of one row, over one split of the context. Heads of a page lie one after another
// and are read in that order: memory delivers long sequential reads twice as fast as pieces of a page.
struct Task {
  int row, head0, head1, first_query, queries, split;
  int heads() const { return head1 - head0; }
};

// What one task found for its queries.
struct Partial {
  std::vector<float> outs;       // [value sides][heads][queries][width], each in its side's own order
  std::vector<bool> used;        // [value sides]
  std::vector<Running> running;  // [heads][queries]
};

// Buffers of one thread.
struct Scratch {
  std::vector<float> logits;  // [heads][queries][kTile]
  std::vector<float> tile, shrink;
  std::vector<Visibility> visible, all;
};

// Memory of a call, kept for the next one of the thread: malloc would give so much of it back to the system, and every
// call would wait for its pages again.
struct Workspace {
  std::vector<Partial> partials;               // [tasks]
  std::vector<Scratch> scratch;                // [threads]
  std::vector<float> rotated;                  // [query spaces][query rows][key width]
  std::vector<float> biases;                   // [key spaces][query rows]: <query, mean>
  std::vector<std::vector<uint8_t>> prepared;  // [key readers], [rows][KV heads][blocks] of prepared queries

  size_t nbytes() const {
    size_t total = (rotated.capacity() + biases.capacity()) * sizeof(float);
    for (const Partial& partial : partials) total += partial.outs.capacity() * sizeof(float);
    for (const std::vector<uint8_t>& queries : prepared) total += queries.capacity();
    return total;
  }
};

// Work that threads share, piece by piece. Nobody waits for a thread that has not come yet, as at OpenMP's barriers:
// the system may take longer to wake it than the work takes.
class Shared {
 public:
  explicit Shared(int count) : count_(count) {}

  template <typename Visit>
  void work(Visit visit) {
    for (int i = next_.fetch_add(1); i < count_; i = next_.fetch_add(1)) {
      visit(i);
      done_.fetch_add(1, std::memory_order_release);
    }
  }

  // Until the pieces that other threads have begun are done.
  void wait() const {
    while (done_.load(std::memory_order_acquire) < count_) std::this_thread::yield();
  }

 private:
  const int count_;
  std::atomic<int> next_{0}, done_{0};
};

class Step {
 public:
  Step(const AttendKernels& kernels, const std::vector<const Run*>& runs, const Query& query, const Mask& mask,
       const Softmax& softmax, int threads, const Output& out, Workspace& workspace)
      : k_(kernels), runs_(runs), query_(query), mask_(mask), softmax_(softmax), out_(out), w_(workspace),
        groups_(query.query_heads / query.kv_heads), key_width_(padded_dim(query.dim)),
        value_width_(padded_dim(out.value_dim)) {
    for (const Run* run : runs_) {
      add_once(key_readers_, reader_of(*run));
      add_once(value_sides_, run->value);
      add_once(query_spaces_, reader_of(*run).query_space());
      if (run->space) add_once(biased_, run->space);
      add_once(value_spaces_, run->value->space());
      end_ = std::max(end_, run->start + run->spans * run->tokens);
    }
    plan_tasks(threads);
    w_.partials.resize(std::max(w_.partials.size(), tasks_.size()));
    w_.scratch.resize(std::max<size_t>(w_.scratch.size(), threads));
    w_.rotated.resize(query_spaces_.size() * query_rows() * key_width_);
    w_.biases.resize(biased_.size() * query_rows());
    w_.prepared.resize(std::max(w_.prepared.size(), key_readers_.size()));
    const int most = std::min(kQueryBlock, groups_ * query.length);
    for (size_t i = 0; i < key_readers_.size(); ++i) {
      prepared_bytes_.push_back(k_.prepared_bytes(*key_readers_[i].side, most));
      w_.prepared[i].resize(prepared_bytes_[i] * blocks_ * query.batch * query.kv_heads);
    }
  }

  void run(int threads) {
    const int tasks = static_cast<int>(tasks_.size()), most_heads = tasks_[0].heads();
    Shared heads(query_.batch * query_.kv_heads), splits(tasks), merges(tasks / splits_ * most_heads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      Scratch& scratch = w_.scratch[omp_get_thread_num()];
      heads.work([&](int head) { rotate(head); });
      heads.wait();
      // The last split has the raw tail, which takes longest: it is begun first.
      splits.work([&](int i) { attend(tasks_[tasks - 1 - i], w_.partials[tasks - 1 - i], scratch); });
      splits.wait();
      merges.work([&](int i) { finish(i / most_heads * splits_, i % most_heads); });
    }
  }

 private:
  size_t query_rows() const { return static_cast<size_t>(query_.batch) * query_.query_heads * query_.length; }

  void plan_tasks(int threads);
  // All queries of one KV head of one row, in every space of the keys and prepared for every reader, and their biases.
  void rotate(int head) {
    const int n = groups_ * query_.length;
    const size_t first = static_cast<size_t>(head) * n;
    std::vector<float> padded(static_cast<size_t>(n) * key_width_);
    for (int i = 0; i < n; ++i) {
      const int64_t at = head / query_.kv_heads * query_.batch_stride +
                         (head % query_.kv_heads * groups_ + i / query_.length) * query_.head_stride +
                         i % query_.length * query_.query_stride;
      read_row(query_.form, element_at(query_.rows, query_.form, at), query_.dim,
               padded.data() + static_cast<size_t>(i) * key_width_);
    }
    for (size_t i = 0; i < query_spaces_.size(); ++i) {
      to_space(query_spaces_[i], padded, head % query_.kv_heads, n,
               w_.rotated.data() + (i * query_rows() + first) * key_width_);
    }
    for (size_t i = 0; i < biased_.size(); ++i) {
      const float* mean = biased_[i]->mean + static_cast<size_t>(head % query_.kv_heads) * query_.dim;
      for (int q = 0; q < n; ++q) {
        const float* row = padded.data() + static_cast<size_t>(q) * key_width_;
        w_.biases[i * query_rows() + first + q] = std::inner_product(mean, mean + query_.dim, row, 0.0f);
      }
    }
    for (size_t i = 0; i < key_readers_.size(); ++i) {
      const size_t space = index_of(query_spaces_, key_readers_[i].query_space());
      const float* rows = w_.rotated.data() + (space * query_rows() + first) * key_width_;
      for (int block = 0; block < blocks_; ++block) {
        const int from = block * kQueryBlock;
        k_.prepare(*key_readers_[i].side, rows + static_cast<size_t>(from) * key_width_,
                   std::min(kQueryBlock, n - from), prepared(i, head, block));
      }
    }
  }

  // n padded rows of one KV head to a space.
  void to_space(const QuerySpace& where, const std::vector<float>& rows, int kv_head, int n, float* to) const {
    const Rotation* steps[] = {where.space ? where.space->queries + kv_head : nullptr, where.rotation};
    std::vector<float> from = rows;
    for (const Rotation* step : steps) {
      if (!step) continue;
      k_.rotate(*step, from.data(), n, to);
      std::copy(to, to + from.size(), from.begin());
    }
    std::copy(from.begin(), from.end(), to);
  }

  // The biases of a task's queries of one head, or null.
  const float* bias(const Task& task, int head, const KeySpace* space) const {
    if (!space) return nullptr;
    return w_.biases.data() + index_of(biased_, space) * query_rows() + row_of(task, head, 0);
  }

  // The prepared queries of a block of a KV head of a row, `head` counting through the rows.
  uint8_t* prepared(size_t reader, int head, int block) {
    return w_.prepared[reader].data() + (static_cast<size_t>(head) * blocks_ + block) * prepared_bytes_[reader];
  }

  // Query i of a KV head is position i % length of query head i / length of its group: rows lie one after another.
  size_t row_of(const Task& task, int head, int i) const {
    const size_t first = static_cast<size_t>(task.row) * query_.query_heads + head * groups_;
    return first * query_.length + task.first_query + i;
  }

  int position_of(const Task& task, int i) const { return query_.past + (task.first_query + i) % query_.length; }

  void attend(const Task& task, Partial& partial, Scratch& scratch);
  void attend_run(const Task& task, const Run& run, Partial& partial, Scratch& scratch);
  void attend_tile(const Task& task, const Run& run, int span, int first, Partial& partial, Scratch& scratch);
  const uint8_t* ahead(const Task& task, const Run& run, size_t at, int block, int heads) const;
  void soften(const Task& task, int head, int start, int tokens, const KeySpace* space, float* logits, Partial& partial,
              Scratch& scratch);
  Visibility visible(const Task& task, int head, int i, int start, int tokens) const;
  void finish(int first_task, int nth_head);
  void write(const Task& task, int head, const std::vector<float>& spaces, const std::vector<float>& top,
             const std::vector<float>& sum) const;

  const AttendKernels& k_;
  const std::vector<const Run*>& runs_;
  const Query& query_;
  const Mask& mask_;
  const Softmax& softmax_;
  const Output& out_;
  Workspace& w_;
  int groups_, key_width_, value_width_, end_ = 0, splits_ = 1, blocks_ = 1;
  std::vector<KeyReader> key_readers_;
  std::vector<QuerySpace> query_spaces_;
  std::vector<const KeySpace*> biased_;
  std::vector<const Side*> value_sides_;
  std::vector<const Rotation*> value_spaces_;
  std::vector<Task> tasks_;
  std::vector<size_t> prepared_bytes_;  // [key readers]: of one block of queries
};

// Splits the context first, so that a task reads whole pages, and the heads only where that does not occupy all threads.
void Step::plan_tasks(int threads) {
  const int per_head = groups_ * query_.length;
  blocks_ = (per_head + kQueryBlock - 1) / kQueryBlock;
  const int wanted = threads == 1 ? 1 : kTasksPerThread * threads;
  splits_ = std::clamp((wanted - 1) / (query_.batch * blocks_) + 1, 1, std::max(end_ / kSplitTokens, 1));
  const int groups = std::clamp((wanted - 1) / (query_.batch * blocks_ * splits_) + 1, 1, query_.kv_heads);
  const int heads = (query_.kv_heads + groups - 1) / groups;
  for (int row = 0; row < query_.batch; ++row) {
    for (int head = 0; head < query_.kv_heads; head += heads) {
      for (int first = 0; first < per_head; first += kQueryBlock) {
        for (int split = 0; split < splits_; ++split) {
          tasks_.push_back({row, head, std::min(head + heads, query_.kv_heads), first,
                            std::min(kQueryBlock, per_head - first), split});
        }
      }
    }
  }
}

void Step::attend(const Task& task, Partial& partial, Scratch& scratch) {
  const size_t rows = static_cast<size_t>(task.heads()) * task.queries;
  partial.outs.resize(value_sides_.size() * rows * value_width_);  // cleared when a side is first met
  partial.used.assign(value_sides_.size(), false);
  partial.running.assign(rows, Running{kNothing, {}});
  scratch.logits.resize(rows * kTile);
  scratch.shrink.resize(task.queries);
  scratch.visible.resize(task.queries);
  scratch.all.assign(task.queries, Visibility{kTile, nullptr, nullptr});
  for (const Run* run : runs_) {
    if (task.row >= run->row0 && task.row < run->row1 && task.head0 < run->head1 && task.head1 > run->head0) {
      attend_run(task, *run, partial, scratch);
    }
  }
}

void Step::attend_run(const Task& task, const Run& run, Partial& partial, Scratch& scratch) {
  const int begin = static_cast<int>(static_cast<int64_t>(end_) * task.split / splits_);
  const int end = static_cast<int>(static_cast<int64_t>(end_) * (task.split + 1) / splits_);
  // The last position that any query of the task can see.
  const bool bounded = mask_.causal && !mask_.allowed && !mask_.added;
  const int newest = bounded ? query_.past + query_.length - 1 : end_;
  const int first_span = begin > run.start ? (begin - run.start) / run.tokens : 0;
  for (int span = first_span; span < run.spans; ++span) {
    const int start = run.start + span * run.tokens;
    if (start >= end || start > newest) return;
    for (int first = 0; first < run.tokens; first += kTile) {
      const int at = start + first;
      if (at >= begin && at < end && at <= newest) attend_tile(task, run, span, first, partial, scratch);
    }
  }
}

Visibility Step::visible(const Task& task, int head, int i, int start, int tokens) const {
  Visibility visible{tokens, nullptr, nullptr};
  if (mask_.allowed || mask_.added) {
    const int query = task.first_query + i;
    const int64_t at = task.row * mask_.batch_stride + (head * groups_ + query / query_.length) * mask_.head_stride +
                       (query % query_.length) * mask_.query_stride + start;
    if (mask_.allowed) visible.allowed = mask_.allowed + at;
    if (mask_.added) visible.added = mask_.added + at;
  } else if (mask_.causal) {
    visible.limit = std::min(tokens, position_of(task, i) + 1 - start);
  }
  return visible;
}

// What is read `block` pieces after the start of page `at`, to be prefetched: pieces are heads of keys, then heads of
// values, then those of the next page.
const uint8_t* Step::ahead(const Task& task, const Run& run, size_t at, int block, int heads) const {
  const size_t row_end = (at / run.spans + 1) * run.spans;
  at = std::min(at + block / (2 * heads), row_end - 1);
  const int piece = block % (2 * heads), head = std::max(task.head0, run.head0) - run.head0 + piece % heads;
  const bool is_key = piece < heads;
  const Rectangle& rectangle = is_key ? run.key_rectangle : run.value_rectangle;
  return (is_key ? run.keys : run.values)[at] + head * rectangle.code_stride;
}

// Norms are few bytes, but attention waits for them: those of the next page are fetched while this one is read.
void prefetch_norms(const Side& side, const Rectangle& rectangle, const uint8_t* page, int head) {
  __builtin_prefetch(page + rectangle.norm_offset + head * rectangle.norm_stride);
  if (head == 0) __builtin_prefetch(page + rectangle.range_offset);
  if (side.channels) __builtin_prefetch(page + rectangle.channel_offset + head * side.channel_bytes());
  const uint8_t* mean = page + rectangle.mean_offset + head * side.mean_bytes();
  for (size_t at = 0; at < side.mean_bytes(); at += 64) __builtin_prefetch(mean + at);
}

void Step::soften(const Task& task, int head, int start, int tokens, const KeySpace* space, float* logits,
                  Partial& partial, Scratch& scratch) {
  const int n = task.queries;
  // Old tokens are seen by every query, which needs no look at each.
  const bool masked = mask_.allowed || mask_.added;
  const bool seen = !masked && (!mask_.causal || start + tokens <= query_.past + 1);
  for (int i = 0; !seen && i < n; ++i) scratch.visible[i] = visible(task, head, i, start, tokens);
  const Visibility* visible = seen ? scratch.all.data() : scratch.visible.data();
  const size_t first = static_cast<size_t>(head - task.head0) * n;
  k_.soften(logits, n, tokens, bias(task, head, space), softmax_, visible, partial.running.data() + first,
            scratch.shrink.data());
  for (int i = 0; i < n; ++i) {
    if (scratch.shrink[i] == 1.0f) continue;
    for (size_t side = 0; side < value_sides_.size(); ++side) {
      if (!partial.used[side]) continue;
      const size_t row = side * task.heads() * n + first + i;
      k_.scale(partial.outs.data() + row * value_width_, value_width_, scratch.shrink[i]);
    }
  }
}

void Step::attend_tile(const Task& task, const Run& run, int span, int first, Partial& partial, Scratch& scratch) {
  const int n = task.queries, tokens = std::min(kTile, run.tokens - first);
  const int start = run.start + span * run.tokens + first;
  const int head0 = std::max(task.head0, run.head0), head1 = std::min(task.head1, run.head1);
  const size_t at = static_cast<size_t>(task.row - run.row0) * run.spans + span;
  const int heads = head1 - head0;
  const size_t next = span + 1 < run.spans ? at + 1 : at;
  scratch.tile.resize(std::max(
      scratch.tile.size(), std::max(k_.scratch_floats(*run.key, n), k_.scratch_floats(*run.value, n))));
  const size_t reader = index_of(key_readers_, reader_of(run));
  for (int head = head0; head < head1; ++head) {
    const Span keys = Span::of(*run.key, run.key_rectangle, run.keys[at], head - run.head0);
    prefetch_norms(*run.key, run.key_rectangle, run.keys[next], head - run.head0);
    k_.score(*run.key, keys, first, tokens,
             prepared(reader, task.row * query_.kv_heads + head, task.first_query / kQueryBlock), n,
             scratch.logits.data() + static_cast<size_t>(head - task.head0) * n * kTile, scratch.tile.data(),
             ahead(task, run, at, head - head0 + kAhead, heads));
  }
  const size_t side = index_of(value_sides_, run.value), rows = static_cast<size_t>(task.heads()) * n;
  float* outs = partial.outs.data() + side * rows * value_width_;
  if (!partial.used[side]) std::fill_n(outs, rows * value_width_, 0.0f);
  partial.used[side] = true;
  for (int head = head0; head < head1; ++head) {
    const Span values = Span::of(*run.value, run.value_rectangle, run.values[at], head - run.head0);
    prefetch_norms(*run.value, run.value_rectangle, run.values[next], head - run.head0);
    const size_t row = static_cast<size_t>(head - task.head0) * n;
    float* logits = scratch.logits.data() + row * kTile;
    soften(task, head, start, tokens, run.space, logits, partial, scratch);
    k_.mix(*run.value, values, first, tokens, logits, n, outs + row * value_width_, scratch.tile.data(),
           ahead(task, run, at, heads + head - head0 + kAhead, heads));
  }
}

// The factor that takes sums relative to a split's reference point to the common one.
float share_of(const Running& running, float top) { return top == kNothing ? 0.0f : std::exp(running.top - top); }

// Merges the splits of one block of queries of one head by log-sum-exp and takes the outputs back to the original space.
void Step::finish(int first_task, int nth_head) {
  const Task& task = tasks_[first_task];
  const int head = task.head0 + nth_head;
  if (head >= task.head1) return;  // the last group of heads may be smaller than the first
  const int n = task.queries;
  const size_t first = static_cast<size_t>(head - task.head0) * n;
  std::vector<float> top(n, kNothing), sum(n, 0.0f);
  for (int split = 0; split < splits_; ++split) {
    const Running* running = w_.partials[first_task + split].running.data() + first;
    for (int i = 0; i < n; ++i) top[i] = std::max(top[i], running[i].top);
  }
  for (int split = 0; split < splits_; ++split) {
    for (int i = 0; i < n; ++i) {
      const Running& running = w_.partials[first_task + split].running[first + i];
      sum[i] += share_of(running, top[i]) * std::accumulate(running.sums, running.sums + kPad, 0.0f);
    }
  }
  const size_t size = static_cast<size_t>(n) * value_width_;
  std::vector<float> spaces(value_spaces_.size() * size), merged(size);
  for (size_t side = 0; side < value_sides_.size(); ++side) {
    std::fill(merged.begin(), merged.end(), 0.0f);
    for (int split = 0; split < splits_; ++split) {
      const Partial& partial = w_.partials[first_task + split];
      if (!partial.used[side]) continue;
      const float* rows = partial.outs.data() + (side * task.heads() * n + first) * value_width_;
      for (int i = 0; i < n; ++i) {
        const size_t row = static_cast<size_t>(i) * value_width_;
        k_.add_scaled(merged.data() + row, rows + row, value_width_, share_of(partial.running[first + i], top[i]));
      }
    }
    const size_t space = index_of(value_spaces_, value_sides_[side]->space());
    k_.finish(*value_sides_[side], merged.data(), n, spaces.data() + space * size);
  }
  write(task, head, spaces, top, sum);
}

void Step::write(const Task& task, int head, const std::vector<float>& spaces, const std::vector<float>& top,
                 const std::vector<float>& sum) const {
  const int n = task.queries;
  const size_t size = static_cast<size_t>(n) * value_width_;
  std::vector<float> turned(size), whole(size);
  for (size_t space = 0; space < value_spaces_.size(); ++space) {
    const float* rows = spaces.data() + space * size;
    if (value_spaces_[space]) {
      k_.unrotate(*value_spaces_[space], rows, n, turned.data());
      rows = turned.data();
    }
    for (size_t i = 0; i < size; ++i) whole[i] += rows[i];
  }
  for (int i = 0; i < n; ++i) {
    const size_t row = row_of(task, head, i);
    const float inverse = sum[i] > 0 ? 1.0f / sum[i] : 0.0f;
    float* numbers = whole.data() + static_cast<size_t>(i) * value_width_;
    for (int j = 0; j < out_.value_dim; ++j) numbers[j] *= inverse;
    write_row(out_.form, numbers, out_.value_dim, element_at(out_.rows, out_.form, row * out_.value_dim));
    out_.lse[row] = sum[i] > 0 ? top[i] + std::log(sum[i]) : kNothing;
  }
}

}  // namespace

void attend(const AttendKernels& kernels, const std::vector<const Run*>& runs, const Query& query, const Mask& mask,
            const Softmax& softmax, int threads, const Output& out) {
  static thread_local Workspace workspace;
  Step(kernels, runs, query, mask, softmax, threads, out, workspace).run(threads);
  if (workspace.nbytes() > kKeptBytes) workspace = {};
}

const AttendKernels& attend_kernels(Isa isa) {
#ifdef FIBKV_X86
  if (isa == Isa::avx512) return avx512::attend_kernels;
  if (isa == Isa::avx2) return avx2::attend_kernels;
#endif
  (void)isa;
  return portable::attend_kernels;
}

}  // namespace fibkv
