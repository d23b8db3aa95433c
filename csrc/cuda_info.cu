// Facts about CUDA on the machine that runs this build. Loads and answers without a driver.
#include <cuda_runtime.h>

namespace {
__global__ void image_probe() {}
}  // namespace

struct RrtCudaInfo {
  int runtime_version;  // 1000 * major + 10 * minor; of the statically linked runtime
  int driver_version;   // likewise the newest the driver supports; 0 without a driver
};

extern "C" __attribute__((visibility("default"))) void rrt_cuda_info(RrtCudaInfo* info) {
  *info = {};
  if (cudaRuntimeGetVersion(&info->runtime_version) != cudaSuccess) info->runtime_version = 0;
  if (cudaDriverGetVersion(&info->driver_version) != cudaSuccess) info->driver_version = 0;
}

// Architecture (80, 90) of the compiled image that `device` runs, or minus the CUDA error that says why
// there is none (209: no image for this device). Opens a context on the device.
extern "C" __attribute__((visibility("default"))) int rrt_cuda_image(int device) {
  int previous = 0;
  cudaError_t error = cudaGetDevice(&previous);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  cudaFuncAttributes attributes{};
  if (error == cudaSuccess) {
    error = cudaFuncGetAttributes(&attributes, image_probe);
    cudaSetDevice(previous);
  }
  cudaGetLastError();  // leave no error behind for others
  return error == cudaSuccess ? attributes.binaryVersion : -static_cast<int>(error);
}
