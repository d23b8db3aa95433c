// The gradients of causal attention in tiles, of which only those on and below the diagonal are computed, for the
// per-instruction-set files and under their rules (see simd.h):
//
//   P = exp(S - lse), dV += P dO, dP = V dO^T, dS = P (dP - delta), dK += dS Q, dQ^T += K^T dS
#pragma once

#include "attention/tiles.h"

namespace rrt::attention {
namespace {

template <class D>
struct Backward {
  using Acc = typename D::Acc;
  using Vec = typename D::Vec;
  using Storage = typename D::Storage;
  using Unit = typename Operands<D>::Unit;

  const BackwardParams& params;
  const Shape& shape;
  const BackwardScratch& scratch;
  const int64_t batch;
  const int64_t head;
  const int64_t kv_head = head / (shape.num_heads / shape.num_kv_heads);
  const int64_t dim = padded_dim(shape);
  const int64_t tiles = tiles_of(shape.length);
  const int64_t size = dim * kTile;       // of a tile of sums
  const int64_t units = size / kPair<D>;  // of a tile as an operand
  const Stager<D> stager{shape.head_dim, dim};

  template <class T>
  static T* at(void* base, int64_t offset = 0) {
    return static_cast<T*>(base) + offset;
  }

  void run() const {
    stage_queries();
    const Head<D> k(params.k, batch, kv_head), v(params.v, batch, kv_head);
    const Sight<D> sight(shape, batch, scratch.seen_until);
    for (int64_t j = 0; j < tiles; ++j) {
      stager.rows(k, j * kTile, shape.length, at<Unit>(scratch.k_rows));
      stager.column_pairs(k, j * kTile, shape.length, at<Unit>(scratch.k_columns));
      stager.rows(v, j * kTile, shape.length, at<Unit>(scratch.v_rows));
      for (int64_t i = 0; i < size; ++i) *at<Acc>(scratch.k_grad, i) = *at<Acc>(scratch.v_grad, i) = 0;
      for (int64_t i = j; i < tiles; ++i) {
        if (sight.reaches(j, i * kTile)) multiply(i, {i, j, sight});
      }
      store_keys(j, at<Acc>(scratch.k_grad), params.k_grad, 0);
      store_keys(j, at<Acc>(scratch.v_grad), params.v_grad, 1);
    }
    Vec ones[kTile / kLanes<D>];
    for (Vec& one : ones) one = Vec{} + 1;
    for (int64_t i = 0; i < tiles; ++i) {
      auto* to = at<Storage>(params.q_grad,
                             ((batch * shape.length + i * kTile) * shape.num_heads + head) * shape.head_dim);
      store_transposed<D>(at<Acc>(scratch.q_grad, i * size), kTile, ones, smaller(kTile, shape.length - i * kTile),
                          shape.head_dim, shape.num_heads * shape.head_dim, to);
    }
  }

  void stage_queries() const {
    const Head<D> q(params.q, batch, head), out_grad(params.out_grad, batch, head), out(params.out, batch, head);
    const auto* lse = static_cast<const Acc*>(params.lse) + (batch * shape.num_heads + head) * shape.length;
    for (int64_t i = 0; i < tiles; ++i) {
      stager.columns(q, i * kTile, shape.length, at<Unit>(scratch.q_columns, i * units));
      stager.row_pairs(q, i * kTile, shape.length, at<Unit>(scratch.q_rows, i * units));
      stager.columns(out_grad, i * kTile, shape.length, at<Unit>(scratch.out_columns, i * units));
      stager.row_pairs(out_grad, i * kTile, shape.length, at<Unit>(scratch.out_rows, i * units));
    }
    for (int64_t token = 0; token < tiles * kTile; ++token) {
      Vec sum = {};
      for (int64_t i = 0; token < shape.length && i < shape.head_dim; i += kLanes<D>) {
        sum += wide(out, token, i) * wide(out_grad, token, i);
      }
      *at<Acc>(scratch.delta, token) = reduce_lanes(sum, [](Acc a, Acc b) { return a + b; });
      // Beyond the end nothing is probable.
      *at<Acc>(scratch.lse, token) = token < shape.length ? lse[token] : -kLowest<Acc>;
    }
    for (int64_t i = 0; i < tiles * size; ++i) *at<Acc>(scratch.q_grad, i) = 0;
  }

  Vec wide(const Head<D>& from, int64_t token, int64_t i) const {
    const Storage* elements = from.data + token * from.stride + i;
    if (shape.head_dim - i >= kLanes<D>) return D::widen(elements);
    Storage chunk[kLanes<D>] = {};
    std::memcpy(chunk, elements, (shape.head_dim - i) * sizeof(chunk[0]));
    return D::widen(chunk);
  }

  // The tile of keys at hand against the tile of queries i.
  void multiply(int64_t i, const Unseen<D>& unseen) const {
    constexpr int64_t kStride = kTile / kPair<D>;
    const Blocks<D> q_columns{at<Unit>(scratch.q_columns, i * units), kTile};
    const Blocks<D> out_columns{at<Unit>(scratch.out_columns, i * units), kTile};
    multiply_rows<D, kMaxRows, false>(at<Unit>(scratch.k_rows), dim / kPair<D>, q_columns, dim,
                                      at<Acc>(scratch.scores), kTile, kTile, kTile);
    multiply_rows<D, kMaxRows, false>(at<Unit>(scratch.v_rows), dim / kPair<D>, out_columns, dim,
                                      at<Acc>(scratch.probability_grads), kTile, kTile, kTile);
    slopes(i, unseen);
    const Blocks<D> q_rows{at<Unit>(scratch.q_rows, i * units), dim};
    const Blocks<D> out_rows{at<Unit>(scratch.out_rows, i * units), dim};
    const Blocks<D> score_pairs{at<Unit>(scratch.score_pairs), kTile};
    multiply_rows<D, kMaxRows, true>(at<Unit>(scratch.probabilities), kStride, out_rows, kTile,
                                     at<Acc>(scratch.v_grad), dim, kTile, dim);
    multiply_rows<D, kMaxRows, true>(at<Unit>(scratch.score_rows), kStride, q_rows, kTile, at<Acc>(scratch.k_grad),
                                     dim, kTile, dim);
    multiply_rows<D, kMaxRows, true>(at<Unit>(scratch.k_columns), kStride, score_pairs, kTile,
                                     at<Acc>(scratch.q_grad, i * size), kTile, dim, kTile);
  }

  // Probabilities, and the gradient of the scores, as operands.
  void slopes(int64_t i, const Unseen<D>& unseen) const {
    const auto scale = static_cast<Acc>(shape.scale);
    for (int64_t query = 0; query < kTile; query += kLanes<D>) {
      const Vec lse = load<Vec>(at<Acc>(scratch.lse, i * kTile + query));
      const Vec delta = load<Vec>(at<Acc>(scratch.delta, i * kTile + query));
      for (int64_t key = 0; key < kTile; key += kPair<D>) {
        Vec slope[kPair<D>];
        for (int r = 0; r < kPair<D>; ++r) {
          const int64_t place = (key + r) * kTile + query;
          const Vec score = load<Vec>(at<Acc>(scratch.scores, place)) * scale;
          const Vec p = unseen.set(exp_negative(score - lse), query, key + r, 0);
          slope[r] = p * (load<Vec>(at<Acc>(scratch.probability_grads, place)) - delta) * scale;
          store_row<D>(p, at<Unit>(scratch.probabilities, (key + r) * (kTile / kPair<D>)), query);
          store_row<D>(slope[r], at<Unit>(scratch.score_rows, (key + r) * (kTile / kPair<D>)), query);
        }
        store_pairs<D>(slope, at<Unit>(scratch.score_pairs, key / kPair<D> * kTile + query));
      }
    }
  }

  // A tile's sums to the gradient, or to this head's share of it.
  void store_keys(int64_t j, const Acc* sums, void* grad, int64_t which) const {
    const int64_t first = j * kTile, count = smaller(kTile, shape.length - first);
    for (int64_t token = first; token < first + count; ++token, sums += dim) {
      if (params.shares != nullptr) {
        std::memcpy(at<Acc>(params.shares, share(shape, which, batch, head, token)), sums, dim * sizeof(Acc));
        continue;
      }
      auto* to = at<Storage>(grad, ((batch * shape.length + token) * shape.num_kv_heads + kv_head) * shape.head_dim);
      for (int64_t i = 0; i < shape.head_dim; ++i) to[i] = D::narrow(sums[i]);
    }
  }

  // Where a token's share in k_grad (0) or v_grad (1) begins.
  static int64_t share(const Shape& s, int64_t which, int64_t batch, int64_t head, int64_t token) {
    return (((which * s.batch + batch) * s.num_heads + head) * s.length + token) * padded_dim(s);
  }
};

template <class D>
void backward(const BackwardParams& params, int64_t batch, int64_t head, const BackwardScratch& scratch) {
  [[maybe_unused]] TileRegisters<D> registers;
  Backward<D>{params, params.shape, scratch, batch, head}.run();
}

template <class D>
void sum_shares(const BackwardParams& params, int64_t batch, int64_t kv_head) {
  using Acc = typename D::Acc;
  const Shape& s = params.shape;
  const int64_t group = s.num_heads / s.num_kv_heads;
  void* const grads[] = {params.k_grad, params.v_grad};
  for (int64_t which = 0; which < 2; ++which) {
    for (int64_t token = 0; token < s.length; ++token) {
      auto* to = static_cast<typename D::Storage*>(grads[which]) +
                 ((batch * s.length + token) * s.num_kv_heads + kv_head) * s.head_dim;
      const Acc* from = static_cast<const Acc*>(params.shares) +
                        Backward<D>::share(s, which, batch, kv_head * group, token);
      for (int64_t i = 0; i < s.head_dim; i += kLanes<D>) {
        typename D::Vec sum = {};
        for (int64_t h = 0; h < group; ++h) sum += load<typename D::Vec>(from + h * s.length * padded_dim(s) + i);
        Acc values[kLanes<D>];
        std::memcpy(values, &sum, sizeof(values));
        const int64_t width = smaller(kLanes<D>, s.head_dim - i);
        for (int64_t lane = 0; lane < width; ++lane) to[i + lane] = D::narrow(values[lane]);
      }
    }
  }
}

}  // namespace
}  // namespace rrt::attention
