#include "program.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <set>

#include "instructions.h"
#include "machine.h"

namespace ptx {
namespace {

// The machine fills these before a block starts, in this order.
const char* const kSpecial[] = {"%tid.x",    "%tid.y",    "%tid.z",    "%ntid.x",   "%ntid.y", "%ntid.z", "%ctaid.x",
                                "%ctaid.y",  "%ctaid.z",  "%nctaid.x", "%nctaid.y", "%nctaid.z", "%laneid", "%warpid"};

struct Register {
  char letter;  // of Entry::signature
  Operand operand;
};

std::vector<std::string> split(const std::string& text, char by) {  // outside of braces
  std::vector<std::string> parts(1);
  int depth = 0;
  for (const char c : text) {
    depth += c == '{' || c == '[';
    depth -= c == '}' || c == ']';
    if (c == by && depth == 0) {
      parts.emplace_back();
    } else if (c != ' ' || by == '.') {
      parts.back() += c;
    }
  }
  if (parts.size() == 1 && parts[0].empty()) parts.clear();
  return parts;
}

bool starts(const std::string& text, const char* with) { return text.rfind(with, 0) == 0; }
bool is_name(char c) { return std::isalnum(static_cast<unsigned char>(c)) || std::strchr("_$%.@!<>", c); }

// Bits of a type such as "f32" or "pred" (1), 0: no type.
int bits_of(const std::string& type) {
  if (type == "pred") return 1;
  if (type == "bf16") return 16;
  if (type.size() < 2 || !std::strchr("bsuf", type[0])) return 0;
  const int bits = std::atoi(type.c_str() + 1);
  return bits == 8 || bits == 16 || bits == 32 || bits == 64 ? bits : 0;
}
char letter_of(int bits) { return bits == 1 ? 'p' : bits <= 16 ? 'h' : bits == 32 ? 'w' : 'd'; }

}  // namespace

// Goes over the text once; branches are resolved when a kernel ends.
class Parser {
 public:
  Parser(const std::string& text, Program* program) : text_(text), program_(*program) {}

  void run() {
    for (skip_blank(); at_ < text_.size(); skip_blank()) {
      const size_t start = at_;
      const std::string word = take_word();
      if (word == ".version" || word == ".target" || word == ".address_size") {
        take_line();
      } else if (word == ".file") {
        add_file(take_line());
      } else if (word == ".section") {
        while (at_ < text_.size() && text_[at_] != '}') step();
        step();
      } else if (word == ".visible" || word == ".weak" || word == ".extern") {
        continue;
      } else if (word == ".shared") {
        add_shared(take_until(';'), globals_, &global_shared_);
      } else if (word == ".entry") {
        parse_kernel();
      } else {
        at_ = start;
        refuse("'" + take_until('\n') + "' is not supported outside of a kernel");
      }
    }
  }

 private:
  [[noreturn]] void refuse(const std::string& what) const { throw Fault("PTX line " + std::to_string(line_) + ": " + what); }

  void step() { line_ += text_[at_++] == '\n'; }
  void skip_blank() {
    while (at_ < text_.size()) {
      if (std::isspace(static_cast<unsigned char>(text_[at_]))) {
        step();
      } else if (text_.compare(at_, 2, "//") == 0) {
        while (at_ < text_.size() && text_[at_] != '\n') step();
      } else {
        return;
      }
    }
  }
  std::string take_word() {
    skip_blank();
    std::string word;
    while (at_ < text_.size() && is_name(text_[at_])) word += text_[at_], step();
    return word;
  }
  std::string take_line() { return take_until('\n'); }
  // The text before `end`, blanks made single, and beyond it.
  std::string take_until(char end) {
    std::string out;
    while (at_ < text_.size() && text_[at_] != end) {
      const char c = text_[at_];
      if (std::isspace(static_cast<unsigned char>(c))) {
        if (!out.empty() && out.back() != ' ') out += ' ';
      } else {
        out += c;
      }
      step();
    }
    if (at_ < text_.size()) step();
    while (!out.empty() && out.back() == ' ') out.pop_back();
    return out;
  }

  void add_file(const std::string& rest) {  // 2 "path"
    const size_t open = rest.find('"'), close = rest.rfind('"');
    if (open == std::string::npos) refuse("odd .file");
    const std::string path = rest.substr(open + 1, close - open - 1);
    const auto number = uint32_t(std::atoi(rest.c_str()));
    program_.files[number] = path.substr(path.rfind('/') + 1);
  }

  // .align 16 .b8 name[64], or name[] for what a launch adds
  void add_shared(const std::string& rest, std::map<std::string, uint32_t>& names, uint32_t* used) {
    uint32_t align = 1, size = 0;
    std::string name;
    const std::vector<std::string> words = split_words(rest);
    for (size_t k = 0; k < words.size(); ++k) {
      if (words[k] == ".align") {
        align = uint32_t(std::atoi(words[++k].c_str()));
      } else if (words[k][0] == '.') {
        size = uint32_t(bits_of(words[k].substr(1)) / 8);
      } else {
        name = words[k];
      }
    }
    const size_t bracket = name.find('[');
    if (bracket == std::string::npos) {
      align = std::max(align, size);
    } else {
      const std::string count = name.substr(bracket + 1);
      if (count == "]") size = 0;
      else size *= uint32_t(std::atoi(count.c_str()));
      if (size == 0) align = std::max(align, 16u);
      name.resize(bracket);
    }
    *used = (*used + align - 1) / align * align;
    names[name] = *used;
    *used += size;
  }

  static std::vector<std::string> split_words(const std::string& text) {
    std::vector<std::string> words;
    for (const std::string& word : spaced(text)) {
      if (!word.empty()) words.push_back(word);
    }
    return words;
  }
  static std::vector<std::string> spaced(const std::string& text) {
    std::vector<std::string> words(1);
    for (const char c : text) {
      if (c == ' ') words.emplace_back();
      else words.back() += c;
    }
    return words;
  }

  void parse_kernel() {
    kernel_ = std::make_unique<Kernel>();
    kernel_->name = take_word();
    labels_.clear();
    jumps_.clear();
    scopes_.assign(1, {});
    shared_ = globals_;
    kernel_->shared_bytes = global_shared_;
    constants_.clear();
    source_ = 0;
    for (const char* name : kSpecial) scopes_[0][name] = {'w', Operand(kernel_->units++)};
    skip_blank();
    if (text_[at_] == '(') {
      step();
      for (const std::string& parameter : split(take_until(')'), ',')) add_parameter(parameter);
    }
    for (skip_blank(); text_[at_] != '{'; skip_blank()) {  // .maxntid 512, 1, 1
      const std::string directive = take_line();
      if (starts(directive, ".maxntid") || starts(directive, ".reqntid")) {
        uint32_t threads = 1;
        for (const std::string& n : split(directive.substr(8), ',')) threads *= uint32_t(std::atoi(n.c_str()));
        kernel_->max_threads = threads;
      } else if (!starts(directive, ".minnctapersm") && !starts(directive, ".maxnreg")) {
        refuse("'" + directive + "' is not supported");
      }
    }
    parse_body();
    for (const auto& [index, label] : jumps_) {
      const auto found = labels_.find(label);
      if (found == labels_.end()) refuse("no label " + label);
      kernel_->code[index].target = found->second;
    }
    program_.kernels.push_back(std::move(kernel_));
  }

  void add_parameter(const std::string& text) {  // ".param.align8.b8name[2672]" with the blanks gone
    size_t at = std::string(".param").size();
    uint32_t align = 0, size = 0;
    if (!starts(text, ".param")) refuse("odd parameter " + text);
    if (text.compare(at, 6, ".align") == 0) {
      at += 6;
      while (std::isdigit(static_cast<unsigned char>(text[at]))) align = align * 10 + uint32_t(text[at++] - '0');
    }
    for (const char* type : {".b8", ".u8", ".s8", ".b16", ".u16", ".s16", ".f16", ".b32", ".u32", ".s32", ".f32", ".b64", ".u64",
                             ".s64", ".f64"}) {
      if (text.compare(at, std::strlen(type), type) == 0) {
        size = uint32_t(bits_of(type + 1) / 8);
        at += std::strlen(type);
        break;
      }
    }
    if (!size) refuse("odd parameter " + text);
    align = std::max(align, size);
    if (text.compare(at, 4, ".ptr") == 0) {  // .ptr .global .align 1: what it points to
      at += 4;
      for (const char* space : {".global", ".shared", ".const", ".local"}) {
        if (text.compare(at, std::strlen(space), space) == 0) at += std::strlen(space);
      }
      if (text.compare(at, 6, ".align") == 0) at += 6;
      while (std::isdigit(static_cast<unsigned char>(text[at]))) ++at;
    }
    std::string name = text.substr(at);
    const size_t bracket = name.find('[');
    if (bracket != std::string::npos) {
      size *= uint32_t(std::atoi(name.c_str() + bracket + 1));
      name.resize(bracket);
    }
    const uint32_t offset = (kernel_->parameter_bytes + align - 1) / align * align;
    kernel_->parameters.push_back({name, offset, size});
    kernel_->parameter_bytes = offset + size;
  }

  void parse_body() {
    step();
    for (int depth = 1; depth > 0;) {
      skip_blank();
      if (at_ >= text_.size()) refuse("the text ends within a kernel");
      if (text_[at_] == '{') {
        ++depth;
        scopes_.emplace_back();
        step();
      } else if (text_[at_] == '}') {
        --depth;
        scopes_.pop_back();
        step();
      } else if (text_[at_] == '.') {
        const std::string word = take_word();
        if (word == ".loc") add_location(take_line());
        else if (word == ".reg") add_registers(take_until(';'));
        else if (word == ".shared") add_shared(take_until(';'), shared_, &kernel_->shared_bytes);
        else if (word == ".pragma") take_until(';');
        else refuse(word + " is not supported");
      } else {
        const size_t start = at_;
        const uint32_t line = line_;
        const std::string word = take_word();
        skip_blank();
        if (text_[at_] == ':') {
          step();
          labels_[word] = uint32_t(kernel_->code.size());
          continue;
        }
        at_ = start;
        line_ = line;
        add_instruction(take_until(';'), line);
      }
    }
    // what falls off the end leaves
    Instruction leave;
    leave.flow = Flow::kExit;
    leave.line = line_;
    kernel_->code.push_back(leave);
  }

  void add_location(const std::string& rest) {  // 2 457 17, function_name ..., inlined_at 1 47 5
    char* end = nullptr;
    const auto file = uint32_t(std::strtoul(rest.c_str(), &end, 10)), line = uint32_t(std::strtoul(end, nullptr, 10));
    const auto key = std::make_pair(file, line);
    auto found = locations_.find(key);
    if (found == locations_.end()) {
      program_.sources.push_back({file, line});
      found = locations_.emplace(key, uint32_t(program_.sources.size())).first;
    }
    source_ = found->second;
  }

  void add_registers(const std::string& rest) {  // .b32 %r<1228>, or .b32 low, high
    const size_t blank = rest.find(' ');
    const int bits = bits_of(rest.substr(1, blank - 1));
    if (!bits) refuse("registers of type " + rest.substr(0, blank) + " are not supported");
    for (const std::string& name : split(rest.substr(blank), ',')) {
      const size_t bracket = name.find('<');
      if (bracket == std::string::npos) {
        add_register(name, bits);
      } else {
        const int count = std::atoi(name.c_str() + bracket + 1);
        for (int k = 0; k < count; ++k) add_register(name.substr(0, bracket) + std::to_string(k), bits);
      }
    }
  }
  void add_register(const std::string& name, int bits) {
    const char letter = letter_of(bits);
    if (letter == 'd') kernel_->units += kernel_->units % 2;  // aligned to all their lanes
    const uint32_t operand = letter == 'p' ? kernel_->predicates++ : kernel_->units;
    if (letter != 'p') kernel_->units += letter == 'd' ? 2 : 1;
    scopes_.back()[name] = {letter, Operand(operand)};
  }

  const Register* find_register(const std::string& name) const {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      const auto found = scope->find(name);
      if (found != scope->end()) return &found->second;
    }
    return nullptr;
  }

  // The operand of a constant: one or two units, the same in all lanes.
  Operand constant(char letter, uint64_t value) {
    const auto key = std::make_pair(letter == 'd', letter == 'd' ? value : letter == 'h' ? value & 0xffff : uint32_t(value));
    const auto found = constants_.find(key);
    if (found != constants_.end()) return found->second;
    std::vector<uint32_t>& out = kernel_->constants;
    if (letter == 'd') out.resize((out.size() + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes));
    const auto operand = ~Operand(out.size() / kLanes);
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
      out.push_back(uint32_t(key.second));
      if (letter == 'd') out.push_back(uint32_t(key.second >> 32));
    }
    constants_[key] = operand;
    return operand;
  }

  Operand source(const std::string& text, char letter) {
    if (const Register* found = find_register(text)) {
      if (found->letter != letter) refuse("register " + text + " has another width than its instruction");
      return found->operand;
    }
    if (letter == 'p') {
      if (text == "0") return kFalse;
      if (text == "1" || text == "-1") return kTrue;
      refuse("odd predicate " + text);
    }
    if (starts(text, "0f") || starts(text, "0F")) return constant(letter, std::strtoull(text.c_str() + 2, nullptr, 16));
    if (std::isdigit(static_cast<unsigned char>(text[0])) || text[0] == '-') {
      char* end = nullptr;
      uint64_t value = std::strtoull(text.c_str() + (text[0] == '-'), &end, 0);
      if (*end && *end != 'U') refuse("odd number " + text);
      return constant(letter, text[0] == '-' ? 0 - value : value);
    }
    if (shared_.count(text)) return constant(letter, kSharedBase + shared_.at(text));
    for (const Parameter& p : kernel_->parameters) {
      if (p.name == text) return constant(letter, p.offset);
    }
    refuse("operand " + text + " is not supported");
  }

  Operand target(const std::string& text, char letter) {
    const Register* found = find_register(text);
    if (text == "_") refuse("results that are thrown away are not supported");
    if (!found || found->letter != letter) refuse("result " + text + " is no register of the width of its instruction");
    return found->operand;
  }

  void add_instruction(const std::string& statement, uint32_t line) {
    Instruction i;
    i.line = line;
    i.source = source_;
    std::string rest = statement;
    if (rest[0] == '@') {
      const size_t blank = rest.find(' ');
      i.negated = rest[1] == '!';
      i.guard = source(rest.substr(1 + i.negated, blank - 1 - i.negated), 'p');
      rest = rest.substr(blank + 1);
    }
    const size_t blank = std::min(rest.find(' '), rest.size());
    const std::string opcode = rest.substr(0, blank);
    std::vector<std::string> operands = split(rest.substr(blank), ',');
    if (opcode == "ret" || opcode == "exit") {
      i.flow = Flow::kExit;
    } else if (opcode == "bra" || opcode == "bra.uni") {
      i.flow = Flow::kBranch;
      jumps_.emplace_back(kernel_->code.size(), operands.at(0));
    } else if (opcode == "bar.sync" || opcode == "barrier.sync" || opcode == "barrier.cta.sync") {
      if (operands.empty() || operands.size() > 2) refuse("'" + statement + "': a barrier has a number and a count of threads");
      i.flow = Flow::kBarrier;
      i.in[0] = source(operands[0], 'w');
      i.in[1] = operands.size() > 1 ? source(operands[1], 'w') : kEverybody;
    } else if (starts(opcode, "ld.") || starts(opcode, "st.")) {
      add_transfer(opcode, operands, &i);
    } else {
      add_operation(opcode, operands, &i);
    }
    kernel_->code.push_back(i);
  }

  // ld.global.nc.v2.f32 {a, b}, [address+8]
  void add_transfer(const std::string& opcode, const std::vector<std::string>& operands, Instruction* i) {
    const std::vector<std::string> parts = split(opcode, '.');
    std::string vector;
    i->space = Space::kGeneric;
    for (size_t k = 1; k + 1 < parts.size(); ++k) {
      static const std::set<std::string> caching = {"nc", "ca", "cg", "cs", "cv", "lu", "wb", "wt", "L2::128B", "L1::no_allocate"};
      if (parts[k] == "global") i->space = Space::kGlobal;
      else if (parts[k] == "shared") i->space = Space::kShared;
      else if (parts[k] == "param" && parts[0] == "ld") i->space = Space::kParam;
      else if (parts[k] == "v2" || parts[k] == "v4") vector = "." + parts[k];
      else if (!caching.count(parts[k])) refuse("instruction " + opcode + " is not supported");
    }
    const bool is_load = parts[0] == "ld";
    std::string values = operands.at(is_load ? 0 : 1), address = operands.at(is_load ? 1 : 0);
    if (values[0] == '{') values = values.substr(1, values.size() - 2);
    const std::vector<std::string> names = split(values, ',');
    const int bits = bits_of(parts.back());
    i->size = uint8_t(bits / 8 * int(names.size()));
    char letter = letter_of(bits);  // of constants
    for (const std::string& name : names) {
      if (const Register* found = find_register(name)) letter = found->letter;
    }
    const Entry* entry = find_entry(parts[0] + "." + parts.back() + vector + ":" + letter);
    if (!entry || i->size > 16) refuse("instruction " + opcode + " is not supported");
    i->handler = entry->handler;
    for (size_t k = 0; k < names.size(); ++k) {
      if (is_load) i->out[k] = target(names[k], letter);
      else i->in[k + 1] = source(names[k], letter);
    }
    // [base], [base+4], [base+-4]
    address = address.substr(1, address.size() - 2);
    const size_t plus = address.find('+');
    if (plus != std::string::npos) {
      i->offset = std::strtoll(address.c_str() + plus + 1, nullptr, 0);
      address.resize(plus);
    }
    const Register* base = find_register(address);
    i->wide_address = !base || base->letter == 'd';
    i->in[0] = source(address, base ? base->letter : 'd');
  }

  void add_operation(const std::string& opcode, std::vector<std::string> operands, Instruction* i) {
    std::string name;
    const std::vector<std::string> parts = split(opcode, '.');
    const bool drops_rounding = parts.back() == "f32" && parts[0] != "cvt";
    for (const std::string& part : parts) {
      if (!(part == "rn" && drops_rounding)) name += (name.empty() ? "" : ".") + part;
    }
    // the defaults that name another instruction: an approximate quotient or root is not the exact one
    if ((parts[0] == "div" || parts[0] == "rcp" || parts[0] == "sqrt") && parts.back() == "f32" && parts[1] != "rn") {
      refuse("instruction " + opcode + " is not supported");
    }
    const auto in_braces = [&](size_t k) { return operands.size() > k && operands[k][0] == '{'; };
    if (parts[0] == "mov" && (in_braces(0) || in_braces(1))) {
      const size_t k = in_braces(0) ? 0 : 1;
      name = "mov.b" + std::to_string(bits_of(parts.back())) + (k ? ":pack" : ":unpack");
      const std::string inner = operands[k].substr(1, operands[k].size() - 2);
      operands.erase(operands.begin() + long(k));
      const std::vector<std::string> pieces = split(inner, ',');
      operands.insert(operands.begin() + long(k), pieces.begin(), pieces.end());
    }
    const Entry* entry = find_entry(name);
    if (!entry && parts[0] == "cvt" && operands.size() == 2) {  // by the registers' widths
      const Register *to = find_register(operands[0]), *from = find_register(operands[1]);
      if (to && from) entry = find_entry(name + ":" + to->letter + from->letter);
    }
    if (!entry || !entry->handler) refuse("instruction " + opcode + " is not supported");
    i->handler = entry->handler;
    const std::string& signature = entry->signature;
    const size_t equals = signature.find('=');
    size_t next = 0, results = 0;
    const auto take = [&]() -> const std::string& {
      if (next >= operands.size()) refuse("too few operands for " + opcode);
      return operands[next++];
    };
    for (size_t k = 0; k < equals; ++k) {
      if (signature[k] == '|') continue;
      const bool optional = k > 0 && signature[k - 1] == '|';
      if (optional) {  // "r|p" stands as one operand
        std::string& both = operands[next - 1];
        const size_t bar = both.find('|');
        i->out[results++] = bar == std::string::npos ? kFalse : target(both.substr(bar + 1), 'p');
      } else {
        const std::string text = take();
        i->out[results++] = target(text.substr(0, text.find('|')), signature[k]);
      }
    }
    size_t count = 0;
    for (size_t k = equals + 1; k < signature.size(); ++k) i->in[count++] = source(take(), signature[k]);
    if (next != operands.size()) refuse("too many operands for " + opcode);
  }

  const std::string& text_;
  Program& program_;
  size_t at_ = 0;
  uint32_t line_ = 1;
  std::map<std::string, uint32_t> globals_, shared_;  // names in shared memory
  uint32_t global_shared_ = 0;

  std::unique_ptr<Kernel> kernel_;
  std::vector<std::map<std::string, Register>> scopes_;
  std::map<std::string, uint32_t> labels_;
  std::vector<std::pair<size_t, std::string>> jumps_;
  std::map<std::pair<bool, uint64_t>, Operand> constants_;
  std::map<std::pair<uint32_t, uint32_t>, uint32_t> locations_;
  uint32_t source_ = 0;
};

Program::Program(const std::string& text) { Parser(text, this).run(); }

std::string Program::where(const Instruction& instruction) const {
  std::string text = "PTX line " + std::to_string(instruction.line);
  if (!instruction.source) return text;
  const Source& s = sources[instruction.source - 1];
  const auto file = files.find(s.file);
  return (file == files.end() ? "?" : file->second) + ":" + std::to_string(s.line) + " (" + text + ")";
}

}  // namespace ptx
