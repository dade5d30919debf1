// What each instruction does to the 32 lanes of a warp, and the table of all that are known.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../../core/numerics.h"
#include "instructions.h"
#include "machine.h"

namespace ptx {
namespace {

// 32 lanes of a register. 16-bit registers use the low half of 32 bits, the high half is 0.
template <class T>
struct LanesOf {
  typedef T type __attribute__((vector_size(kLanes * sizeof(T)), may_alias));
};
template <class T>
using Lanes = typename LanesOf<T>::type;
using U32 = Lanes<uint32_t>;
using S32 = Lanes<int32_t>;
using U64 = Lanes<uint64_t>;
using S64 = Lanes<int64_t>;
using F32 = Lanes<float>;

template <class V>
const V& get(const Warp& w, Operand operand) {
  const uint32_t* unit =
      operand >= 0 ? w.registers + size_t(operand) * kLanes : w.constants + size_t(~operand) * kLanes;
  return *reinterpret_cast<const V*>(unit);
}

template <class V>
V& at(Warp& w, Operand operand) {
  return *reinterpret_cast<V*>(w.registers + size_t(operand) * kLanes);
}

uint32_t predicate(const Warp& w, Operand operand) {
  return operand >= 0 ? w.predicates[operand] : operand == kFalse ? 0u : ~0u;
}
void set_predicate(Warp& w, Operand operand, uint32_t bits) {
  w.predicates[operand] = (w.predicates[operand] & ~w.active) | (bits & w.active);
}

// -1 in the lanes of a mask.
S32 spread(uint32_t mask) {
  S32 out;
  for (uint32_t lane = 0; lane < kLanes; ++lane) out[lane] = mask >> lane & 1 ? -1 : 0;
  return out;
}
// The mask of lanes that are -1.
uint32_t gather(const S32& lanes) {
  uint32_t mask = 0;
#if defined(__SSE2__)
  for (int k = 0; k < 8; ++k) {
    __m128 four;
    std::memcpy(&four, reinterpret_cast<const char*>(&lanes) + 16 * k, sizeof four);
    mask |= uint32_t(_mm_movemask_ps(four)) << (4 * k);
  }
#else
  for (uint32_t lane = 0; lane < kLanes; ++lane) mask |= uint32_t(lanes[lane] & 1) << lane;
#endif
  return mask;
}
uint32_t gather(const S64& lanes) { return gather(__builtin_convertvector(lanes, S32)); }

template <class V>
void put(Warp& w, Operand operand, const V& value) {
  V& out = at<V>(w, operand);
  if (w.active == ~0u) {
    out = value;
  } else if constexpr (sizeof(value[0]) == 4) {
    out = spread(w.active) ? value : out;
  } else {
    out = __builtin_convertvector(spread(w.active), S64) ? value : out;
  }
}

template <class F>
void each(const Warp& w, F f) {
  for (uint32_t rest = w.active; rest; rest &= rest - 1) f(uint32_t(__builtin_ctz(rest)));
}

F32 fused(const F32& a, const F32& b, const F32& c) {
  F32 out;
  for (uint32_t lane = 0; lane < kLanes; ++lane) out[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
  return out;
}

template <class V>
V sixteen(const V& lanes) {  // cut to 16 bits
  return lanes & 0xffff;
}
S32 signed16(const U32& lanes) { return S32(lanes << 16) >> 16; }

// --- loads and stores ----------------------------------------------------------------------------------------------------------

// T in memory, R in the register (wider or as wide; the sign goes along), `count` of them.
template <class T, class R, int count>
void load(Warp& w, const Instruction& i) {
  char* const* from = w.resolve(i, i.in[0], false);
  each(w, [&](uint32_t lane) {
    T values[count];
    std::memcpy(values, from[lane], sizeof values);
    for (int k = 0; k < count; ++k) {
      if constexpr (sizeof(R) == 8) {
        at<U64>(w, i.out[k])[lane] = uint64_t(int64_t(values[k]));
      } else {
        at<U32>(w, i.out[k])[lane] = std::is_same_v<R, uint16_t> ? uint16_t(values[k]) : uint32_t(int32_t(values[k]));
      }
    }
  });
}

template <class T, class R, int count>
void store(Warp& w, const Instruction& i) {
  char* const* to = w.resolve(i, i.in[0], true);
  each(w, [&](uint32_t lane) {
    T values[count];
    for (int k = 0; k < count; ++k) {
      values[k] = sizeof(R) == 8 ? T(get<U64>(w, i.in[k + 1])[lane]) : T(get<U32>(w, i.in[k + 1])[lane]);
    }
    std::memcpy(to[lane], values, sizeof values);
  });
}

// --- conversions -----------------------------------------------------------------------------------------------------------------

template <class D, class S, class Rd, class Rs>
void convert(Warp& w, const Instruction& i) {  // integers
  U64 wide;
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    const S from = sizeof(Rs) == 8 ? S(get<U64>(w, i.in[0])[lane]) : S(get<U32>(w, i.in[0])[lane]);
    wide[lane] = uint64_t(int64_t(D(from)));
  }
  if constexpr (sizeof(Rd) == 8) {
    put<U64>(w, i.out[0], wide);
  } else {
    U32 narrow = __builtin_convertvector(wide, U32);
    if (sizeof(Rd) == 2) narrow = sixteen(narrow);
    put<U32>(w, i.out[0], narrow);
  }
}

template <class D>
D saturated(float value, float (*rounding)(float)) {  // as cvt: NaN is 0
  if (std::isnan(value)) return 0;
  const double rounded = rounding(value);
  if (rounded <= double(std::numeric_limits<D>::min())) return std::numeric_limits<D>::min();
  if (rounded >= double(std::numeric_limits<D>::max())) return std::numeric_limits<D>::max();
  return D(rounded);
}

template <class D, class S, class F>
void lane_by_lane(Warp& w, const Instruction& i, F f) {
  Lanes<D> out = at<Lanes<D>>(w, i.out[0]);
  const Lanes<S>& in = get<Lanes<S>>(w, i.in[0]);
  each(w, [&](uint32_t lane) { out[lane] = f(in[lane]); });
  put<Lanes<D>>(w, i.out[0], out);
}

// --- across the lanes of a warp -----------------------------------------------------------------------------------------------------

enum class Shuffle { kUp, kDown, kButterfly, kIndex };

template <Shuffle kind>
void shuffle(Warp& w, const Instruction& i) {  // in: value, lane operand, clamp and segment, members
  const U32 value = get<U32>(w, i.in[0]);
  const U32 &by = get<U32>(w, i.in[1]), &shape = get<U32>(w, i.in[2]), &members = get<U32>(w, i.in[3]);
  U32 out = at<U32>(w, i.out[0]);
  uint32_t inside = 0;
  each(w, [&](uint32_t lane) {
    w.meet(members[lane] | 1u << lane, i);
    const int b = int(by[lane] & 31), clamp = int(shape[lane] & 31), segment = int(shape[lane] >> 8 & 31), me = int(lane);
    const int most = (me & segment) | (clamp & ~segment), least = me & segment;
    int from = me;
    bool good = false;
    switch (kind) {
      case Shuffle::kUp: from = me - b, good = from >= most; break;
      case Shuffle::kDown: from = me + b, good = from <= most; break;
      case Shuffle::kButterfly: from = me ^ b, good = from <= most; break;
      case Shuffle::kIndex: from = least | (b & ~segment), good = from <= most; break;
    }
    if (!good) from = me;
    if (!(w.active >> from & 1)) w.stop("a shuffle reads lane " + std::to_string(from) + ", which is not here", i);
    out[lane] = value[from];
    inside |= uint32_t(good) << lane;
  });
  put<U32>(w, i.out[0], out);
  if (i.out[1] >= 0) set_predicate(w, i.out[1], inside);
}

template <class F>
void vote(Warp& w, const Instruction& i, F f) {
  const uint32_t bits = predicate(w, i.in[0]);
  const U32& members = get<U32>(w, i.in[1]);
  each(w, [&](uint32_t lane) { w.meet(members[lane], i); });
  f(bits & w.active);
}

template <class V, bool remainder>
void divide(Warp& w, const Instruction& i) {
  const V &a = get<V>(w, i.in[0]), &b = get<V>(w, i.in[1]);
  V out = at<V>(w, i.out[0]);
  each(w, [&](uint32_t lane) {
    using T = std::decay_t<decltype(a[0])>;
    if (b[lane] == 0) w.stop("division by zero", i);
    if (std::is_signed_v<T> && b[lane] == T(-1)) {  // the one quotient that overflows wraps
      out[lane] = remainder ? 0 : T(0 - std::make_unsigned_t<T>(a[lane]));
    } else {
      out[lane] = remainder ? a[lane] % b[lane] : a[lane] / b[lane];
    }
  });
  put<V>(w, i.out[0], out);
}

// --- the table -------------------------------------------------------------------------------------------------------------------

using Table = std::map<std::string, Entry>;

uint32_t to_half(float a) { return sdct::float_to_half(a); }
uint32_t to_bfloat16(float a) { return a != a ? 0x7fffu : sdct::float_to_bfloat16(a); }

// Two floats to one register, the first one to its upper half.
template <uint32_t (*to)(float)>
void pair_of(Warp& w, const Instruction& i) {
  const F32 &high = get<F32>(w, i.in[0]), &low = get<F32>(w, i.in[1]);
  U32 out = {};
  each(w, [&](uint32_t lane) { out[lane] = to(high[lane]) << 16 | to(low[lane]); });
  put<U32>(w, i.out[0], out);
}

#define UNARY(V, D, expression)                                \
  [](Warp& w, const Instruction& i) {                          \
    const V& a = get<V>(w, i.in[0]);                           \
    put<D>(w, i.out[0], (expression));                         \
  }
#define BINARY(V, D, expression)                                     \
  [](Warp& w, const Instruction& i) {                                \
    const V &a = get<V>(w, i.in[0]), &b = get<V>(w, i.in[1]);        \
    put<D>(w, i.out[0], (expression));                               \
  }
#define TERNARY(V, D, expression)                                                               \
  [](Warp& w, const Instruction& i) {                                                           \
    const V &a = get<V>(w, i.in[0]), &b = get<V>(w, i.in[1]), &c = get<V>(w, i.in[2]);          \
    put<D>(w, i.out[0], (expression));                                                          \
  }
#define COMPARE(V, expression)                                       \
  [](Warp& w, const Instruction& i) {                                \
    const V &a = get<V>(w, i.in[0]), &b = get<V>(w, i.in[1]);        \
    set_predicate(w, i.out[0], gather(expression));                  \
  }
#define PREDICATES(expression)                                                  \
  [](Warp& w, const Instruction& i) {                                           \
    const uint32_t a = predicate(w, i.in[0]), b = predicate(w, i.in[1]);        \
    static_cast<void>(b);                                                       \
    set_predicate(w, i.out[0], (expression));                                   \
  }

template <class T, char register_letter>
void integers(Table& t, const std::string& type) {
  constexpr bool is_signed = std::is_signed_v<T>;
  using V = Lanes<T>;
  using U = Lanes<std::make_unsigned_t<T>>;  // wraps
  const std::string r(1, register_letter), two = r + "=" + r + r, three = two + r, compare = "p=" + r + r;
  const auto add = [&](const char* name, const std::string& signature, Handler handler) {
    t[name + type] = {signature, handler};
  };
  add("add.", two, BINARY(U, U, a + b));
  add("sub.", two, BINARY(U, U, a - b));
  add("mul.lo.", two, BINARY(U, U, a * b));
  add("mad.lo.", three, TERNARY(U, U, a * b + c));
  add("min.", two, BINARY(V, V, a < b ? a : b));
  add("max.", two, BINARY(V, V, a > b ? a : b));
  add("div.", two, divide<V, false>);
  add("rem.", two, divide<V, true>);
  add("setp.eq.", compare, COMPARE(V, a == b));
  add("setp.ne.", compare, COMPARE(V, a != b));
  for (const char* name : {"setp.lt.", "setp.lo."}) add(name, compare, COMPARE(V, a < b));
  for (const char* name : {"setp.le.", "setp.ls."}) add(name, compare, COMPARE(V, a <= b));
  for (const char* name : {"setp.gt.", "setp.hi."}) add(name, compare, COMPARE(V, a > b));
  for (const char* name : {"setp.ge.", "setp.hs."}) add(name, compare, COMPARE(V, a >= b));
  add("shr.", r + "=" + r + "w", [](Warp& w, const Instruction& i) {
    const V& a = get<V>(w, i.in[0]);
    const U32& by = get<U32>(w, i.in[1]);
    V out;
    constexpr uint32_t kBits = 8 * sizeof(a[0]);
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
      out[lane] = by[lane] >= kBits ? (a[lane] < 0 ? -1 : 0) : a[lane] >> by[lane];
    }
    put<V>(w, i.out[0], out);
  });
  if (is_signed) add("neg.", r + "=" + r, UNARY(U, U, 0 - a));
  if (is_signed) add("abs.", r + "=" + r, UNARY(V, U, a < 0 ? 0 - U(a) : U(a)));
}

template <class V, char register_letter>
void bits(Table& t, const std::string& size) {
  const std::string r(1, register_letter), two = r + "=" + r + r;
  t["and.b" + size] = {two, BINARY(V, V, a & b)};
  t["or.b" + size] = {two, BINARY(V, V, a | b)};
  t["xor.b" + size] = {two, BINARY(V, V, a ^ b)};
  t["not.b" + size] = {r + "=" + r, size == "16" ? Handler(UNARY(V, V, sixteen(~a))) : Handler(UNARY(V, V, ~a))};
  t["setp.eq.b" + size] = {"p=" + r + r, COMPARE(V, a == b)};
  t["setp.ne.b" + size] = {"p=" + r + r, COMPARE(V, a != b)};
  const auto shift_left = [](Warp& w, const Instruction& i) {
    const V& a = get<V>(w, i.in[0]);
    const U32& by = get<U32>(w, i.in[1]);
    V out;
    for (uint32_t lane = 0; lane < kLanes; ++lane) out[lane] = by[lane] >= 8 * sizeof(a[0]) ? 0 : a[lane] << by[lane];
    put<V>(w, i.out[0], out);
  };
  t["shl.b" + size] = {r + "=" + r + "w", shift_left};
  if (size == "16") {
    t["shl.b16"].handler = [](Warp& w, const Instruction& i) {
      const U32 &a = get<U32>(w, i.in[0]), &by = get<U32>(w, i.in[1]);
      U32 out;
      for (uint32_t lane = 0; lane < kLanes; ++lane) out[lane] = by[lane] >= 16 ? 0 : a[lane] << by[lane] & 0xffff;
      put<U32>(w, i.out[0], out);
    };
  }
  for (const char* kind : {"b", "u", "s", "f"}) {
    t["mov." + (kind + size)] = {r + "=" + r, UNARY(V, V, a)};
    t["selp." + (kind + size)] = {r + "=" + r + r + "p", [](Warp& w, const Instruction& i) {
                                    const V &a = get<V>(w, i.in[0]), &b = get<V>(w, i.in[1]);
                                    const S32 choose = spread(predicate(w, i.in[2]));
                                    if constexpr (sizeof(V) == sizeof(U64)) {
                                      put<V>(w, i.out[0], __builtin_convertvector(choose, S64) ? a : b);
                                    } else {
                                      put<V>(w, i.out[0], choose ? a : b);
                                    }
                                  }};
  }
}

void floats(Table& t) {
  t["add.f32"] = {"w=ww", BINARY(F32, F32, a + b)};
  t["sub.f32"] = {"w=ww", BINARY(F32, F32, a - b)};
  t["mul.f32"] = {"w=ww", BINARY(F32, F32, a * b)};
  t["fma.f32"] = t["mad.f32"] = {"w=www", TERNARY(F32, F32, fused(a, b, c))};
  t["neg.f32"] = {"w=w", UNARY(U32, U32, a ^ 0x80000000u)};
  t["abs.f32"] = {"w=w", UNARY(U32, U32, a & 0x7fffffffu)};
  t["div.f32"] = {"w=ww", BINARY(F32, F32, a / b)};  // .rn only: the parser drops that
  t["min.f32"] = {"w=ww", BINARY(F32, F32, (a != a) ? b : (b != b) ? a : (a < b) ? a : b)};
  t["max.f32"] = {"w=ww", BINARY(F32, F32, (a != a) ? b : (b != b) ? a : (a > b) ? a : b)};
  t["sqrt.f32"] = {"w=w", [](Warp& w, const Instruction& i) {
                     lane_by_lane<float, float>(w, i, [](float a) { return std::sqrt(a); });
                   }};
  t["rcp.f32"] = {"w=w", UNARY(F32, F32, 1.0f / a)};
#define BOTH(name, expression)                                                        \
  t["setp." name ".f32"] = {"p=ww", COMPARE(F32, (expression))};                      \
  t["setp." name "u.f32"] = {"p=ww", COMPARE(F32, (expression) | (a != a) | (b != b))}
  BOTH("eq", a == b);
  BOTH("lt", a < b);
  BOTH("le", a <= b);
  BOTH("gt", a > b);
  BOTH("ge", a >= b);
  t["setp.neu.f32"] = {"p=ww", COMPARE(F32, a != b)};
  t["setp.ne.f32"] = {"p=ww", COMPARE(F32, (a != b) & (a == a) & (b == b))};
  t["setp.num.f32"] = {"p=ww", COMPARE(F32, (a == a) & (b == b))};
  t["setp.nan.f32"] = {"p=ww", COMPARE(F32, (a != a) | (b != b))};
#undef BOTH
}

template <class S>
void wide(Table& t, const std::string& type) {
  using W = Lanes<std::conditional_t<std::is_signed_v<S>, int64_t, uint64_t>>;
  using V = Lanes<S>;
#define WIDE(x) __builtin_convertvector(x, W)
  t["mul.wide." + type] = {"d=ww", BINARY(V, W, WIDE(a) * WIDE(b))};
  t["mul.hi." + type] = {"w=ww", BINARY(V, V, __builtin_convertvector((WIDE(a) * WIDE(b)) >> 32, V))};
  t["mad.wide." + type] = {"d=wwd", [](Warp& w, const Instruction& i) {
                             const V &a = get<V>(w, i.in[0]), &b = get<V>(w, i.in[1]);
                             put<U64>(w, i.out[0], U64(WIDE(a) * WIDE(b)) + get<U64>(w, i.in[2]));
                           }};
#undef WIDE
}

void sixteen_bits(Table& t) {
  for (const char* type : {"s16", "u16"}) {
    const bool is_signed = type[0] == 's';
    const std::string name = type;
    t["add." + name] = {"h=hh", BINARY(U32, U32, sixteen(a + b))};
    t["sub." + name] = {"h=hh", BINARY(U32, U32, sixteen(a - b))};
    t["mul.lo." + name] = {"h=hh", BINARY(U32, U32, sixteen(a * b))};
    t["mul.wide." + name] = {"w=hh", is_signed ? Handler(BINARY(U32, U32, U32(signed16(a) * signed16(b))))
                                               : Handler(BINARY(U32, U32, a * b))};
    t["setp.eq." + name] = {"p=hh", COMPARE(U32, a == b)};
    t["setp.ne." + name] = {"p=hh", COMPARE(U32, a != b)};
#define EITHER(condition, operation) \
  t["setp." condition "." + name] = \
      {"p=hh", is_signed ? Handler(COMPARE(U32, signed16(a) operation signed16(b))) : Handler(COMPARE(U32, a operation b))}
    EITHER("lt", <);
    EITHER("le", <=);
    EITHER("gt", >);
    EITHER("ge", >=);
#undef EITHER
    t["shr." + name] = {"h=hw", is_signed ? Handler(BINARY(U32, U32, sixteen(U32(signed16(a) >> S32(b > 15 ? 15 : b)))))
                                          : Handler(BINARY(U32, U32, b > 15 ? 0 : a >> b))};
  }
}

template <class D, class S>
void conversion(Table& t, const std::string& name, const char* to, const char* from) {
  // every width of register that holds D or S
  for (const char* d = to; *d; ++d) {
    for (const char* s = from; *s; ++s) {
      Handler handler = nullptr;
      if (*d == 'd') handler = *s == 'd' ? convert<D, S, uint64_t, uint64_t> : convert<D, S, uint64_t, uint32_t>;
      if (*d == 'w') handler = *s == 'd' ? convert<D, S, uint32_t, uint64_t> : convert<D, S, uint32_t, uint32_t>;
      if (*d == 'h') handler = *s == 'd' ? convert<D, S, uint16_t, uint64_t> : convert<D, S, uint16_t, uint32_t>;
      t[name + ":" + *d + *s] = {std::string(1, *d) + "=" + *s, handler};
    }
  }
}

template <class D>
void conversions_to(Table& t, const std::string& name, const char* registers) {
  conversion<D, uint8_t>(t, name + ".u8", registers, "hwd");
  conversion<D, int8_t>(t, name + ".s8", registers, "hwd");
  conversion<D, uint16_t>(t, name + ".u16", registers, "hwd");
  conversion<D, int16_t>(t, name + ".s16", registers, "hwd");
  conversion<D, uint32_t>(t, name + ".u32", registers, "wd");
  conversion<D, int32_t>(t, name + ".s32", registers, "wd");
  conversion<D, uint64_t>(t, name + ".u64", registers, "d");
  conversion<D, int64_t>(t, name + ".s64", registers, "d");
}

void conversions(Table& t) {
  conversions_to<uint8_t>(t, "cvt.u8", "hwd");
  conversions_to<int8_t>(t, "cvt.s8", "hwd");
  conversions_to<uint16_t>(t, "cvt.u16", "hwd");
  conversions_to<int16_t>(t, "cvt.s16", "hwd");
  conversions_to<uint32_t>(t, "cvt.u32", "wd");
  conversions_to<int32_t>(t, "cvt.s32", "wd");
  conversions_to<uint64_t>(t, "cvt.u64", "d");
  conversions_to<int64_t>(t, "cvt.s64", "d");
  // the frequent ones, all lanes at once
  t["cvt.s64.s32:dw"].handler = UNARY(S32, S64, __builtin_convertvector(a, S64));
  t["cvt.u64.u32:dw"].handler = UNARY(U32, U64, __builtin_convertvector(a, U64));
  for (const char* name : {"cvt.u32.u64:wd", "cvt.s32.s64:wd"}) {
    t[name].handler = UNARY(U64, U32, __builtin_convertvector(a, U32));
  }

  t["cvt.f32.f16"] = {"w=h", [](Warp& w, const Instruction& i) {
                        lane_by_lane<float, uint32_t>(w, i, [](uint32_t a) { return sdct::half_to_float(uint16_t(a)); });
                      }};
  t["cvt.f32.bf16"] = {"w=h", [](Warp& w, const Instruction& i) {
                         lane_by_lane<float, uint32_t>(w, i, [](uint32_t a) { return sdct::bfloat16_to_float(uint16_t(a)); });
                       }};
  t["cvt.rn.f16.f32"] = {"h=w", [](Warp& w, const Instruction& i) { lane_by_lane<uint32_t, float>(w, i, to_half); }};
  t["cvt.rn.bf16.f32"] = {"h=w", [](Warp& w, const Instruction& i) { lane_by_lane<uint32_t, float>(w, i, to_bfloat16); }};
  t["cvt.rn.f16x2.f32"] = {"w=ww", [](Warp& w, const Instruction& i) { pair_of<to_half>(w, i); }};
  t["cvt.rn.bf16x2.f32"] = {"w=ww", [](Warp& w, const Instruction& i) { pair_of<to_bfloat16>(w, i); }};
  t["cvt.rn.f32.s32"] = {"w=w", UNARY(S32, F32, __builtin_convertvector(a, F32))};
  t["cvt.rn.f32.u32"] = {"w=w", UNARY(U32, F32, __builtin_convertvector(a, F32))};
  t["cvt.rzi.s32.f32"] = {"w=w", [](Warp& w, const Instruction& i) {
                            lane_by_lane<int32_t, float>(w, i, [](float a) { return saturated<int32_t>(a, truncf); });
                          }};
  t["cvt.rni.s32.f32"] = {"w=w", [](Warp& w, const Instruction& i) {
                            lane_by_lane<int32_t, float>(w, i, [](float a) { return saturated<int32_t>(a, nearbyintf); });
                          }};
  t["cvt.rzi.u32.f32"] = {"w=w", [](Warp& w, const Instruction& i) {
                            lane_by_lane<uint32_t, float>(w, i, [](float a) { return saturated<uint32_t>(a, truncf); });
                          }};
}

template <class T>
void transfers(Table& t, const std::string& type, bool half) {
  // "ld.u16.v4:w": four of 16 bits into registers of 32
#define TRANSFER(count, suffix)                                                                                    \
  if (half) t["ld." + type + suffix + ":h"] = {"", load<T, uint16_t, count>};                                      \
  if (half) t["st." + type + suffix + ":h"] = {"", store<T, uint16_t, count>};                                     \
  if (sizeof(T) <= 4) t["ld." + type + suffix + ":w"] = {"", load<T, uint32_t, count>};                            \
  if (sizeof(T) <= 4) t["st." + type + suffix + ":w"] = {"", store<T, uint32_t, count>};                           \
  t["ld." + type + suffix + ":d"] = {"", load<T, uint64_t, count>};                                                \
  t["st." + type + suffix + ":d"] = {"", store<T, uint64_t, count>}
  TRANSFER(1, "");
  TRANSFER(2, ".v2");
  TRANSFER(4, ".v4");
#undef TRANSFER
}

Table make_table() {
  Table t;
  integers<int32_t, 'w'>(t, "s32");
  integers<uint32_t, 'w'>(t, "u32");
  integers<int64_t, 'd'>(t, "s64");
  integers<uint64_t, 'd'>(t, "u64");
  t["shr.b32"] = t["shr.u32"];
  t["shr.b64"] = t["shr.u64"];
  bits<U32, 'h'>(t, "16");
  bits<U32, 'w'>(t, "32");
  bits<U64, 'd'>(t, "64");
  sixteen_bits(t);
  floats(t);
  wide<int32_t>(t, "s32");
  wide<uint32_t>(t, "u32");
  conversions(t);
  for (const char* type : {"u8", "b8"}) transfers<uint8_t>(t, type, true);
  transfers<int8_t>(t, "s8", true);
  for (const char* type : {"u16", "b16"}) transfers<uint16_t>(t, type, true);
  transfers<int16_t>(t, "s16", true);
  for (const char* type : {"u32", "b32", "f32"}) transfers<uint32_t>(t, type, false);
  transfers<int32_t>(t, "s32", false);
  for (const char* type : {"u64", "b64", "s64", "f64"}) transfers<uint64_t>(t, type, false);

  t["and.pred"] = {"p=pp", PREDICATES(a & b)};
  t["or.pred"] = {"p=pp", PREDICATES(a | b)};
  t["xor.pred"] = {"p=pp", PREDICATES(a ^ b)};
  t["not.pred"] = {"p=p", [](Warp& w, const Instruction& i) { set_predicate(w, i.out[0], ~predicate(w, i.in[0])); }};
  t["mov.pred"] = {"p=p", [](Warp& w, const Instruction& i) { set_predicate(w, i.out[0], predicate(w, i.in[0])); }};

  t["mov.b32:pack"] = {"w=hh", BINARY(U32, U32, a | b << 16)};
  t["mov.b64:pack"] = {"d=ww", BINARY(U32, U64, __builtin_convertvector(a, U64) | __builtin_convertvector(b, U64) << 32)};
  t["mov.b32:unpack"] = {"hh=w", [](Warp& w, const Instruction& i) {
                           const U32 a = get<U32>(w, i.in[0]);
                           put<U32>(w, i.out[0], a & 0xffff);
                           put<U32>(w, i.out[1], a >> 16);
                         }};
  t["mov.b64:unpack"] = {"ww=d", [](Warp& w, const Instruction& i) {
                           const U64 a = get<U64>(w, i.in[0]);
                           put<U32>(w, i.out[0], __builtin_convertvector(a, U32));
                           put<U32>(w, i.out[1], __builtin_convertvector(a >> 32, U32));
                         }};
  for (const char* name : {"cvta.global.u64", "cvta.to.global.u64"}) t[name] = {"d=d", UNARY(U64, U64, a)};
  t["cvta.shared.u64"] = {"d=d", UNARY(U64, U64, a + kSharedWindow)};
  t["cvta.to.shared.u64"] = {"d=d", UNARY(U64, U64, a - kSharedWindow)};

  t["popc.b32"] = {"w=w", [](Warp& w, const Instruction& i) {
                    lane_by_lane<uint32_t, uint32_t>(w, i, [](uint32_t a) { return uint32_t(__builtin_popcount(a)); });
                  }};
  t["prmt.b32"] = {"w=www", [](Warp& w, const Instruction& i) {
                     const U32 a = get<U32>(w, i.in[0]), b = get<U32>(w, i.in[1]), selector = get<U32>(w, i.in[2]);
                     U32 out = {};
                     for (uint32_t lane = 0; lane < kLanes; ++lane) {
                       const uint64_t both = uint64_t(b[lane]) << 32 | a[lane];
                       for (int k = 0; k < 4; ++k) {
                         const uint32_t choice = selector[lane] >> (4 * k) & 15;
                         uint32_t byte = uint32_t(both >> (8 * (choice & 7)) & 255);
                         if (choice & 8) byte = byte & 128 ? 255 : 0;
                         out[lane] |= byte << (8 * k);
                       }
                     }
                     put<U32>(w, i.out[0], out);
                   }};
  t["lop3.b32"] = {"w=wwww", [](Warp& w, const Instruction& i) {
                     const U32 a = get<U32>(w, i.in[0]), b = get<U32>(w, i.in[1]), c = get<U32>(w, i.in[2]);
                     const uint32_t truth = get<U32>(w, i.in[3])[0];
                     U32 out = {};
                     for (uint32_t k = 0; k < 8; ++k) {
                       if (truth >> k & 1) out |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
                     }
                     put<U32>(w, i.out[0], out);
                   }};

  t["shfl.sync.up.b32"] = {"w|p=wwww", shuffle<Shuffle::kUp>};
  t["shfl.sync.down.b32"] = {"w|p=wwww", shuffle<Shuffle::kDown>};
  t["shfl.sync.bfly.b32"] = {"w|p=wwww", shuffle<Shuffle::kButterfly>};
  t["shfl.sync.idx.b32"] = {"w|p=wwww", shuffle<Shuffle::kIndex>};
  t["vote.sync.ballot.b32"] = {"w=pw", [](Warp& w, const Instruction& i) {
                                 vote(w, i, [&](uint32_t bits) { put<U32>(w, i.out[0], U32{} + bits); });
                               }};
  t["vote.sync.any.pred"] = {"p=pw", [](Warp& w, const Instruction& i) {
                               vote(w, i, [&](uint32_t bits) { set_predicate(w, i.out[0], bits ? ~0u : 0u); });
                             }};
  t["vote.sync.all.pred"] = {"p=pw", [](Warp& w, const Instruction& i) {
                               vote(w, i, [&](uint32_t bits) { set_predicate(w, i.out[0], bits == w.active ? ~0u : 0u); });
                             }};
  t["activemask.b32"] = {"w=", [](Warp& w, const Instruction& i) { put<U32>(w, i.out[0], U32{} + w.active); }};
  t["bar.warp.sync"] = {"=w", [](Warp& w, const Instruction& i) {
                          w.synchronise(get<U32>(w, i.in[0])[uint32_t(__builtin_ctz(w.active))], i);
                        }};
  return t;
}

const Table& table() {
  static const auto* made = new Table(make_table());
  return *made;
}

}  // namespace

const Entry* find_entry(const std::string& opcode) {
  const auto found = table().find(opcode);
  return found == table().end() ? nullptr : &found->second;
}

std::string list_entries() {
  std::string names;
  for (const auto& [name, entry] : table()) names += name + " " + entry.signature + "\n";
  return names;
}

}  // namespace ptx
