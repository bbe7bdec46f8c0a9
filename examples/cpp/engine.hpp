// Continuous batching over a cache: requests of a trace come by a clock of their own, are admitted, grow by a
// token a step, are preempted where memory is short, and are retired. Owns the queue and the batch; what a
// step computes is `Attention`'s, and where memory comes from is vattn's.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "attention.hpp"
#include "trace.hpp"

namespace engine {

struct Options {
    std::uint64_t budget;
    std::uint64_t max_tokens;
    std::uint32_t batch;        // the most requests in a step
    double step_seconds;        // how long a step takes by the trace's clock
    std::uint64_t spoil_step;   // the step in which a byte is spoilt; 0 for none
};

struct Totals {
    std::uint64_t steps = 0, finished = 0;
    std::uint64_t tokens = 0;       // keys and values written, recomputed ones included
    std::uint64_t preempted = 0;    // requests that gave their memory up and began again
    std::uint64_t grown = 0;        // steps in which a running request's memory grew
    std::uint64_t checked = 0;      // tokens of which all keys and values were compared at the end
    std::uint64_t differing = 0;    // elements of those that were not what was written
    std::uint64_t most_running = 0;
    std::uint64_t most_needed = 0, most_parked = 0, most_held = 0;  // bytes
    vattn::Stats cache{};
};

class Engine {
public:
    Engine(const Options& options, const Model& model, std::vector<Request> trace);
    // A cache may not end while kernels that no fence is given for use it: those of requests that still run.
    ~Engine() { attention_->wait(); }
    Engine(const Engine&) = delete;
    Engine& operator=(const Engine&) = delete;
    Totals run();
    const std::vector<Errors>& errors() { return attention_->errors(); }

private:
    struct Waiting {
        std::uint64_t request;
        std::uint64_t prompt;  // what is computed at once: after a preemption all that was there
    };
    struct Running {
        std::uint64_t request;
        std::uint64_t prompt;
        vattn::Slot slot;
        std::uint64_t held = 0;  // tokens; 0 until its first step

        std::uint64_t wanted() const { return held == 0 ? prompt : held + 1; }
        Piece piece() const { return {slot.index, request, held, wanted()}; }
    };

    void arrive();
    void make_room();
    void admit();
    void step();
    void finish();
    void retire(const Running& gone);
    bool batch_fits() const;
    std::vector<vattn::SlotTokens> entries() const;
    void watch();

    Options options_;
    std::vector<Request> trace_;
    std::unique_ptr<Attention> attention_;
    vattn::Cache cache_;
    double now_ = 0;
    std::size_t arrived_ = 0;
    std::deque<Waiting> waiting_;
    std::vector<Running> running_;  // by time of admission: the last is preempted first
    Totals totals_;
};

}  // namespace engine
