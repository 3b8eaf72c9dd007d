/* Stands in for the CUDA driver library: everything succeeds and nothing runs. Triton's own launcher is linked against
   it to measure what a launch costs the host, and to count launches, on a machine without a GPU. */
#include <stddef.h>

typedef int Result;
static _Atomic long launches; /* Triton launches without Python's lock */

long stub_launches(void) { return launches; }

Result cuLaunchKernelEx(void) { launches++; return 0; }
Result cuLaunchKernel(void) { launches++; return 0; }
Result cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 232448; return 0; }
Result cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute == 0 ? 1024 : 0; return 0; }
Result cuFuncSetAttribute(void) { return 0; }
Result cuFuncSetCacheConfig(void) { return 0; }
Result cuModuleLoadData(void **module, const void *image) { *module = (void *)1; return 0; }
Result cuModuleGetFunction(void **function, void *module, const char *name) { *function = (void *)1; return 0; }
Result cuModuleUnload(void) { return 0; }
Result cuDevicePrimaryCtxRetain(void **context) { *context = (void *)1; return 0; }
Result cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
Result cuCtxSetCurrent(void *context) { return 0; }
Result cuCtxGetLimit(size_t *value, int limit) { *value = 0; return 0; }
Result cuCtxSetLimit(void) { return 0; }
Result cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
Result cuDriverGetVersion(int *version) { *version = 13000; return 0; }
Result cuGetErrorString(int error, const char **text) { *text = "stub"; return 0; }
Result cuPointerGetAttribute(void *value, int attribute, unsigned long long pointer) { return 0; }
Result cuPointerGetAttributes(void) { return 0; }
Result cuOccupancyMaxActiveClusters(int *count) { *count = 1; return 0; }
Result cuTensorMapEncodeTiled(void) { return 0; }
Result cuTensorMapEncodeIm2col(void) { return 0; }
