// NCCL: this process believes to be a rank of many, and that the others have what it has. Small messages arrive as such.
// The amount of a collective is what torch's counters call its size: the tensor that is summed or scattered, or the rank's
// part that is gathered, in bytes.
#include "null.h"

// nccl.h wants the C++ header, of which the C header above has all it needs.
#define __CUDA_RUNTIME_H__
#include <nccl.h>
#include <stdlib.h>
#include <string.h>

static const size_t ARRIVES = 1 << 20;  // bytes; longer messages are only counted
static int world, rank;
// What this rank has broadcast in the group of calls that is open: torch gathers into a list by a broadcast of each rank.
static const void *mine;
static size_t mine_bytes;

static size_t bytes_of(ncclDataType_t type) {
  switch (type) {
    case ncclInt8: case ncclUint8: return 1;
    case ncclFloat16: case ncclBfloat16: return 2;
    case ncclInt32: case ncclUint32: case ncclFloat32: return 4;
    case ncclInt64: case ncclUint64: case ncclFloat64: return 8;
    default: return 1;  // 8-bit floats
  }
}
static ncclResult_t sent(const char *what, size_t bytes, cudaStream_t stream) {
  if (enqueue(stream, what)) return ncclUnhandledCudaError;
  time_passes(1);
  count_with("collective", what, bytes, "%p", (void *)stream);
  return ncclSuccess;
}
static void arrive(void *to, const void *from, size_t bytes) {
  if (from && to != from && bytes <= ARRIVES) memmove(to, from, bytes);
}

API ncclResult_t ncclGetVersion(int *version) {
  *version = NCCL_VERSION_CODE;
  return ncclSuccess;
}
API ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
  memset(id, 7, sizeof *id);
  return ncclSuccess;
}
API ncclResult_t ncclCommInitRank(ncclComm_t *out, int ranks, ncclUniqueId id, int own) {
  world = ranks;
  rank = own;
  *out = calloc(1, 64);
  return ncclSuccess;
}
API ncclResult_t ncclCommInitRankConfig(ncclComm_t *out, int ranks, ncclUniqueId id, int own, ncclConfig_t *config) {
  return ncclCommInitRank(out, ranks, id, own);
}
API ncclResult_t ncclCommInitRankScalable(ncclComm_t *out, int ranks, int own, int ids, ncclUniqueId *id,
                                          ncclConfig_t *config) {
  return ncclCommInitRank(out, ranks, *id, own);
}
API ncclResult_t ncclCommSplit(ncclComm_t from, int color, int key, ncclComm_t *out, ncclConfig_t *config) {
  *out = calloc(1, 64);
  return ncclSuccess;
}
API ncclResult_t ncclCommGetAsyncError(ncclComm_t communicator, ncclResult_t *error) {
  *error = ncclSuccess;
  return ncclSuccess;
}
API ncclResult_t ncclCommCount(const ncclComm_t communicator, int *ranks) {
  *ranks = world;
  return ncclSuccess;
}
API ncclResult_t ncclCommUserRank(const ncclComm_t communicator, int *own) {
  *own = rank;
  return ncclSuccess;
}
API const char *ncclGetErrorString(ncclResult_t error) { return "error of the null device"; }
API const char *ncclGetLastError(ncclComm_t communicator) { return ""; }

API ncclResult_t ncclAllReduce(const void *from, void *to, size_t elements, ncclDataType_t type, ncclRedOp_t op,
                               ncclComm_t communicator, cudaStream_t stream) {
  arrive(to, from, elements * bytes_of(type));
  return sent("all_reduce", elements * bytes_of(type), stream);
}
API ncclResult_t ncclBroadcast(const void *from, void *to, size_t elements, ncclDataType_t type, int root,
                               ncclComm_t communicator, cudaStream_t stream) {
  size_t bytes = elements * bytes_of(type);
  if (root == rank) mine = from, mine_bytes = bytes;
  if (mine_bytes == bytes) arrive(to, mine, bytes);
  return sent("broadcast", bytes, stream);
}
API ncclResult_t ncclGroupStart(void) {
  mine = NULL;
  return ncclSuccess;
}
API ncclResult_t ncclGroupEnd(void) {
  mine = NULL;
  return ncclSuccess;
}
API ncclResult_t ncclAllGather(const void *from, void *to, size_t elements, ncclDataType_t type, ncclComm_t communicator,
                               cudaStream_t stream) {
  size_t bytes = elements * bytes_of(type);
  for (int other = 0; other < world; other++) arrive((char *)to + other * bytes, from, bytes);
  return sent("all_gather", bytes, stream);
}
API ncclResult_t ncclReduceScatter(const void *from, void *to, size_t elements, ncclDataType_t type, ncclRedOp_t op,
                                   ncclComm_t communicator, cudaStream_t stream) {
  return sent("reduce_scatter", elements * bytes_of(type) * world, stream);
}
API ncclResult_t ncclReduce(const void *from, void *to, size_t elements, ncclDataType_t type, ncclRedOp_t op, int root,
                            ncclComm_t communicator, cudaStream_t stream) {
  return sent("reduce", elements * bytes_of(type), stream);
}
API ncclResult_t ncclSend(const void *from, size_t elements, ncclDataType_t type, int peer, ncclComm_t communicator,
                          cudaStream_t stream) {
  return sent("send", elements * bytes_of(type), stream);
}
API ncclResult_t ncclRecv(void *to, size_t elements, ncclDataType_t type, int peer, ncclComm_t communicator,
                          cudaStream_t stream) {
  return sent("recv", elements * bytes_of(type), stream);
}
