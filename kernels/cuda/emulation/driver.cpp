// A stand-in for the CUDA driver library: enough of its interface for this project, on the CPU. Kernels are shared
// libraries made by the stand-in compiler (nvrtc.cpp). Streams are queues that run when somebody waits for them, so that code
// which reads a result too early, or reuses memory too early, gets wrong numbers here too.
//
// g++ -std=c++17 -O2 -fPIC -shared -Wl,-soname,libcuda.so.13 driver.cpp -o libcuda.so -ldl
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#define API extern "C" __attribute__((visibility("default"))) int

namespace {

using Pointer = unsigned long long;
using Task = std::function<int()>;

enum Error { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 101, INVALID_IMAGE = 200, NOT_FOUND = 500, ILLEGAL_ADDRESS = 700, LAUNCH_FAILED = 719 };

struct Stream {
  std::vector<Task> queue;
  size_t done = 0;  // tasks of the queue that have run
  bool capturing = false;
  std::vector<Task> captured;
};

struct Event {
  Stream* stream = nullptr;
  size_t at = 0;  // number of the task of its stream that it is
  double milliseconds = 0;
};

struct Graph {
  std::vector<Task> tasks;
};

struct Function {
  std::string name;
  int (*launch)(const char*, const unsigned*, const unsigned*, size_t, void**, unsigned);
  const char* (*error)();
  std::vector<size_t> sizes;
  size_t shared = 48 << 10;
};

struct Module {
  void* library;
  std::map<std::string, std::unique_ptr<Function>> functions;
};

std::recursive_mutex mutex;
std::map<Pointer, size_t> allocations;
std::vector<Stream*> streams;
std::string failure;  // what a kernel said
int context, sticky = SUCCESS;
thread_local void* current;

#define LOCK std::lock_guard<std::recursive_mutex> guard(mutex)

bool inside(Pointer p, size_t n) {
  auto it = allocations.upper_bound(p);
  if (it == allocations.begin()) return false;
  --it;
  return p + n <= it->first + it->second;
}

// Runs the tasks of a stream before number `until`.
int drain(Stream* s, size_t until = SIZE_MAX) {
  while (s->done < s->queue.size() && s->done < until && sticky == SUCCESS) {
    Task task = std::move(s->queue[s->done++]);
    const int error = task();
    if (error != SUCCESS) sticky = error;
  }
  return sticky;
}

int enqueue(Stream* s, Task task) {
  if (sticky != SUCCESS) return sticky;
  if (s->capturing) {
    s->captured.push_back(std::move(task));
  } else {
    s->queue.push_back(std::move(task));
  }
  return SUCCESS;
}

int drain_all() {
  for (Stream* s : streams) drain(s);
  return sticky;
}

unsigned thread_order() {
  const char* text = getenv("EMULATION_ORDER");
  return text ? (unsigned)strtoul(text, nullptr, 10) : 0;
}

}  // namespace

// For the stand-in of cuBLASLt: a task in a stream's order.
extern "C" __attribute__((visibility("default"))) int emulation_enqueue(void* stream, void (*run)(void*), void* data, void (*drop)(void*)) {
  LOCK;
  std::shared_ptr<void> owned(data, drop);
  return enqueue(static_cast<Stream*>(stream), [run, owned] { run(owned.get()); return SUCCESS; });
}

// Whether memory of the device has `n` bytes at `p`.
extern "C" __attribute__((visibility("default"))) int emulation_inside(const void* p, size_t n) {
  LOCK;
  return inside((Pointer)p, n);
}

API cuInit(unsigned) { return SUCCESS; }
API cuDriverGetVersion(int* v) { *v = 13000; return SUCCESS; }
API cuDeviceGet(int* d, int ordinal) { *d = 0; return ordinal == 0 ? SUCCESS : NO_DEVICE; }
API cuDeviceGetCount(int* n) { *n = 1; return SUCCESS; }
API cuDeviceGetName(char* name, int n, int) {
    const char* wanted = getenv("EMULATION_NAME");
    snprintf(name, n, "%s", wanted ? wanted : "CPU emulation");
    return SUCCESS;
}
API cuDeviceGetAttribute(int* v, int attribute, int) {
  *v = attribute == 75 ? 9 : attribute == 16 ? 4 : 0;  // compute capability 9.0, 4 multiprocessors
  return SUCCESS;
}
API cuDeviceTotalMem_v2(size_t* n, int) { *n = size_t(1) << 32; return SUCCESS; }
API cuMemGetInfo_v2(size_t* free, size_t* total) { *free = *total = size_t(1) << 32; return SUCCESS; }
API cuDevicePrimaryCtxRetain(void** c, int) { *c = &context; return SUCCESS; }
API cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
API cuCtxSetCurrent(void* c) { current = c; return SUCCESS; }
API cuCtxGetCurrent(void** c) { *c = current; return SUCCESS; }
API cuCtxSynchronize() { LOCK; return drain_all(); }

API cuGetErrorName(int e, const char** text) {
  static thread_local char name[32];
  snprintf(name, sizeof name, "CUDA_ERROR_%d", e);
  *text = name;
  return SUCCESS;
}
API cuGetErrorString(int e, const char** text) {
  if (e == LAUNCH_FAILED || e == ILLEGAL_ADDRESS) *text = failure.c_str();
  else cuGetErrorName(e, text);
  return SUCCESS;
}

API cuStreamCreate(void** s, unsigned) {
  LOCK;
  *s = streams.emplace_back(new Stream);
  return SUCCESS;
}
API cuStreamDestroy_v2(void* s) {
  LOCK;
  Stream* stream = static_cast<Stream*>(s);
  drain(stream);
  for (size_t i = 0; i < streams.size(); ++i)
    if (streams[i] == stream) streams.erase(streams.begin() + i);
  return SUCCESS;  // events may still point to it
}
API cuStreamSynchronize(void* s) { LOCK; return drain(static_cast<Stream*>(s)); }
API cuStreamWaitEvent(void* s, void* e, unsigned) {
  LOCK;
  Event* event = static_cast<Event*>(e);
  if (!event->stream) return SUCCESS;
  Stream* other = event->stream;
  const size_t at = event->at;
  return enqueue(static_cast<Stream*>(s), [other, at] { return drain(other, at + 1); });
}
API cuStreamBeginCapture_v2(void* s, int) {
  LOCK;
  Stream* stream = static_cast<Stream*>(s);
  if (stream->capturing) return INVALID_VALUE;
  stream->capturing = true;
  stream->captured.clear();
  return SUCCESS;
}
API cuStreamEndCapture(void* s, void** graph) {
  LOCK;
  Stream* stream = static_cast<Stream*>(s);
  if (!stream->capturing) return INVALID_VALUE;
  stream->capturing = false;
  *graph = new Graph{std::move(stream->captured)};
  return SUCCESS;
}
API cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long) {
  *executable = new Graph(*static_cast<Graph*>(graph));
  return SUCCESS;
}
API cuGraphLaunch(void* executable, void* s) {
  LOCK;
  for (const Task& task : static_cast<Graph*>(executable)->tasks)
    if (int error = enqueue(static_cast<Stream*>(s), task)) return error;
  return SUCCESS;
}
API cuGraphDestroy(void* graph) { delete static_cast<Graph*>(graph); return SUCCESS; }
API cuGraphExecDestroy(void* graph) { delete static_cast<Graph*>(graph); return SUCCESS; }

API cuEventCreate(void** e, unsigned) { *e = new Event; return SUCCESS; }
API cuEventDestroy_v2(void* e) {
  LOCK;
  Event* event = static_cast<Event*>(e);
  if (event->stream) drain(event->stream);
  delete event;
  return SUCCESS;
}
API cuEventRecord(void* e, void* s) {
  LOCK;
  Event* event = static_cast<Event*>(e);
  event->stream = static_cast<Stream*>(s);
  event->at = event->stream->queue.size();
  return enqueue(event->stream, [event] {
    event->milliseconds = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
    return SUCCESS;
  });
}
API cuEventSynchronize(void* e) {
  LOCK;
  Event* event = static_cast<Event*>(e);
  return event->stream ? drain(event->stream, event->at + 1) : SUCCESS;
}
API cuEventQuery(void* e) { return cuEventSynchronize(e); }
API cuEventElapsedTime(float* ms, void* a, void* b) {
  *ms = float(static_cast<Event*>(b)->milliseconds - static_cast<Event*>(a)->milliseconds);
  return SUCCESS;
}
API cuEventElapsedTime_v2(float* ms, void* a, void* b) { return cuEventElapsedTime(ms, a, b); }

API cuMemAlloc_v2(Pointer* p, size_t n) {
  LOCK;
  if (n == 0) return INVALID_VALUE;
  void* memory = aligned_alloc(256, (n + 255) / 256 * 256);
  if (!memory) return OUT_OF_MEMORY;
  memset(memory, 0xff, n);  // NaN
  allocations[*p = (Pointer)memory] = n;
  return SUCCESS;
}
API cuMemFree_v2(Pointer p) {
  LOCK;
  drain_all();
  if (!allocations.erase(p)) return INVALID_VALUE;
  free((void*)p);
  return SUCCESS;
}
API cuMemHostAlloc(void** p, size_t n, unsigned) {
  LOCK;
  *p = aligned_alloc(256, (n + 255) / 256 * 256);
  allocations[(Pointer)*p] = n;
  return SUCCESS;
}
API cuMemFreeHost(void* p) { return cuMemFree_v2((Pointer)p); }
API cuMemsetD8Async(Pointer p, unsigned char value, size_t n, void* s) {
  LOCK;
  if (!inside(p, n)) return INVALID_VALUE;
  return enqueue(static_cast<Stream*>(s), [=] { memset((void*)p, value, n); return SUCCESS; });
}
API cuMemcpyHtoDAsync_v2(Pointer to, const void* from, size_t n, void* s) {
  LOCK;
  if (!inside(to, n)) return INVALID_VALUE;
  return enqueue(static_cast<Stream*>(s), [=] { memcpy((void*)to, from, n); return SUCCESS; });
}
API cuMemcpyDtoHAsync_v2(void* to, Pointer from, size_t n, void* s) {
  LOCK;
  if (!inside(from, n)) return INVALID_VALUE;
  return enqueue(static_cast<Stream*>(s), [=] { memcpy(to, (void*)from, n); return SUCCESS; });
}
API cuMemcpyDtoDAsync_v2(Pointer to, Pointer from, size_t n, void* s) {
  LOCK;
  if (!inside(to, n) || !inside(from, n)) return INVALID_VALUE;
  return enqueue(static_cast<Stream*>(s), [=] { memcpy((void*)to, (void*)from, n); return SUCCESS; });
}
// Streams of this project do not wait for the default stream, so these do not wait for them.
API cuMemcpyHtoD_v2(Pointer to, const void* from, size_t n) {
  LOCK;
  if (!inside(to, n)) return INVALID_VALUE;
  memcpy((void*)to, from, n);
  return sticky;
}
API cuMemcpyDtoH_v2(void* to, Pointer from, size_t n) {
  LOCK;
  if (!inside(from, n)) return INVALID_VALUE;
  memcpy(to, (void*)from, n);
  return sticky;
}

// An image is an ELF shared library; its size is in its header.
API cuModuleLoadData(void** module, const void* image) {
  LOCK;
  const unsigned char* bytes = static_cast<const unsigned char*>(image);
  if (memcmp(bytes, "\177ELF", 4) != 0) return INVALID_IMAGE;
  uint64_t sections;
  uint16_t size, count;
  memcpy(&sections, bytes + 40, 8);
  memcpy(&size, bytes + 58, 2);
  memcpy(&count, bytes + 60, 2);
  const size_t n = sections + size_t(size) * count;
  const int file = memfd_create("module", 0);
  if (file < 0 || write(file, bytes, n) != (ssize_t)n) return OUT_OF_MEMORY;
  const std::string path = "/proc/self/fd/" + std::to_string(file);
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  // the file stays open: the next module must not get its name, or the loader takes it for the same library
  if (!library) {
    fprintf(stderr, "%s\n", dlerror());
    return INVALID_IMAGE;
  }
  *module = new Module{library, {}};
  return SUCCESS;
}
API cuModuleUnload(void*) { LOCK; return drain_all(); }  // its code may be part of a graph
API cuModuleGetFunction(void** function, void* m, const char* name) {
  LOCK;
  Module* module = static_cast<Module*>(m);
  auto& slot = module->functions[name];
  if (!slot) {
    auto params = (int (*)(const char*))dlsym(module->library, "emu_params");
    auto size = (size_t (*)(const char*, int))dlsym(module->library, "emu_param_size");
    slot = std::make_unique<Function>();
    slot->name = name;
    slot->launch = (decltype(slot->launch))dlsym(module->library, "emu_launch");
    slot->error = (decltype(slot->error))dlsym(module->library, "emu_error");
    const int n = params && size && slot->launch ? params(name) : -1;
    if (n < 0) {
      module->functions.erase(name);
      return NOT_FOUND;
    }
    for (int i = 0; i < n; ++i) slot->sizes.push_back(size(name, i));
  }
  *function = slot.get();
  return SUCCESS;
}
API cuFuncSetAttribute(void* f, int attribute, int value) {
  if (value > 227 << 10) return INVALID_VALUE;
  if (attribute == 8) static_cast<Function*>(f)->shared = value;
  return SUCCESS;
}
API cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void* s, void** parameters, void**) {
  LOCK;
  Function* function = static_cast<Function*>(f);
  if (shared > function->shared || gy > 65535 || gz > 65535 || bx * by * bz > 1024 || !(gx && gy && gz && bx && by && bz)) return INVALID_VALUE;
  // parameters are copied at the call, as the driver does
  auto values = std::make_shared<std::vector<std::vector<char>>>();
  for (size_t i = 0; i < function->sizes.size(); ++i) {
    const char* from = static_cast<const char*>(parameters[i]);
    values->emplace_back(from, from + function->sizes[i]);
  }
  return enqueue(static_cast<Stream*>(s), [=] {
    std::vector<void*> pointers;
    for (auto& value : *values) pointers.push_back(value.data());
    const unsigned grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
    if (function->launch(function->name.c_str(), grid, block, shared, pointers.data(), thread_order()) == 0) return int(SUCCESS);
    failure = "kernel `" + function->name + "`: " + (function->error ? function->error() : "failed");
    return int(LAUNCH_FAILED);
  });
}
