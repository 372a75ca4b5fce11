// out[t] = sum over the slots of t of scale * (act(x W_gate) * (x W_up)) W_down, in two phases of one parallel region:
//
//   1. for each expert, its rows gathered into tiles: gate and up side by side in one panel, the activation on the sums, and the
//      hidden rows kept as tiles, which is what the next product reads;
//   2. hidden rows times W_down, added to tokens (sum_to_tokens). No [S, D] tensor of products ever exists.
#pragma once

#include "call.h"

namespace moec {

template <class T>
struct Forward {
  using Element = typename T::Element;
  const Call& c;
  const long d_lines = ceil_div(c.d_model, T::per_line), f_lines = ceil_div(c.d_expert, T::per_line);
  const std::vector<Item> items = divide(c, c.d_expert, d_lines * 64);
  long block_rows = 0;
  Rows rows;
  Word* hidden;

  struct Lane {  // what one thread has for itself
    Word *tiles, *panel;
    float* sums;
    long expert = -1, first = -1;  // whose rows `tiles` holds
  };
  std::vector<Lane> lanes;

  Forward(const Call& call, Arena& arena) : c(call), lanes(call.threads) {
    for (const Item& it : items) {
      const Tiling t{expert_rows(c, it.expert)};
      block_rows = std::max(block_rows, t.begin(it.last) - t.begin(it.first));
    }
    rows = {arena.take<int32_t>(rows_in_all(c)), arena.take<float>(rows_in_all(c))};
    hidden = arena.take<Word>(rows_in_all(c) * f_lines * 16);
    for (Lane& lane : lanes) {
      lane.tiles = arena.take<Word>(block_rows * d_lines * 16);
      lane.panel = arena.take<Word>(std::max(d_lines, f_lines) * 16 * PANEL);
      lane.sums = arena.take<float>(c.tokens * sum_width(c, c.d_model));
    }
  }

  void run() {
    Queue first(items.size()), second(ceil_div(c.d_model, sum_width(c, c.d_model)));
#pragma omp parallel num_threads(c.threads)
    {
      Lane& lane = lanes[thread_number()];
      read_rows<T>(c, rows);
      first.drain([&](long i) { hide(lane, items[i], first); });
#pragma omp barrier
      sum_to_tokens<T>(
          c, rows, hidden, f_lines, second, c.d_model, c.out, lane.sums, lane.panel,
          [&](long e) { return matrix<T>(c.down, e, c.d_expert); },
          [&](long e, long p, __m512 y, long d) {
            if (c.down_bias) y = _mm512_add_ps(y, load16((const Element*)c.down_bias[e] + d, c.d_model - d));
            return _mm512_mul_ps(y, all(rows.scale[p]));
          });
    }
  }

  // A panel is 16 columns of gate and of up, or 32 of up alone.
  long step() const { return c.gated ? 16 : PANEL; }
  Columns<T> left(const Matrix<T>& gate, const Matrix<T>& up, long f) const {
    return {c.gated ? &gate : &up, f, c.d_expert - f};
  }
  Columns<T> right(const Matrix<T>& up, long f) const {
    return c.gated ? Columns<T>{&up, f, c.d_expert - f} : Columns<T>{&up, f + 16, c.d_expert - f - 16};
  }

  void hide(Lane& lane, const Item& it, const Queue& queue) {
    const long begin = expert_begin(c, it.expert);
    const Tiling tiling{expert_rows(c, it.expert)};
    if (lane.expert != it.expert || lane.first != it.first)
      gather<T>(lane.tiles, c.x, c.d_model, rows.token + begin, tiling, it.first, it.last);
    lane.expert = it.expert, lane.first = it.first;
    const Matrix<T> up = matrix<T>(c.up, it.expert, c.d_model), gate = c.gated ? matrix<T>(c.gate, it.expert, c.d_model) : up;
    const long end = it.end == c.d_expert ? f_lines * T::per_line : it.end;  // hidden lines are filled up with zeros
    for (long f = it.begin; f < end; f += step()) {
      const bool more = f + step() < end;
      const Item* then = more ? nullptr : queue.probably_next(items);
      const Matrix<T> next_up = !then ? up : matrix<T>(c.up, then->expert, c.d_model);
      const Matrix<T> next_gate = !then ? gate : c.gated ? matrix<T>(c.gate, then->expert, c.d_model) : next_up;
      Ahead ahead;
      if (more || then) {
        ahead.add(left(next_gate, next_up, more ? f + step() : then->begin));
        ahead.add(right(next_up, more ? f + step() : then->begin));
      }
      product<T>(tiling, it.first, it.last, lane.tiles, d_lines, left(gate, up, f), right(up, f), lane.panel, ahead,
                 [&](long tile, const float* sums) { keep_tile(it.expert, begin, tiling, tile, sums, f); });
    }
  }

  void keep_tile(long e, long begin, Tiling tiling, long tile, const float* sums, long f) {
    const long from = begin + tiling.begin(tile), size = tiling.size(tile);
    Word* to = hidden + from * f_lines * 16;
    for (long r = 0; r < size; r++, sums += PANEL) {
      __m512 a = _mm512_load_ps(sums), b = _mm512_load_ps(sums + 16);
      if (c.gated) keep_gated(e, from + r, cell<T>(to, size, r, f), a, b, f);
      else {
        keep_plain(e, from + r, cell<T>(to, size, r, f), a, f);
        if (f + 16 < f_lines * T::per_line) keep_plain(e, from + r, cell<T>(to, size, r, f + 16), b, f + 16);
      }
    }
  }

  void keep_gated(long e, long p, typename T::Kept* to, __m512 gate, __m512 up, long f) {
    const long n = c.d_expert - f, step = c.bias_step;
    if (c.gate_bias) {
      gate = _mm512_add_ps(gate, load16((const Element*)c.gate_bias[e] + f * step, n, step));
      up = _mm512_add_ps(up, load16((const Element*)c.up_bias[e] + f * step, n, step));
    }
    if (c.pre && n > 0) {
      Element* pre = (Element*)c.pre + p * 2 * c.d_expert;
      if (c.interleaved) store_pairs(pre + 2 * f, n < 16 ? n : 16, gate, up);
      else store16(pre + f, n, gate), store16(pre + c.d_expert + f, n, up);
    }
    T::keep(to, _mm512_mul_ps(activate(Activation(c.activation), gate), up));
  }

  void keep_plain(long e, long p, typename T::Kept* to, __m512 up, long f) {
    const long n = c.d_expert - f;
    if (c.up_bias) up = _mm512_add_ps(up, load16((const Element*)c.up_bias[e] + f, n));
    if (c.pre) store16((Element*)c.pre + p * c.d_expert + f, n, up);
    T::keep(to, activate(Activation(c.activation), up));
  }
};

}  // namespace moec
