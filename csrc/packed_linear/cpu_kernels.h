// The CPU kernels' inner parts, compiled once per instruction set and chosen at run time (cpu.cpp).
#pragma once

#include "cpu_isa.h"
#include "packed_linear/launch.h"
#include "packed_linear/row_operands.h"

namespace rrt::packed_linear {

// Tasks are panels, matrix after matrix.
struct PackWork {
  const void* from;
  int64_t n, k;
  void* to;
};

// Outputs are split into parts of so many panels, whatever the threads, and the parts' results are merged in order.
constexpr int64_t kPartPanels = 32;

// A row's softmax over one part of the outputs.
struct PartStatistics {
  double max;
  double sum;      // of exp(logit - max)
  int64_t argmax;  // the first of the largest
};

struct StatisticsWork {
  RowOperands x;
  int64_t n;
  const void* weight;
  PartStatistics* parts;  // [parts, rows]
};

// All arrays are by Dtype.
struct CpuKernels {
  int64_t tile_rows[4];      // rows that are multiplied together
  int64_t operand_bytes[4];  // of a step
  void (*pack_panels[4])(const PackWork& work, int64_t begin, int64_t end);
  void (*pack_rows[4])(const RowOperands& rows, int64_t begin, int64_t end);
  void (*statistics[4])(const StatisticsWork& work, int64_t begin, int64_t end);  // over parts
};

RRT_DECLARE_CPU_KERNELS(CpuKernels);

}  // namespace rrt::packed_linear
