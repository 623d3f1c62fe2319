// The model's forward pass for one more token of each row, on a CPU: decoding.py compiles it and calls it.
//
// Each weight is read once and in order, by the one of `threads` that has its row, which is all that takes time.
// Shapes as in decoding.py; matrices (rows, columns) and vectors lie row by row. Sums are fp32, whatever W, the
// weights' format, and C, the cache's. The same bits come out for any number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

struct bf16 {
  uint16_t bits;
  operator float() const {  // the upper half of an fp32
    uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
  bf16() = default;
  bf16(float value) {  // to the nearest, ties to even; NaN stays NaN
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    bits = value != value ? 0x7fc0 : (wide + 0x7fff + (wide >> 16 & 1)) >> 16;
  }
};

struct Matrix {
  const void* weight;  // (rows, columns) of W
  const float* scale;  // (rows) for int8 weights, else null
  int64_t rows, columns;
};

struct Layer {
  Matrix wqkv, wo, w_up, w_down;
  const float *attention_norm, *mlp_norm;  // (D)
  const float *q_norm, *k_norm;            // (K), null without QK-norm
};

struct Model {
  const Layer* layers;
  Matrix head;
  const float* final_norm;  // (D)
  const float *cos, *sin;   // (max_length, K/2)
  int64_t n_layers, D, H, G, K, threads, swiglu;
  int64_t rows_at_once, ahead;  // how weights are read: 1 or 2 side by side, asked for so many bytes ahead
  double eps;
};

// x (n) / its root mean square * weight
static void normed(const float* x, const float* weight, float eps, int64_t n, float* out) {
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < n; i++) squares += x[i] * x[i];
  float factor = 1 / std::sqrt(squares / n + eps);
#pragma omp simd
  for (int64_t i = 0; i < n; i++) out[i] = x[i] * factor * weight[i];
}

static const int64_t LANES = 32;

// Half of the lanes onto the other half, until one is left: a compiler may not turn a sum in order into this.
template <int64_t n>
__attribute__((always_inline)) static inline float sum(const float* lanes) {
  float halves[n / 2];
#pragma omp simd
  for (int64_t l = 0; l < n / 2; l++) halves[l] = lanes[l] + lanes[l + n / 2];
  return sum<n / 2>(halves);
}

template <>
__attribute__((always_inline)) inline float sum<1>(const float* lanes) {
  return *lanes;
}

// sums (N, M) of N rows of w (N, columns) times M rows of x (M, columns), in LANES lanes each, whose order no compiler
// may change by itself.
template <class W, int64_t N, int64_t M>
static void dot(const W* const w[N], const float* x, int64_t columns, int64_t ahead, float sums[N][M]) {
  float lanes[N][M][LANES] = {};
  int64_t whole = columns / LANES * LANES;
  for (int64_t c = 0; c < whole; c += LANES)
    for (int64_t i = 0; i < N; i++) {
      for (int64_t byte = 0; byte < LANES * int64_t(sizeof(W)); byte += 64)
        __builtin_prefetch((const char*)(w[i] + c) + ahead + byte);
      for (int64_t b = 0; b < M; b++)
#pragma omp simd
        for (int64_t l = 0; l < LANES; l++) lanes[i][b][l] += float(w[i][c + l]) * x[b * columns + c + l];
    }
  for (int64_t i = 0; i < N; i++)
    for (int64_t b = 0; b < M; b++) {
      sums[i][b] = sum<LANES>(lanes[i][b]);
      for (int64_t c = whole; c < columns; c++) sums[i][b] += float(w[i][c]) * x[b * columns + c];
    }
}

// Calls store(b, r + i, sum, scale) for the N rows of m from r on and the texts from b on, M at a time.
template <class W, int64_t N, int64_t M, class Store>
static void rows_by(const Matrix& m, int64_t r, const float* x, int64_t b, int64_t B, int64_t ahead, Store store) {
  const W* w[N];
  for (int64_t i = 0; i < N; i++) w[i] = (const W*)m.weight + std::min(r + i, m.rows - 1) * m.columns;
  for (; b + M <= B; b += M) {
    float sums[N][M];
    dot<W, N, M>(w, x + b * m.columns, m.columns, ahead, sums);
    for (int64_t i = 0; i < std::min(N, m.rows - r); i++)
      for (int64_t j = 0; j < M; j++) store(b + j, r + i, sums[i][j], m.scale ? m.scale[r + i] : 1);
  }
  if (b < B) rows_by<W, N, M == 1 ? 1 : M / 2>(m, r, x, b, B, ahead, store);
}

// Calls store(b, r, sum, scale), whose product is (x W^T)[b, r], for x (B, columns). All threads share the rows, and
// wait for each other at the end.
template <class W, int64_t N, int64_t M, class Store>
static void multiply_by(const Matrix& m, const float* x, int64_t B, int64_t ahead, Store store) {
#pragma omp for schedule(static)
  for (int64_t r = 0; r < m.rows; r += N) rows_by<W, N, M>(m, r, x, 0, B, ahead, store);
}

// Norm and rotate x (K) in place.
static void place(float* x, const float* weight, const Model& m, int64_t position) {
  if (weight) normed(x, weight, m.eps, m.K, x);
  const float *cos = m.cos + position * m.K / 2, *sin = m.sin + position * m.K / 2;
  for (int64_t i = 0; i < m.K / 2; i++) {
    float x1 = x[i], x2 = x[i + m.K / 2];
    x[i] = x1 * cos[i] - x2 * sin[i];
    x[i + m.K / 2] = x1 * sin[i] + x2 * cos[i];
  }
}

// y (K) = softmax(q K^T / sqrt(K)) V over the first n of keys and values (n, K).
template <class C>
static void attend(const float* q, const C* keys, const C* values, int64_t n, int64_t K, float* scores, float* y) {
  float highest = -INFINITY, total = 0;
  for (int64_t t = 0; t < n; t++) {
    float score = 0;
#pragma omp simd reduction(+ : score)
    for (int64_t i = 0; i < K; i++) score += q[i] * float(keys[t * K + i]);
    scores[t] = score / std::sqrt(float(K));
    highest = std::max(highest, scores[t]);
  }
  std::fill(y, y + K, 0.0f);
  for (int64_t t = 0; t < n; t++) {
    float p = std::exp(scores[t] - highest);
    total += p;
#pragma omp simd
    for (int64_t i = 0; i < K; i++) y[i] += p * float(values[t * K + i]);
  }
  for (int64_t i = 0; i < K; i++) y[i] /= total;
}

// x (B, D) the embedded tokens, changed; keys and values (layers, B, G, length, K), of which `seen` positions are
// filled; logits (B, V).
template <class W, class C>
static void step(const Model& m, float* x, C* keys, C* values, int64_t B, int64_t length, int64_t seen, float* logits) {
  const int64_t rows_at_once = m.rows_at_once, ahead = m.ahead;  // of this step, whatever another thread sets
  auto multiply = [&](const Matrix& matrix, const float* x, auto store) {
    // A weight is widened once for several texts, as many as have their x in the first cache, of 32 kB.
    if (B > 1 && matrix.columns <= 1024) multiply_by<W, 1, 4>(matrix, x, B, ahead, store);
    else if (B > 1) multiply_by<W, 1, 2>(matrix, x, B, ahead, store);
    else if (rows_at_once == 1) multiply_by<W, 1, 1>(matrix, x, B, ahead, store);
    else multiply_by<W, 2, 1>(matrix, x, B, ahead, store);
  };
  const int64_t D = m.D, H = m.H, G = m.G, K = m.K, width = (H + 2 * G) * K, F = m.layers[0].w_down.columns;
  const int64_t up = m.layers[0].w_up.rows;
  std::vector<float> qkv(B * width), y(B * H * K), hidden(B * up), gated(B * F);
#pragma omp parallel num_threads(m.threads)
  {
    std::vector<float> n(B * D), scores(seen + 1);
    auto norm_rows = [&](const float* weight) {  // by each thread for itself: sooner done than waited for
      for (int64_t b = 0; b < B; b++) normed(&x[b * D], weight, m.eps, D, &n[b * D]);
    };
    // Fused by name: a compiler may fuse a product and a sum, and once did for one way to read int8 weights only.
    auto add = [&](int64_t b, int64_t r, float v, float s) { x[b * D + r] = std::fma(v, s, x[b * D + r]); };
    for (int64_t l = 0; l < m.n_layers; l++) {
      const Layer& layer = m.layers[l];
      norm_rows(layer.attention_norm);
      multiply(layer.wqkv, n.data(), [&](int64_t b, int64_t r, float v, float s) { qkv[b * width + r] = v * s; });
#pragma omp for schedule(static)
      for (int64_t i = 0; i < B * G; i++) {
        int64_t b = i / G, g = i % G;
        float *q = &qkv[b * width + g * (H / G) * K], *k = &qkv[b * width + (H + g) * K], *v = k + G * K;
        C* cached_keys = keys + ((l * B + b) * G + g) * length * K;
        C* cached_values = values + ((l * B + b) * G + g) * length * K;
        place(k, layer.k_norm, m, seen);
        std::copy(k, k + K, cached_keys + seen * K);
        std::copy(v, v + K, cached_values + seen * K);
        for (int64_t h = 0; h < H / G; h++) {
          place(q + h * K, layer.q_norm, m, seen);
          float* out = &y[(b * H + g * (H / G) + h) * K];
          attend(q + h * K, cached_keys, cached_values, seen + 1, K, scores.data(), out);
        }
      }
      multiply(layer.wo, y.data(), add);
      norm_rows(layer.mlp_norm);
      multiply(layer.w_up, n.data(), [&](int64_t b, int64_t r, float v, float s) { hidden[b * up + r] = v * s; });
#pragma omp for schedule(static)
      for (int64_t i = 0; i < B * F; i++) {
        const float* row = &hidden[i / F * up + i % F];
        if (m.swiglu) gated[i] = row[0] / (1 + std::exp(-row[0])) * row[F];
        else gated[i] = std::max(row[0], 0.0f) * std::max(row[0], 0.0f);
      }
      multiply(layer.w_down, gated.data(), add);
    }
    norm_rows(m.final_norm);
    const int64_t V = m.head.rows;
    multiply(m.head, n.data(), [&](int64_t b, int64_t r, float v, float s) { logits[b * V + r] = v * s; });
  }
}

#define STEP(W, C)                                                                                               \
  extern "C" void step_##W##_##C(const Model* m, float* x, C* keys, C* values, int64_t B, int64_t length,       \
                                 int64_t seen, float* logits) {                                                  \
    step<W, C>(*m, x, keys, values, B, length, seen, logits);                                                    \
  }
STEP(float, float)
STEP(bf16, bf16)
STEP(int8_t, float)
STEP(int8_t, bf16)
