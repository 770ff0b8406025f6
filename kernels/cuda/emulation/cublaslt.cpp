// A stand-in for cuBLASLt: column-major products of f32 with the bias epilogue, in a stream's order.
//
// g++ -std=c++17 -O2 -fPIC -shared -Wl,-soname,libcublasLt.so.13 cublaslt.cpp -L. -l:libcuda.so -o libcublasLt.so
#include <cstdint>
#include <cstring>
#include <vector>

#define API extern "C" __attribute__((visibility("default"))) int

extern "C" int emulation_enqueue(void* stream, void (*run)(void*), void* data, void (*drop)(void*));
extern "C" int emulation_inside(const void* p, size_t n);

namespace {

enum Status { SUCCESS = 0, INVALID_VALUE = 7, NOT_SUPPORTED = 15 };
enum Type { F32 = 0, BF16 = 14 };

struct Layout {
  int type;
  uint64_t rows, cols;
  int64_t step;
  int batches = 1;
  int64_t offset = 0;

  // Elements from the first to one past the last.
  size_t span() const { return (batches - 1) * offset + (cols - 1) * step + rows; }
  size_t bytes() const { return span() * (type == F32 ? 4 : 2); }
};

struct Description {
  int transpose_a = 0, transpose_b = 0, epilogue = 1;
  const void* bias = nullptr;
};

struct Preference {
  size_t workspace = 0;
  uint32_t alignment[4] = {256, 256, 256, 256};
};

// What a search found: the alignment that it counts on.
struct Algorithm {
  uint64_t mark, alignment[4];
};
constexpr uint64_t FOUND = 0x656d756c61746564;

float get(const void* p, int type, size_t i) {
  if (type == F32) return static_cast<const float*>(p)[i];
  const uint32_t bits = uint32_t(static_cast<const uint16_t*>(p)[i]) << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

void set(void* p, int type, size_t i, float x) {
  if (type == F32) {
    static_cast<float*>(p)[i] = x;
    return;
  }
  uint32_t bits;
  memcpy(&bits, &x, 4);
  static_cast<uint16_t*>(p)[i] = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

struct Product {
  Description description;
  float alpha, beta;
  Layout la, lb, lc, ld;
  const void *a, *b, *c;
  void* d;

  void run() const {
    const size_t m = ld.rows, n = ld.cols, k = description.transpose_a ? la.rows : la.cols;
    std::vector<float> column(k);
    for (int batch = 0; batch < ld.batches; ++batch)
      for (size_t j = 0; j < n; ++j) {
        for (size_t l = 0; l < k; ++l)
          column[l] = get(b, lb.type, batch * lb.offset + (description.transpose_b ? l * lb.step + j : j * lb.step + l));
        for (size_t i = 0; i < m; ++i) {
          double sum = 0;
          const size_t from = batch * la.offset + (description.transpose_a ? i * la.step : i), by = description.transpose_a ? 1 : la.step;
          for (size_t l = 0; l < k; ++l) sum += double(get(a, la.type, from + l * by)) * column[l];
          sum *= alpha;
          if (beta != 0) sum += beta * get(c, lc.type, batch * lc.offset + j * lc.step + i);
          if (description.epilogue == 4) sum += get(description.bias, ld.type, i);
          set(d, ld.type, batch * ld.offset + j * ld.step + i, float(sum));
        }
      }
  }
};

bool fits(const Description& description, const Layout& a, const Layout& b, const Layout& c, const Layout& d) {
  const auto rows = [](const Layout& l, int t) { return t ? l.cols : l.rows; };
  const auto cols = [](const Layout& l, int t) { return t ? l.rows : l.cols; };
  for (const Layout* l : {&a, &b, &c, &d})
    if (l->rows == 0 || l->cols == 0 || l->step < (int64_t)l->rows || l->batches != d.batches) return false;
  return rows(a, description.transpose_a) == d.rows && cols(b, description.transpose_b) == d.cols &&
         cols(a, description.transpose_a) == rows(b, description.transpose_b) && c.rows == d.rows && c.cols == d.cols;
}

}  // namespace

API cublasLtCreate(void** handle) { *handle = new int; return SUCCESS; }
API cublasLtDestroy(void* handle) { delete static_cast<int*>(handle); return SUCCESS; }
API cublasLtMatrixLayoutCreate(void** layout, int type, uint64_t rows, uint64_t cols, int64_t step) {
  *layout = new Layout{type, rows, cols, step};
  return SUCCESS;
}
API cublasLtMatrixLayoutSetAttribute(void* layout, int attribute, const void* value, size_t) {
  Layout* l = static_cast<Layout*>(layout);
  if (attribute == 5) memcpy(&l->batches, value, 4);
  else if (attribute == 6) memcpy(&l->offset, value, 8);
  else return NOT_SUPPORTED;
  return SUCCESS;
}
API cublasLtMatrixLayoutDestroy(void* layout) { delete static_cast<Layout*>(layout); return SUCCESS; }
API cublasLtMatmulDescCreate(void** description, int, int) { *description = new Description; return SUCCESS; }
API cublasLtMatmulDescSetAttribute(void* description, int attribute, const void* value, size_t) {
  Description* d = static_cast<Description*>(description);
  switch (attribute) {
    case 3: memcpy(&d->transpose_a, value, 4); return SUCCESS;
    case 4: memcpy(&d->transpose_b, value, 4); return SUCCESS;
    case 7: memcpy(&d->epilogue, value, 4); return d->epilogue == 1 || d->epilogue == 4 ? SUCCESS : NOT_SUPPORTED;
    case 8: memcpy(&d->bias, value, 8); return SUCCESS;
    default: return NOT_SUPPORTED;
  }
}
API cublasLtMatmulDescDestroy(void* description) { delete static_cast<Description*>(description); return SUCCESS; }
API cublasLtMatmulPreferenceCreate(void** preference) { *preference = new Preference; return SUCCESS; }
API cublasLtMatmulPreferenceSetAttribute(void* preference, int attribute, const void* value, size_t) {
  Preference* p = static_cast<Preference*>(preference);
  if (attribute == 1) memcpy(&p->workspace, value, 8);
  else if (attribute >= 5 && attribute <= 8) memcpy(&p->alignment[attribute - 5], value, 4);
  else return NOT_SUPPORTED;
  return SUCCESS;
}
API cublasLtMatmulPreferenceDestroy(void* preference) { delete static_cast<Preference*>(preference); return SUCCESS; }

struct Found {
  uint64_t algorithm[8];
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};

API cublasLtMatmulAlgoGetHeuristic(void*, void* description, void* a, void* b, void* c, void* d, void* preference, int, Found* found, int* n) {
  *n = 0;
  if (!fits(*static_cast<Description*>(description), *static_cast<Layout*>(a), *static_cast<Layout*>(b), *static_cast<Layout*>(c), *static_cast<Layout*>(d)))
    return INVALID_VALUE;
  *found = Found{};
  found->algorithm[0] = FOUND;
  for (int i = 0; i < 4; ++i) found->algorithm[1 + i] = static_cast<Preference*>(preference)->alignment[i];
  *n = 1;
  return SUCCESS;
}

API cublasLtMatmul(void*, void* description, const void* alpha, const void* a, void* la, const void* b, void* lb, const void* beta, const void* c, void* lc, void* d, void* ld, const uint64_t* algorithm, void*, size_t, void* stream) {
  Product* p = new Product{*static_cast<Description*>(description), *static_cast<const float*>(alpha), *static_cast<const float*>(beta), *static_cast<Layout*>(la), *static_cast<Layout*>(lb), *static_cast<Layout*>(lc), *static_cast<Layout*>(ld), a, b, c, d};
  bool fine = fits(p->description, p->la, p->lb, p->lc, p->ld) && algorithm && algorithm[0] == FOUND;
  const void* pointers[4] = {a, b, c, d};
  const Layout* layouts[4] = {&p->la, &p->lb, &p->lc, &p->ld};
  for (int i = 0; fine && i < 4; ++i)
    fine = uintptr_t(pointers[i]) % algorithm[1 + i] == 0 && emulation_inside(pointers[i], layouts[i]->bytes());
  if (!fine) {
    delete p;
    return INVALID_VALUE;
  }
  return emulation_enqueue(
      stream, [](void* data) { static_cast<Product*>(data)->run(); }, p, [](void* data) { delete static_cast<Product*>(data); });
}
