/* A CUDA runtime, driver, cuBLAS and NCCL of one rank with one card on which nothing is computed.

   Memory is address space that holds zeros: nothing is copied into it, and kernels are only counted. What a program does
   with it is real: the bytes that it allocates, the kernels that it launches, and where the host waits for the card. */
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

typedef void *pointer;
/* the headers declare these otherwise, so they have names of their own here */
#define NAMED(name, parameters) int null_##name parameters __asm__(#name); int null_##name parameters
#define NOTHING(name) NAMED(name, (void)) { return 0; }
#define CREATES(name) NAMED(name, (pointer * made)) { *made = calloc(1, 4096); return 0; }
#define LAUNCHES(name) NAMED(name, (void)) { launches++; return 0; }

/* An RTX 3090. */
static const int MAJOR = 8, MINOR = 6, MULTIPROCESSORS = 82, SHARED_BYTES = 101376;
static const size_t TOTAL = 24ul << 30, PAGE = 2ul << 20;

/* --- memory */

enum place { PAGEABLE, PINNED, CARD };
static struct range { char *start; size_t size; enum place place; } ranges[65536];
static int known;
static size_t used;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void *take(size_t size, enum place place) {
  int protection = PROT_READ | PROT_WRITE, flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void *start = mmap(NULL, size, protection, flags, -1, 0);
  pthread_mutex_lock(&lock);
  ranges[known++] = (struct range){start, size, place};
  if (place == CARD) used += size;
  pthread_mutex_unlock(&lock);
  return start;
}

static void give(void *start) {
  pthread_mutex_lock(&lock);
  for (int i = known - 1; i >= 0; i--)
    if (ranges[i].start == start) {
      munmap(start, ranges[i].size);
      if (ranges[i].place == CARD) used -= ranges[i].size;
      ranges[i] = ranges[--known];
      break;
    }
  pthread_mutex_unlock(&lock);
}

static enum place place_of(const void *address) {
  enum place found = PAGEABLE;
  pthread_mutex_lock(&lock);
  for (int i = known - 1; i >= 0 && !found; i--)
    if ((char *)address >= ranges[i].start && (char *)address < ranges[i].start + ranges[i].size)
      found = ranges[i].place;
  pthread_mutex_unlock(&lock);
  return found;
}

cudaError_t cudaMalloc(void **made, size_t size) {
  size = (size + PAGE - 1) / PAGE * PAGE;
  if (used + size > TOTAL) return cudaErrorMemoryAllocation;
  *made = take(size, CARD);
  return 0;
}
cudaError_t cudaHostAlloc(void **made, size_t size, unsigned flags) { *made = take(size, PINNED); return 0; }
cudaError_t cudaFree(void *start) { if (start) give(start); return 0; }
cudaError_t cudaFreeHost(void *start) { give(start); return 0; }
cudaError_t cudaMemGetInfo(size_t *free, size_t *total) { *total = TOTAL; *free = TOTAL - used; return 0; }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *told, const void *address) {
  static const enum cudaMemoryType types[] = {cudaMemoryTypeUnregistered, cudaMemoryTypeHost, cudaMemoryTypeDevice};
  *told = (struct cudaPointerAttributes){types[place_of(address)], 0, (void *)address, (void *)address};
  return 0;
}

/* --- what is counted */

static unsigned long launches;
static void (*on_wait)(const char *kind); /* called where the host waits for the card */

unsigned long null_launches(void) { return launches; }
void null_on_wait(void (*call)(const char *kind)) { on_wait = call; }
static int waits(const char *kind) { if (on_wait) on_wait(kind); return 0; }

static int copy(void *to, const void *from, size_t size) {
  enum place source = place_of(from), target = place_of(to);
  if (target != CARD) memmove(to, from, size);
  if (source == CARD && target != CARD) return waits("copy to the host");
  return source == PAGEABLE && target == CARD ? waits("copy from pageable memory") : 0;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) { return copy(to, from, size); }
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
  return copy(to, from, size);
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return waits("synchronize of a stream"); }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return waits("synchronize of an event"); }
cudaError_t cudaDeviceSynchronize(void) { return waits("synchronize of the card"); }

LAUNCHES(cudaLaunchKernel)
LAUNCHES(cudaLaunchKernelExC)
LAUNCHES(__cudaLaunchKernel)
LAUNCHES(cuLaunchKernel)
LAUNCHES(cuLaunchKernelEx)
LAUNCHES(cuLaunchCooperativeKernel)

/* --- the card */

cudaError_t cudaGetDeviceCount(int *count) {
  const char *visible = getenv("CUDA_VISIBLE_DEVICES");
  *count = !visible || *visible;
  return *count ? cudaSuccess : cudaErrorNoDevice;
}
cudaError_t cudaGetDevice(int *device) { *device = 0; return 0; }
cudaError_t cudaSetDevice(int device) { return device ? cudaErrorInvalidDevice : cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { *can = 0; return 0; }
cudaError_t cudaDeviceGetPCIBusId(char *bus, int length, int device) { snprintf(bus, length, "0000:01:00.0"); return 0; }
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *told, int device) {
  *told = (struct cudaDeviceProp){
      .name = "no card", .totalGlobalMem = TOTAL, .sharedMemPerBlock = 49152, .regsPerBlock = 65536, .warpSize = 32,
      .maxThreadsPerBlock = 1024, .maxThreadsDim = {1024, 1024, 64}, .maxGridSize = {2147483647, 65535, 65535},
      .major = MAJOR, .minor = MINOR, .multiProcessorCount = MULTIPROCESSORS, .l2CacheSize = 6291456,
      .maxThreadsPerMultiProcessor = 1536, .sharedMemPerMultiprocessor = SHARED_BYTES + 1024,
      .regsPerMultiprocessor = 65536, .sharedMemPerBlockOptin = SHARED_BYTES, .unifiedAddressing = 1,
      .concurrentKernels = 1, .textureAlignment = 512, .memoryBusWidth = 384};
  return 0;
}
cudaError_t cudaDeviceGetAttribute(int *told, enum cudaDeviceAttr asked, int device) {
  switch ((int)asked) {
    case cudaDevAttrComputeCapabilityMajor: *told = MAJOR; break;
    case cudaDevAttrComputeCapabilityMinor: *told = MINOR; break;
    case cudaDevAttrMultiProcessorCount: *told = MULTIPROCESSORS; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *told = SHARED_BYTES; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *told = 49152; break;
    case cudaDevAttrWarpSize: *told = 32; break;
    case cudaDevAttrMaxThreadsPerBlock: *told = 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *told = 1536; break;
    case cudaDevAttrMaxRegistersPerBlock: *told = 65536; break;
    case cudaDevAttrMaxGridDimX: *told = 2147483647; break;
    default: *told = 0;
  }
  return 0;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *told, const void *kernel) {
  *told = (struct cudaFuncAttributes){.maxThreadsPerBlock = 1024, .numRegs = 64, .maxDynamicSharedSizeBytes = SHARED_BYTES,
                                      .ptxVersion = MAJOR * 10 + MINOR, .binaryVersion = MAJOR * 10 + MINOR};
  return 0;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *kernel, int threads,
                                                                   size_t shared, unsigned flags) {
  *blocks = 2;
  return 0;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return 0; }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) { *status = 0; return 0; }
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **nodes,
                                     const cudaGraphEdgeData **edges, size_t *count) {
  *status = 0;
  return 0;
}
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) { *milliseconds = 1; return 0; }
const char *cudaGetErrorString(cudaError_t error) { return error == cudaErrorMemoryAllocation ? "out of memory" : "no card"; }
const char *cudaGetErrorName(cudaError_t error) { return "no card"; }
cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) { static char room[65536]; *address = room; return 0; }
static int nothing(void) { return 0; }
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                             unsigned long long flags, enum cudaDriverEntryPointQueryResult *result) {
  void *own = dlsym(RTLD_DEFAULT, name);
  *function = own ? own : (void *)nothing;
  if (result) *result = cudaDriverEntryPointSuccess;
  return 0;
}

CREATES(cudaStreamCreateWithPriority)
CREATES(cudaStreamCreateWithFlags)
CREATES(cudaEventCreateWithFlags)
CREATES(cudaEventCreate)
NOTHING(cudaMemset)
NOTHING(cudaMemsetAsync)
NOTHING(cudaGetLastError)
NOTHING(cudaPeekAtLastError)
NOTHING(cudaStreamQuery)
NOTHING(cudaStreamWaitEvent)
NOTHING(cudaStreamDestroy)
NOTHING(cudaEventRecord)
NOTHING(cudaEventRecordWithFlags)
NOTHING(cudaEventQuery)
NOTHING(cudaEventDestroy)
NOTHING(cudaThreadExchangeStreamCaptureMode)
NOTHING(cudaMemcpyToSymbol)
NOTHING(cudaFuncSetAttribute)
NOTHING(cudaHostRegister)
NOTHING(cudaHostUnregister)

/* --- the driver, as Triton asks it */

int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
int cuCtxGetCurrent(pointer *context) { static char one; *context = &one; return 0; }
int cuDeviceGet(int *device, int number) { *device = 0; return 0; }
int cuDeviceGetCount(int *count) { return cudaGetDeviceCount(count); }
int cuDeviceGetAttribute(int *told, int asked, int device) { return cudaDeviceGetAttribute(told, asked, device); }
int cuFuncGetAttribute(int *told, int asked, pointer kernel) { *told = asked ? 0 : 1024; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "no card"; return 0; }
int cuPointerGetAttribute(unsigned long long *told, int asked, unsigned long long address) { *told = address; return 0; }
int cuOccupancyMaxActiveClusters(int *clusters, pointer kernel, pointer config) { *clusters = 1; return 0; }
CREATES(cuDevicePrimaryCtxRetain)
CREATES(cuModuleLoad)
CREATES(cuModuleLoadData)
CREATES(cuModuleLoadDataEx)
CREATES(cuModuleGetFunction)
NOTHING(cuInit)
NOTHING(cuCtxSetCurrent)
NOTHING(cuCtxGetLimit)
NOTHING(cuCtxSetLimit)
NOTHING(cuModuleUnload)
NOTHING(cuFuncSetAttribute)
NOTHING(cuFuncSetCacheConfig)
NOTHING(cuLinkAddData_v2)
NOTHING(cuLinkComplete)
NOTHING(cuLinkCreate_v2)
NOTHING(cuOccupancyMaxActiveBlocksPerMultiprocessor)
NOTHING(cuTensorMapEncodeTiled)

/* --- cuBLAS */

CREATES(cublasCreate_v2)
CREATES(cublasLtCreate)
int cublasGetMathMode(pointer handle, int *mode) { *mode = 0; return 0; }
int cublasGetPointerMode_v2(pointer handle, int *mode) { *mode = 0; return 0; }
int cublasLtMatmulAlgoGetHeuristic(pointer handle, pointer operation, pointer a, pointer b, pointer c, pointer d,
                                   pointer preference, int asked, pointer results, int *found) {
  memset(results, 0, 64); /* the algorithm; then bytes of workspace and a status, both 0 */
  *found = 1;
  return 0;
}
NOTHING(cublasSetStream_v2)
NOTHING(cublasSetWorkspace_v2)
NOTHING(cublasSetMathMode)
NOTHING(cublasSetPointerMode_v2)
NOTHING(cublasDestroy_v2)
LAUNCHES(cublasLtMatmul)
LAUNCHES(cublasGemmEx)
LAUNCHES(cublasGemmStridedBatchedEx)
LAUNCHES(cublasSgemm_v2)
LAUNCHES(cublasSgemmStridedBatched)
LAUNCHES(cublasSgemv_v2)

/* --- NCCL of one rank */

static size_t size_of(int type) {
  static const size_t sizes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
  return sizes[type];
}
static int sends(const void *from, void *to, size_t count, int type) {
  launches++;
  return from == to ? 0 : copy(to, from, count * size_of(type));
}
int ncclAllReduce(const void *from, void *to, size_t count, int type) { return sends(from, to, count, type); }
int ncclReduce(const void *from, void *to, size_t count, int type) { return sends(from, to, count, type); }
int ncclBroadcast(const void *from, void *to, size_t count, int type) { return sends(from, to, count, type); }
int ncclAllGather(const void *from, void *to, size_t count, int type) { return sends(from, to, count, type); }
int ncclReduceScatter(const void *from, void *to, size_t count, int type) { return sends(from, to, count, type); }
int ncclGetVersion(int *version) { *version = 22907; return 0; }
int ncclCommGetAsyncError(pointer communicator, int *error) { *error = 0; return 0; }
int ncclCommSplit(pointer communicator, int colour, int key, pointer *made) { *made = malloc(8); return 0; }
const char *ncclGetErrorString(int error) { return "no card"; }
const char *ncclGetLastError(pointer communicator) { return "no card"; }
CREATES(ncclCommInitRankConfig)
CREATES(ncclCommInitRank)
CREATES(ncclCommInitRankScalable)
NOTHING(ncclGetUniqueId)
NOTHING(ncclCommDestroy)
NOTHING(ncclCommAbort)
NOTHING(ncclCommFinalize)
NOTHING(ncclCommRegister)
NOTHING(ncclCommDeregister)
NOTHING(ncclGroupStart)
NOTHING(ncclGroupEnd)
