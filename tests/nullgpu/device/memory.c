// Memory is mapped and, unless somebody writes it, never touched: 80 GB cost nothing. Copies are real.
#include "null.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

typedef struct {
  char *at;
  size_t bytes;
  enum owner owner;
} Range;

static const size_t PAGE = 4096;
static Range *ranges;
static int range_count, room;
static size_t used, peak, pinned;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

size_t total_memory(void) { return (size_t)setting("NULLCUDA_MB", 80000) << 20; }
size_t used_memory(void) { return used; }
API size_t null_used(void) { return used; }
API size_t null_peak(void) { return peak; }
API size_t null_pinned(void) { return pinned; }
API void null_reset_peak(void) { peak = used; }

static void *map(size_t bytes, enum owner owner) {
  bytes = bytes ? (bytes + PAGE - 1) & ~(PAGE - 1) : PAGE;
  void *at = NULL;
  pthread_mutex_lock(&lock);
  if (owner != DEVICE || used + bytes <= total_memory()) {
    at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) at = NULL;
  }
  if (at) {
    if (range_count == room) ranges = realloc(ranges, (room = room ? 2 * room : 1024) * sizeof *ranges);
    ranges[range_count++] = (Range){at, bytes, owner};
    if (owner == PINNED) pinned += bytes;
    else if ((used += bytes) > peak) peak = used;
  }
  pthread_mutex_unlock(&lock);
  return at;
}

static void unmap(void *at) {
  pthread_mutex_lock(&lock);
  for (int i = 0; i < range_count; i++)
    if (ranges[i].at == at) {
      munmap(at, ranges[i].bytes);
      *(ranges[i].owner == PINNED ? &pinned : &used) -= ranges[i].bytes;
      ranges[i] = ranges[--range_count];
      break;
    }
  pthread_mutex_unlock(&lock);
}

enum owner owner_of(const void *at) {
  enum owner owner = UNKNOWN;
  pthread_mutex_lock(&lock);
  for (int i = 0; i < range_count && !owner; i++)
    if ((char *)at >= ranges[i].at && (char *)at < ranges[i].at + ranges[i].bytes) owner = ranges[i].owner;
  pthread_mutex_unlock(&lock);
  return owner;
}

API cudaError_t cudaMalloc(void **at, size_t bytes) {
  cudaError_t error = forbidden_in_capture("cudaMalloc");
  if (error) return error;
  *at = map(bytes, DEVICE);
  count("memory", "allocated", bytes);
  return *at ? cudaSuccess : refuse(cudaErrorMemoryAllocation, "cudaMalloc");
}
API cudaError_t cudaMallocAsync(void **at, size_t bytes, cudaStream_t stream) { return cudaMalloc(at, bytes); }
API cudaError_t cudaMallocManaged(void **at, size_t bytes, unsigned flags) { return cudaMalloc(at, bytes); }
API cudaError_t cudaFree(void *at) {
  if (!at) return cudaSuccess;  // torch's way to make a context
  cudaError_t error = waits("cudaFree");
  if (!error) unmap(at);
  return error;
}
API cudaError_t cudaFreeAsync(void *at, cudaStream_t stream) {
  unmap(at);
  return cudaSuccess;
}
API cudaError_t cudaHostAlloc(void **at, size_t bytes, unsigned flags) {
  cudaError_t error = forbidden_in_capture("cudaHostAlloc");
  if (error) return error;
  *at = map(bytes, PINNED);
  count("memory", "pinned", bytes);
  return *at ? cudaSuccess : refuse(cudaErrorMemoryAllocation, "cudaHostAlloc");
}
API cudaError_t cudaMallocHost(void **at, size_t bytes) { return cudaHostAlloc(at, bytes, 0); }
API cudaError_t cudaFreeHost(void *at) {
  unmap(at);
  return cudaSuccess;
}
API cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
  *total = total_memory();
  *free = *total - used;
  return cudaSuccess;
}
API cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *at) {
  enum owner owner = owner_of(at);
  memset(found, 0, sizeof *found);
  found->type = owner == DEVICE ? cudaMemoryTypeDevice : owner == PINNED ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  found->devicePointer = owner == DEVICE ? (void *)at : NULL;
  found->hostPointer = owner ? (void *)at : NULL;
  return cudaSuccess;
}

// ---- copies ----

static void copy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind how, cudaStream_t stream) {
  static const char *names[] = {"H2H", "H2D", "D2H", "D2D"};
  if (how == cudaMemcpyDefault)
    how = (owner_of(from) == DEVICE ? 2 : 0) + (owner_of(to) == DEVICE ? 1 : 0);
  const void *host = how == cudaMemcpyHostToDevice ? from : how == cudaMemcpyDeviceToHost ? to : NULL;
  const char *name = names[how];
  if (host && owner_of(host) == UNKNOWN) name = how == cudaMemcpyHostToDevice ? "H2D pageable" : "D2H pageable";
  count_with("copy", name, bytes, "%p\t%p\t%p", from, to, (void *)stream);
  if (how == cudaMemcpyHostToDevice && is_capturing(stream)) captured_copy(from, bytes);
  // Large copies within the device are counted only: they would touch memory that nobody has written.
  if (how == cudaMemcpyDeviceToDevice && bytes > (size_t)setting("NULLCUDA_COPY_MAX", 1 << 22)) return;
  memmove(to, from, bytes);
  // A single byte that the host reads is a bool that no kernel has computed: the test says what it is.
  if (how == cudaMemcpyDeviceToHost && bytes == 1) *(char *)to = (char)setting("NULLCUDA_BOOL", *(char *)to);
}

API cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind how, cudaStream_t stream) {
  cudaError_t error = enqueue(stream, "cudaMemcpyAsync");
  if (error) return error;
  if (is_capturing(stream) && (!owner_of(to) || !owner_of(from))) {
    error = forbidden_in_capture("copy of pageable memory");
    if (error) return error;
  }
  copy(to, from, bytes, how, stream);
  return cudaSuccess;
}
API cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind how) {
  cudaError_t error = waits("cudaMemcpy");
  if (!error) copy(to, from, bytes, how, NULL);
  return error;
}
API cudaError_t cudaMemcpyPeerAsync(void *to, int there, const void *from, int here, size_t bytes, cudaStream_t stream) {
  copy(to, from, bytes, cudaMemcpyDeviceToDevice, stream);
  return cudaSuccess;
}

static void fill(char *at, int value, size_t bytes) {
  count("fill", "memset", bytes);
  if (value || bytes < 16 * PAGE) {
    memset(at, value, bytes);
    return;
  }
  // Whole pages are given back to the system: they read as zero.
  char *first = (char *)(((size_t)at + PAGE - 1) & ~(PAGE - 1)), *last = (char *)(((size_t)at + bytes) & ~(PAGE - 1));
  memset(at, 0, first - at);
  madvise(first, last - first, MADV_DONTNEED);
  memset(last, 0, at + bytes - last);
}
API cudaError_t cudaMemset(void *at, int value, size_t bytes) {
  fill(at, value, bytes);
  return cudaSuccess;
}
API cudaError_t cudaMemsetAsync(void *at, int value, size_t bytes, cudaStream_t stream) {
  cudaError_t error = enqueue(stream, "cudaMemsetAsync");
  if (!error) fill(at, value, bytes);
  return error;
}
