// cuBLAS, whose products are counted by the type of their factors with their FLOPs; and what cuSOLVER must answer.
#include "null.h"

#include <cublasLt.h>
#include <cublas_v2.h>
#include <stdlib.h>
#include <string.h>

#define OK CUBLAS_STATUS_SUCCESS
static cublasMath_t math;
static __thread cudaStream_t stream;

static const char *type_name(cudaDataType type, cublasComputeType_t compute) {
  if (type == CUDA_R_16BF) return "bf16";
  if (type == CUDA_R_16F) return "fp16";
  if (type == CUDA_R_64F) return "fp64";
  if (type != CUDA_R_32F) return "other";
  int tf32 = compute == CUBLAS_COMPUTE_32F_FAST_TF32 || (compute == CUBLAS_COMPUTE_32F && math == CUBLAS_TF32_TENSOR_OP_MATH);
  return tf32 && capability() >= 80 ? "tf32" : "fp32";
}
static cublasStatus_t product(const char *function, cudaDataType type, cublasComputeType_t compute, long m, long n, long k,
                              long batch) {
  if (enqueue(stream, function)) return CUBLAS_STATUS_EXECUTION_FAILED;
  time_passes(1);
  count_with("product", type_name(type, compute), 2.0 * m * n * k * batch, "%s\t%ld x %ld x %ld\t%ld", function, m, n, k,
             batch);
  return OK;
}

API cublasStatus_t cublasCreate_v2(cublasHandle_t *handle) {
  *handle = calloc(1, 64);
  return OK;
}
API cublasStatus_t cublasDestroy_v2(cublasHandle_t handle) {
  free(handle);
  return OK;
}
API cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t to) {
  stream = to;
  return OK;
}
API cublasStatus_t cublasSetMathMode(cublasHandle_t handle, cublasMath_t mode) {
  math = mode;
  return OK;
}
API cublasStatus_t cublasGetMathMode(cublasHandle_t handle, cublasMath_t *mode) {
  *mode = math;
  return OK;
}
API cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t handle, cublasPointerMode_t *mode) {
  *mode = CUBLAS_POINTER_MODE_HOST;
  return OK;
}
API cublasStatus_t cublasGemmEx(cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
                                const void *alpha, const void *A, cudaDataType type, int lda, const void *B,
                                cudaDataType type_b, int ldb, const void *beta, void *C, cudaDataType type_c, int ldc,
                                cublasComputeType_t compute, cublasGemmAlgo_t algorithm) {
  return product("cublasGemmEx", type, compute, m, n, k, 1);
}
API cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb, int m, int n,
                                              int k, const void *alpha, const void *A, cudaDataType type, int lda,
                                              long long stride_a, const void *B, cudaDataType type_b, int ldb,
                                              long long stride_b, const void *beta, void *C, cudaDataType type_c, int ldc,
                                              long long stride_c, int batch, cublasComputeType_t compute,
                                              cublasGemmAlgo_t algorithm) {
  return product("cublasGemmStridedBatchedEx", type, compute, m, n, k, batch);
}
API cublasStatus_t cublasSgemm_v2(cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
                                  const float *alpha, const float *A, int lda, const float *B, int ldb, const float *beta,
                                  float *C, int ldc) {
  return product("cublasSgemm", CUDA_R_32F, CUBLAS_COMPUTE_32F, m, n, k, 1);
}
API cublasStatus_t cublasSgemmStridedBatched(cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb, int m, int n,
                                             int k, const float *alpha, const float *A, int lda, long long stride_a,
                                             const float *B, int ldb, long long stride_b, const float *beta, float *C,
                                             int ldc, long long stride_c, int batch) {
  return product("cublasSgemmStridedBatched", CUDA_R_32F, CUBLAS_COMPUTE_32F, m, n, k, batch);
}
API cublasStatus_t cublasSgemv_v2(cublasHandle_t handle, cublasOperation_t ta, int m, int n, const float *alpha,
                                  const float *A, int lda, const float *x, int step_x, const float *beta, float *y,
                                  int step_y) {
  return product("cublasSgemv", CUDA_R_32F, CUBLAS_COMPUTE_32F, m, 1, n, 1);
}

// ---- cublasLt: descriptors are ours, behind its opaque types ----

typedef struct {
  int type, batch;
  unsigned long rows, columns;
} Layout;
typedef struct {
  int compute, transposed;
} Description;

API cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle) {
  *handle = calloc(1, 64);
  return OK;
}
API cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *out, cudaDataType type, uint64_t rows,
                                              uint64_t columns, int64_t stride) {
  Layout *layout = malloc(sizeof *layout);
  *layout = (Layout){type, 1, rows, columns};
  *out = (cublasLtMatrixLayout_t)layout;
  return OK;
}
API cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout, cublasLtMatrixLayoutAttribute_t which,
                                                    const void *value, size_t bytes) {
  if (which == CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT) ((Layout *)layout)->batch = *(const int *)value;
  return OK;
}
API cublasStatus_t cublasLtMatrixLayoutDestroy(const cublasLtMatrixLayout_t layout) {
  free((void *)layout);
  return OK;
}
API cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *out, cublasComputeType_t compute, cudaDataType_t scale) {
  Description *description = malloc(sizeof *description);
  *description = (Description){compute, 0};
  *out = (cublasLtMatmulDesc_t)description;
  return OK;
}
API cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t description, cublasLtMatmulDescAttributes_t which,
                                                  const void *value, size_t bytes) {
  if (which == CUBLASLT_MATMUL_DESC_TRANSA) ((Description *)description)->transposed = *(const int *)value != CUBLAS_OP_N;
  return OK;
}
API cublasStatus_t cublasLtMatmulDescDestroy(const cublasLtMatmulDesc_t description) {
  free((void *)description);
  return OK;
}
API cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *out) {
  *out = calloc(1, 64);
  return OK;
}
API cublasStatus_t cublasLtMatmulPreferenceDestroy(const cublasLtMatmulPreference_t preference) {
  free((void *)preference);
  return OK;
}
API cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t description,
                                                  cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                                  cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                                  cublasLtMatmulPreference_t preference, int most,
                                                  cublasLtMatmulHeuristicResult_t results[], int *found) {
  memset(results, 0, sizeof *results);
  *found = 1;
  return OK;
}
API cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t description, const void *alpha,
                                  const void *A, const cublasLtMatrixLayout_t a, const void *B,
                                  const cublasLtMatrixLayout_t b, const void *beta, const void *C,
                                  const cublasLtMatrixLayout_t c, void *D, const cublasLtMatrixLayout_t d,
                                  const cublasLtMatmulAlgo_t *algorithm, void *workspace, size_t bytes, cudaStream_t on) {
  const Layout *factor = (const Layout *)a, *result = (const Layout *)d;
  const Description *how = (const Description *)description;
  stream = on;
  return product("cublasLtMatmul", factor->type, how->compute, result->rows, result->columns,
                 how->transposed ? factor->rows : factor->columns, result->batch);
}

// ---- cuSOLVER: eigenvalues are what was there; workspaces have a size ----

API int cusolverDnCreate(void **handle) {
  *handle = calloc(1, 64);
  return 0;
}
API int cusolverDnCreateParams(void **parameters) {
  *parameters = calloc(1, 64);
  return 0;
}
API int cusolverDnSsyevd_bufferSize(void *handle, int job, int part, int n, const void *A, int lda, const void *W,
                                    int *elements) {
  *elements = 1;
  return 0;
}
API int cusolverDnXsyevd_bufferSize(void *handle, void *parameters, int job, int part, long n, int type_a, const void *A,
                                    long lda, int type_w, const void *W, int compute, size_t *on_device, size_t *on_host) {
  *on_device = *on_host = 256;
  return 0;
}
API int cusolverDnXsyevBatched_bufferSize(void *handle, void *parameters, int job, int part, long n, int type_a,
                                          const void *A, long lda, int type_w, const void *W, int compute,
                                          size_t *on_device, size_t *on_host, long batch) {
  *on_device = *on_host = 256;
  return 0;
}
