// The CPU kernel's inner parts, compiled once per instruction set and chosen at run time (cpu.cpp).
#pragma once

#include "cpu_isa.h"
#include "loop_lora/launch.h"
#include "packed_linear/row_operands.h"

namespace rrt::loop_lora {

// Up to so many rows, weights that are multiplied as they lie take longer to come from memory than to be multiplied.
constexpr int64_t kFewRows = 8;

// One block of rows.
struct CpuWork {
  const Params* params;
  packed_linear::RowOperands x;  // in the order of loops
  const RowPiece* pieces;
  const int64_t* loop_starts;  // [num_loops + 1]: as in RowBlock
  int64_t num_loops;           // of the block's rows
  const Segment* segments;
  int64_t num_segments;
  const int64_t* segment_chunk;  // the first chunk of `shrunk` that is of segment s
  void* shrunk;                  // [chunks, rows, kChunk] operands: lora_a x
};

// All arrays are by Dtype.
struct CpuKernels {
  using Range = void (*)(const CpuWork& work, int64_t begin, int64_t end);
  int64_t tile_rows[4];      // rows that are multiplied together
  int64_t few_tile_rows[4];  // the same for up to kFewRows rows: see kFewTileRows
  int64_t operand_bytes[4];  // of a step
  void (*pack_rows[4])(const packed_linear::RowOperands& block, int64_t begin, int64_t end);
  Range shrink[4];           // over loops of the block x panels of lora_a
  Range expand[4];           // over panels of the weight
};

RRT_DECLARE_CPU_KERNELS(CpuKernels);

}  // namespace rrt::loop_lora
