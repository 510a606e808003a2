// Streams are done at once, so nothing ever waits; each wait is counted. A capture refuses what CUDA's refuses.
#include "null.h"

#include <stdlib.h>
#include <string.h>

// ---- captures of graphs: one at a time, as torch makes them ----

enum { MOST = 64 };  // streams of a capture
typedef struct Read {  // host memory that a graph copies to the device at each launch
  const void *from;
  size_t bytes;
  void *was;
  struct Read *next;
} Read;
typedef struct {
  long nodes;
  Read *reads;
} Graph;

static cudaStream_t capturing[MOST];
static int capture_streams, broken;
static unsigned long long capture_id = 1;
static enum cudaStreamCaptureMode capture_mode;
static __thread int began_it;
static __thread enum cudaStreamCaptureMode thread_mode;
static Graph *graph;  // that is being captured

int is_capturing(cudaStream_t stream) {
  for (int i = 0; i < capture_streams; i++)
    if (capturing[i] == stream) return 1;
  return 0;
}

// Refuses a call that CUDA calls unsafe, where a capture is under way and this thread has not asked for leniency.
cudaError_t forbidden_in_capture(const char *what) {
  int strict = capture_mode == cudaStreamCaptureModeGlobal
                   ? thread_mode == cudaStreamCaptureModeGlobal || began_it
                   : capture_mode == cudaStreamCaptureModeThreadLocal && began_it;
  if (!capture_streams || !strict || thread_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  broken = 1;
  return refuse(cudaErrorStreamCaptureUnsupported, what);
}

cudaError_t waits(const char *what) {
  cudaError_t error = forbidden_in_capture(what);
  if (!error) count("wait", what, 0);
  return error;
}

cudaError_t enqueue(cudaStream_t stream, const char *what) {
  if (is_capturing(stream)) {
    graph->nodes++;
  } else if (capture_streams && !stream) {
    broken = 1;
    return refuse(cudaErrorStreamCaptureImplicit, what);
  }
  return cudaSuccess;
}

void captured_copy(const void *from, size_t bytes) {
  Read *read = malloc(sizeof *read);
  *read = (Read){from, bytes, memcpy(malloc(bytes + 1), from, bytes), graph->reads};
  graph->reads = read;
}

API cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
  if (!stream || capture_streams) return refuse(cudaErrorStreamCaptureUnsupported, "cudaStreamBeginCapture");
  capturing[capture_streams++] = stream;
  capture_mode = mode;
  capture_id++;
  began_it = 1;
  broken = 0;
  graph = calloc(1, sizeof *graph);
  return cudaSuccess;
}
API cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *out) {
  capture_streams = 0;
  began_it = 0;
  *out = broken ? NULL : (cudaGraph_t)graph;
  if (broken) return refuse(cudaErrorStreamCaptureInvalidated, "cudaStreamEndCapture");
  count("graph", "captured", graph->nodes);
  return cudaSuccess;
}
API cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
  *status = is_capturing(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
#if CUDART_VERSION >= 13000
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                         cudaGraph_t *of, const cudaGraphNode_t **before, const cudaGraphEdgeData **edges,
                                         size_t *count_before) {
  if (edges) *edges = NULL;
#else
API cudaError_t cudaStreamGetCaptureInfo_v2(cudaStream_t stream, enum cudaStreamCaptureStatus *status,
                                            unsigned long long *id, cudaGraph_t *of, const cudaGraphNode_t **before,
                                            size_t *count_before) {
#endif
  if (id) *id = capture_id;
  if (of) *of = (cudaGraph_t)graph;
  if (before) *before = NULL;
  if (count_before) *count_before = 0;
  return cudaStreamIsCapturing(stream, status);
}
API cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
  enum cudaStreamCaptureMode old = thread_mode;
  thread_mode = *mode;
  *mode = old;
  return cudaSuccess;
}
API cudaError_t cudaGraphInstantiate(cudaGraphExec_t *out, cudaGraph_t of, unsigned long long flags) {
  *out = (cudaGraphExec_t)of;
  return cudaSuccess;
}
API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *out, cudaGraph_t of, unsigned long long flags) {
  return cudaGraphInstantiate(out, of, flags);
}
API cudaError_t cudaGraphGetNodes(cudaGraph_t of, cudaGraphNode_t *nodes, size_t *number) {
  *number = of ? ((Graph *)of)->nodes : 0;
  return cudaSuccess;
}
API cudaError_t cudaGraphLaunch(cudaGraphExec_t of, cudaStream_t stream) {
  Graph *launched = (Graph *)of;
  count_with("graph", "launch", launched->nodes, "%p", (void *)stream);
  time_passes(launched->nodes);
  // A graph reads the address that was captured; what is there by now must be what was there.
  for (Read *read = launched->reads; read; read = read->next)
    if (owner_of(read->from) != PINNED || memcmp(read->from, read->was, read->bytes))
      count_with("graph", "reads host memory that changed", read->bytes, "%p", read->from);
  return cudaSuccess;
}

// ---- streams and events ----

typedef struct {
  int captured;
  long at;  // of the clock
} Event;
static long launches;  // the device's clock: each launch takes NULLCUDA_LAUNCH_NS

void time_passes(long by) { __sync_fetch_and_add(&launches, by); }

API cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
  *stream = calloc(1, 16);
  return cudaSuccess;
}
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
API cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
API cudaError_t cudaStreamDestroy(cudaStream_t stream) { return cudaSuccess; }
API cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
  *priority = 0;
  return cudaSuccess;
}
API cudaError_t cudaStreamQuery(cudaStream_t stream) { return forbidden_in_capture("cudaStreamQuery"); }
API cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return waits("cudaStreamSynchronize"); }
API cudaError_t cudaDeviceSynchronize(void) { return waits("cudaDeviceSynchronize"); }
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
  *event = calloc(1, sizeof(Event));
  return cudaSuccess;
}
API cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
API cudaError_t cudaEventDestroy(cudaEvent_t event) {
  free(event);
  return cudaSuccess;
}
API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  *(Event *)event = (Event){is_capturing(stream), launches};
  count_with("event", "record", 0, "%p\t%p", (void *)event, (void *)stream);
  // An event is no node of a graph.
  return is_capturing(stream) ? cudaSuccess : enqueue(stream, "cudaEventRecord");
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  return cudaEventRecord(event, stream);
}
API cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  // A stream that waits for a captured one is captured with it.
  if (capture_streams && capture_streams < MOST && ((Event *)event)->captured && !is_capturing(stream))
    capturing[capture_streams++] = stream;
  count_with("event", "awaited by a stream", 0, "%p\t%p", (void *)event, (void *)stream);
  return cudaSuccess;
}
API cudaError_t cudaEventQuery(cudaEvent_t event) { return forbidden_in_capture("cudaEventQuery"); }
API cudaError_t cudaEventSynchronize(cudaEvent_t event) { return waits("cudaEventSynchronize"); }
static cudaError_t elapsed(float *ms, cudaEvent_t from, cudaEvent_t to) {
  long passed = ((Event *)to)->at - ((Event *)from)->at;
  *ms = (passed > 0 ? passed : 1) * setting("NULLCUDA_LAUNCH_NS", 1000) * 1e-6f;
  return cudaSuccess;
}
API cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) { return elapsed(ms, from, to); }
API cudaError_t cudaEventElapsedTime_v2(float *ms, cudaEvent_t from, cudaEvent_t to) { return elapsed(ms, from, to); }
