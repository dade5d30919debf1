// The instructions that the machine knows.
#ifndef SDCT_TESTS_PTX_INSTRUCTIONS_H_
#define SDCT_TESTS_PTX_INSTRUCTIONS_H_

#include <string>

#include "program.h"

namespace ptx {

// Operands by letter: h, w, d registers of 16, 32, 64 bits, p predicates; results before the "=", "|p" one that may be left out.
struct Entry {
  std::string signature;
  Handler handler;
};

// Names are opcodes without rounding modes that are the only ones (add.rn.f32 is "add.f32"). Where several widths of registers are
// allowed they follow: "cvt.s64.s32:dw", "ld.u16.v4:w", and "mov.b32:pack" takes {a, b}. Null: unknown.
const Entry* find_entry(const std::string& opcode);
std::string list_entries();  // "name signature", a line each

}  // namespace ptx

#endif  // SDCT_TESTS_PTX_INSTRUCTIONS_H_
