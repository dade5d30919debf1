// PTX text, decoded for the machine that runs it (machine.h).
#ifndef SDCT_TESTS_PTX_PROGRAM_H_
#define SDCT_TESTS_PTX_PROGRAM_H_

#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx {

constexpr uint32_t kLanes = 32;

// What stops a kernel or a program: an unknown instruction, a bad access, a race.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Warp;
struct Instruction;
using Handler = void (*)(Warp&, const Instruction&);

// Which part of an instruction the machine itself has to act on; everything else is in the handler.
enum class Flow : uint8_t { kNext, kBranch, kBarrier, kExit };
enum class Space : uint8_t { kNone, kGlobal, kShared, kParam, kGeneric };

// An operand: a register, or a constant where negative. Registers of 64 bits take two units of 32 lanes x 4 bytes from an even one
// on, others one; predicates are masks of 32 bits with an index of their own.
using Operand = int32_t;
constexpr Operand kFalse = -1, kTrue = -2;  // predicates; an optional result that is left out is kFalse

constexpr Operand kEverybody = INT32_MIN;  // a barrier without a count of threads

struct Instruction {
  Handler handler = nullptr;
  Flow flow = Flow::kNext;
  Space space = Space::kNone;
  bool negated = false;       // of the guard
  bool wide_address = false;  // the address register has 64 bits
  uint8_t size = 0;           // bytes of an access of one lane
  int32_t guard = -1;         // predicate, -1: always
  Operand out[4] = {};
  Operand in[5] = {};
  int64_t offset = 0;    // of an address
  uint32_t target = 0;   // of a branch
  uint32_t line = 0;     // in the PTX text
  uint32_t source = 0;   // in Program::sources, 0: unknown
};

struct Source {  // a line of CUDA code, by -lineinfo
  uint32_t file, line;
};

struct Parameter {
  std::string name;
  uint32_t offset, size;
};

struct Kernel {
  std::string name;
  std::vector<Parameter> parameters;
  uint32_t parameter_bytes = 0;
  uint32_t max_threads = 1024;    // .maxntid or .reqntid
  uint32_t shared_bytes = 0;      // static; the dynamic part follows
  uint32_t units = 0;             // of registers
  uint32_t predicates = 0;
  std::vector<uint32_t> constants;  // units of 32 lanes
  std::vector<Instruction> code;
};

struct Program {
  explicit Program(const std::string& text);  // throws Fault
  std::string where(const Instruction& instruction) const;  // "kernel.h:104 (PTX line 812)"

  std::vector<std::unique_ptr<Kernel>> kernels;
  std::map<uint32_t, std::string> files;
  std::vector<Source> sources;
};

}  // namespace ptx

#endif  // SDCT_TESTS_PTX_PROGRAM_H_
