// What the CPU partitions of the lfi_* ops share: the memory order of a call, and where its results are written.
#pragma once

#include "cpu/layout.h"
#include "cpu/lfi_rows.h"
#include "cpu/result_memory.h"
#include "lfi.h"

namespace fastcam::cpu {

// A result like the features and what is written: itself, or, where its rows lie otherwise, a stand-in.
struct LfiResult {
  at::Tensor tensor;
  Images images;

  LfiResult(const at::Tensor& features, bool channels_last) : tensor(empty_result_like(features)) {
    const bool direct = channels_last ? rows_are_positions(tensor) : rows_are_channels(tensor);
    const auto order = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
    images = as_images(direct ? tensor : fastcam::empty(features.sizes(), features.options().memory_format(order)), channels_last);
  }

  template <typename S>
  S* at(int64_t b) const {
    return static_cast<S*>(images.tensor.mutable_data_ptr()) + b * images.batch;
  }

  at::Tensor finished() const { return images.tensor.is_same(tensor) ? tensor : tensor.copy_(images.tensor); }
};

// Channels of a task that takes some of an image's: by sizes only, whole blocks of channels_last.
inline int64_t lfi_channels_of_task(int64_t positions) {
  return std::max<int64_t>(1, kGrain / (positions * kLfiBlock)) * kLfiBlock;
}

}  // namespace fastcam::cpu
