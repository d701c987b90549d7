// The elementwise work of fused_linear_token_stats on CPUs, over one block of logits at a time: rows of `width`
// consecutive vocabulary entries from `start`, one row a token, in float or bfloat16 with float arithmetic.
// Plain C++ for the compiler to vectorise, called through ctypes by block_cpp.py; block_torch.py says the same in PyTorch.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

struct BFloat16 {
  uint16_t bits;
};

inline float load(float value) { return value; }

inline float load(BFloat16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline void store(float value, float& out) { out = value; }

inline void store(float value, BFloat16& out) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  out.bits = uint16_t(value == value ? rounded : 0x7FC0);
}

// exp(x) for x up to 80, within 2 units in the last place; 0 below -87, NaN for NaN. No branch, so that loops vectorise.
inline float exponential(float x) {
  const float low = -87.0f, magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float y = x < low ? low : x;
  const float shifted = y * 1.44269504f + magic;
  const float k = shifted - magic;
  const float r = (y - k * 0.693359375f) + k * 2.12194440e-4f;  // ln 2 in two parts
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127) << 23;  // 2^k: the low bits of `shifted` hold k
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return x < low ? 0.0f : p * power;
}

// How a logit follows from a product: softcap * tanh(scale * (product + bias) / softcap).
struct Head {
  const float* bias;  // of the block, or null
  float scale;
  float softcap;  // 0: none

  inline float logit(float product, int64_t j) const {
    const float u = scale * (bias ? product + bias[j] : product);
    if (softcap == 0.0f) return u;
    const float e = exponential(-2.0f * std::fabs(u / softcap));
    return std::copysign(softcap * (1.0f - e) / (1.0f + e), u);
  }

  inline float slope(float z) const {  // of the logit in the product
    return softcap == 0.0f ? scale : scale * (1.0f - (z / softcap) * (z / softcap));
  }
};

struct Plain {
  inline float logit(float product, int64_t) const { return product; }
  inline float slope(float) const { return 1.0f; }
};

// Running sums of each token, (6, n): largest logit m; sums over all entries but the largest of e = exp(z - m),
// of e^2, and of e (z - m); the target's logit; 0, or NaN once an entry was not finite.
enum { PEAK, REST, SQUARES, MOMENT, TARGET, POISON };

template <class T, class H>
void update(const T* products, int64_t n, int64_t width, int64_t start, const int64_t* targets, H head, double* state,
            int64_t* top, int threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> buffer(width);
    float* z = buffer.data();
#pragma omp for schedule(static)
    for (int64_t i = 0; i < n; ++i) {
      const T* row = products + i * width;
      float largest = -std::numeric_limits<float>::infinity(), poison = 0.0f;
#pragma omp simd reduction(max : largest) reduction(+ : poison)
      for (int64_t j = 0; j < width; ++j) {
        const float product = load(row[j]);
        z[j] = head.logit(product, j);
        poison += product * 0.0f;
        largest = z[j] > largest ? z[j] : largest;
      }
      double* s = state + i;
      if (targets[i] >= start && targets[i] < start + width) s[TARGET * n] = z[targets[i] - start];
      if (largest > s[PEAK * n]) {
        // The former largest entry joins the sums; the new one leaves them: near 1, log1p keeps what a sum would round.
        const double gap = s[PEAK * n] - largest, decay = std::exp(gap);
        s[MOMENT * n] = decay * (s[MOMENT * n] + gap * (1.0 + s[REST * n]));
        s[SQUARES * n] = decay * decay * (1.0 + s[SQUARES * n]);
        s[REST * n] = decay * (1.0 + s[REST * n]);
        s[PEAK * n] = largest;
        int64_t j = 0;
        while (j + 1 < width && z[j] != largest) ++j;
        top[i] = start + j;
        z[j] = largest - 200.0f;  // its exponential is 0
      }
      const float peak = float(s[PEAK * n]);
      float rest = 0.0f, squares = 0.0f, moment = 0.0f;
#pragma omp simd reduction(+ : rest, squares, moment)
      for (int64_t j = 0; j < width; ++j) {
        const float below = z[j] - peak;
        const float e = exponential(below);
        rest += e;
        squares += e * e;
        moment += e * below;
      }
      s[REST * n] += rest;
      s[SQUARES * n] += squares;
      s[MOMENT * n] += moment;
      s[POISON * n] += poison;
    }
  }
}

// Running sums for several temperatures T, given as 1 / T: `state` as above, of which the sums are not used, and `rest`
// (temperatures, n), each a sum over all entries but the largest of exp((z - m) / T).
template <class H>
void update_temperatures(const float* products, int64_t n, int64_t width, int64_t start, const int64_t* targets, H head,
                         const double* inverse, int64_t temperatures, double* state, double* rest, int threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> buffer(width);
    float* z = buffer.data();
#pragma omp for schedule(static)
    for (int64_t i = 0; i < n; ++i) {
      const float* row = products + i * width;
      float largest = -std::numeric_limits<float>::infinity(), poison = 0.0f;
#pragma omp simd reduction(max : largest) reduction(+ : poison)
      for (int64_t j = 0; j < width; ++j) {
        z[j] = head.logit(row[j], j);
        poison += row[j] * 0.0f;
        largest = z[j] > largest ? z[j] : largest;
      }
      double* s = state + i;
      s[POISON * n] += poison;
      if (targets[i] >= start && targets[i] < start + width) s[TARGET * n] = z[targets[i] - start];
      const double gap = s[PEAK * n] - largest;
      if (gap < 0) {  // the former largest entry joins the sums, the new one leaves them
        for (int64_t k = 0; k < temperatures; ++k) {
          double& r = rest[k * n + i];
          r = std::exp(gap * inverse[k]) * (1.0 + r);
        }
        s[PEAK * n] = largest;
        int64_t j = 0;
        while (j + 1 < width && z[j] != largest) ++j;
        z[j] = -std::numeric_limits<float>::infinity();
      }
      const float peak = float(s[PEAK * n]);
      for (int64_t k = 0; k < temperatures; ++k) {
        const float factor = float(inverse[k]);
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < width; ++j) sum += exponential((z[j] - peak) * factor);
        rest[k * n + i] += sum;
      }
    }
  }
}

// Gradient of the products, over them: with log p = z - peak - log_normalizer it is slope * p * (a + b log p + c p), and
// slope * at_target at the target. `rows` is (6, n): peak, log_normalizer, a, b, c, at_target.
template <class T, class H>
void gradient(T* products, int64_t n, int64_t width, int64_t start, const int64_t* targets, H head, const float* rows,
              int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < n; ++i) {
    T* row = products + i * width;
    const float peak = rows[i], log_normalizer = rows[n + i], a = rows[2 * n + i], b = rows[3 * n + i],
                c = rows[4 * n + i], at_target = rows[5 * n + i];
    const int64_t y = targets[i] - start;
    const bool here = y >= 0 && y < width;
    const float target_slope = here ? head.slope(head.logit(load(row[y]), y)) : 0.0f;
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) {
      const float z = head.logit(load(row[j]), j);
      const float logp = (z - peak) - log_normalizer;
      const float p = exponential(logp);
      store(head.slope(z) * p * (a + b * logp + c * p), row[j]);
    }
    if (here) store(target_slope * at_target, row[y]);
  }
}

template <class Run>
void with_head(const float* bias, float scale, float softcap, Run run) {
  if (!bias && scale == 1.0f && softcap == 0.0f)
    run(Plain{});
  else
    run(Head{bias, scale, softcap});
}

}  // namespace

extern "C" {

void calibtrain_update_stats(int bfloat16, const void* products, int64_t n, int64_t width, int64_t start,
                             const int64_t* targets, const float* bias, float scale, float softcap, double* state,
                             int64_t* top, int threads) {
  with_head(bias, scale, softcap, [&](auto head) {
    if (bfloat16)
      update(static_cast<const BFloat16*>(products), n, width, start, targets, head, state, top, threads);
    else
      update(static_cast<const float*>(products), n, width, start, targets, head, state, top, threads);
  });
}

void calibtrain_update_temperatures(const void* products, int64_t n, int64_t width, int64_t start,
                                    const int64_t* targets, const float* bias, float scale, float softcap,
                                    const double* inverse, int64_t temperatures, double* state, double* rest,
                                    int threads) {
  with_head(bias, scale, softcap, [&](auto head) {
    update_temperatures(static_cast<const float*>(products), n, width, start, targets, head, inverse, temperatures, state,
                        rest, threads);
  });
}

void calibtrain_form_gradient(int bfloat16, void* products, int64_t n, int64_t width, int64_t start,
                              const int64_t* targets, const float* bias, float scale, float softcap, const float* rows,
                              int threads) {
  with_head(bias, scale, softcap, [&](auto head) {
    if (bfloat16)
      gradient(static_cast<BFloat16*>(products), n, width, start, targets, head, rows, threads);
    else
      gradient(static_cast<float*>(products), n, width, start, targets, head, rows, threads);
  });
}
}
