#include "engine.hpp"

#include <stdexcept>

namespace engine {
namespace {

constexpr const char* ALONE = "the memory is too small for a request that runs alone";

// Tokens to go that there has to be room for where a request is admitted. Without, one that was preempted
// would come back at once, and go again a step later.
constexpr std::uint64_t HEADROOM = 64;

vattn::Cache make_cache(const Options& options, Attention& attention) {
    const auto geometry = attention.geometry();
    const auto config = vattn::Config()
                            .with_budget(options.budget)
                            .with_max_slots(options.batch)
                            .with_max_tokens(options.max_tokens)
                            .with_tile_tokens(attention.tile_tokens(geometry));
    return vattn::Cache(config, geometry, attention.driver());
}

}  // namespace

Engine::Engine(const Options& options, const Model& model, std::vector<Request> trace)
    : options_(options),
      trace_(std::move(trace)),
      attention_(make_attention(model)),
      cache_(make_cache(options, *attention_)) {
    attention_->attach(cache_);
    for (const auto& request : trace_) {
        const auto bytes = cache_.bytes_for(request.tokens());
        if (bytes > options.budget) {
            throw std::runtime_error("a request of " + std::to_string(request.tokens()) + " tokens takes " +
                                     std::to_string(bytes) + " bytes: more than the budget of " +
                                     std::to_string(options.budget) + "; give it more with --budget");
        }
    }
}

Totals Engine::run() {
    while (totals_.finished < trace_.size()) {
        arrive();
        make_room();
        admit();
        if (running_.empty()) {
            if (!waiting_.empty()) throw std::runtime_error(ALONE);
            now_ = trace_.at(arrived_).arrival;
            continue;
        }
        step();
        finish();
        now_ += options_.step_seconds;
    }
    totals_.differing = attention_->differing();
    totals_.cache = cache_.stats();
    return totals_;
}

void Engine::arrive() {
    for (; arrived_ < trace_.size() && trace_[arrived_].arrival <= now_; ++arrived_) {
        waiting_.push_back({arrived_, trace_[arrived_].prompt});
    }
}

// Whoever was admitted last goes first, and waits at the front of the queue. Its memory is parked from then
// on: free for the others, and mapped still if it comes back soon.
void Engine::make_room() {
    while (!running_.empty() && !batch_fits()) {
        if (running_.size() == 1) throw std::runtime_error(ALONE);
        const auto last = running_.back();
        running_.pop_back();
        waiting_.push_front({last.request, last.held});
        retire(last);
        ++totals_.preempted;
    }
}

// As many as there is memory for beside what those that run need next.
void Engine::admit() {
    std::vector<std::uint64_t> prompts;
    for (const auto& request : waiting_) {
        if (running_.size() + prompts.size() == options_.batch) break;
        prompts.push_back(std::min(request.prompt + HEADROOM, trace_[request.request].tokens()));
    }
    const auto admitted = cache_.admits(prompts);
    for (std::size_t number = 0; number < admitted; ++number) {
        const auto next = waiting_.front();
        const auto slot = cache_.acquire_on(next.prompt, attention_->stream());
        running_.push_back({next.request, next.prompt, slot});
        if (!batch_fits()) {
            cache_.retire(slot, vattn::Fence::stream(attention_->stream()));
            running_.pop_back();
            break;
        }
        waiting_.pop_front();
    }
}

void Engine::step() {
    const auto before = cache_.bytes().mapped;
    cache_.step(entries());
    watch();

    std::vector<Piece> batch;
    bool growing = true;
    for (const auto& request : running_) {
        batch.push_back(request.piece());
        growing &= request.held > 0;
        totals_.tokens += request.wanted() - request.held;
    }
    totals_.grown += growing && cache_.bytes().mapped > before;
    attention_->step(batch);
    if (++totals_.steps == options_.spoil_step) attention_->spoil(batch.front());
    for (auto& request : running_) request.held = request.wanted();
}

void Engine::finish() {
    std::vector<Running> remaining;
    for (const auto& request : running_) {
        if (request.held < trace_[request.request].tokens()) {
            remaining.push_back(request);
            continue;
        }
        retire(request);
        ++totals_.finished;
    }
    running_ = std::move(remaining);
}

// The kernels of its last step may still run: the fence tells when they are done.
void Engine::retire(const Running& gone) {
    attention_->compare({gone.slot.index, gone.request, 0, gone.held});
    totals_.checked += gone.held;
    cache_.retire(gone.slot, vattn::Fence::stream(attention_->stream()));
}

bool Engine::batch_fits() const {
    const auto fits = cache_.fits(entries());
    return std::all_of(fits.get(), fits.get() + running_.size(), [](bool one) { return one; });
}

// The batch as vattn takes it: each slot with its tokens in all.
std::vector<vattn::SlotTokens> Engine::entries() const {
    std::vector<vattn::SlotTokens> entries;
    for (const auto& request : running_) entries.push_back({request.slot, request.wanted()});
    return entries;
}

void Engine::watch() {
    const auto bytes = cache_.bytes();
    totals_.most_running = std::max<std::uint64_t>(totals_.most_running, running_.size());
    totals_.most_needed = std::max(totals_.most_needed, bytes.needed);
    totals_.most_parked = std::max(totals_.most_parked, bytes.parked);
    totals_.most_held = std::max(totals_.most_held, bytes.held);
}

}  // namespace engine
