// Stands in for libcuda.so.1: the entry points that cuda_driver.py calls, with the kernels of nf4.cu run on the CPU. A thread
// has no context until it sets one, as on a GPU.
#include "cuda_shim.h"
namespace {  // each copy of the library that a process loads has its own shared memory, zero at first
#include "nf4.cu"
}

#include <map>
#include <string>
#include <utility>

enum { SUCCESS = 0, INVALID_VALUE = 1, INVALID_IMAGE = 200, INVALID_CONTEXT = 201, NOT_FOUND = 500 };
typedef std::function<void(void**)> Kernel;

template <class... A, size_t... I>
static Kernel unpacked(void (*kernel)(A...), std::index_sequence<I...>) {
    return [kernel](void** parameters) { kernel(*(A*)parameters[I]...); };
}
template <class... A>
static Kernel wrap(void (*kernel)(A...)) { return unpacked(kernel, std::index_sequence_for<A...>()); }

#define ENTRY(name) {#name, wrap(name)}
#define ENTRIES(dtype) \
    ENTRY(quantize_##dtype), ENTRY(dequantize_##dtype), ENTRY(dequantize_double_##dtype), \
    ENTRY(matmul_1_##dtype), ENTRY(matmul_4_##dtype), ENTRY(matmul_8_##dtype), \
    ENTRY(matmul_double_1_##dtype), ENTRY(matmul_double_4_##dtype), ENTRY(matmul_double_8_##dtype)
static std::map<std::string, Kernel> kernels = {ENTRIES(float32), ENTRIES(float16), ENTRIES(bfloat16)};

static thread_local void* current = nullptr;
static int context, module;
static void* last_stream;

extern "C" {
int cuDeviceGet(int* device, int index) { return *device = index, SUCCESS; }
int cuDevicePrimaryCtxRetain(void** made, int) { return *made = &context, SUCCESS; }
int cuCtxSetCurrent(void* made) { return current = made, SUCCESS; }
int cuModuleLoadData(void** loaded, const char* image) {
    if (!current) return INVALID_CONTEXT;
    if (memcmp(image, "\x7f" "ELF", 4)) return INVALID_IMAGE;
    return *loaded = &module, SUCCESS;
}
int cuModuleGetFunction(void** function, void*, const char* name) {
    auto found = kernels.find(name);
    if (found == kernels.end()) return NOT_FOUND;
    return *function = &found->second, SUCCESS;
}
int cuLaunchKernel(
    void* function, unsigned blocks, unsigned y, unsigned z, unsigned threads, unsigned, unsigned, unsigned, void* stream,
    void** parameters, void**
) {
    if (!current) return INVALID_CONTEXT;
    if (!blocks || y != 1 || z != 1 || !threads || threads > 1024) return INVALID_VALUE;
    last_stream = stream;
    fibers::launch(blocks, threads, [=] { (*(Kernel*)function)(parameters); });
    return SUCCESS;
}
int cuGetErrorString(int error, const char** text) {
    static const std::map<int, const char*> texts = {
        {INVALID_VALUE, "invalid argument"}, {INVALID_IMAGE, "device kernel image is invalid"},
        {INVALID_CONTEXT, "invalid device context"}, {NOT_FOUND, "named symbol not found"},
    };
    return *text = texts.at(error), SUCCESS;
}
void* fake_last_stream() { return last_stream; }
}
