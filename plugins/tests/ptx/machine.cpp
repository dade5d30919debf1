#include "machine.h"

#include <algorithm>
#include <bitset>
#include <cstdlib>
#include <cstring>
#include <tuple>

namespace ptx {
namespace {

// A lane group that is all of them, less those beyond the block's threads.
uint32_t lanes_below(uint32_t count) { return count >= kLanes ? ~0u : (1u << count) - 1; }

std::string number(uint64_t value) { return std::to_string(value); }

std::string hex(uint64_t value) {
  char text[24];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

// Passes over the 32 banks: so many lanes at once that they ask for at most 128 bytes; in each pass a bank gives one word.
void add_wavefronts(const uint64_t* addresses, uint32_t lanes, uint32_t size, Cost* cost) {
  const uint32_t words = std::max(size / 4, 1u), together = kLanes / words;
  for (uint32_t first = 0; first < kLanes; first += together) {
    uint64_t asked[32][32];
    uint32_t count[32] = {}, most = 0;
    for (uint32_t lane = first; lane < first + together; ++lane) {
      if (!(lanes >> lane & 1)) continue;
      for (uint32_t k = 0; k < words; ++k) {
        const uint64_t word = addresses[lane] / 4 + k, bank = word % 32;
        if (std::find(asked[bank], asked[bank] + count[bank], word) == asked[bank] + count[bank]) {
          asked[bank][count[bank]++] = word;
        }
        most = std::max(most, count[bank]);
      }
    }
    cost->wavefronts += most;
    cost->ideal += most > 0;
  }
}

uint32_t sectors(const uint64_t* addresses, uint32_t lanes) {
  uint64_t found[kLanes];
  uint32_t count = 0;
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    const uint64_t sector = addresses[lane] / 32;  // an access is aligned and has at most 16 bytes
    if (lanes >> lane & 1 && std::find(found, found + count, sector) == found + count) found[count++] = sector;
  }
  return count;
}

}  // namespace

void* Memory::allocate(size_t bytes, int device) {
  const size_t rounded = (bytes + 511) / 256 * 256;
  void* memory = std::aligned_alloc(256, rounded);
  if (!memory) return nullptr;
  std::memset(memory, 0xff, rounded);
  const auto address = reinterpret_cast<uint64_t>(memory);
  allocations_[address] = {address, bytes, device, nullptr};
  return memory;
}

bool Memory::release(void* pointer) {
  const auto found = allocations_.find(reinterpret_cast<uint64_t>(pointer));
  if (found == allocations_.end()) return false;
  allocations_.erase(found);
  std::free(pointer);
  return true;
}

Allocation* Memory::find(uint64_t address, uint64_t size) {
  auto after = allocations_.upper_bound(address);
  if (after == allocations_.begin()) return nullptr;
  Allocation& allocation = std::prev(after)->second;
  const uint64_t offset = address - allocation.address;
  return offset <= allocation.size && size <= allocation.size - offset ? &allocation : nullptr;
}

void Memory::forget_accesses() {
  for (auto& [address, allocation] : allocations_) allocation.shadow.reset();
}

// --- a warp ------------------------------------------------------------------------------------------------------------------

// Lanes that took different ways run in groups, the one that is least far first, so that they meet again where the ways do.
void Warp::jump(uint32_t pc, uint32_t lanes) {
  if (!lanes) return;
  for (Group& group : groups_) {
    if (group.pc == pc) {
      group.lanes |= lanes;
      return;
    }
  }
  groups_.push_back({pc, lanes});
}

void Warp::next_group() {
  here = 0;
  next_ = UINT32_MAX;
  if (groups_.empty()) return;
  const auto first = std::min_element(groups_.begin(), groups_.end(), [](Group a, Group b) { return a.pc < b.pc; });
  pc_ = first->pc;
  here = first->lanes;
  groups_.erase(first);
  for (const Group& group : groups_) next_ = std::min(next_, group.pc);
}

uint32_t Warp::uniform(Operand operand, const Instruction& instruction) const {
  const uint32_t* unit = operand >= 0 ? registers + size_t(operand) * kLanes : constants + size_t(~operand) * kLanes;
  const uint32_t value = unit[__builtin_ctz(active)];
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    if (active >> lane & 1 && unit[lane] != value) stop("lanes disagree about a barrier", instruction);
  }
  return value;
}

void Warp::stop(const std::string& what, const Instruction& instruction) const { machine->fault(what, instruction); }

void Warp::meet(uint32_t members, const Instruction& instruction) const {
  if (members & ~exited_ & ~active) {
    stop("the lanes " + hex(members) + " are to meet here, and only " + hex(active) + " have come", instruction);
  }
}

void Warp::synchronise(uint32_t members, const Instruction& instruction) {
  meet(members, instruction);
  if (++syncs_ >= Actor::kMaxSyncs) stop("more synchronisations of a warp than can be told apart", instruction);
}

char* const* Warp::resolve(const Instruction& i, Operand address, bool write) {
  Machine& m = *machine;
  uint64_t addresses[kLanes];
  uint64_t low = UINT64_MAX, high = 0, bits = 0;
  const auto widen = [&](const auto* lanes) {
    for (uint32_t lane = 0; lane < kLanes; ++lane) addresses[lane] = uint64_t(lanes[lane]) + uint64_t(i.offset);
  };
  const uint32_t* unit = address >= 0 ? registers + size_t(address) * kLanes : constants + size_t(~address) * kLanes;
  if (i.wide_address) {
    widen(reinterpret_cast<const uint64_t*>(unit));
  } else {
    widen(unit);
  }
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    const bool on = active >> lane & 1;
    low = std::min(low, on ? addresses[lane] : UINT64_MAX);
    high = std::max(high, on ? addresses[lane] : 0);
    bits |= on ? addresses[lane] : 0;
  }
  const auto each = [&](auto f) {
    for (uint32_t rest = active; rest; rest &= rest - 1) {
      const auto lane = uint32_t(__builtin_ctz(rest));
      f(lane, addresses[lane]);
    }
  };
  if (bits & (i.size - 1)) {
    each([&](uint32_t lane, uint64_t at) {
      if (at & (i.size - 1)) m.fault("misaligned access of " + number(i.size) + " bytes", i, first_thread + lane, at);
    });
  }
  Cost& cost = m.costs_[pc_];
  Space space = i.space;
  if (space == Space::kGeneric) {
    const bool is_shared = low >= kSharedWindow;
    if (is_shared != (high >= kSharedWindow)) m.fault("lanes of one access are in different kinds of memory", i);
    space = is_shared ? Space::kShared : Space::kGlobal;
    if (is_shared) {
      for (uint64_t& at : addresses) at -= kSharedWindow;
      low -= kSharedWindow, high -= kSharedWindow;
    }
  }
  if (space == Space::kParam) {
    if (high + i.size > m.parameters_->size()) m.fault("access beyond the kernel's parameters", i, first_thread, high);
    char* base = const_cast<char*>(m.parameters_->data());
    each([&](uint32_t lane, uint64_t at) { at_[lane] = base + at; });
    return at_;
  }
  const auto actor = [&](uint32_t lane) {
    return Actor(m.launch_, m.block_index_, m.time_, syncs_, first_thread + lane);
  };
  if (space == Space::kShared) {
    const uint64_t end = kSharedBase + m.shared_.size();
    if (low < kSharedBase || high + i.size > end) {
      each([&](uint32_t lane, uint64_t at) {
        if (at < kSharedBase || at + i.size > end) {
          m.fault((write ? "write" : "read") + std::string(" outside of the block's ") + number(m.shared_.size()) +
                      " bytes of shared memory",
                  i, first_thread + lane, at - kSharedBase);
        }
      });
    }
    if (m.checks_.costs) add_wavefronts(addresses, active, i.size, &cost);
    each([&](uint32_t lane, uint64_t at) {
      at_[lane] = m.shared_.data() + (at - kSharedBase);
      m.note(*m.shared_shadow_, at - kSharedBase, i.size, write, true, i, actor(lane), seen_);
    });
    return at_;
  }
  if (m.checks_.costs) cost.sectors += sectors(addresses, active);
  Allocation*& last = m.last_[pc_];
  const auto inside = [&](uint64_t first, uint64_t end) {
    return last && first >= last->address && end <= last->address + last->size;
  };
  const bool together = inside(low, high + i.size) || ((last = m.memory_.find(low, high - low + i.size)) != nullptr);
  each([&](uint32_t lane, uint64_t at) {
    if (!together && !inside(at, at + i.size)) {
      last = m.memory_.find(at, i.size);
      if (!last) {
        m.fault((write ? "write" : "read") + std::string(" of ") + number(i.size) + " bytes outside of device memory", i,
                first_thread + lane, at);
      }
    }
    if (last->device != m.device_) {
      m.fault((write ? "write" : "read") + std::string(" in memory of device ") + number(uint64_t(last->device)) + " on device " +
                  number(uint64_t(m.device_)),
              i, first_thread + lane, at);
    }
    at_[lane] = reinterpret_cast<char*>(at);
    if (!m.checks_.races) return;
    if (!last->shadow) last->shadow = std::make_unique<Shadow>(last->size);
    m.note(*last->shadow, at - last->address, i.size, write, false, i, actor(lane), seen_);
  });
  return at_;
}

// --- the machine -----------------------------------------------------------------------------------------------------------------

void Machine::fault(const std::string& what, const Instruction& instruction) const {
  throw Fault(what + ", block " + number(block_at_.x) + "," + number(block_at_.y) + "," + number(block_at_.z) + ", " +
              program_->where(instruction) + ", in " + kernel_->name);
}

void Machine::fault(const std::string& what, const Instruction& instruction, uint32_t thread, uint64_t address) const {
  fault(what + " at " + hex(address) + ", thread " + number(thread), instruction);
}

void Machine::note(Shadow& shadow, uint64_t at, uint32_t size, bool write, bool shared, const Instruction& i, Actor me,
                   const uint32_t* seen) {
  if (size == 1 && write) fault("stores of single bytes are not checked, and refused for it", i);
  const size_t first = at / 2, end = first + std::max(size / 2, 1u);
  for (size_t cell = first; cell < end; ++cell) {
    Actor& writer = shadow.writers[cell];
    Actor& reader = shadow.readers[cell];
    if (shared && !write && writer.nobody()) fault("shared memory is read before anything wrote it", i, me.thread(), at);
    if (checks_.races && !(writer == me) && writer.races(me, seen)) {
      fault("race: thread " + number(writer.thread()) + " of block " + number(writer.block()) + " wrote what this one " +
                (write ? "writes" : "reads"),
            i, me.thread(), at);
    }
    if (write) {
      if (checks_.races && !(reader == me) && reader.races(me, seen)) {
        fault("race: thread " + number(reader.thread()) + " of block " + number(reader.block()) + " read what this one writes",
              i, me.thread(), at);
      }
      writer = me;
    } else if (!(reader == me)) {
      reader = reader.joined(me, seen);
    }
  }
}

void Machine::run_warp(Warp& w) {
  const Instruction* code = kernel_->code.data();
  if (!w.here) w.next_group();
  while (w.here) {
    const Instruction& i = code[w.pc_];
    ++costs_[w.pc_].instructions;
    w.active = w.here;
    if (i.guard >= 0) w.active &= i.negated ? ~w.predicates[i.guard] : w.predicates[i.guard];
    switch (i.flow) {
      case Flow::kNext:
        if (w.active) i.handler(w, i);
        ++w.pc_;
        break;
      case Flow::kBranch:
        if (w.active == w.here) {
          w.pc_ = i.target;
        } else if (!w.active) {
          ++w.pc_;
        } else {
          w.jump(i.target, w.active);
          w.jump(w.pc_ + 1, w.here & ~w.active);
          w.next_group();
          continue;
        }
        break;
      case Flow::kBarrier:
        if (w.active != w.here) fault("a barrier under a condition", i);
        if (w.at_barrier_ && w.barrier_pc_ != w.pc_) fault("threads of a warp wait at different barriers", i);
        w.at_barrier_ |= w.here;
        w.barrier_pc_ = w.pc_;
        w.barrier_ = w.uniform(i.in[0], i);
        if (w.barrier_ > 15) fault("a block has 16 barriers", i);
        w.barrier_threads_ = i.in[1] == kEverybody ? 0 : w.uniform(i.in[1], i);
        if (w.barrier_threads_ % kLanes) fault("a barrier is for whole warps", i);
        w.next_group();
        continue;
      case Flow::kExit:
        w.exited_ |= w.active;
        w.jump(w.pc_ + 1, w.here & ~w.active);
        w.next_group();
        continue;
    }
    if (w.pc_ >= w.next_) {
      w.jump(w.pc_, w.here);
      w.next_group();
    }
  }
}

void Machine::run_block(uint64_t index) {
  block_index_ = index;
  block_at_ = {uint32_t(index % grid_.x), uint32_t(index / grid_.x % grid_.y), uint32_t(index / grid_.x / grid_.y)};
  std::fill(shared_.begin(), shared_.end(), char(0xff));
  std::fill(shared_shadow_->writers.begin(), shared_shadow_->writers.end(), Actor());
  std::fill(shared_shadow_->readers.begin(), shared_shadow_->readers.end(), Actor());
  const auto threads = uint32_t(block_.count());
  for (Warp& w : warps_) {
    const uint32_t here = lanes_below(threads - w.first_thread);
    w.groups_.assign(1, {0, here});
    w.here = w.at_barrier_ = w.syncs_ = w.barriers_ = 0;
    std::fill(w.seen_, w.seen_ + kLanes, 0u);
    w.exited_ = ~here;
    uint32_t* unit = w.registers;
    const auto fill = [&](auto value) {
      for (uint32_t lane = 0; lane < kLanes; ++lane) unit[lane] = value(w.first_thread + lane);
      unit += kLanes;
    };
    fill([&](uint32_t t) { return t % block_.x; });  // in the order of program.cpp
    fill([&](uint32_t t) { return t / block_.x % block_.y; });
    fill([&](uint32_t t) { return t / block_.x / block_.y; });
    for (const Extent& e : {block_, block_at_, grid_}) {
      for (const uint32_t n : {e.x, e.y, e.z}) fill([&](uint32_t) { return n; });
    }
    fill([&](uint32_t t) { return t % kLanes; });
    fill([&](uint32_t t) { return t / kLanes; });
  }
  for (time_ = 0;;) {
    for (Warp& w : warps_) run_warp(w);
    for (const Warp& w : warps_) barriers_ = std::max<uint64_t>(barriers_, w.barriers_);
    if (!pass_barriers()) return;
  }
}

// Lets those go on for whom all have come; false: nobody waits.
bool Machine::pass_barriers() {
  bool waits = false, passed = false;
  for (const Warp& first : warps_) {
    if (!first.at_barrier_) continue;
    waits = true;
    const Instruction& barrier = kernel_->code[first.barrier_pc_];
    const auto threads = uint32_t(block_.count()), wanted = first.barrier_threads_ ? first.barrier_threads_ : threads;
    uint32_t waiting = 0, seen[kLanes] = {};
    const auto each = [&](auto f) {
      for (Warp& w : warps_) {
        if (w.at_barrier_ && w.barrier_ == first.barrier_) f(w);
      }
    };
    each([&](const Warp& w) {
      if (w.barrier_pc_ != first.barrier_pc_) {
        fault("barrier: threads wait here and at " + program_->where(barrier), kernel_->code[w.barrier_pc_]);
      }
      if (w.barrier_threads_ != first.barrier_threads_) fault("barrier: threads wait here for different numbers of others", barrier);
      waiting += uint32_t(std::bitset<32>(w.at_barrier_).count());
    });
    if (waiting > wanted) fault("barrier: " + number(waiting) + " threads wait for " + number(wanted), barrier);
    if (waiting < wanted) continue;
    passed = true;
    if (++time_ >= Actor::kMaxTimes) fault("more barriers than can be told apart", barrier);
    each([&](const Warp& w) {
      for (uint32_t k = 0; k < kLanes; ++k) seen[k] = std::max(seen[k], w.seen_[k]);
      seen[w.first_thread / kLanes] = uint32_t(time_);
    });
    const uint32_t which = first.barrier_;
    for (Warp& w : warps_) {
      if (!w.at_barrier_ || w.barrier_ != which) continue;
      std::copy(seen, seen + kLanes, w.seen_);
      w.groups_.assign(1, {w.barrier_pc_ + 1, w.at_barrier_});
      w.at_barrier_ = w.syncs_ = 0;
      ++w.barriers_;
    }
  }
  for (const Warp& w : warps_) {
    if (passed || !w.at_barrier_) continue;
    uint32_t waiting = 0, left = 0;
    for (const Warp& other : warps_) {
      const bool here = other.at_barrier_ && other.barrier_ == w.barrier_;
      waiting += here ? uint32_t(std::bitset<32>(other.at_barrier_).count()) : 0;
      left += uint32_t(std::bitset<32>(other.exited_ & lanes_below(uint32_t(block_.count()) - other.first_thread)).count());
    }
    const std::string others = w.barrier_threads_ ? " of " + number(w.barrier_threads_) : "";
    fault("barrier: " + number(waiting) + others + " threads wait here and " + number(left) + " have left the kernel",
          kernel_->code[w.barrier_pc_]);
  }
  return waits;
}

void Machine::run(const Program& program, const Kernel& kernel, Extent grid, Extent block, const std::vector<char>& parameters,
                  size_t dynamic_shared, Checks checks, int device) {
  program_ = &program;
  kernel_ = &kernel;
  grid_ = grid, block_ = block;
  parameters_ = &parameters;
  checks_ = checks;
  device_ = device;
  barriers_ = 0;
  costs_.assign(kernel.code.size(), {});
  last_.assign(kernel.code.size(), nullptr);
  if (grid.count() > Actor::kMaxBlocks) fault("more blocks than can be told apart", kernel.code[0]);
  if (++launch_ > Actor::kLaunches) {
    memory_.forget_accesses();
    launch_ = 1;
  }
  shared_.resize(kernel.shared_bytes + dynamic_shared);
  if (!shared_shadow_ || shared_shadow_->writers.size() != (shared_.size() + 1) / 2) {
    shared_shadow_ = std::make_unique<Shadow>(shared_.size());
  }
  // registers of every warp, on lines of their own; what lanes without a thread compute is never looked at
  const auto count = uint32_t((block.count() + kLanes - 1) / kLanes);
  const auto whole = [](size_t words) { return (words + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes); };  // 64-bit registers
  const size_t each = whole(size_t(kernel.units) * kLanes), predicates = whole(kernel.predicates);
  const size_t constant = whole(kernel.constants.size()), needed = count * (each + predicates) + constant + 2 * kLanes;
  if (needed > storage_size_) {
    storage_.reset(new uint32_t[needed]());
    storage_size_ = needed;
  }
  auto* next = reinterpret_cast<uint32_t*>((reinterpret_cast<uintptr_t>(storage_.get()) + 255) / 256 * 256);
  std::copy(kernel.constants.begin(), kernel.constants.end(), next);
  const uint32_t* constants = next;
  next += constant;
  warps_.assign(count, Warp());
  for (uint32_t k = 0; k < count; ++k) {
    Warp& w = warps_[k];
    w.machine = this;
    w.first_thread = k * kLanes;
    w.constants = constants;
    w.registers = next;
    next += each;
    w.predicates = next;
    next += predicates;
  }
  for (uint64_t index = 0; index < grid.count(); ++index) run_block(index);
}

}  // namespace ptx
