/* libcuda for tests: answers as a GPU's driver does, launches nothing, and writes down what it was asked. */
#include <stdint.h>
#include <stdio.h>
#include <string.h>

static FILE *log_file;
static void *current;
static int contexts, maps;
static unsigned opt_in;
static char entry[128];

void stub_open(const char *path) { log_file = fopen(path, "w"); }
void stub_close(void) { fclose(log_file); log_file = 0; }
void stub_forget_context(void) { current = 0; }
int stub_contexts(void) { return contexts; }
int stub_maps(void) { return maps; }

int cuInit(unsigned flags) { return (int)flags; }
int cuGetErrorName(int code, const char **name) { *name = code ? "CUDA_ERROR_STUB" : "CUDA_SUCCESS"; return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)(uintptr_t)(1000 + device); return 0; }
int cuCtxGetCurrent(void **context) { *context = current; return 0; }
int cuCtxSetCurrent(void *context) { current = context; contexts++; return 0; }
int cuModuleLoadData(void **module, const void *image) {
  if (memcmp(image, "\177ELF", 4)) return 200;
  *module = (void *)image;
  return 0;
}
/* A function is its name, kept for the log. */
int cuModuleGetFunction(void **function, void *module, const char *name) {
  static char names[64][128];
  static int count;
  (void)module;
  strncpy(names[count], name, 127);
  *function = names[count++];
  return 0;
}
int cuFuncSetAttribute(void *function, int attribute, int value) {
  (void)function;
  if (attribute != 8) return 1;
  opt_in = (unsigned)value;
  return 0;
}
int cuTensorMapEncodeTiled(void *map, int type, uint32_t rank, void *base, const uint64_t *shape,
                           const uint64_t *strides, const uint32_t *box, const uint32_t *steps, int interleave,
                           int swizzle, int promotion, int fill) {
  (void)base; (void)steps; (void)interleave; (void)promotion; (void)fill;
  if (rank != 2 || (uintptr_t)map % 64) return 1;
  *(uint64_t *)map = (uint64_t)++maps;
  if (log_file)
    fprintf(log_file,
            "{\"map\": %d, \"type\": %d, \"shape\": [%llu, %llu], \"row_bytes\": %llu, \"box\": [%u, %u], \"swizzle\": %d}\n",
            maps, type, (unsigned long long)shape[0], (unsigned long long)shape[1], (unsigned long long)strides[0],
            box[0], box[1], swizzle);
  return 0;
}
int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **parameters, void **extra) {
  (void)extra;
  if (!current) return 201;
  if (!log_file) return 0;
  strncpy(entry, function, 127);
  fprintf(log_file,
          "{\"entry\": \"%s\", \"grid\": [%u, %u, %u], \"block\": [%u, %u, %u], \"shared\": %u, \"opt_in\": %u, "
          "\"stream\": %llu, ", entry, gx, gy, gz, bx, by, bz, shared, opt_in, (unsigned long long)(uintptr_t)stream);
  if (strcmp(entry, "linear_tma_kernel") == 0) {
    /* Maps stand before their shape (two) and strides (two): parameters 0, 5, and, behind the bias, 11. */
    fprintf(log_file, "\"map_numbers\": [%llu, %llu, %llu]}\n", *(unsigned long long *)parameters[0],
            *(unsigned long long *)parameters[5], *(unsigned long long *)parameters[11]);
  } else {
    fprintf(log_file, "\"values\": [");
    for (int i = 0; i < 12; i++) {
      uint64_t value;
      memcpy(&value, parameters[i], 8);
      fprintf(log_file, "%s%llu", i ? ", " : "", (unsigned long long)value);
    }
    fprintf(log_file, "]}\n");
  }
  return 0;
}
