// Radices of a Fourier transform.
#ifndef SDCT_CORE_FACTORISE_H_
#define SDCT_CORE_FACTORISE_H_

#include <cstdint>
#include <vector>

namespace sdct {

// m as a product of 8, 4, 2 and odd primes, the largest prime first and the powers of two last.
std::vector<int32_t> factorise(int32_t m);

}  // namespace sdct

#endif  // SDCT_CORE_FACTORISE_H_
