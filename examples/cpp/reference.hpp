// Attention in float32, over what the hash says keys and values are and never over the cache. It goes by
// blocks of tokens with a running maximum, one dimension after the other, so that it shares no loop with what
// it checks.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "model.hpp"

namespace engine {

class Reference {
public:
    explicit Reference(const Model& model)
        : model_(model), keys_(model.dim), values_(model.dim), sums_(model.dim) {}

    // The output for `query` of a query head over the tokens before `tokens` of its KV head.
    void attend(std::uint64_t request, std::uint32_t layer, std::uint32_t kv_head, const float* query,
                std::uint64_t tokens, float* out) {
        const auto key_seed = head_seed(request, layer, Part::Key, kv_head);
        const auto value_seed = head_seed(request, layer, Part::Value, kv_head);
        float highest = -INFINITY;
        double weights = 0;
        std::fill(sums_.begin(), sums_.end(), 0.0);
        for (std::uint64_t from = 0; from < tokens; from += BLOCK) {
            fill_block(key_seed, from, keys_);
            fill_block(value_seed, from, values_);
            Block scores{};
            for (std::uint32_t d = 0; d < model_.dim; ++d) {
                const float factor = query[d] * model_.scale();
                for (std::size_t at = 0; at < BLOCK; ++at) scores[at] += factor * keys_[d][at];
            }
            const auto count = static_cast<std::size_t>(std::min<std::uint64_t>(BLOCK, tokens - from));
            std::fill(scores.begin() + static_cast<std::ptrdiff_t>(count), scores.end(), -INFINITY);
            const float top = std::max(highest, *std::max_element(scores.begin(), scores.end()));
            const double shrink = static_cast<double>(std::exp(highest - top));
            highest = top;
            float weight = 0;
            for (std::size_t at = 0; at < count; ++at) weight += scores[at] = std::exp(scores[at] - highest);
            std::fill(scores.begin() + static_cast<std::ptrdiff_t>(count), scores.end(), 0.0F);
            weights = weights * shrink + static_cast<double>(weight);
            for (std::uint32_t d = 0; d < model_.dim; ++d) {
                std::array<float, LANES> lanes{};
                for (std::size_t at = 0; at < BLOCK; at += LANES) {
                    for (std::size_t lane = 0; lane < LANES; ++lane) {
                        lanes[lane] += scores[at + lane] * values_[d][at + lane];
                    }
                }
                sums_[d] *= shrink;
                for (const float lane : lanes) sums_[d] += static_cast<double>(lane);
            }
        }
        for (std::uint32_t d = 0; d < model_.dim; ++d) out[d] = static_cast<float>(sums_[d] / weights);
    }

private:
    static constexpr std::size_t BLOCK = 128, LANES = 8;
    using Block = std::array<float, BLOCK>;

    // The elements of BLOCK tokens of a head, by dimension.
    void fill_block(std::uint32_t seed, std::uint64_t from, std::vector<Block>& out) const {
        const auto words = model_.words(), first = static_cast<std::uint32_t>(from) * words;
        for (std::uint32_t w = 0; w < words; ++w) {
            std::array<std::uint32_t, BLOCK> bits;
            for (std::uint32_t at = 0; at < BLOCK; ++at) bits[at] = word(seed, first + at * words + w);
            for (std::uint32_t byte = 0; byte < 4; ++byte) {
                auto& block = out[w * 4 + byte];
                for (std::size_t at = 0; at < BLOCK; ++at) block[at] = element(bits[at] >> (8 * byte) & 255U);
            }
        }
    }

    Model model_;
    std::vector<Block> keys_, values_;
    std::vector<double> sums_;
};

}  // namespace engine
