// What the engine asks of whoever computes: `attention_host.cpp` and `attention_torch.cpp` answer it, one of
// them in each build.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "model.hpp"
#include "vattn.hpp"

namespace engine {

// A request's part of a step: its tokens from `first` to `tokens` are new.
struct Piece {
    std::uint32_t slot;
    std::uint64_t request;
    std::uint64_t first;
    std::uint64_t tokens;
};

// How far a kernel's outputs are from float32: the norm of the difference by that of the reference, for each
// query of each head.
struct Errors {
    std::string kernel;
    double bound;
    std::uint64_t outputs = 0;
    double worst = 0;
    double sum = 0;

    void add(double error) { add(1, error, error); }
    void add(std::uint64_t count, double largest, double total) {
        outputs += count;
        // NaN is as bad as it gets, and no maximum would say so.
        worst = std::isfinite(largest) ? std::max(worst, largest) : INFINITY;
        sum += total;
    }
};

// What a build uses where the command line says nothing.
struct Defaults {
    Model model;
    std::uint64_t budget;
    std::size_t limit;
    std::size_t batch;
};

class Attention {
public:
    virtual ~Attention() = default;
    virtual vattn::Driver driver() = 0;
    // The kernels by the names that vattn has for them, and the type of the elements.
    virtual vattn::Geometry geometry() = 0;
    virtual std::uint32_t tile_tokens(const vattn::Geometry& geometry) = 0;
    // Where the work runs; what the cache's fences are made of.
    virtual void* stream() = 0;
    // Asks for the views, once: they stay where they are while the cache lives.
    virtual void attach(const vattn::Cache& cache) = 0;
    // Writes the new tokens' keys and values, attends with their queries, and checks every output.
    virtual void step(const std::vector<Piece>& batch) = 0;
    // Compares all of a request's keys and values with what was written, bit for bit.
    virtual void compare(const Piece& piece) = 0;
    // Changes one element of a request's last token, for a test of the checks.
    virtual void spoil(const Piece& piece) = 0;
    // Waits until nothing runs any more.
    virtual void wait() = 0;
    // Elements that `compare` found to differ, and the errors of the outputs. A build for a device waits here
    // and nowhere before.
    virtual std::uint64_t differing() = 0;
    virtual const std::vector<Errors>& errors() = 0;
};

Defaults defaults();
std::unique_ptr<Attention> make_attention(const Model& model);

}  // namespace engine
