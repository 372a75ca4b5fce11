// rows [R, K] times columns [K, 32], summed in float, for a few hundred rows of one expert: what everything here is made of.
//
// Rows come as *tiles* of up to 12: for each line of k, the line of each row: [lines][rows of the tile][16 words]. Columns are packed
// into a *panel*: for each word of k, 32 columns: [words][32]. A tile times a panel is 24 accumulators, 2 loads and 12 broadcasts
// a word. Packing costs about as much as five more rows would, so with few rows and columns that are contiguous along k
// the panel is left out: then each product is a dot product, and weights go from memory straight through the registers.
//
// While a panel is multiplied, the memory that the next one is packed from is prefetched; on two cores the weights of an expert
// with 20 rows take as long to arrive as to multiply.
#pragma once

#include "simd.h"

namespace moec {

constexpr long TILE = 12;   // rows
constexpr long PANEL = 32;  // columns
constexpr long LATER = 16;  // rows of k between reading and fetching
constexpr long FEW = 8;     // rows that are not worth a panel
constexpr long CHUNK = 16;  // lines that are summed in one go: long sums of float in parts, or they would err more than eager's

// R rows as nearly equal tiles.
struct Tiling {
  long rows;
  long count() const { return ceil_div(rows, TILE); }
  long begin(long tile) const { return rows * tile / count(); }
  long size(long tile) const { return begin(tile + 1) - begin(tile); }
};

// Where row `row` of a tile keeps the numbers from `column` on; 16 lie together if column is a multiple of 16.
template <class T>
typename T::Kept* cell(Word* tile, long rows, long row, long column) {
  return (typename T::Kept*)(tile + (column / T::per_line * rows + row) * 16) + column % T::per_line;
}

// A matrix [K, N] wherever it lies, in one part or two that follow each other along k, each filled up with zeros to whole lines.
// Of the two strides, in elements, one is 1 (or 2, in a matrix that holds the columns of gate and up by turns).
template <class T>
struct Matrix {
  struct Part {
    const typename T::Element* at;
    long k_stride, n_stride, k;
    long lines() const { return ceil_div(k, T::per_line); }
    bool along_k() const { return k_stride == 1 || (k_stride == 2 && n_stride != 1); }
  };
  Part part[2];
  int parts;
};

// Half a panel: 16 columns of a matrix from `column` on, `valid` of which exist.
template <class T>
struct Columns {
  const Matrix<T>* matrix;
  long column, valid;
  bool contiguous() const {
    for (int i = 0; i < matrix->parts; i++)
      if (matrix->part[i].k_stride != 1) return false;
    return true;
  }
};

// ---- prefetching

// What will be read next, to be fetched into L2 in equal steps.
class Ahead {
 public:
  template <class T>
  void add(const Columns<T>& columns) {
    for (int i = 0; i < columns.matrix->parts && columns.valid > 0; i++) {
      const auto& p = columns.matrix->part[i];
      const long size = sizeof(*p.at), n = columns.valid < 16 ? columns.valid : 16;
      const char* at = (const char*)(p.at + columns.column * p.n_stride);
      if (p.along_k()) add(at, n, p.k * p.k_stride * size, p.n_stride * size);
      else add(at, p.k, n * p.n_stride * size, p.k_stride * size);
    }
  }
  void spread(long steps) { quota_ = ceil_div(left_, steps > 0 ? steps : 1); }
  void step() {
    for (long n = quota_; n > 0 && run_ < count_;) {
      Run& r = runs_[run_];
      const long now = n < r.lines - line_ ? n : r.lines - line_;
      const char* at = r.at + line_ * 64;
      for (long i = 0; i < now; i++) _mm_prefetch(at + i * 64, _MM_HINT_T1);
      n -= now, line_ += now;
      if (line_ < r.lines) return;
      line_ = 0, r.at += r.stride;
      if (--r.rows == 0) run_++;
    }
  }

 private:
  struct Run {
    const char* at;
    long rows, lines, stride;
  };
  void add(const char* at, long rows, long bytes, long stride) {
    if (bytes == stride) bytes *= rows, rows = 1;
    runs_[count_++] = {at, rows, ceil_div(bytes, 64), stride};
    left_ += rows * ceil_div(bytes, 64);
  }
  Run runs_[4];
  int count_ = 0, run_ = 0;
  long line_ = 0, left_ = 0, quota_ = 0;
};

// ---- packing

// Columns contiguous along k: 16 columns x 16 words at a time are transposed.
template <class T>
void pack_along_k(Word* panel, const typename Matrix<T>::Part& p, const typename T::Element* at, long valid, Ahead& ahead) {
  for (long line = 0; line < p.lines(); line++, at += T::per_line * p.k_stride, panel += 16 * PANEL) {
    const long n = p.k - line * T::per_line;
    ahead.step();
    if (valid >= 16 && n >= T::per_line && p.k_stride == 1)
      transpose16(panel, PANEL, [&](int i) { return T::full_line(at + i * p.n_stride); });
    else
      transpose16(panel, PANEL, [&](int i) {
        return i < valid ? T::line(at + i * p.n_stride, n, p.k_stride) : _mm512_setzero_si512();
      });
  }
}

// Columns contiguous along n: rows of k are copied, by pairs where a word holds two.
template <class T>
void pack_along_n(Word* panel, const typename Matrix<T>::Part& p, const typename T::Element* at, long valid, Ahead& ahead) {
  for (long k = 0; k < p.lines() * T::per_line; k += T::per_word, panel += PANEL) {
    if (k % T::per_line == 0) ahead.step();
    const auto* row = at + k * p.k_stride;
    __m512i words = _mm512_setzero_si512();
    if (k < p.k && valid > 0) words = T::words(row, k + 1 < p.k ? row + p.k_stride : nullptr, valid, p.n_stride);
    _mm512_store_si512(panel, words);
  }
}

// The same for 32 columns that lie side by side, all of them there. Rows are far apart: no hardware guesses the next.
template <class T>
void pack_whole_along_n(Word* panel, const typename Matrix<T>::Part& p, long column, Ahead& ahead) {
  const auto* row = p.at + column;
  long k = 0;
  for (; k + T::per_word <= p.k; k += T::per_word, row += T::per_word * p.k_stride, panel += PANEL) {
    if (k % T::per_line == 0) ahead.step();
    for (long i = 0; i < T::per_word; i++) _mm_prefetch((const char*)(row + (LATER + i) * p.k_stride), _MM_HINT_T0);
    T::full_words(panel, row, row + p.k_stride);
  }
  for (; k < p.lines() * T::per_line; k += T::per_word, panel += PANEL)
    for (long half = 0; half < PANEL; half += 16)
      _mm512_store_si512(panel + half, k < p.k ? T::words(row + half, nullptr, 16, 1) : _mm512_setzero_si512());
}

template <class T>
void pack(Word* panel, const Columns<T>& left, const Columns<T>& right, Ahead& ahead) {
  const bool whole = left.matrix == right.matrix && right.column == left.column + 16 && right.valid >= 16;
  for (int i = 0; i < left.matrix->parts; i++) {
    const long words = left.matrix->part[i].lines() * 16;
    if (whole && !left.matrix->part[i].along_k() && left.matrix->part[i].n_stride == 1)
      pack_whole_along_n<T>(panel, left.matrix->part[i], left.column, ahead);
    else
      for (const Columns<T>* half : {&left, &right}) {
        const auto& p = half->matrix->part[i];
        const auto* at = p.at + half->column * p.n_stride;
        if (p.along_k()) pack_along_k<T>(panel + (half == &right) * 16, p, at, half->valid, ahead);
        else pack_along_n<T>(panel + (half == &right) * 16, p, at, half->valid, ahead);
      }
    panel += words * PANEL;
  }
}

// ---- multiplying

// sums [R][32]. Few rows have few accumulators; words then take turns between several sets, or each would wait for the last.
template <class T, int R>
void multiply(const Word* tile, const Word* panel, long lines, float* sums, Ahead& ahead) {
  constexpr int SETS = R == 1 ? 4 : R <= 3 ? 2 : 1;
  __m512 acc[SETS][R][2];
#pragma GCC unroll 64
  for (int i = 0; i < SETS * R * 2; i++) (&acc[0][0][0])[i] = _mm512_setzero_ps();
  for (long line = 0; line < lines; line++, tile += R * 16) {
    for (int w = 0; w < 16; w += 4, panel += 4 * PANEL) {
      ahead.step();
#pragma GCC unroll 4
      for (int s = 0; s < 4; s++) {
        __m512i b0 = _mm512_load_si512(panel + s * PANEL), b1 = _mm512_load_si512(panel + s * PANEL + 16);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
          __m512i a = _mm512_set1_epi32(tile[r * 16 + w + s]);
          acc[s % SETS][r][0] = T::dot(acc[s % SETS][r][0], a, b0);
          acc[s % SETS][r][1] = T::dot(acc[s % SETS][r][1], a, b1);
        }
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      __m512 total = acc[0][r][half];
#pragma GCC unroll 4
      for (int s = 1; s < SETS; s++) total = _mm512_add_ps(total, acc[s][r][half]);
      _mm512_store_ps(sums + r * PANEL + half * 16, total);
    }
  }
}

template <class T>
void multiply(long rows, const Word* tile, const Word* panel, long lines, float* sums, Ahead& ahead) {
  using Kernel = void (*)(const Word*, const Word*, long, float*, Ahead&);
  using W = typename T::Words;
  static constexpr Kernel kernels[TILE] = {
      multiply<W, 1>, multiply<W, 2>, multiply<W, 3>, multiply<W, 4>,  multiply<W, 5>,  multiply<W, 6>,
      multiply<W, 7>, multiply<W, 8>, multiply<W, 9>, multiply<W, 10>, multiply<W, 11>, multiply<W, 12>};
  kernels[rows - 1](tile, panel, lines < CHUNK ? lines : CHUNK, sums, ahead);
  alignas(64) float more[TILE * PANEL];
  for (long line = CHUNK; line < lines; line += CHUNK) {
    const long n = lines - line < CHUNK ? lines - line : CHUNK;
    kernels[rows - 1](tile + line * rows * 16, panel + line * 16 * PANEL, n, more, ahead);
    for (long i = 0; i < rows * PANEL; i += 16)
      _mm512_store_ps(sums + i, _mm512_add_ps(_mm512_load_ps(sums + i), _mm512_load_ps(more + i)));
  }
}

// The same for few rows and half a panel, read where it lies: some columns at a time, in memory order.
template <class T, int R>
void dots(const Word* tile, const Columns<T>& columns, float* out) {
  constexpr int C = R <= 6 ? 4 : 2;
  for (long n = 0; n < 16; n += C) {
    __m512 acc[R + 1][C];
#pragma GCC unroll 32
    for (int i = 0; i < (R + 1) * C; i++) (&acc[0][0])[i] = _mm512_setzero_ps();
    const Word* x = tile;
    for (int part = 0; part < columns.matrix->parts && n < columns.valid; part++) {
      const auto& p = columns.matrix->part[part];
      const typename T::Element* w[C];
      for (int i = 0; i < C; i++) {
        long column = n + i < columns.valid ? n + i : columns.valid - 1;
        w[i] = p.at + (columns.column + column) * p.n_stride;
      }
      // What comes about 8 KB later is fetched, into L2: with more misses than L1 can hold it would be half as fast.
      const long later = p.n_stride * C * ceil_div(8192, C * p.n_stride * long(sizeof(*w[0])));
      for (long k = 0; k < p.k; k += T::per_line, x += R * 16) {
        __m512i line[C];
#pragma GCC unroll 4
        for (int i = 0; i < C; i++) {
          _mm_prefetch((const char*)(w[i] + k + later), _MM_HINT_T1);
          line[i] = p.k - k >= T::per_line ? T::full_line(w[i] + k) : T::line(w[i] + k, p.k - k, 1);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
          const __m512i row = _mm512_load_si512(x + r * 16);
#pragma GCC unroll 4
          for (int i = 0; i < C; i++) acc[r][i] = T::dot(acc[r][i], row, line[i]);
        }
      }
    }
    const __mmask8 exist = first16(columns.valid - n) & ((1 << C) - 1);
    for (int r = 0; r < R; r += 4 / C) {
      const __m128 total = _mm_maskz_mov_ps(C == 4 ? exist : exist | exist << 2,
                                            C == 4 ? sums(acc[r][0], acc[r][1], acc[r][2], acc[r][3])
                                                   : sums(acc[r][0], acc[r][1], acc[r + 1][0], acc[r + 1][1]));
      if (C == 4) _mm_store_ps(out + r * PANEL + n, total);
      else {
        _mm_storel_pi((__m64*)(out + r * PANEL + n), total);
        if (r + 1 < R) _mm_storeh_pi((__m64*)(out + (r + 1) * PANEL + n), total);
      }
    }
  }
}

template <class T>
void dots(long rows, const Word* tile, const Columns<T>& columns, float* out) {
  using Kernel = void (*)(const Word*, const Columns<T>&, float*);
  static constexpr Kernel kernels[FEW] = {dots<T, 1>, dots<T, 2>, dots<T, 3>, dots<T, 4>,
                                          dots<T, 5>, dots<T, 6>, dots<T, 7>, dots<T, 8>};
  kernels[rows - 1](tile, columns, out);
}

struct Nothing {
  void operator()(long) const {}
};

// Tiles [first, last) of an expert's rows, beginning at `rows`, times two half panels. each(tile, sums [rows of the tile][32]);
// before(tile) comes before the multiplication, early enough to fetch what `each` will touch.
template <class T, class Each, class Before = Nothing>
void product(Tiling tiling, long first, long last, const Word* rows, long lines, const Columns<T>& left, const Columns<T>& right,
             Word* panel, Ahead& ahead, Each&& each, Before&& before = {}) {
  alignas(64) float sums[TILE * PANEL];
  if (tiling.rows <= FEW && left.contiguous() && right.contiguous()) {
    dots<T>(tiling.rows, rows, left, sums);
    dots<T>(tiling.rows, rows, right, sums + 16);
    each(0L, sums);
    return;
  }
  ahead.spread((last - first) * lines * 4 + lines * 2);
  pack(panel, left, right, ahead);
  for (long tile = first; tile < last; tile++) {
    const long size = tiling.size(tile);
    before(tile);
    multiply<T>(size, rows, panel, lines, sums, ahead);
    each(tile, sums);
    rows += size * lines * 16;
  }
}

}  // namespace moec
