// What Python hands over, the experts' rows in it, and how work is divided.
//
// Shape letters as in moec/ops/reference.py: T tokens, K slots per row, S = T*K slots, E experts, D model width, F expert width.
// The only arguments are pointers and sizes; nothing here knows torch. `bindings.py` holds the same struct.
#pragma once

#include <atomic>
#include <cstddef>
#include <vector>

#include "activation.h"
#include "product.h"

namespace moec {

// Weights of E experts, [out, in] in the sense of F.linear, with strides in elements; a null pointer: not asked for.
struct Operand {
  void* const* at;
  int64_t out_stride, in_stride;
};

struct Call {
  int64_t dtype, activation, gated, interleaved;  // interleaved: columns of gate and up take turns in `pre`
  int64_t tokens, slots_per_row, experts, d_model, d_expert, threads;
  const int64_t *order, *offsets;
  const void *x, *scale;  // [T, D]; [S] or null
  int64_t scale_is_float;
  Operand gate, up, down;
  void *const *gate_bias, *const *up_bias, *const *down_bias;  // E pointers, or null
  int64_t bias_step;                                           // in gate_bias and up_bias, in elements
  void* pre;                                                   // [S, F] or [S, 2F]; forward: may be null
  void* out;                                                   // forward: [T, D]

  const void* grad;    // backward: [T, D]
  void* grad_x;        // [T, D] or null
  float* grad_scale;   // [S] or null
  Operand gate_grad, up_grad, down_grad;
  void *const *gate_bias_grad, *const *up_bias_grad, *const *down_bias_grad;
  char* scratch;
};

// Memory handed out in pieces of whole lines; with a null base it only counts.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}
  template <class P>
  P* take(long count) {
    P* at = (P*)(base_ + used_);
    used_ += ceil_div(count * long(sizeof(P)), 64) * 64;
    return at;
  }
  long used() const { return used_; }

 private:
  char* base_;
  long used_ = 0;
};

inline long expert_begin(const Call& c, long e) { return e ? c.offsets[e - 1] : 0; }
inline long expert_rows(const Call& c, long e) { return c.offsets[e] - expert_begin(c, e); }
inline long rows_in_all(const Call& c) { return c.experts ? c.offsets[c.experts - 1] : 0; }

template <class T>
Matrix<T> matrix(const Operand& w, long expert, long in) {
  return {{{(const typename T::Element*)w.at[expert], w.in_stride, w.out_stride, in}, {}}, 1};
}
// The same weight used the other way round: its outputs are summed over.
template <class T>
Matrix<T> adjoint(const Operand& w, long expert, long out) {
  return {{{(const typename T::Element*)w.at[expert], w.out_stride, w.in_stride, out}, {}}, 1};
}

// A share of the work: columns [begin, end) of tiles [first, last) of an expert.
struct Item {
  long expert, first, last, begin, end;
};

// All (expert, rows, columns) in pieces of which each thread gets about eight. What is computed does not depend on the pieces.
// `row_bytes`: of a row in tiles; those of one piece fit in half of the L2 cache, but weights are not packed for less than 192 rows.
inline std::vector<Item> divide(const Call& c, long columns, long row_bytes) {
  constexpr long CACHE = 512 << 10, LOADING = 24;  // loading weights costs as much as multiplying 24 rows
  auto cost = [&](long rows) { return rows > LOADING ? rows : LOADING; };
  long total = 0;
  for (long e = 0; e < c.experts; e++)
    if (long rows = expert_rows(c, e)) total += cost(rows) * columns;
  const long share = c.threads > 1 ? total / (8 * c.threads) : total;
  const long tiles_at_once = std::max(16L, CACHE / (row_bytes * TILE));
  std::vector<Item> items;
  for (long e = 0; e < c.experts; e++) {
    const long tiles = Tiling{expert_rows(c, e)}.count(), blocks = ceil_div(tiles, tiles_at_once);
    for (long b = 0; b < blocks; b++) {
      const long first = tiles * b / blocks, last = tiles * (b + 1) / blocks;
      long width = share / cost(expert_rows(c, e) / blocks) / PANEL * PANEL;
      width = width < PANEL ? PANEL : width;
      for (long begin = 0; begin < columns; begin += width)
        items.push_back({e, first, last, begin, begin + width < columns ? begin + width : columns});
    }
  }
  return items;
}

// Threads take the items in order.
class Queue {
 public:
  explicit Queue(long count) : count_(count) {}
  template <class Do>
  void drain(Do&& work) {
    for (long i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) work(i);
  }
  // The item this thread will probably take after the present one, to prefetch for it; null after the last.
  const Item* probably_next(const std::vector<Item>& items) const {
    const long i = next_.load(std::memory_order_relaxed);
    return i < count_ ? &items[i] : nullptr;
  }

 private:
  std::atomic<long> next_{0};
  const long count_;
};

// Rows of a tensor [*, width], chosen by token, as tiles.
template <class T>
void gather(Word* tiles, const void* from, long width, const int32_t* tokens, Tiling tiling, long first, long last) {
  const long lines = ceil_div(width, T::per_line);
  for (long tile = first; tile < last; tile++) {
    const long begin = tiling.begin(tile), size = tiling.size(tile);
    for (long r = 0; r < size; r++) {
      const auto* row = (const typename T::Element*)from + tokens[begin + r] * width;
      Word* to = tiles + r * 16;
      for (long k = 0; k < width; k += T::per_line, to += size * 16)
        _mm512_store_si512(to, width - k >= T::per_line ? T::full_line(row + k) : T::line(row + k, width - k, 1));
    }
    tiles += size * lines * 16;
  }
}

// What is the same for a row wherever it is used: its token, and its weight as float.
struct Rows {
  int32_t* token;  // by sorted position
  float* scale;
};

template <class T>
void read_rows(const Call& c, Rows rows) {
#pragma omp for schedule(static)
  for (long p = 0; p < rows_in_all(c); p++) {
    const int64_t slot = c.order[p];
    rows.token[p] = slot / c.slots_per_row;
    if (!c.scale) rows.scale[p] = 1.f;
    else if (c.scale_is_float) rows.scale[p] = ((const float*)c.scale)[slot];
    else rows.scale[p] = _mm512_cvtss_f32(load16((const typename T::Element*)c.scale + slot, 1));
  }
}

// How many columns of [T, columns] a thread sums at a time, in float.
inline long sum_width(const Call& c, long columns) {
  constexpr long CACHE = 4 << 20;
  long width = c.threads > 1 ? columns / (2 * c.threads) : columns;
  if (c.tokens > 0 && width * c.tokens * 4 > CACHE) width = CACHE / (4 * c.tokens);
  width = width / PANEL * PANEL;
  return width < 2 * PANEL ? 2 * PANEL : width;
}

// rows of all experts (`tiles`, `lines` each) times their weights, summed into tokens: out [T, columns].
// A thread owns columns and adds the experts in ascending order, so the sums never leave its cache and always round the same.
// each(position, 16 sums, column) may change what is added.
template <class T, class Weight, class Each>
void sum_to_tokens(const Call& c, Rows rows, const Word* tiles, long lines, Queue& queue, long columns, void* out, float* sums,
                   Word* panel, Weight&& weight, Each&& each) {
  const long width = sum_width(c, columns);
  queue.drain([&](long item) {
    const long first = item * width, last = first + width < columns ? first + width : columns;
    for (long i = 0; i < c.tokens * width; i += 16) _mm512_store_ps(sums + i, _mm512_setzero_ps());
    for (long e = 0; e < c.experts; e++) {
      const long begin = expert_begin(c, e);
      const Tiling tiling{expert_rows(c, e)};
      if (!tiling.rows) continue;
      const Matrix<T> w = weight(e);
      long following = e + 1;
      while (following < c.experts && !expert_rows(c, following)) following++;
      const Matrix<T> then = weight(following < c.experts ? following : e);
      for (long n = first; n < last; n += PANEL) {
        Ahead ahead;
        const bool more = n + PANEL < last;
        const Matrix<T>& next = more ? w : then;
        const long at = more ? n + PANEL : first;
        if (more || following < c.experts) {
          ahead.add(Columns<T>{&next, at, last - at});
          ahead.add(Columns<T>{&next, at + 16, last - at - 16});
        }
        auto add = [&](long tile, const float* products) {
          const long from = begin + tiling.begin(tile), size = tiling.size(tile);
          for (long r = 0; r < size; r++) {
            float* to = sums + rows.token[from + r] * width + n - first;
            for (long half = 0; half < PANEL; half += 16) {
              __m512 v = each(e, from + r, _mm512_load_ps(products + r * PANEL + half), n + half);
              _mm512_store_ps(to + half, _mm512_add_ps(_mm512_load_ps(to + half), v));
            }
          }
        };
        auto fetch = [&](long tile) {
          for (long r = begin + tiling.begin(tile); r < begin + tiling.begin(tile + 1); r++) {
            const float* to = sums + rows.token[r] * width + n - first;
            __builtin_prefetch(to, 1), __builtin_prefetch(to + 16, 1);
          }
        };
        product<T>(tiling, 0, tiling.count(), tiles + begin * lines * 16, lines, Columns<T>{&w, n, last - n},
                   Columns<T>{&w, n + 16, last - n - 16}, panel, ahead, add, fetch);
      }
    }
    for (long t = 0; t < c.tokens; t++)
      for (long n = first; n < last; n += 16)
        store16((typename T::Element*)out + t * columns + n, last - n, _mm512_load_ps(sums + t * width + n - first));
  });
}

}  // namespace moec
