#include "owned.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "orders.h"

namespace fibkv {
namespace {

// Rounds numbers to integers so that the weighted mean of their errors vanishes: an error that all tokens share does not
// average out over a long context, the rest does. Numbers near a half go to the other side.
class UnbiasedRounding {
 public:
  UnbiasedRounding(const std::vector<double>& numbers, const std::vector<double>& weights)
      : rounded(numbers.size()), numbers_(numbers), weights_(weights) {
    for (size_t i = 0; i < numbers.size(); ++i) {
      rounded[i] = static_cast<int>(std::lround(numbers[i]));
      bias_ += weights[i] * error(i);
    }
    turn_single_ones();
  }

  void turn_pairs() {
    while (turn_a_pair()) {
    }
  }

  std::vector<int> rounded;

 private:
  double error(size_t i) const { return rounded[i] - numbers_[i]; }
  int step(size_t i) const { return error(i) > 0 ? -1 : 1; }
  // What a step adds to the bias.
  double share(size_t i) const { return step(i) * weights_[i]; }
  // Nothing gets further off than three quarters.
  bool may_turn(size_t i) const { return std::fabs(error(i)) >= 0.25; }

  void turn(size_t i) {
    bias_ += share(i);
    rounded[i] += step(i);
  }

  // The nearest to a half first, each that makes the bias smaller.
  void turn_single_ones() {
    std::vector<size_t> order(rounded.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return std::fabs(error(a)) > std::fabs(error(b)); });
    for (size_t i : order) {
      if (may_turn(i) && std::fabs(bias_ + share(i)) < std::fabs(bias_)) turn(i);
    }
  }

  // What is left is a part of one weight: the two that leave least of it, if they leave less.
  bool turn_a_pair() {
    double least = std::fabs(bias_);
    size_t first = 0, second = 0;
    for (size_t i = 0; i < rounded.size(); ++i) {
      for (size_t j = 0; j < i && may_turn(i); ++j) {
        const double left = std::fabs(bias_ + share(i) + share(j));
        if (!may_turn(j) || left >= least) continue;
        least = left;
        first = i;
        second = j;
      }
    }
    if (first == second) return false;
    turn(first);
    turn(second);
    return true;
  }

  const std::vector<double>&numbers_, &weights_;
  double bias_ = 0;
};

std::vector<int> round_unbiased(const std::vector<double>& numbers, const std::vector<double>& weights) {
  return UnbiasedRounding(numbers, weights).rounded;
}

// Of few numbers, each of some weight: single ones leave a part of one.
std::vector<int> round_few_unbiased(const std::vector<double>& numbers, const std::vector<double>& weights) {
  UnbiasedRounding rounding(numbers, weights);
  rounding.turn_pairs();
  return rounding.rounded;
}

// A side that float kernels read, in rows.
Side plain_side(const SideSettings& s, const Rotation* rotation) {
  return {s.form, Order::rows, s.dim, s.code_bytes, s.norm_bytes, s.block, s.size, s.bits, s.window, s.log_norms,
          s.channels, s.centered, nullptr, rotation, nullptr, 0, 0, 0, nullptr, nullptr, 1.0f, nullptr, 1.0f};
}

}  // namespace

OwnedRotation::OwnedRotation(const float* rows, int dim, const float* of_rounds, int rounds)
    : matrix(rows, rows + static_cast<size_t>(dim) * dim),
      transposed(matrix.size()),
      signs(of_rounds, of_rounds + static_cast<size_t>(rounds) * dim) {
  for (int i = 0; i < dim; ++i) {
    for (int j = 0; j < dim; ++j) transposed[static_cast<size_t>(j) * dim + i] = matrix[static_cast<size_t>(i) * dim + j];
  }
  rotation = {dim, matrix.data(), transposed.data(), rounds ? signs.data() : nullptr, rounds};
}

OwnedKeySpace::OwnedKeySpace(const float* mean, const float* inverses, int heads, int dim) {
  const size_t size = static_cast<size_t>(dim) * dim;
  // A query becomes A^-T q, so that A^-1 is the transpose; nothing is taken back.
  for (int h = 0; inverses && h < heads; ++h) queries.push_back({dim, nullptr, inverses + h * size, nullptr, 0});
  space = {dim, mean, inverses ? queries.data() : nullptr};
}

OwnedSide::OwnedSide(const SideSettings& s, const float* codewords, const uint8_t* widths, int heads)
    : side_(plain_side(s, nullptr)),
      codewords_(codewords, codewords + static_cast<size_t>(s.size) * s.block),
      sections_(static_cast<size_t>(heads) * kPairLevels) {
  const int pairs = s.dim / 2;
  for (int head = 0; head < heads; ++head) {
    const uint8_t* of_head = widths + static_cast<size_t>(head) * pairs;
    int pair = 0, bit = 0;
    // Widths do not rise: from 8 bits down to none.
    for (int level = 0; level < kPairLevels; ++level) {
      PairSection& section = sections_[static_cast<size_t>(head) * kPairLevels + level];
      section.bits = 2 * (kPairLevels - 1 - level);
      section.first_bit = bit;
      // Behind the codewords of fewer bits, 1 + 4 + ... of them.
      section.book = codewords_.data() + 2 * (((1 << section.bits) - 1) / 3);
      while (pair + section.pairs < pairs && of_head[pair + section.pairs] == section.bits) ++section.pairs;
      pair += section.pairs;
      bit += section.pairs * section.bits;
    }
  }
  side_.sections = sections_.data();
  side_.heads = heads;
}

OwnedSide::OwnedSide(const SideSettings& s, const float* codewords, const uint8_t* labels, const double* frequencies,
                     std::shared_ptr<OwnedRotation> rotation)
    : rotation_(std::move(rotation)) {
  side_ = plain_side(s, rotation_ ? &rotation_->rotation : nullptr);
  if (s.form == Form::fib) {
    // Room for every index of the width, so that no damaged code can read outside the book.
    codewords_.assign((size_t{1} << s.window) * s.block, 0.0f);
    std::copy(codewords, codewords + static_cast<size_t>(s.size) * s.block, codewords_.begin());
    side_.codewords = codewords_.data();
  }
  // Integer kernels take two planes at a time, or whole int8 numbers.
  const int unit = s.form == Form::fib && s.bits == 3 * s.block && s.block <= 2 ? 3 : 1, units = s.code_bytes / unit;
  const int planes = s.form == Form::int8                           ? 1
                     : s.form == Form::fib && 8 * unit % s.bits == 0 ? 8 * unit / s.bits * s.block
                                                                    : 0;
  const int slice = unit == 3 && !labels && units % kValueSlice ? 8 : kValueSlice, whole = s.is_key ? 4 : slice;
  const bool fits = s.dim <= kMostTiledDim && s.dim % whole == 0 && units % whole == 0 && units * planes == s.dim &&
                    (s.form == Form::int8 || planes % 2 == 0);
  // Means are added to logits, not to outputs: centered values are decoded.
  if (!s.tiled || s.channels || (s.centered && !s.is_key) || planes == 0 || !fits) return;
  side_.order = s.is_key ? Order::key_tiles : Order::value_tiles;
  side_.planes = planes;
  side_.unit = unit;
  side_.slice = slice;
  if (labels) {
    build_labels(labels, frequencies);
  } else if (s.form == Form::fib) {
    build_tables();
  }
}

// Coordinate `plane` of what a symbol stands for.
float OwnedSide::coordinate(int symbol, int plane) const {
  const int index = symbol >> (plane / side_.block * side_.bits) & ((1 << side_.bits) - 1);
  return codewords_[static_cast<size_t>(index) * side_.block + plane % side_.block];
}

// How often each symbol occurs, up to a factor. At high rate a trained codebook has p ~ f^(2 / (k + 2)), where f is
// the density of the source, here the normal one of variance 1 / d.
std::vector<double> OwnedSide::frequencies() const {
  std::vector<double> found(symbols());
  for (int symbol = 0; symbol < symbols(); ++symbol) {
    double square = 0;
    for (int plane = 0; plane < symbol_planes(); ++plane) square += std::pow(coordinate(symbol, plane), 2);
    found[symbol] = std::exp(-square * side_.dim / (side_.block + 2));
  }
  const double total = std::accumulate(found.begin(), found.end(), 0.0);
  for (double& p : found) p /= total;
  return found;
}

void OwnedSide::build_tables() {
  float top = 0;
  for (float x : codewords_) top = std::max(top, std::fabs(x));
  // One below the largest int8: rounding to the other side stays in range.
  side_.plane_step = top / 126.0f;
  side_.word_step = top / kMostWord;
  const size_t count = symbols();
  tables_.resize(symbol_planes() * count);
  words_.resize(symbol_planes() / 2 * count);
  const std::vector<double> weights = frequencies();
  for (int plane = 0; plane < symbol_planes(); ++plane) {
    std::vector<double> bytes(count), words(count);
    for (size_t symbol = 0; symbol < count; ++symbol) {
      const float x = coordinate(static_cast<int>(symbol), plane);
      bytes[symbol] = x / side_.plane_step;
      words[symbol] = x / side_.word_step;
    }
    const std::vector<int> whole_bytes = round_unbiased(bytes, weights), whole_words = round_unbiased(words, weights);
    for (size_t symbol = 0; symbol < count; ++symbol) {
      tables_[plane * count + symbol] = static_cast<int8_t>(whole_bytes[symbol]);
      const uint32_t half = static_cast<uint16_t>(whole_words[symbol]);
      words_[plane / 2 * count + symbol] |= static_cast<int32_t>(plane % 2 ? half << 16 : half);
    }
  }
  side_.tables = tables_.data();
  side_.words = words_.data();
}

void OwnedSide::build_labels(const uint8_t* labels, const double* frequencies) {
  const int window = side_.window, bits = side_.bits;
  while (*std::max_element(labels, labels + codewords_.size()) >> side_.label_bits) ++side_.label_bits;
  std::vector<double> levels(size_t{1} << side_.label_bits);
  for (size_t w = 0; w < codewords_.size(); ++w) levels[labels[w]] = codewords_[w];
  double top = 0;
  for (double level : levels) top = std::max(top, std::fabs(level));
  side_.plane_step = static_cast<float>(top / 126);
  for (double& level : levels) level /= top / 126;
  const std::vector<int> whole =
      round_few_unbiased(levels, std::vector<double>(frequencies, frequencies + levels.size()));
  tables_.assign(whole.begin(), whole.end());
  const int sources = side_.unit + 1;
  matrices_.resize(static_cast<size_t>(sources) * side_.planes);
  for (int plane = 0; plane < side_.planes; ++plane) {
    for (int w = 0; w < window; ++w) {
      const int at = bits * (plane + 1) - window + w;  // in the unit, or in the byte before it
      uint64_t& matrix = matrices_[static_cast<size_t>(sources) * plane + (at < 0 ? side_.unit : at / 8)];
      for (int i = 0; i < side_.label_bits; ++i) {
        if (labels[size_t{1} << w] >> i & 1) matrix |= uint64_t{1} << (8 * (7 - i) + (at & 7));
      }
    }
  }
  side_.tables = tables_.data();
  side_.matrices = matrices_.data();
}

OwnedSide::Canonical OwnedSide::in_one_run(int heads, int tokens, uint8_t* bytes) const {
  Canonical parts{};
  parts.channels = bytes;
  parts.means = parts.channels + heads * side_.channel_bytes();
  parts.ranges = parts.means + heads * side_.mean_bytes();
  parts.norms = parts.ranges + (side_.log_norms ? size_t{4} * heads : 0);
  parts.codes = parts.norms + static_cast<size_t>(heads) * tokens * side_.norm_bytes;
  return parts;
}

void OwnedSide::pack(int heads, int tokens, const Canonical& from, uint8_t* to) const {
  const Rectangle r = Rectangle::of(side_, heads, tokens);
  if (side_.padded(tokens) != tokens) std::memset(to, 0, r.nbytes);
  const size_t code = static_cast<size_t>(tokens) * side_.code_bytes, norm = static_cast<size_t>(tokens) * side_.norm_bytes;
  for (size_t h = 0; h < static_cast<size_t>(heads); ++h) {
    put_in_order(side_, tokens, from.codes + h * code, to + h * r.code_stride);
    if (norm) std::memcpy(to + r.norm_offset + h * r.norm_stride, from.norms + h * norm, norm);
  }
  if (side_.log_norms) std::memcpy(to + r.range_offset, from.ranges, r.channel_offset - r.range_offset);
  if (side_.channels) std::memcpy(to + r.channel_offset, from.channels, r.mean_offset - r.channel_offset);
  if (side_.centered) std::memcpy(to + r.mean_offset, from.means, r.nbytes - r.mean_offset);
}

void OwnedSide::unpack(int heads, int tokens, const uint8_t* from, const Canonical& to) const {
  const Rectangle r = Rectangle::of(side_, heads, tokens);
  const size_t code = static_cast<size_t>(tokens) * side_.code_bytes, norm = static_cast<size_t>(tokens) * side_.norm_bytes;
  for (size_t h = 0; h < static_cast<size_t>(heads); ++h) {
    put_in_rows(side_, tokens, from + h * r.code_stride, to.codes + h * code);
    if (norm) std::memcpy(to.norms + h * norm, from + r.norm_offset + h * r.norm_stride, norm);
  }
  if (side_.log_norms) std::memcpy(to.ranges, from + r.range_offset, r.channel_offset - r.range_offset);
  if (side_.channels) std::memcpy(to.channels, from + r.channel_offset, r.mean_offset - r.channel_offset);
  if (side_.centered) std::memcpy(to.means, from + r.mean_offset, r.nbytes - r.mean_offset);
}

void Plan::add(Run run, std::shared_ptr<OwnedSide> key, std::shared_ptr<OwnedSide> value,
               std::shared_ptr<OwnedKeySpace> space) {
  run.key = &key->side();
  run.value = &value->side();
  run.space = space ? &space->space : nullptr;
  run.key_rectangle = Rectangle::of(*run.key, run.head1 - run.head0, run.tokens);
  run.value_rectangle = Rectangle::of(*run.value, run.head1 - run.head0, run.tokens);
  runs_.push_back(std::move(run));
  sides_.push_back(std::move(key));
  sides_.push_back(std::move(value));
  if (space) spaces_.push_back(std::move(space));
}

}  // namespace fibkv
