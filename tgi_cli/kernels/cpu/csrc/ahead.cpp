#include "ahead.h"

#include <algorithm>

namespace tgi {

void Ahead::start(const AheadStart& from) {
  settle();
  const StepInput& step = *from.step;
  const int64_t n = step.seqs;
  program_ = *from.program;
  step_ = step;
  sampling_ = *from.sampling;
  ids_.assign(step.ids, step.ids + n);
  positions_.assign(step.positions, step.positions + n);
  seq_lens_.assign(step.seq_lens, step.seq_lens + n);
  query_start_.assign(step.query_start, step.query_start + n + 1);
  logit_rows_.assign(step.logit_rows, step.logit_rows + n);
  rows_.assign(sampling_.rows, sampling_.rows + n);
  history_lens_.assign(sampling_.history_lens, sampling_.history_lens + n);
  output_positions_.assign(sampling_.output_positions, sampling_.output_positions + n);
  slots_.resize(static_cast<size_t>(from.groups));
  tables_.resize(slots_.size());
  slot_pointers_.resize(slots_.size());
  table_pointers_.resize(slots_.size());
  strides_.assign(step.table_strides, step.table_strides + from.groups);
  for (size_t g = 0; g < slots_.size(); ++g) {
    slots_[g].assign(step.slots[g], step.slots[g] + n);
    tables_[g].assign(step.block_tables[g], step.block_tables[g] + n * strides_[g]);
    slot_pointers_[g] = slots_[g].data();
    table_pointers_[g] = tables_[g].data();
  }
  if (step.adapter_slots != nullptr) {
    adapter_slots_.assign(step.adapter_slots, step.adapter_slots + n);
    step_.adapter_slots = adapter_slots_.data();
  }
  step_.ids = ids_.data(), step_.positions = positions_.data(), step_.seq_lens = seq_lens_.data();
  step_.query_start = query_start_.data(), step_.logit_rows = logit_rows_.data();
  step_.slots = slot_pointers_.data(), step_.block_tables = table_pointers_.data();
  step_.table_strides = strides_.data();
  tokens_ = from.tokens;
  sampling_.tokens = tokens_, sampling_.logits = step.logits, sampling_.n = n;
  sampling_.rows = rows_.data(), sampling_.history_lens = history_lens_.data();
  sampling_.output_positions = output_positions_.data();
  for (Drawn& each : drawn_) each.token_ids.resize(static_cast<size_t>(n)), each.valid.resize(static_cast<size_t>(n));
  taken_ = 0;
  computed_.store(0, std::memory_order_relaxed);
  want(from.steps);
}

void Ahead::want(int64_t steps) {
  // Without another thread a guess would only be waited for.
  wanted_.store(std::min(steps, taken_ + (pool_.size() > 1 ? kKept : 1)), std::memory_order_seq_cst);
  if (!pool_.delegate([](void* self) { static_cast<Ahead*>(self)->run(); }, this)) run();
}

bool Ahead::finish(int64_t* token_ids, uint8_t* valid) {
  pool_.assist(
      [](void* self) {
        auto* own = static_cast<Ahead*>(self);
        return own->computed_.load(std::memory_order_seq_cst) > own->taken_ || !own->pool_.delegating();
      },
      this);
  if (computed_.load(std::memory_order_seq_cst) <= taken_) return false;
  const Drawn& drawn = drawn_[taken_++ % kKept];
  std::copy(drawn.token_ids.begin(), drawn.token_ids.end(), token_ids);
  std::copy(drawn.valid.begin(), drawn.valid.end(), valid);
  return true;
}

void Ahead::settle() {
  if (!pool_.delegating()) return;
  unwanted_.store(true, std::memory_order_seq_cst);
  pool_.assist([](void* self) { return !static_cast<Ahead*>(self)->pool_.delegating(); }, this);
  unwanted_.store(false, std::memory_order_seq_cst);
}

void Ahead::run() {
  for (int64_t done = computed_.load(std::memory_order_relaxed); done < wanted_.load(std::memory_order_seq_cst);) {
    if (done > 0) advance(drawn_[(done - 1) % kKept]);
    if (!run_step(pool_, kernels_, program_, step_, &unwanted_)) return;
    Drawn& drawn = drawn_[done % kKept];
    sampling_.token_ids = drawn.token_ids.data(), sampling_.valid = drawn.valid.data();
    kernels_.sample(pool_, sampling_);
    computed_.store(++done, std::memory_order_seq_cst);
    pool_.wake();
  }
}

// Every sequence is one token longer.
void Ahead::advance(const Drawn& drawn) {
  for (size_t i = 0; i < ids_.size(); ++i) {
    ids_[i] = drawn.token_ids[i];
    tokens_[rows_[i] * sampling_.token_stride + history_lens_[i]] = static_cast<int32_t>(ids_[i]);
    const int64_t position = ++positions_[i];
    ++seq_lens_[i], ++history_lens_[i], ++output_positions_[i];
    for (size_t g = 0; g < slots_.size(); ++g) {
      const int32_t block = tables_[g][i * static_cast<size_t>(strides_[g]) + static_cast<size_t>(position / kBlock)];
      slots_[g][i] = int64_t{block} * kBlock + position % kBlock;
    }
  }
}

}  // namespace tgi
