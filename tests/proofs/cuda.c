/* A CUDA runtime and driver with one card on which nothing runs: what torch asks for while tensors are fake. */
#include <stdlib.h>

typedef void *pointer;
#define NOTHING(name) int name(void) { return 0; }

int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -1; return 0; }
int cudaStreamCreateWithPriority(pointer *stream, unsigned flags, int priority) { *stream = malloc(8); return 0; }
int cudaStreamCreateWithFlags(pointer *stream, unsigned flags) { *stream = malloc(8); return 0; }
int cudaStreamIsCapturing(pointer stream, int *status) { *status = 0; return 0; }
int cudaEventCreateWithFlags(pointer *event, unsigned flags) { *event = malloc(8); return 0; }
int cudaEventCreate(pointer *event) { *event = malloc(8); return 0; }
int cudaEventElapsedTime(float *milliseconds, pointer start, pointer end) { *milliseconds = 1; return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 0; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "no card"; return 0; }

NOTHING(cudaSetDevice)
NOTHING(cudaGetLastError)
NOTHING(cudaPeekAtLastError)
NOTHING(cudaStreamSynchronize)
NOTHING(cudaStreamQuery)
NOTHING(cudaStreamWaitEvent)
NOTHING(cudaEventRecord)
NOTHING(cudaEventRecordWithFlags)
NOTHING(cudaEventQuery)
NOTHING(cudaEventSynchronize)
NOTHING(cudaEventDestroy)
NOTHING(cudaDeviceSynchronize)
NOTHING(cudaThreadExchangeStreamCaptureMode)
NOTHING(cuInit)
NOTHING(cuCtxGetCurrent)
NOTHING(cuCtxSetCurrent)
NOTHING(cuDeviceGet)
NOTHING(cuDeviceGetAttribute)
NOTHING(cuDevicePrimaryCtxRetain)
NOTHING(cuFuncGetAttribute)
NOTHING(cuFuncSetAttribute)
NOTHING(cuFuncSetCacheConfig)
NOTHING(cuLaunchCooperativeKernel)
NOTHING(cuLaunchKernel)
NOTHING(cuLinkAddData_v2)
NOTHING(cuLinkComplete)
NOTHING(cuLinkCreate_v2)
NOTHING(cuModuleGetFunction)
NOTHING(cuModuleLoad)
NOTHING(cuModuleLoadData)
NOTHING(cuModuleLoadDataEx)
NOTHING(cuModuleUnload)
NOTHING(cuOccupancyMaxActiveBlocksPerMultiprocessor)
NOTHING(cuPointerGetAttribute)
NOTHING(cuTensorMapEncodeTiled)
