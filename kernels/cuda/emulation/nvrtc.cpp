// A stand-in for NVRTC: compiles kernels for the CPU with g++ and emulation.hpp. The "machine code" is a shared library that the
// stand-in driver (driver.cpp) loads.
//
// g++ -std=c++17 -O2 -fPIC -shared -Wl,-soname,libnvrtc.so.13 -DEMULATION_FOLDER='"…/kernels/cuda/emulation"' nvrtc.cpp -o libnvrtc.so
#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#define API extern "C" __attribute__((visibility("default"))) int

namespace {

enum Result { SUCCESS = 0, INVALID_INPUT = 3, COMPILATION = 6 };

struct Program {
  std::string name, text, log, image;
  std::vector<std::pair<std::string, std::string>> headers;
};

std::string read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

void write(const std::string& path, const std::string& text) { std::ofstream(path, std::ios::binary) << text; }

// The names of the kernels in preprocessed text, where __global__ has become `emulated_kernel`.
std::vector<std::string> kernels(const std::string& text) {
  std::vector<std::string> names;
  const std::string mark = "emulated_kernel";
  for (size_t at = text.find(mark); at != std::string::npos; at = text.find(mark, at + 1)) {
    size_t end = text.find('(', at);
    if (end == std::string::npos) break;
    while (end > at && isspace((unsigned char)text[end - 1])) --end;
    size_t begin = end;
    while (begin > at && (isalnum((unsigned char)text[begin - 1]) || text[begin - 1] == '_')) --begin;
    names.push_back(text.substr(begin, end - begin));
  }
  return names;
}

}  // namespace

API nvrtcVersion(int* major, int* minor) { *major = 13, *minor = 0; return SUCCESS; }
extern "C" __attribute__((visibility("default"))) const char* nvrtcGetErrorString(int) { return "compilation failed"; }

API nvrtcCreateProgram(void** program, const char* text, const char* name, int n, const char* const* headers, const char* const* names) {
  Program* p = new Program;
  p->text = text;
  p->name = name ? name : "kernel.cu";
  for (int i = 0; i < n; ++i) p->headers.emplace_back(names[i], headers[i]);
  *program = p;
  return SUCCESS;
}

API nvrtcCompileProgram(void* program, int n, const char* const* options) {
  Program* p = static_cast<Program*>(program);
  char folder[] = "/tmp/emulation-XXXXXX";
  if (!mkdtemp(folder)) return INVALID_INPUT;
  const std::string base = std::string(folder) + "/";
  write(base + p->name, p->text);
  for (auto& [name, text] : p->headers) write(base + name, text);
  std::string flags = "-std=c++17 -O1 -fPIC -fno-strict-aliasing -w -x c++ -I'" EMULATION_FOLDER "' -I" + base;
  if (const char* more = getenv("EMULATION_FLAGS")) flags += std::string(" ") + more;
  for (int i = 0; i < n; ++i)
    if (strncmp(options[i], "-D", 2) == 0) flags += " '" + std::string(options[i]) + "'";
  auto run = [&](const std::string& command) { return system((command + " 2>>" + base + "log").c_str()) == 0; };
  // once to find the kernels' names under these definitions, once to compile
  write(base + "names.cpp", "#include \"emulation.hpp\"\n#undef __global__\n#define __global__ emulated_kernel\n#include \"" + p->name + "\"\n");
  bool done = run("g++ -E -P " + flags + " " + base + "names.cpp -o " + base + "names.txt");
  if (done) {
    std::string text = "#include \"emulation.hpp\"\n#include \"" + p->name + "\"\n";
    for (const std::string& name : kernels(read(base + "names.txt"))) text += "EMU_KERNEL(" + name + ");\n";
    write(base + "all.cpp", text);
    done = run("g++ " + flags + " -shared " + base + "all.cpp -o " + base + "image.so");
  }
  p->image = read(base + "image.so");
  p->log = read(base + "log");
  // messages name files as the caller does
  for (size_t at; (at = p->log.find(base)) != std::string::npos;) p->log.erase(at, base.size());
  system(("rm -r " + std::string(folder)).c_str());
  return done ? SUCCESS : COMPILATION;
}

API nvrtcGetProgramLogSize(void* program, size_t* n) { *n = static_cast<Program*>(program)->log.size() + 1; return SUCCESS; }
API nvrtcGetProgramLog(void* program, char* to) { strcpy(to, static_cast<Program*>(program)->log.c_str()); return SUCCESS; }
API nvrtcGetCUBINSize(void* program, size_t* n) { *n = static_cast<Program*>(program)->image.size(); return SUCCESS; }
API nvrtcGetCUBIN(void* program, char* to) {
  const std::string& image = static_cast<Program*>(program)->image;
  memcpy(to, image.data(), image.size());
  return SUCCESS;
}
API nvrtcDestroyProgram(void** program) { delete static_cast<Program*>(*program); *program = nullptr; return SUCCESS; }
