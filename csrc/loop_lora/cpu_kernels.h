// The CPU kernel's inner parts, compiled once per instruction set and chosen at run time (cpu.cpp).
#pragma once

#include "cpu_isa.h"
#include "loop_lora/launch.h"

namespace rrt::loop_lora {

// Sums run over chunks of kChunk steps (of columns, or of ranks), each from zero: so their order is the layer's.
constexpr int64_t kChunk = 128;
// Bounds the scratch memory; at this many rows, reading the weight once per block costs little.
constexpr int64_t kMaxBlockRows = 192;

// Up to here the bytes of weights that are multiplied as they lie take longer than the multiply-adds.
constexpr int64_t kFewRows = 8;

static constexpr int64_t num_chunks(int64_t steps) { return ceil_div(steps, kChunk); }

// One block of rows. Operands are what rows are multiplied as: see Operand in cpu_kernels.cpp.
struct CpuWork {
  const Params* params;
  const int64_t* order;  // [rows]: the block's rows of x, sorted by loop
  int64_t rows;
  const RowTile* tiles;
  int64_t num_tiles;
  const RowPiece* pieces;
  const int64_t* present;
  int64_t num_present;
  const Segment* segments;
  int64_t num_segments;
  const int64_t* segment_chunk;  // the first chunk of `shrunk` that is of segment s
  void* packed_x;                // [chunks, rows, kChunk] operands: x in `order`, zeros beyond column k
  void* shrunk;                  // [chunks, rows, kChunk] operands: lora_a x in `order`
};

// Panels of one part of the outputs: parts are the same whatever the threads, and are merged in order.
constexpr int64_t kPartPanels = 32;

// The part of a row's softmax that is of one part of the outputs.
struct PartStatistics {
  double max;
  double sum;      // of exp(logit - max)
  int64_t argmax;  // the first of the largest
};

struct StatisticsWork {
  CpuWork block;  // order, rows, tiles and packed_x
  int64_t n, k;
  const void* weight;
  PartStatistics* parts;  // [parts, rows]
};

// Weights as the kernel of pack_linear sees them; tasks are panels, matrix after matrix.
struct PackWork {
  const void* from;
  int64_t n, k;
  void* to;
};

struct CpuKernels {
  using Range = void (*)(const CpuWork& work, int64_t begin, int64_t end);
  int64_t tile_rows;         // rows whose sums fit the registers
  int64_t few_tile_rows[4];  // the same where memory sets the time: see kFewTileRows; by Dtype
  int64_t operand_bytes[4];  // of a step; this and the rest by Dtype
  Range pack_rows[4];        // over rows of the block
  Range shrink[4];           // over present loops x panels of lora_a
  Range expand[4];           // over panels of the weight
  void (*statistics[4])(const StatisticsWork& work, int64_t begin, int64_t end);  // over parts
  void (*pack_panels[4])(const PackWork& work, int64_t begin, int64_t end);
};

RRT_DECLARE_CPU_KERNELS(CpuKernels);

}  // namespace rrt::loop_lora
