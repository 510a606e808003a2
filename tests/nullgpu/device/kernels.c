// Kernels: torch's register themselves by name when its libraries are loaded; a launch is counted.
#include "null.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
  const void *host;  // the function that stands for the kernel on the host
  const char *name;
} Kernel;

static Kernel *kernels;
static size_t registered, sorted, room;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

API void **__cudaRegisterFatBinary(void *binary) {
  static void *handle[1];
  return handle;
}
API void __cudaRegisterFatBinaryEnd(void **handle) {}
API void __cudaUnregisterFatBinary(void **handle) {}
API void __cudaRegisterVar(void **handle, char *host, char *address, const char *name, int external, size_t bytes,
                           int constant, int global) {}
API void __cudaRegisterFunction(void **handle, const char *host, char *function, const char *name, int limit, void *thread,
                                void *block, void *block_size, void *grid, int *warp) {
  pthread_mutex_lock(&lock);
  if (registered == room) kernels = realloc(kernels, (room = room ? 2 * room : 1 << 16) * sizeof *kernels);
  kernels[registered++] = (Kernel){host, name};
  pthread_mutex_unlock(&lock);
}

static int by_host(const void *one, const void *other) {
  const Kernel *a = one, *b = other;
  return a->host < b->host ? -1 : a->host > b->host;
}
static const char *name_of(const void *host) {
  Kernel wanted = {host, NULL};
  pthread_mutex_lock(&lock);
  if (sorted != registered) qsort(kernels, sorted = registered, sizeof *kernels, by_host);
  Kernel *found = bsearch(&wanted, kernels, registered, sizeof *kernels, by_host);
  const char *name = found ? found->name : "unknown kernel";
  pthread_mutex_unlock(&lock);
  return name;
}

cudaError_t launched(const char *name, dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  cudaError_t error = enqueue(stream, name);
  if (error) return error;
  time_passes(1);
  count_with("kernel", name, 0, "%u,%u,%u\t%u\t%zu\t%p", grid.x, grid.y, grid.z, block.x * block.y * block.z, shared,
             (void *)stream);
  return cudaSuccess;
}

// A launch in C++, f<<<grid, block>>>(), is two calls: push, and in the body of f pop.
static __thread struct {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
} call;
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st *stream) {
  call.grid = grid;
  call.block = block;
  call.shared = shared;
  call.stream = stream;
  return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  *grid = call.grid;
  *block = call.block;
  *shared = call.shared;
  *(cudaStream_t *)stream = call.stream;
  return cudaSuccess;
}
API cudaError_t cudaLaunchKernel(const void *host, dim3 grid, dim3 block, void **arguments, size_t shared,
                                 cudaStream_t stream) {
  return launched(name_of(host), grid, block, shared, stream);
}
API cudaError_t cudaLaunchCooperativeKernel(const void *host, dim3 grid, dim3 block, void **arguments, size_t shared,
                                            cudaStream_t stream) {
  return launched(name_of(host), grid, block, shared, stream);
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *how, const void *host, void **arguments) {
  return launched(name_of(host), how->gridDim, how->blockDim, how->dynamicSmemBytes, how->stream);
}
API cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *host) {
  *kernel = (cudaKernel_t)host;
  return cudaSuccess;
}
API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                                   cudaStream_t stream) {
  return launched(name_of(kernel), grid, block, shared, stream);
}
API cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *host) {
  memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = 1024;
  found->numRegs = 32;
  found->ptxVersion = found->binaryVersion = capability();
  found->maxDynamicSharedSizeBytes = attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
  return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *host, int threads, size_t shared) {
  int resident = attribute(CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR);
  *blocks = threads > 0 && threads < resident ? resident / threads : 1;
  return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *host, int threads,
                                                                       size_t shared, unsigned flags) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, host, threads, shared);
}
API cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned version,
                                                 unsigned long long flags, enum cudaDriverEntryPointQueryResult *result) {
  *function = dlsym(RTLD_DEFAULT, symbol);
  if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return *function ? cudaSuccess : cudaErrorSymbolNotFound;
}
API cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) { return cudaMalloc(address, 1 << 16); }
