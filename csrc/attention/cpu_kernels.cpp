// Compiled once per instruction set: RRT_KERNELS names the table, RRT_VECTOR_BYTES is its registers' size.
#include "attention/cpu_kernels.h"

#include "attention/backward.h"
#include "attention/forward.h"

namespace rrt::attention {

const CpuKernels RRT_KERNELS = {
    {forward<Float32>, forward<Float64>, forward<BFloat16>, forward<Float16>},
    {backward<Float32>, backward<Float64>, backward<BFloat16>, backward<Float16>},
    {sum_shares<Float32>, sum_shares<Float64>, sum_shares<BFloat16>, sum_shares<Float16>},
};

}  // namespace rrt::attention
