// Tasks, threads and tiles; what happens inside a tile is the instruction set's (attend_kernels.h).
#include "attend.h"

#include <algorithm>

#include "attend_outputs.h"
#include "attend_queries.h"
#include "helpers.h"
#include "openmp.h"
#include "shared_work.h"

namespace fibkv {
namespace {

// A split of the context below this many tokens costs more in merging than it gains.
constexpr int kSplitTokens = 512;
// Tasks that each thread should find, so that one that is held up leaves work to the others.
constexpr int kTasksPerThread = 3;
// Heads of a page (4 KiB of 4-bit codes each) between what is read and what is prefetched.
constexpr int kAhead = 6;
// Memory that stays with a thread between calls, at most: that of a step, not of a prefill.
constexpr size_t kKeptBytes = 4 << 20;

// A block of queries of some KV heads of one row, over one split of the context. Heads of a page lie one after another
// and are read in that order: memory delivers long sequential reads twice as fast as pieces of a page.
struct Task {
  int row, head0, head1, first_query, queries, split;
  int heads() const { return head1 - head0; }
};

// Buffers of one thread.
struct Scratch {
  std::vector<float> rows;    // of queries before tasks, and of outputs behind them
  std::vector<float> logits;  // [heads][queries][kTile]
  std::vector<float> tile, shrink;
  std::vector<Visibility> visible, all;
  Partial partial;    // of a task that has the whole context
  double worked = 0;  // seconds
};

// Memory of a call, kept for the next one of the thread: malloc would give so much of it back to the system, and every
// call would wait for its pages again.
struct Workspace {
  std::vector<Partial> partials;  // [tasks]
  std::vector<Scratch> scratch;   // [threads]
  Queries::Memory queries;

  size_t nbytes() const {
    size_t total = queries.nbytes();
    for (const Partial& partial : partials) total += partial.outs.capacity() * sizeof(float);
    for (const Scratch& one : scratch) {
      total += (one.rows.capacity() + one.logits.capacity() + one.partial.outs.capacity()) * sizeof(float);
    }
    return total;
  }
};

class Step {
 public:
  Step(const AttendKernels& kernels, const std::vector<const Run*>& runs, const Query& query, const Mask& mask,
       const Softmax& softmax, int threads, const Output& out, Workspace& workspace)
      : k_(kernels), runs_(runs), query_(query), mask_(mask), softmax_(softmax), w_(workspace),
        queries_(kernels, runs, query, workspace.queries), outputs_(kernels, runs, out) {
    for (const Run* run : runs_) end_ = std::max(end_, run->start + run->spans * run->tokens);
    plan_tasks(threads);
    if (splits_ > 1) w_.partials.resize(std::max(w_.partials.size(), tasks_.size()));
    w_.scratch.resize(std::max<size_t>(w_.scratch.size(), threads));
  }

  // Tasks are planned for so many threads, and give the same numbers whoever takes them.
  void run(int threads, Helpers& helpers) {
    const int tasks = static_cast<int>(tasks_.size()), most_heads = tasks_[0].heads(), blocks = queries_.blocks();
    SharedWork pieces(queries_.heads() * blocks), splits(tasks), merges(splits_ > 1 ? tasks / splits_ * most_heads : 0);
    const bool alone = threads == 1 || !helpers.are_wanted();
    for (Scratch& one : w_.scratch) one.worked = 0;
    const double started = omp_get_wtime();
#pragma omp parallel num_threads(threads) if (!alone)
    {
      Scratch& scratch = w_.scratch[omp_get_thread_num()];
      const double came = omp_get_wtime();
      double idle = 0;
      const auto wait_for = [&](const SharedWork& work) {
        const double from = omp_get_wtime();
        work.wait();
        idle += omp_get_wtime() - from;
      };
      pieces.work([&](int i) { queries_.prepare(i / blocks, i % blocks, scratch.rows); });
      wait_for(pieces);
      // The last split has the raw tail, which takes longest: it is begun first.
      splits.work([&](int i) {
        const int at = tasks - 1 - i;
        if (splits_ > 1) return attend(tasks_[at], w_.partials[at], scratch);
        attend(tasks_[at], scratch.partial, scratch);
        for (int head = 0; head < tasks_[at].heads(); ++head) finish(tasks_[at], &scratch.partial, head, scratch);
      });
      if (splits_ > 1) wait_for(splits);
      merges.work([&](int i) {
        const int first = i / most_heads * splits_, head = i % most_heads;
        // The last group of heads may be smaller than the first.
        if (head < tasks_[first].heads()) finish(tasks_[first], &w_.partials[first], head, scratch);
      });
      scratch.worked = omp_get_wtime() - came - idle;
    }
    if (alone) return;
    double all = 0;
    for (int i = 0; i < threads; ++i) all += w_.scratch[i].worked;
    helpers.came(omp_get_wtime() - started, w_.scratch[0].worked, all);
  }

 private:
  void plan_tasks(int threads);

  // The row of query i of a head of a task: those of a KV head lie one after another.
  size_t row_of(const Task& task, int head, int i) const {
    return (static_cast<size_t>(task.row) * query_.kv_heads + head) * queries_.per_head() + task.first_query + i;
  }

  int position_of(const Task& task, int i) const { return query_.past + (task.first_query + i) % query_.length; }

  void attend(const Task& task, Partial& partial, Scratch& scratch);
  void attend_run(const Task& task, const Run& run, Partial& partial, Scratch& scratch);
  void attend_tile(const Task& task, const Run& run, int span, int first, Partial& partial, Scratch& scratch);
  const uint8_t* ahead(const Task& task, const Run& run, size_t at, int block, int heads) const;
  void soften(const Task& task, int head, int start, int tokens, const KeySpace* space, float* logits, Partial& partial,
              Scratch& scratch);
  Visibility visible(const Task& task, int head, int i, int start, int tokens) const;
  void finish(const Task& task, const Partial* partials, int nth_head, Scratch& scratch) const;

  const AttendKernels& k_;
  const std::vector<const Run*>& runs_;
  const Query& query_;
  const Mask& mask_;
  const Softmax& softmax_;
  Workspace& w_;
  Queries queries_;
  Outputs outputs_;
  int end_ = 0, splits_ = 1;
  std::vector<Task> tasks_;
};

// Splits the context first, so that a task reads whole pages, and the heads only where that does not occupy all
// threads, or where queries are many.
void Step::plan_tasks(int threads) {
  const int per_head = queries_.per_head(), blocks = queries_.blocks();
  const int wanted = threads == 1 ? 1 : kTasksPerThread * threads;
  const int fewest = std::clamp(query_.kv_heads * per_head / kQueryBlock, 1, query_.kv_heads);
  splits_ = std::clamp((wanted - 1) / (query_.batch * blocks * fewest) + 1, 1, std::max(end_ / kSplitTokens, 1));
  const int groups = std::clamp((wanted - 1) / (query_.batch * blocks * splits_) + 1, fewest, query_.kv_heads);
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
  partial.outs.resize(outputs_.sides() * rows * outputs_.width());  // cleared when a side is first met
  partial.used.assign(outputs_.sides(), false);
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
    const int query = task.first_query + i, groups = query_.query_heads / query_.kv_heads;
    const int64_t at = task.row * mask_.batch_stride + (head * groups + query / query_.length) * mask_.head_stride +
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
  k_.soften(logits, n, tokens, queries_.biases(space, row_of(task, head, 0)), softmax_, visible, partial.running.data() + first,
            scratch.shrink.data());
  for (int i = 0; i < n; ++i) {
    if (scratch.shrink[i] == 1.0f) continue;
    for (int side = 0; side < outputs_.sides(); ++side) {
      if (!partial.used[side]) continue;
      const size_t row = static_cast<size_t>(side) * task.heads() * n + first + i;
      k_.scale(partial.outs.data() + row * outputs_.width(), outputs_.width(), scratch.shrink[i]);
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
  const int reader = queries_.reader_of(run);
  for (int head = head0; head < head1; ++head) {
    const Span keys = Span::of(*run.key, run.key_rectangle, run.keys[at], head - run.head0);
    prefetch_norms(*run.key, run.key_rectangle, run.keys[next], head - run.head0);
    k_.score(*run.key, keys, first, tokens,
             queries_.prepared(reader, task.row * query_.kv_heads + head, task.first_query / kQueryBlock), n,
             scratch.logits.data() + static_cast<size_t>(head - task.head0) * n * kTile, scratch.tile.data(),
             ahead(task, run, at, head - head0 + kAhead, heads));
  }
  const int side = outputs_.side_of(run);
  const size_t rows = static_cast<size_t>(task.heads()) * n;
  float* outs = partial.outs.data() + side * rows * outputs_.width();
  if (!partial.used[side]) std::fill_n(outs, rows * outputs_.width(), 0.0f);
  partial.used[side] = true;
  for (int head = head0; head < head1; ++head) {
    const Span values = Span::of(*run.value, run.value_rectangle, run.values[at], head - run.head0);
    prefetch_norms(*run.value, run.value_rectangle, run.values[next], head - run.head0);
    const size_t row = static_cast<size_t>(head - task.head0) * n;
    float* logits = scratch.logits.data() + row * kTile;
    soften(task, head, start, tokens, run.space, logits, partial, scratch);
    k_.mix(*run.value, values, first, tokens, logits, n, outs + row * outputs_.width(), scratch.tile.data(),
           ahead(task, run, at, heads + head - head0 + kAhead, heads));
  }
}

// Merges what all splits of the context found for the queries of one head of a task, and writes it.
void Step::finish(const Task& task, const Partial* partials, int nth_head, Scratch& scratch) const {
  const Found found{partials, splits_, task.heads(), nth_head, task.queries};
  outputs_.write(found, row_of(task, task.head0 + nth_head, 0), scratch.rows);
}

}  // namespace

void attend(const AttendKernels& kernels, const std::vector<const Run*>& runs, const Query& query, const Mask& mask,
            const Softmax& softmax, int threads, const Output& out) {
  static thread_local Workspace workspace;
  static thread_local Helpers helpers;
  Step(kernels, runs, query, mask, softmax, threads, out, workspace).run(threads, helpers);
  if (workspace.nbytes() > kKeptBytes) workspace = {};
}

const AttendKernels& attend_kernels(Isa isa, Form form) {
  const bool narrow = form == Form::bf16;
#ifdef FIBKV_X86
  if (isa == Isa::avx512) return narrow ? avx512::bf16_attend_kernels : avx512::f32_attend_kernels;
  if (isa == Isa::avx2) return narrow ? avx2::bf16_attend_kernels : avx2::f32_attend_kernels;
#endif
  (void)isa;
  return narrow ? portable::bf16_attend_kernels : portable::f32_attend_kernels;
}

}  // namespace fibkv
