// A model without weights: what it would compute for a token is a hash of where the token belongs, so that
// whoever checks can compute it again and needs no copy. Owns the shape and that hash; knows no memory.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

namespace engine {

enum class Part : std::uint32_t { Key = 0, Value = 1, Query = 2 };

struct Model {
    std::uint32_t layers;
    std::uint32_t kv_heads;
    std::uint32_t group;  // query heads that share a KV head
    std::uint32_t dim;    // of a head, a multiple of 4

    std::uint32_t query_heads() const { return kv_heads * group; }
    std::uint32_t words() const { return dim / 4; }
    // Elements are uniform between -1 and 1. With this scale scores deviate by 1, so that the weights of
    // attention differ and no token is lost among the others.
    float scale() const { return 3.0F / std::sqrt(static_cast<float>(dim)); }
};

// "lowbias32" of https://github.com/skeeto/hash-prospector: a permutation of 32 bits.
constexpr std::uint32_t SHIFTS[] = {16, 15, 16};
constexpr std::uint32_t FACTORS[] = {0x7feb352dU, 0x846ca68bU};
constexpr std::uint32_t ODD = 0x9e3779b1U;

inline std::uint32_t mix(std::uint32_t x) {
    x = (x ^ (x >> SHIFTS[0])) * FACTORS[0];
    x = (x ^ (x >> SHIFTS[1])) * FACTORS[1];
    return x ^ (x >> SHIFTS[2]);
}

// What all tokens of one head have in common.
inline std::uint32_t head_seed(std::uint64_t request, std::uint32_t layer, Part part, std::uint32_t head) {
    auto seed = mix(static_cast<std::uint32_t>(request) + ODD);
    seed = mix(seed ^ (layer * 4 + static_cast<std::uint32_t>(part)));
    return mix(seed ^ head);
}

// Four successive elements, a byte each: word `token * words + w` of a head.
inline std::uint32_t word(std::uint32_t seed, std::uint32_t number) { return mix(seed ^ (number * ODD)); }

// A byte as an element: exact in bfloat16 and in float32.
inline float element(std::uint32_t byte) {
    return static_cast<float>(static_cast<std::int32_t>(byte) - 128) * (1.0F / 128);
}

// A token's elements of one head.
inline void fill(const Model& model, std::uint32_t seed, std::uint64_t token, float* out) {
    for (std::uint32_t w = 0; w < model.words(); ++w) {
        const auto bits = word(seed, static_cast<std::uint32_t>(token) * model.words() + w);
        for (std::uint32_t byte = 0; byte < 4; ++byte) out[w * 4 + byte] = element(bits >> (8 * byte) & 255U);
    }
}

}  // namespace engine
