// Sides and plans with the memory behind them, as Python holds them.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "attend.h"
#include "side.h"

namespace fibkv {

struct OwnedRotation {
  // `signs` [rounds][dim], or null and 0 rounds.
  OwnedRotation(const float* rows, int dim, const float* signs, int rounds);
  std::vector<float> matrix, transposed, signs;
  Rotation rotation;
};

// A key space over memory of Python's tensors, which must outlive it: `mean` [heads][dim]; `inverses` [heads][dim][dim],
// A^-1 of each head, or null where A is the identity.
struct OwnedKeySpace {
  OwnedKeySpace(const float* mean, const float* inverses, int heads, int dim);
  std::vector<Rotation> queries;
  KeySpace space;
};

// What Python says of a side; the order in memory and the integer tables follow from it.
struct SideSettings {
  Form form;
  bool is_key;
  bool tiled;  // lay tiles out for integer kernels where the code allows it
  int dim, code_bytes, norm_bytes, block, size, bits, window;
  bool log_norms, channels, centered;
};

class OwnedSide {
 public:
  // `codewords` [size][block], null unless fib or klt; `labels` [size] and how often each one occurs,
  // `frequencies` [labels], null unless a trellis; `rotation` may be null.
  OwnedSide(const SideSettings& settings, const float* codewords, const uint8_t* labels, const double* frequencies,
            std::shared_ptr<OwnedRotation> rotation);
  // klt: `widths` [heads][dim / 2] are the bits of the pairs of each head, `codewords` those of all widths.
  OwnedSide(const SideSettings& settings, const float* codewords, const uint8_t* widths, int heads);

  const Side& side() const { return side_; }
  // Bytes of a rectangle of codes.
  size_t nbytes(int heads, int tokens) const { return Rectangle::of(side_, heads, tokens).nbytes; }

  // A rectangle's parts in canonical order: codes [heads][tokens][code_bytes], norms [heads][tokens][norm_bytes],
  // ranges [heads][4 or 0], channel scales or grids [heads][2 or 4 * dim, or 0], means [heads][1 + dim or 0].
  struct Canonical {
    uint8_t *codes, *norms, *ranges, *channels, *means;
  };
  // Bytes of a rectangle's parts in canonical order.
  size_t canonical_nbytes(int heads, int tokens) const {
    return heads * (side_.channel_bytes() + side_.mean_bytes() + (side_.log_norms ? 4 : 0) +
                    static_cast<size_t>(tokens) * (side_.norm_bytes + side_.code_bytes));
  }
  // The parts where they stand in a segment's stored bytes: channels, means, ranges, norms and codes, one behind another.
  Canonical in_one_run(int heads, int tokens, uint8_t* bytes) const;
  void pack(int heads, int tokens, const Canonical& from, uint8_t* to) const;
  void unpack(int heads, int tokens, const uint8_t* from, const Canonical& to) const;

 private:
  // What tables are looked up by: a code byte, or six bits of a unit of three bytes.
  int symbols() const { return side_.unit == 1 ? 256 : 64; }
  int symbol_planes() const { return side_.unit == 1 ? side_.planes : 2; }
  float coordinate(int symbol, int plane) const;
  std::vector<double> frequencies() const;
  void build_tables();
  void build_labels(const uint8_t* labels, const double* frequencies);
  Side side_{};
  std::vector<float> codewords_;
  std::vector<PairSection> sections_;
  std::vector<int8_t> tables_;
  std::vector<int32_t> words_;
  std::vector<uint64_t> matrices_;
  std::shared_ptr<OwnedRotation> rotation_;
};

// The page runs of a layer. Holds pointers into pages, which Python keeps alive.
class Plan {
 public:
  // `space` may be null.
  void add(Run run, std::shared_ptr<OwnedSide> key, std::shared_ptr<OwnedSide> value,
           std::shared_ptr<OwnedKeySpace> space);
  const std::vector<Run>& runs() const { return runs_; }

 private:
  std::vector<Run> runs_;
  std::vector<std::shared_ptr<OwnedSide>> sides_;
  std::vector<std::shared_ptr<OwnedKeySpace>> spaces_;
};

}  // namespace fibkv
