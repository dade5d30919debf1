// The GPU kernel on the CPU, every block and thread in turn. For tests: slow, and every access is one a sanitizer sees.
#ifndef SDCT_CORE_EMULATE_H_
#define SDCT_CORE_EMULATE_H_

#include "sdct/sdct.h"

namespace sdct {

// `threads` of a block run in an order drawn from `seed` (0: ascending), another one in every phase. A kernel in which threads
// of a phase depended on each other would give other numbers for other seeds. `split`: one block for each projection.
Status emulated_run(const Plan& plan, const Problem& problem, int32_t threads, uint32_t seed, bool split) noexcept;

}  // namespace sdct

#endif  // SDCT_CORE_EMULATE_H_
