// Written by bench/tile_sweep.py: the fastest tilings of the shapes that it measured.
#pragma once

#include "loop_lora/cuda_tiles.h"

namespace rrt::loop_lora {

constexpr MeasuredTiling kMeasuredTilings[] = {
    {},  // ends the table
};

}  // namespace rrt::loop_lora
