// What a node computes, by the definition of the two transforms, in double: for the hosts' tests.
#ifndef SDCT_TESTS_EXPECTED_H_
#define SDCT_TESTS_EXPECTED_H_

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

namespace expected {

// Element i of row k of the orthonormal DCT-II of length n.
inline double cosine(int64_t n, int64_t k, int64_t i) {
  return std::sqrt((k ? 2.0 : 1.0) / double(n)) * std::cos(3.14159265358979323846 * double((2 * i + 1) * k) / (2.0 * double(n)));
}

// One row with two blended adapters, three slots, float32; projection j owns capacity[j] entries of a slot.
struct Call {
  int64_t d_in, tokens;
  std::vector<int64_t> d_out, capacity;
  std::vector<float> x, scales, values;
  std::vector<int32_t> ids, indices;
  std::vector<std::vector<float>> y;

  Call(int64_t d_in, std::vector<int64_t> d_out, std::vector<int64_t> capacity, int64_t tokens)
      : d_in(d_in), tokens(tokens), d_out(d_out), capacity(capacity) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<float>& out, int64_t count) {
      for (int64_t i = 0; i < count; ++i) out.push_back(normal(random));
    };
    ids = {1, 2};
    scales = {1.5f, -0.75f};
    fill(x, tokens * d_in);
    for (int slot = 0; slot < 3; ++slot) {
      for (size_t j = 0; j < d_out.size(); ++j) {
        fill(values, capacity[j]);
        for (int64_t e = 0; e < capacity[j]; ++e) {  // rows ascend
          indices.push_back(int32_t(e * d_out[j] / capacity[j]));
          indices.push_back(int32_t((e * 7 + slot) % d_in));
        }
      }
    }
    for (const int64_t d : d_out) {
      y.emplace_back();
      fill(y.back(), tokens * d);
    }
  }

  int64_t entries() const {
    int64_t all = 0;
    for (const int64_t c : capacity) all += c;
    return all;
  }

  // The largest error of `got` for projection j, over the root mean square of what is added to y.
  double error(size_t j, const std::vector<float>& got) const {
    double worst = 0.0, square = 0.0;
    int64_t first = 0;
    for (size_t k = 0; k < j; ++k) first += capacity[k];
    for (int64_t t = 0; t < tokens; ++t) {
      std::vector<double> sum(size_t(d_out[j]), 0.0);
      for (size_t blend = 0; blend < ids.size(); ++blend) {
        for (int64_t e = first; e < first + capacity[j]; ++e) {
          const int64_t at = ids[blend] * entries() + e, row = indices[size_t(2 * at)], col = indices[size_t(2 * at + 1)];
          double coefficient = 0.0;
          for (int64_t i = 0; i < d_in; ++i) coefficient += cosine(d_in, col, i) * double(x[size_t(t * d_in + i)]);
          const double weight = double(scales[blend]) * double(values[size_t(at)]) * coefficient;
          for (int64_t i = 0; i < d_out[j]; ++i) sum[size_t(i)] += weight * cosine(d_out[j], row, i);
        }
      }
      for (int64_t i = 0; i < d_out[j]; ++i) {
        const auto at = size_t(t * d_out[j] + i);
        worst = std::fmax(worst, std::fabs(double(got[at]) - double(y[j][at]) - sum[size_t(i)]));
        square += sum[size_t(i)] * sum[size_t(i)];
      }
    }
    return worst / std::sqrt(square / double(tokens * d_out[j]));
  }
};

}  // namespace expected

#endif  // SDCT_TESTS_EXPECTED_H_
