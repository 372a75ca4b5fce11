// Gradients, from x, the pre-activations and the gradient of out; the output of the down projection is never needed:
//
//   1. g = grad W_down, row by row of the slots. Hidden rows are computed again from pre. <h, g> is the gradient of the slot's
//      weight; scale * g through the activation is the gradient of pre. Both it and scale * h are kept as tiles.
//   2. grad_x = (gradient of pre) W_up, added to tokens as in forward.
//   3. The gradients of weights: products summed over an expert's rows. Each is written once, past the caches.
//   4. Those of biases: sums over an expert's rows.
#pragma once

#include "call.h"

namespace moec {

// The rows of one expert, read 16 columns at a time to be summed over: rows of a tensor, chosen by token, or tiles.
template <class T>
struct Side {
  const typename T::Element* tensor;
  long width;
  const Word* tiles;
  long lines, first_column;  // in tiles

  static Side of(const void* tensor, long width) { return {(const typename T::Element*)tensor, width, nullptr, 0, 0}; }
  static Side of(const Word* tiles, long lines, long first_column, long width) {
    return {nullptr, width, tiles, lines, first_column};
  }
};

// Where the rows of the expert at hand lie in its tiles: in lines, relative to the first of all; and lines from one of its own to the next.
struct Place {
  int32_t row, tile_rows;
};

// 16 columns of all rows as words [rows / rows per word][16], `pitch` words apart.
template <class T>
void pack_rows(Word* to, long pitch, const Side<T>& side, const int32_t* tokens, const Place* places, long begin, long rows,
               long column) {
  const long n = side.width - column;
  auto in_tensor = [&](long r) { return side.tensor + tokens[r] * side.width + column; };
  auto in_tiles = [&](long r) {
    const long at = side.first_column + column, tile = (begin + r - places[r].row) * side.lines;
    const long line = tile + at / T::per_line * places[r].tile_rows + places[r].row;
    return (const typename T::Kept*)(side.tiles + line * 16) + at % T::per_line;
  };
  for (long r = 0; r < rows; r += T::per_word, to += pitch) {
    const bool pair = r + 1 < rows;
    __m512i words;
    if (n <= 0) words = _mm512_setzero_si512();
    else if (side.tensor) words = T::words(in_tensor(r), pair ? in_tensor(r + 1) : nullptr, n, 1);
    else words = T::words(in_tiles(r), pair ? in_tiles(r + 1) : nullptr, 16, 1);
    _mm512_store_si512(to, words);
  }
}

// 8 x 32 sums over `words` of left [words][16], of which 8 columns count, and right [words][32]. each(row, sums 0-15, sums 16-31).
template <class T, class Each>
[[gnu::always_inline]] inline void outer(const Word* left, const Word* right, long words, Each&& each) {
  __m512 acc[8][2];
  alignas(64) float kept[16 * 16];  // the sums of earlier chunks
  for (long w = 0;;) {
    const bool first = w == 0;
    const long end = words - w < CHUNK * 16 ? words : w + CHUNK * 16;
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) (&acc[0][0])[i] = _mm512_setzero_ps();
    for (; w < end; w++, left += 16, right += PANEL) {
      __m512i b0 = _mm512_load_si512(right), b1 = _mm512_load_si512(right + 16);
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) {
        __m512i a = _mm512_set1_epi32(left[i]);
        acc[i][0] = T::dot(acc[i][0], a, b0);
        acc[i][1] = T::dot(acc[i][1], a, b1);
      }
    }
    if (!first)
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) (&acc[0][0])[i] = _mm512_add_ps((&acc[0][0])[i], _mm512_load_ps(kept + i * 16));
    if (w >= words) break;
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) _mm512_store_ps(kept + i * 16, (&acc[0][0])[i]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) each(i, acc[i][0], acc[i][1]);
}

// Whole lines that nobody reads soon go around the caches.
inline void write32(float* p, __m512 a, __m512 b) { _mm512_stream_ps(p, a), _mm512_stream_ps(p + 16, b); }
inline void write32(bf16* p, __m512 a, __m512 b) { _mm512_stream_si512((__m512i*)p, (__m512i)_mm512_cvtne2ps_pbh(b, a)); }
inline void write32(fp16* p, __m512 a, __m512 b) {
  const __m256i low = _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT), high = _mm512_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT);
  _mm512_stream_si512((__m512i*)p, _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
}

// Adds many numbers, with what each addition loses (Kahan): an expert may have thousands of rows.
struct Sum {
  __m512 total = _mm512_setzero_ps(), lost = _mm512_setzero_ps();
  void add(__m512 v) {
    const __m512 next = _mm512_sub_ps(v, lost), sum = _mm512_add_ps(total, next);
    lost = _mm512_sub_ps(_mm512_sub_ps(sum, total), next);
    total = sum;
  }
};

template <class T>
struct Backward {
  using Element = typename T::Element;

  // out[e] [rows, columns] = left.T @ right; in `paired` the columns of two rights take turns.
  struct Job {
    Side<T> left, right, other;
    bool paired;
    void* const* out;
    long pitch;
  };
  struct JobItem {
    const Job* job;
    long expert, begin, end;
  };
  struct Lane {
    Word *tiles, *panel, *left, *right;
    float* sums;
    Place* places;
    long expert = -1, first = -1;
  };

  const Call& c;
  const long d_lines = ceil_div(c.d_model, T::per_line), f_lines = ceil_div(c.d_expert, T::per_line);
  const long pre_lines = c.gated ? 2 * f_lines : f_lines, up_column = c.gated ? f_lines * T::per_line : 0;
  const long f_panels = ceil_div(c.d_expert, PANEL);
  const std::vector<Item> items = divide(c, c.d_expert, d_lines * 64);
  static constexpr long RIGHT = 512 << 10;  // bytes of packed columns at a time
  Rows rows;
  Word *d_pre, *hidden;
  float* dots;
  std::vector<Lane> lanes;
  std::vector<Job> jobs;
  std::vector<JobItem> job_items;

  Backward(const Call& call, Arena& arena) : c(call), lanes(call.threads) {
    long block_rows = 0, most = 0;
    for (const Item& it : items) {
      const Tiling t{expert_rows(c, it.expert)};
      block_rows = std::max(block_rows, t.begin(it.last) - t.begin(it.first));
      most = std::max(most, t.rows);
    }
    const long total = rows_in_all(c), words = ceil_div(most, T::per_word);
    rows = {arena.take<int32_t>(total), arena.take<float>(total)};
    d_pre = arena.take<Word>(total * pre_lines * 16);
    hidden = arena.take<Word>(total * f_lines * 16);
    dots = arena.take<float>(total * f_panels);
    for (Lane& lane : lanes) {
      lane.tiles = arena.take<Word>(block_rows * d_lines * 16);
      lane.panel = arena.take<Word>(std::max(d_lines, pre_lines) * 16 * PANEL);
      lane.left = arena.take<Word>(words * 16);
      lane.right = arena.take<Word>(words * right_columns(words));
      lane.sums = arena.take<float>(c.tokens * sum_width(c, c.d_model));
      lane.places = arena.take<Place>(most);
    }
  }

  static long right_columns(long words) {
    const long columns = RIGHT / (words > 0 ? 4 * words : 4) / PANEL * PANEL;
    return columns < PANEL ? PANEL : columns > 4096 ? 4096 : columns;
  }

  void run() {
    list_jobs();
    Queue first(items.size()), second(c.grad_x ? ceil_div(c.d_model, sum_width(c, c.d_model)) : 0);
    Queue third(job_items.size()), fourth(c.experts), slots(ceil_div(rows_in_all(c), 64));
#pragma omp parallel num_threads(c.threads)
    {
      Lane& lane = lanes[thread_number()];
      read_rows<T>(c, rows);
      first.drain([&](long i) { differentiate(lane, items[i], first); });
#pragma omp barrier
      if (c.grad_scale) slots.drain([&](long i) { weigh(64 * i); });
      sum_to_tokens<T>(
          c, rows, d_pre, pre_lines, second, c.d_model, c.grad_x, lane.sums, lane.panel,
          [&](long e) {
            Matrix<T> up = adjoint<T>(c.up, e, c.d_expert);
            if (!c.gated) return up;
            Matrix<T> gate = adjoint<T>(c.gate, e, c.d_expert);
            return Matrix<T>{{gate.part[0], up.part[0]}, 2};
          },
          [](long, long, __m512 v, long) { return v; });
      third.drain([&](long i) { multiply_rows(lane, job_items[i]); });
      fourth.drain([&](long e) { sum_biases(e); });
      _mm_sfence();
    }
  }

  // ---- 1

  void differentiate(Lane& lane, const Item& it, const Queue& queue) {
    const long begin = expert_begin(c, it.expert);
    const Tiling tiling{expert_rows(c, it.expert)};
    if (lane.expert != it.expert || lane.first != it.first)
      gather<T>(lane.tiles, c.grad, c.d_model, rows.token + begin, tiling, it.first, it.last);
    lane.expert = it.expert, lane.first = it.first;
    const Matrix<T> down = adjoint<T>(c.down, it.expert, c.d_model);
    for (long f = it.begin; f < it.end; f += PANEL) {
      const bool more = f + PANEL < it.end;
      const Item* then = more ? nullptr : queue.probably_next(items);
      const Matrix<T> next = !then ? down : adjoint<T>(c.down, then->expert, c.d_model);
      Ahead ahead;
      if (more || then) {
        const long at = more ? f + PANEL : then->begin;
        ahead.add(Columns<T>{&next, at, c.d_expert - at});
        ahead.add(Columns<T>{&next, at + 16, c.d_expert - at - 16});
      }
      product<T>(tiling, it.first, it.last, lane.tiles, d_lines, Columns<T>{&down, f, c.d_expert - f},
                 Columns<T>{&down, f + 16, c.d_expert - f - 16}, lane.panel, ahead, [&](long tile, const float* g) {
                   const long from = begin + tiling.begin(tile), size = tiling.size(tile);
                   for (long r = 0; r < size; r++, g += PANEL) {
                     __m512 dot = keep_row(from, size, r, f, _mm512_load_ps(g));
                     if (f + 16 < f_lines * T::per_line)
                       dot = _mm512_add_ps(dot, keep_row(from, size, r, f + 16, _mm512_load_ps(g + 16)));
                     dots[(from + r) * f_panels + f / PANEL] = _mm512_reduce_add_ps(dot);
                   }
                 });
    }
  }

  // 16 columns of row r of the tile whose first row is `from`; returns h * g.
  __m512 keep_row(long from, long size, long r, long f, __m512 g) {
    const long n = c.d_expert - f, p = from + r;
    const Activation kind = Activation(c.activation);
    __m512 gate, up;
    read_pre(p, f, n, gate, up);
    const __m512 act = activate(kind, gate), h = c.gated ? _mm512_mul_ps(act, up) : act;
    const __m512 dh = _mm512_mul_ps(all(rows.scale[p]), g);
    const __m512 d_gate = gradient(kind, c.gated ? _mm512_mul_ps(dh, up) : dh, gate);
    Word* to = d_pre + from * pre_lines * 16;
    T::keep(cell<T>(to, size, r, f), d_gate);
    if (c.gated) T::keep(cell<T>(to, size, r, up_column + f), _mm512_mul_ps(dh, act));
    T::keep(cell<T>(hidden + from * f_lines * 16, size, r, f), _mm512_mul_ps(all(rows.scale[p]), h));
    return _mm512_mul_ps(h, g);
  }

  void read_pre(long p, long f, long n, __m512& gate, __m512& up) const {
    const Element* pre = (const Element*)c.pre + p * (c.gated ? 2 : 1) * c.d_expert;
    if (!c.gated) gate = up = load16(pre + f, n);
    else if (c.interleaved) gate = load16(pre + 2 * f, n, 2), up = load16(pre + 2 * f + 1, n, 2);
    else gate = load16(pre + f, n), up = load16(pre + c.d_expert + f, n);
  }

  // ---- 2

  void weigh(long begin) {
    for (long p = begin; p < begin + 64 && p < rows_in_all(c); p++) {
      float sum = 0;
      for (long i = 0; i < f_panels; i++) sum += dots[p * f_panels + i];
      c.grad_scale[c.order[p]] = sum;
    }
    if (!c.down_bias) return;
    long e = 0;
    for (long p = begin; p < begin + 64 && p < rows_in_all(c); p++) {
      while (c.offsets[e] <= p) e++;
      const Element *bias = (const Element*)c.down_bias[e], *grad = (const Element*)c.grad + rows.token[p] * c.d_model;
      __m512 dot = _mm512_setzero_ps();
      for (long d = 0; d < c.d_model; d += 16)
        dot = _mm512_fmadd_ps(load16(bias + d, c.d_model - d), load16(grad + d, c.d_model - d), dot);
      c.grad_scale[c.order[p]] += _mm512_reduce_add_ps(dot);
    }
  }

  // ---- 3

  void list_jobs() {
    const Side<T> x = Side<T>::of(c.x, c.d_model), grad = Side<T>::of(c.grad, c.d_model);
    const Side<T> gate = Side<T>::of(d_pre, pre_lines, 0, c.d_expert), up = Side<T>::of(d_pre, pre_lines, up_column, c.d_expert);
    add_job(c.up_grad, up, x, gate);
    if (!take_turns()) add_job(c.gate_grad, gate, x, gate);
    add_job(c.down_grad, grad, Side<T>::of(hidden, f_lines, 0, c.d_expert), gate);
    long total = 0;
    for (const Job& job : jobs)
      for (long e = 0; e < c.experts; e++) total += cost(job, e) * job.left.width;
    const long share = c.threads > 1 ? total / (8 * c.threads) : total;
    for (const Job& job : jobs)
      for (long e = 0; e < c.experts; e++) {
        if (!job.out[e]) continue;
        const long width = std::max(16L, share / cost(job, e) / 16 * 16);
        for (long begin = 0; begin < job.left.width; begin += width)
          job_items.push_back({&job, e, begin, std::min(begin + width, job.left.width)});
      }
  }

  long cost(const Job& job, long e) const {
    return job.out[e] ? (expert_rows(c, e) + 32) * job.right.width * (job.paired ? 2 : 1) : 0;
  }

  // `outputs` [S, out] and `inputs` [S, in] of a linear layer. If its weight lies transposed, they change places.
  void add_job(const Operand& to, const Side<T>& outputs, const Side<T>& inputs, const Side<T>& gate) {
    if (!to.at) return;
    if (&to == &c.up_grad && take_turns()) jobs.push_back({inputs, gate, outputs, true, c.gate_grad.at, to.in_stride});
    else if (to.in_stride == 1) jobs.push_back({outputs, inputs, inputs, false, to.at, to.out_stride});
    else jobs.push_back({inputs, outputs, outputs, false, to.at, to.in_stride});
  }

  // In a weight [D, 2F], columns of gate and up may take turns.
  bool take_turns() const { return c.interleaved && c.up_grad.in_stride != 1; }

  void multiply_rows(Lane& lane, const JobItem& it) {
    const Job& job = *it.job;
    const long begin = expert_begin(c, it.expert), n = expert_rows(c, it.expert), words = ceil_div(n, T::per_word);
    const long each = job.paired ? 16 : PANEL, at_once = right_columns(words) / PANEL * each;
    const int32_t* tokens = rows.token + begin;
    Tiling tiling{n};
    for (long tile = 0; n && tile < tiling.count(); tile++)
      for (long r = tiling.begin(tile); r < tiling.begin(tile + 1); r++)
        lane.places[r] = {int32_t(r - tiling.begin(tile)), int32_t(tiling.size(tile))};
    for (long from = 0; from < job.right.width; from += at_once) {
      const long to = std::min(from + at_once, job.right.width);
      Word* panel = lane.right;
      for (long j = from; j < to; j += each, panel += words * PANEL) {
        pack_rows<T>(panel, PANEL, job.right, tokens, lane.places, begin, n, j);
        pack_rows<T>(panel + 16, PANEL, job.other, tokens, lane.places, begin, n, job.paired ? j : j + 16);
      }
      for (long i = it.begin; i < it.end; i += 16) {
        pack_rows<T>(lane.left, 16, job.left, tokens, lane.places, begin, n, i);
        for (long j = from; j < to; j += each)
          for (long half = 0; half < 16 && i + half < it.end; half += 8)
            write(it, i + half, j, lane.left + half, lane.right + (j - from) / each * words * PANEL, words);
      }
    }
  }

  void write(const JobItem& it, long i, long j, const Word* left, const Word* right, long words) {
    const Job& job = *it.job;
    const long n = job.right.width - j, pitch = job.pitch, left_over = it.end - i;
    Element* to = (Element*)job.out[it.expert] + i * pitch + (job.paired ? 2 * j : j);
    if (job.paired)
      outer<T>(left, right, words, [&](long r, __m512 a, __m512 b) {
        if (r < left_over) store_pairs(to + r * pitch, n < 16 ? n : 16, a, b);
      });
    else if (n >= PANEL && left_over >= 8 && ((uintptr_t)to | pitch * sizeof(Element)) % 64 == 0)
      outer<T>(left, right, words, [&](long r, __m512 a, __m512 b) { write32(to + r * pitch, a, b); });
    else
      outer<T>(left, right, words, [&](long r, __m512 a, __m512 b) {
        if (r < left_over) store16(to + r * pitch, n, a), store16(to + r * pitch + 16, n - 16, b);
      });
  }

  // ---- 4

  void sum_biases(long e) {
    if (c.gate_bias_grad && c.gate_bias_grad[e]) sum_tiles(e, 0, (Element*)c.gate_bias_grad[e]);
    if (c.up_bias_grad && c.up_bias_grad[e]) sum_tiles(e, up_column, (Element*)c.up_bias_grad[e]);
    if (!c.down_bias_grad || !c.down_bias_grad[e]) return;
    const long begin = expert_begin(c, e), end = begin + expert_rows(c, e);
    for (long d = 0; d < c.d_model; d += 16) {
      Sum sum;
      for (long p = begin; p < end; p++) {
        __m512 grad = load16((const Element*)c.grad + rows.token[p] * c.d_model + d, c.d_model - d);
        sum.add(_mm512_mul_ps(all(rows.scale[p]), grad));
      }
      store16((Element*)c.down_bias_grad[e] + d, c.d_model - d, sum.total);
    }
  }

  void sum_tiles(long e, long first_column, Element* to) {
    const long begin = expert_begin(c, e);
    const Tiling tiling{expert_rows(c, e)};
    for (long f = 0; f < c.d_expert; f += 16) {
      Sum sum;
      for (long tile = 0; tile < tiling.count(); tile++) {
        const long size = tiling.size(tile);
        Word* at = d_pre + (begin + tiling.begin(tile)) * pre_lines * 16;
        for (long r = 0; r < size; r++) sum.add(load16(cell<T>(at, size, r, first_column + f), 16));
      }
      Element rounded[16];
      store16(rounded, 16, sum.total);
      for (long i = 0; i < 16 && f + i < c.d_expert; i++) to[(f + i) * c.bias_step] = rounded[i];
    }
  }
};

}  // namespace moec
