// A CUDA device that computes nothing: what its files share. tests/nullgpu/README.md says what it proves.
#pragma once
#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <stddef.h>

// The library is built with -fvisibility=hidden: what torch and Triton call is marked.
#define API __attribute__((visibility("default")))

// counts.c: a table of (kind, name) with a number of events and a sum of amounts, and a trace of the events in their order.
void count(const char *kind, const char *name, double amount);
void count_with(const char *kind, const char *name, double amount, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
long setting(const char *variable, long otherwise);

// memory.c: who owns an address.
enum owner { UNKNOWN, PINNED, DEVICE };
enum owner owner_of(const void *at);
size_t total_memory(void);
size_t used_memory(void);

// device.c
int capability(void);
int attribute(int which);
extern __thread int current_device;
cudaError_t refuse(cudaError_t error, const char *what);

// streams.c: every call that waits, may wait, or gives a stream work asks here first; a capture of a graph forbids some.
cudaError_t waits(const char *what);
cudaError_t forbidden_in_capture(const char *what);
cudaError_t enqueue(cudaStream_t stream, const char *what);
int is_capturing(cudaStream_t stream);
void captured_copy(const void *from, size_t bytes);
void time_passes(long launches);

// kernels.c
cudaError_t launched(const char *name, dim3 grid, dim3 block, size_t shared, cudaStream_t stream);
