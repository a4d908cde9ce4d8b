// Steps of the same sequences, one token each, where the next one begins while its caller still deals
// with the one before: the first worker computes and draws, and the caller lends a hand when it waits.
//
// What a step needs of the one before are the drawn tokens; positions, lengths and slots follow. That
// the sequences go on is a guess, and whoever finds it wrong calls `settle`: what was computed too much
// lies behind the known tokens, where nothing is read before it is written. Knows no scheduler.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "program.h"

namespace tgi {

// See kernels/cpu/ahead.py. `step` has one token for each sequence and the logits of each; its arrays
// and those of `sampling` by logit row are copied, all else is the caller's and stays. Who wants a step
// knows that every position of it has a block in the tables.
struct AheadStart {
  const Program* program;
  const StepInput* step;
  const Sampling* sampling;
  int32_t* tokens;        // those of `sampling`; what is drawn goes behind its row's
  int64_t groups, steps;  // KV groups; steps wanted at first
};

class Ahead {
 public:
  Ahead(Pool& pool, const Kernels& kernels) : pool_(pool), kernels_(kernels) {}
  ~Ahead() { settle(); }

  void start(const AheadStart& from);
  // So many steps since the start are wanted; the last of them may be a guess.
  void want(int64_t steps);
  // Waits for the next step that was not waited for: its tokens and whether they mean anything, [n].
  // False if it was given up.
  bool finish(int64_t* token_ids, uint8_t* valid);
  // Gives up what is not computed yet. Nothing runs afterwards.
  void settle();

 private:
  struct Drawn {
    std::vector<int64_t> token_ids;
    std::vector<uint8_t> valid;
  };
  static constexpr int64_t kKept = 2;  // a step is not begun before the one before the last was taken

  void run();
  void advance(const Drawn& drawn);

  Pool& pool_;
  const Kernels& kernels_;
  Program program_{};
  StepInput step_{};
  Sampling sampling_{};
  int32_t* tokens_ = nullptr;
  std::vector<int64_t> ids_, positions_, rows_, history_lens_, output_positions_, strides_;
  std::vector<int32_t> seq_lens_, query_start_, adapter_slots_;
  std::vector<std::vector<int64_t>> slots_;
  std::vector<std::vector<int32_t>> tables_;
  std::vector<const int64_t*> slot_pointers_;
  std::vector<const int32_t*> table_pointers_;
  std::vector<int64_t> logit_rows_;
  Drawn drawn_[kKept];
  int64_t taken_ = 0;  // the caller's
  std::atomic<int64_t> wanted_{0};
  std::atomic<int64_t> computed_{0};
  std::atomic<bool> unwanted_{false};
};

}  // namespace tgi
