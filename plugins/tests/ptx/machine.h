// Runs a decoded kernel: block after block, a block's warps in turn from barrier to barrier, 32 lanes at once.
//
// Every access is checked: inside an allocation, aligned, shared memory written before it is read, and no two threads at the same
// two bytes with nothing between them that orders them, one of them writing. The first fault ends the launch.
#ifndef SDCT_TESTS_PTX_MACHINE_H_
#define SDCT_TESTS_PTX_MACHINE_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "program.h"

namespace ptx {

// Generic addresses of shared memory start here, its own addresses at kSharedBase: 0 stays an error.
constexpr uint64_t kSharedWindow = uint64_t(0x7d) << 56;
constexpr uint64_t kSharedBase = 1024;

// Who touched two bytes last, and when: the time is the number of barriers that the block had completed. An access is ordered
// against another one by a launch, by barriers (which thread waited for which, also through others), or by a synchronisation of the
// same warp; `level` says that several did: lanes of a warp, a range of warps of a block, blocks of a launch.
class Actor {
 public:
  enum Level : uint64_t { kThread, kLanes, kWarps, kBlocks };
  static constexpr uint64_t kLaunches = 63, kMaxBlocks = uint64_t(1) << 18, kMaxTimes = uint64_t(1) << 18, kMaxSyncs = 1024;

  Actor() = default;  // nobody
  Actor(uint64_t launch, uint64_t block, uint64_t time, uint64_t sync, uint64_t thread)
      : bits_(launch << 58 | block << 40 | time << 22 | sync << 10 | thread) {}

  bool nobody() const { return bits_ == 0; }
  uint32_t thread() const { return level() == kWarps ? first_warp() * kLanesOfWarp : uint32_t(bits_ & 1023); }
  uint32_t block() const { return uint32_t(bits_ >> 40 & (kMaxBlocks - 1)); }
  bool operator==(Actor other) const { return bits_ == other.bits_; }
  // An access by `me` with this earlier one; what warp w did before seen[w] comes before what `me` does.
  bool races(Actor me, const uint32_t* seen) const {
    if ((bits_ ^ me.bits_) >> 58) return false;
    if ((bits_ ^ me.bits_) >> 40 || level() == kBlocks) return true;
    bool passed = true;
    for (uint32_t w = first_warp(); w <= last_warp(); ++w) passed = passed && time() < seen[w];
    if (passed) return false;
    if (level() == kWarps || first_warp() != me.first_warp()) return true;
    return sync() == me.sync() && (level() == kLanes || thread() != me.thread());
  }
  Actor joined(Actor me, const uint32_t* seen) const {  // after a read by `me`
    if ((bits_ ^ me.bits_) >> 58) return me;
    if ((bits_ ^ me.bits_) >> 40 || level() == kBlocks) return me.at(kBlocks);
    if (!races(me, seen)) return me;
    const uint64_t first = first_warp() < me.first_warp() ? first_warp() : me.first_warp();
    const uint64_t last = last_warp() > me.last_warp() ? last_warp() : me.last_warp();
    if (first == last && level() != kWarps) return me.at(kLanes);
    Actor out = me.at(kWarps);
    out.bits_ = (out.bits_ & ~uint64_t(1023)) | last << 5 | first;
    return out;
  }

 private:
  static constexpr uint32_t kLanesOfWarp = 32;
  Level level() const { return Level(bits_ >> 20 & 3); }
  uint32_t time() const { return uint32_t(bits_ >> 22 & (kMaxTimes - 1)); }
  uint32_t sync() const { return uint32_t(bits_ >> 10 & (kMaxSyncs - 1)); }
  uint32_t first_warp() const { return uint32_t(level() == kWarps ? bits_ & 31 : bits_ >> 5 & 31); }
  uint32_t last_warp() const { return uint32_t(bits_ >> 5 & 31); }
  Actor at(Level level) const {
    Actor out = *this;
    out.bits_ |= uint64_t(level) << 20;
    return out;
  }
  uint64_t bits_ = 0;  // launch 6, block 18, time 18, level 2, sync 10, thread 10 (of kWarps: the last and the first warp)
};

// The last writer and reader of every two bytes.
struct Shadow {
  std::vector<Actor> writers, readers;
  explicit Shadow(size_t bytes) : writers((bytes + 1) / 2), readers((bytes + 1) / 2) {}
};

struct Allocation {
  uint64_t address;
  size_t size;
  int device;
  std::unique_ptr<Shadow> shadow;  // once a kernel has touched it
};

// Device memory: by address.
class Memory {
 public:
  void* allocate(size_t bytes, int device);  // filled with NaNs; null where the machine has no more
  bool release(void* pointer);   // false: nothing starts there
  size_t count() const { return allocations_.size(); }
  // What [address, address + size) lies in; null where it is in nothing.
  Allocation* find(uint64_t address, uint64_t size);
  void forget_accesses();

 private:
  std::map<uint64_t, Allocation> allocations_;
};

struct Extent {
  uint32_t x = 1, y = 1, z = 1;
  uint64_t count() const { return uint64_t(x) * y * z; }
};

// What a warp instruction cost, summed over all its executions.
struct Cost {
  uint64_t instructions = 0;
  uint64_t wavefronts = 0;  // passes over the 32 banks of shared memory
  uint64_t ideal = 0;       // wavefronts without bank conflicts
  uint64_t sectors = 0;     // distinct 32 bytes of global memory
};

struct Checks {
  bool races = true;
  bool costs = false;  // wavefronts and sectors; instructions are always counted
};

class Machine;

class Warp {
 public:
  uint32_t* registers = nullptr;  // of the operands, see program.h
  const uint32_t* constants = nullptr;
  uint32_t* predicates = nullptr;
  uint32_t active = 0;  // lanes that execute the present instruction
  uint32_t here = 0;    // lanes that have arrived at it
  uint32_t first_thread = 0;
  Machine* machine = nullptr;

  // The host addresses of the active lanes' operands of a load or store, checked.
  char* const* resolve(const Instruction& instruction, Operand address, bool write);
  void meet(uint32_t members, const Instruction& instruction) const;  // faults where one of `members` is not here
  void synchronise(uint32_t members, const Instruction& instruction);  // meets, and orders the lanes' accesses
  [[noreturn]] void stop(const std::string& what, const Instruction& instruction) const;
  uint32_t uniform(Operand operand, const Instruction& instruction) const;  // faults where lanes have different values

 private:
  friend class Machine;
  struct Group {
    uint32_t pc, lanes;
  };
  void next_group();
  void jump(uint32_t pc, uint32_t lanes);

  uint32_t pc_ = 0;
  uint32_t next_ = UINT32_MAX;  // lowest pc of the groups that wait for their turn
  std::vector<Group> groups_;
  uint32_t at_barrier_ = 0, barrier_pc_ = 0, barrier_ = 0, barrier_threads_ = 0;  // lanes; where; which; for how many
  uint32_t exited_ = 0, syncs_ = 0, barriers_ = 0;
  uint32_t seen_[kLanes] = {};  // what warp w did before that time comes before what this one does
  char* at_[kLanes];
};

class Machine {
 public:
  explicit Machine(Memory& memory) : memory_(memory) {}
  // Runs the whole grid. `parameters` is laid out as the kernel's PTX has it. Throws Fault.
  void run(const Program& program, const Kernel& kernel, Extent grid, Extent block, const std::vector<char>& parameters,
           size_t dynamic_shared, Checks checks, int device = 0);
  // Of the last run: for each instruction, and the most barriers that a block met.
  const std::vector<Cost>& costs() const { return costs_; }
  uint64_t barriers() const { return barriers_; }

 private:
  friend class Warp;
  [[noreturn]] void fault(const std::string& what, const Instruction& instruction) const;
  [[noreturn]] void fault(const std::string& what, const Instruction& instruction, uint32_t thread, uint64_t address) const;
  void run_block(uint64_t index);
  void run_warp(Warp& warp);
  bool pass_barriers();
  void note(Shadow& shadow, uint64_t at, uint32_t size, bool write, bool shared, const Instruction& instruction, Actor me,
            const uint32_t* seen);

  Memory& memory_;
  const Program* program_ = nullptr;
  const Kernel* kernel_ = nullptr;
  Extent grid_, block_;
  Extent block_at_;
  const std::vector<char>* parameters_ = nullptr;
  Checks checks_;
  int device_ = 0;
  std::vector<Cost> costs_;
  std::vector<Allocation*> last_;  // where an instruction's accesses fell before
  uint64_t launch_ = 0, block_index_ = 0, time_ = 0, barriers_ = 0;

  std::vector<Warp> warps_;
  std::unique_ptr<uint32_t[]> storage_;
  size_t storage_size_ = 0;
  std::vector<char> shared_;
  std::unique_ptr<Shadow> shared_shadow_;
};

}  // namespace ptx

#endif  // SDCT_TESTS_PTX_MACHINE_H_
