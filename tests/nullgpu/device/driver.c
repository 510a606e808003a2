// The driver's own interface (libcuda.so.1), which Triton, inductor's launcher and a few places of torch call.
#include "null.h"

#include <stdlib.h>
#include <string.h>

static const CUcontext CONTEXT = (CUcontext)16;  // any address but zero

API CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
API CUresult cuDriverGetVersion(int *version) { return (CUresult)cudaDriverGetVersion(version); }
API CUresult cuDeviceGetCount(int *number) { return (CUresult)cudaGetDeviceCount(number); }
API CUresult cuDeviceGet(CUdevice *device, int index) {
  *device = index;
  return CUDA_SUCCESS;
}
API CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice device) {
  *value = attribute(which);
  return CUDA_SUCCESS;
}
API CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
  *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}
API CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  *context = CONTEXT;
  return CUDA_SUCCESS;
}
API CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = CONTEXT;
  return CUDA_SUCCESS;
}
API CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
API CUresult cuCtxPushCurrent_v2(CUcontext context) { return CUDA_SUCCESS; }
API CUresult cuCtxPopCurrent_v2(CUcontext *context) { return cuCtxGetCurrent(context); }
API CUresult cuCtxGetDevice(CUdevice *device) {
  *device = current_device;
  return CUDA_SUCCESS;
}
API CUresult cuCtxSynchronize(void) { return (CUresult)waits("cuCtxSynchronize"); }
API CUresult cuStreamSynchronize(CUstream stream) { return (CUresult)waits("cuStreamSynchronize"); }
API CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  return (CUresult)cudaStreamIsCapturing((cudaStream_t)stream, (enum cudaStreamCaptureStatus *)status);
}
API CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = cudaGetErrorString((cudaError_t)error);
  return CUDA_SUCCESS;
}
API CUresult cuGetErrorName(CUresult error, const char **name) {
  *name = cudaGetErrorName((cudaError_t)error);
  return CUDA_SUCCESS;
}
API CUresult cuGetExportTable(const void **table, const CUuuid *id) { return CUDA_ERROR_NOT_FOUND; }
API CUresult cuMemAlloc_v2(CUdeviceptr *at, size_t bytes) { return (CUresult)cudaMalloc((void **)at, bytes); }
API CUresult cuMemFree_v2(CUdeviceptr at) { return (CUresult)cudaFree((void *)at); }
API CUresult cuPointerGetAttribute(void *value, CUpointer_attribute which, CUdeviceptr at) {
  enum owner owner = owner_of((void *)at);
  if (which == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *(CUdeviceptr *)value = at;
  else if (which == CU_POINTER_ATTRIBUTE_MEMORY_TYPE)
    *(unsigned *)value = owner == DEVICE ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
  else memset(value, 0, 4);
  return owner ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

// ---- kernels of a cubin: a function is its name ----

API CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = calloc(1, 16);
  return CUDA_SUCCESS;
}
API CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned number, CUjit_option *options, void **values) {
  return cuModuleLoadData(module, image);
}
API CUresult cuModuleLoad(CUmodule *module, const char *path) { return cuModuleLoadData(module, path); }
API CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
API CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)strdup(name);
  count("loaded", name, 0);
  return CUDA_SUCCESS;
}
API CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction function) {
  *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : which == CU_FUNC_ATTRIBUTE_NUM_REGS ? 32 : 0;
  return CUDA_SUCCESS;
}
API CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute which, int value) { return CUDA_SUCCESS; }
API CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
API CUresult cuFuncLoad(CUfunction function) { return CUDA_SUCCESS; }
API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction function, int threads, size_t shared) {
  return (CUresult)cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, NULL, threads, shared);
}
API CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *how) {
  *clusters = 1;
  return CUDA_SUCCESS;
}
API CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                            unsigned block_y, unsigned block_z, unsigned shared, CUstream stream, void **arguments,
                            void **extra) {
  dim3 grid = {grid_x, grid_y, grid_z}, block = {block_x, block_y, block_z};
  return (CUresult)launched((const char *)function, grid, block, shared, (cudaStream_t)stream);
}
API CUresult cuLaunchKernelEx(const CUlaunchConfig *how, CUfunction function, void **arguments, void **extra) {
  return cuLaunchKernel(function, how->gridDimX, how->gridDimY, how->gridDimZ, how->blockDimX, how->blockDimY,
                        how->blockDimZ, how->sharedMemBytes, how->hStream, arguments, extra);
}
