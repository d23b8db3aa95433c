// Prints the outputs of a tile and the slices that would be chosen for decoding, a case a line, from an input of lines
// "multiprocessors shared_bytes n k m rows_fit": bench/kernel_model.py --write keeps them beside the compiler's numbers.
#include <cstdint>
#include <iostream>

#include "loop_lora/cuda_tiles_measured.h"

int main() {
  using namespace rrt::loop_lora;
  Gpu gpu{};
  int64_t n = 0, k = 0, m = 0;
  bool rows_fit = false;
  while (std::cin >> gpu.multiprocessors >> gpu.shared_bytes >> n >> k >> m >> rows_fit) {
    const Tiling tiling = choose_tiling(kMeasuredTilings, gpu, n, k, m, rows_fit);
    std::cout << gpu.multiprocessors << ' ' << n << ' ' << k << ' ' << m << ' '
              << tile_rows(tiling.kernel) << ' ' << tiling.slices << '\n';
  }
}
