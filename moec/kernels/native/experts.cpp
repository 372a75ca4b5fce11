// The experts of a MoE layer on CPU, forward and backward, for AVX-512 with bfloat16 dot products. Plain C at the border:
// Python fills a `Call` (call.h), asks how much scratch it takes, allocates that, and calls. Nothing is kept between calls.
//
// Which thread computes what is decided as they go, but each number is computed by one thread, in an order that follows from
// the routing alone: results are the same bits whatever the number of threads.

#include <algorithm>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace moec {
inline int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}
}  // namespace moec

#include "backward.h"
#include "forward.h"

#include <sys/mman.h>

namespace moec {

template <template <class> class Pass, class T>
long run(const Call& call, bool really) {
  Arena arena(really ? call.scratch : nullptr);
  Pass<T> pass(call, arena);
  if (really) pass.run();
  return arena.used();
}

template <template <class> class Pass>
long run(const Call& call, bool really) {
  switch (call.dtype) {
    case 0: return run<Pass, BFloat16>(call, really);
    case 1: return run<Pass, Float32>(call, really);
    default: return run<Pass, Float16>(call, really);
  }
}

}  // namespace moec

extern "C" {

int64_t moec_call_size() { return sizeof(moec::Call); }
int64_t moec_forward_scratch(const moec::Call* call) { return moec::run<moec::Forward>(*call, false); }
int64_t moec_backward_scratch(const moec::Call* call) { return moec::run<moec::Backward>(*call, false); }
void moec_forward(const moec::Call* call) { moec::run<moec::Forward>(*call, true); }
void moec_backward(const moec::Call* call) { moec::run<moec::Backward>(*call, true); }

// Fresh memory in pages of 2 MB: a gradient of 400 MB would otherwise take 100 000 page faults, more time than to compute it.
void moec_large_pages(void* at, int64_t bytes) {
  const uintptr_t page = 2 << 20, begin = ((uintptr_t)at + page - 1) / page * page, end = ((uintptr_t)at + bytes) / page * page;
  if (end > begin) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
}
}
