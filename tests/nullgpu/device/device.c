// What the device says of itself. NULLCUDA_CC chooses the architecture, as 90; NULLCUDA_MB, NULLCUDA_SMS its size.
#include "null.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// NVIDIA's data sheets and the table of compute capabilities in the CUDA programming guide.
typedef struct {
  int capability, multiprocessors, threads, shared_block, shared, l2, clock_khz, memory_khz, bus_bits;
} Model;
static const Model MODELS[] = {
    {61, 28, 2048, 48 << 10, 96 << 10, 2816 << 10, 1582000, 5505000, 352},    // GTX 1080 Ti
    {70, 80, 2048, 96 << 10, 96 << 10, 6 << 20, 1530000, 877000, 4096},       // V100
    {75, 40, 1024, 64 << 10, 64 << 10, 4 << 20, 1590000, 5001000, 256},       // T4
    {80, 108, 2048, 163 << 10, 164 << 10, 40 << 20, 1410000, 1593000, 5120},  // A100 80 GB
    {86, 82, 1536, 99 << 10, 100 << 10, 6 << 20, 1695000, 9751000, 384},      // RTX 3090
    {89, 128, 1536, 99 << 10, 100 << 10, 72 << 20, 2520000, 10501000, 384},   // RTX 4090
    {90, 132, 2048, 227 << 10, 228 << 10, 50 << 20, 1980000, 2619000, 5120},  // H100
    {100, 148, 2048, 227 << 10, 228 << 10, 126 << 20, 1965000, 3996000, 8192},  // B200
    {120, 170, 1536, 99 << 10, 100 << 10, 96 << 20, 2407000, 14001000, 512},  // RTX 5090
};

__thread int current_device;
static __thread cudaError_t last_error;

int capability(void) { return (int)setting("NULLCUDA_CC", 90); }

static const Model *model(void) {
  const Model *found = MODELS;
  for (size_t i = 0; i < sizeof MODELS / sizeof *MODELS; i++)
    if (MODELS[i].capability <= capability()) found = &MODELS[i];
  return found;
}

int attribute(int which) {
  switch (which) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return capability() / 10;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: return capability() % 10;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: return 32;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: return (int)setting("NULLCUDA_SMS", model()->multiprocessors);
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y: return 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z: return 64;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X: return 2147483647;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y:
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z: return 65535;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: return model()->threads;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: return 48 << 10;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: return model()->shared_block;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: return model()->shared;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR: return 65536;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: return model()->l2;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: return model()->clock_khz;
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: return model()->memory_khz;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: return model()->bus_bits;
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
    case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY:
    case CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH: return 1;
  }
  return 0;
}

// In CUDA 12 the header turns this name into cudaGetDeviceProperties_v2.
API cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  memset(p, 0, sizeof *p);
  snprintf(p->name, sizeof p->name, "Null GPU sm_%d", capability());
  p->major = capability() / 10;
  p->minor = capability() % 10;
  p->totalGlobalMem = total_memory();
  p->warpSize = 32;
  p->multiProcessorCount = attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
  p->sharedMemPerBlock = attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK);
  p->sharedMemPerBlockOptin = model()->shared_block;
  p->sharedMemPerMultiprocessor = model()->shared;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxThreadsPerMultiProcessor = model()->threads;
  p->maxBlocksPerMultiProcessor = 32;
  p->maxGridSize[0] = p->memPitch = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->l2CacheSize = model()->l2;
  p->memoryBusWidth = model()->bus_bits;
  p->unifiedAddressing = p->concurrentKernels = p->streamPrioritiesSupported = 1;
  p->cooperativeLaunch = p->canMapHostMemory = 1;
  p->asyncEngineCount = 3;
  p->textureAlignment = 512;
  p->uuid.bytes[0] = (char)device;
  return cudaSuccess;
}
API cudaError_t cudaGetDeviceCount(int *number) {
  *number = (int)setting("NULLCUDA_DEVICES", 1);
  return cudaSuccess;
}
API cudaError_t cudaGetDevice(int *device) {
  *device = current_device;
  return cudaSuccess;
}
API cudaError_t cudaSetDevice(int device) {
  current_device = device;
  return cudaSuccess;
}
API cudaError_t cudaDriverGetVersion(int *version) {
  *version = CUDA_VERSION;
  return cudaSuccess;
}
API cudaError_t cudaRuntimeGetVersion(int *version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int device) {
  *value = attribute(which);
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetPCIBusId(char *id, int room, int device) {
  snprintf(id, room, "0000:%02x:00.0", device);
  return cudaSuccess;
}
API cudaError_t cudaDeviceCanAccessPeer(int *can, int from, int to) {
  *can = 0;
  return cudaSuccess;
}

// ---- errors ----

cudaError_t refuse(cudaError_t error, const char *what) {
  last_error = error;
  count("refused", what, error);
  if (getenv("NULLCUDA_SAY")) fprintf(stderr, "null device refuses %s: error %d\n", what, error);
  return error;
}
API cudaError_t cudaGetLastError(void) {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
API cudaError_t cudaPeekAtLastError(void) { return last_error; }
API const char *cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture";
    case cudaErrorStreamCaptureImplicit: return "operation would make the legacy stream depend on a capturing blocking stream";
    default: return "error of the null device";
  }
}
API const char *cudaGetErrorName(cudaError_t error) { return "cudaErrorOfNullDevice"; }
