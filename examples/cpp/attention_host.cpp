// Attention on the host, computed plainly over a slot's contiguous tokens: a row of keys, a row of values,
// and nothing of vattn's in between.

#include <cmath>
#include <stdexcept>

#include "attention.hpp"
#include "reference.hpp"

namespace engine {
namespace {

// Of a prompt's queries only these are computed, and its last: all of them would take most of the time, and
// attend to the same keys and values.
constexpr std::uint64_t EVERY = 64;

// Small, as the model is: 64 tokens of keys, where Llama-3-8B has 32 to a GPU's 2 MiB.
constexpr std::uint64_t GRANULE = 4096;
constexpr std::uint64_t CAPACITY = std::uint64_t{1} << 30;

// A head's keys or values of one slot.
struct Row {
    float* data;
    std::int64_t stride;  // elements from one token to the next

    float* token(std::uint64_t number) const { return data + static_cast<std::int64_t>(number) * stride; }
};

class HostAttention final : public Attention {
public:
    explicit HostAttention(const Model& model)
        : model_(model), reference_(model), query_(model.dim), out_(model.dim), expected_(model.dim) {}

    vattn::Driver driver() override;
    vattn::Geometry geometry() override;
    std::uint32_t tile_tokens(const vattn::Geometry &) override { return 1; }
    // Any number may name a stream of the host driver. What is in it is done at once, as the work here is.
    void* stream() override { return this; }
    void attach(const vattn::Cache& cache) override;
    void step(const std::vector<Piece>& batch) override {
        for (const auto& piece : batch) {
            for (std::uint32_t layer = 0; layer < model_.layers; ++layer) {
                for (std::uint32_t head = 0; head < model_.kv_heads; ++head) {
                    write(piece, layer, head);
                    for (auto token = piece.first; token < piece.tokens; ++token) {
                        if (token % EVERY == 0 || token + 1 == piece.tokens) check(piece, layer, head, token);
                    }
                }
            }
        }
    }
    void compare(const Piece& piece) override;
    void spoil(const Piece& piece) override {
        float& element = *row(piece.slot, model_.layers - 1, Part::Key, 0).token(piece.tokens - 1);
        element += 1.0F / 128;
    }
    void wait() override {}
    std::uint64_t differing() override { return differing_; }
    const std::vector<Errors>& errors() override { return errors_; }

private:
    Row row(std::uint32_t slot, std::uint32_t layer, Part part, std::uint32_t head) const {
        const auto& elements = views_[layer * 2 + static_cast<std::uint32_t>(part)];
        return {&elements(slot, 0, head, 0), elements.stride(1)};
    }

    void write(const Piece& piece, std::uint32_t layer, std::uint32_t head) {
        for (const auto part : {Part::Key, Part::Value}) {
            const auto seed = head_seed(piece.request, layer, part, head);
            const auto target = row(piece.slot, layer, part, head);
            for (auto token = piece.first; token < piece.tokens; ++token) {
                fill(model_, seed, token, target.token(token));
            }
        }
    }

    // The outputs of one token's queries of a KV head, each against its reference.
    void check(const Piece& piece, std::uint32_t layer, std::uint32_t head, std::uint64_t token) {
        const auto keys = row(piece.slot, layer, Part::Key, head);
        const auto values = row(piece.slot, layer, Part::Value, head);
        for (std::uint32_t of = 0; of < model_.group; ++of) {
            const auto seed = head_seed(piece.request, layer, Part::Query, head * model_.group + of);
            fill(model_, seed, token, query_.data());
            attend(keys, values, token + 1);
            reference_.attend(piece.request, layer, head, query_.data(), token + 1, expected_.data());
            double difference = 0, norm = 0;
            for (std::uint32_t d = 0; d < model_.dim; ++d) {
                difference += std::pow(static_cast<double>(out_[d]) - static_cast<double>(expected_[d]), 2);
                norm += std::pow(static_cast<double>(expected_[d]), 2);
            }
            errors_[0].add(std::sqrt(difference / norm));
        }
    }

    // Softmax of the scores, times the values.
    void attend(Row keys, Row values, std::uint64_t tokens) {
        scores_.resize(tokens);
        float highest = -INFINITY;
        for (std::uint64_t token = 0; token < tokens; ++token) {
            const float* key = keys.token(token);
            float dot = 0;
            for (std::uint32_t d = 0; d < model_.dim; ++d) dot += query_[d] * key[d];
            scores_[token] = dot * model_.scale();
            highest = std::max(highest, scores_[token]);
        }
        float sum = 0;
        std::fill(out_.begin(), out_.end(), 0.0F);
        for (std::uint64_t token = 0; token < tokens; ++token) {
            const float* value = values.token(token);
            const float weight = std::exp(scores_[token] - highest);
            sum += weight;
            for (std::uint32_t d = 0; d < model_.dim; ++d) out_[d] += weight * value[d];
        }
        for (auto& element : out_) element /= sum;
    }

    Model model_;
    Reference reference_;
    std::vector<vattn::Elements<float>> views_;  // keys and values of each layer in turn
    std::vector<float> query_, out_, expected_, scores_;
    std::uint64_t differing_ = 0;
    std::vector<Errors> errors_ = {{"plain loops", 1e-3}};
};

vattn::Driver HostAttention::driver() {
    return vattn::Driver::host({CAPACITY, GRANULE});
}

vattn::Geometry HostAttention::geometry() {
    return vattn::Geometry({{model_.layers, model_.kv_heads, model_.dim, model_.dim}}, 1, vattn::Dtype::F32);
}

void HostAttention::attach(const vattn::Cache& cache) {
    for (std::uint32_t layer = 0; layer < model_.layers; ++layer) {
        for (const auto part : {vattn::Part::Key, vattn::Part::Value}) {
            views_.push_back(cache.view(layer, part).typed<float>());
        }
    }
}

void HostAttention::compare(const Piece& piece) {
    for (std::uint32_t layer = 0; layer < model_.layers; ++layer) {
        for (std::uint32_t head = 0; head < model_.kv_heads; ++head) {
            for (const auto part : {Part::Key, Part::Value}) {
                const auto seed = head_seed(piece.request, layer, part, head);
                const auto found = row(piece.slot, layer, part, head);
                for (std::uint64_t token = 0; token < piece.tokens; ++token) {
                    fill(model_, seed, token, expected_.data());
                    const float* element = found.token(token);
                    for (std::uint32_t d = 0; d < model_.dim; ++d) differing_ += element[d] != expected_[d];
                }
            }
        }
    }
}

}  // namespace

Defaults defaults() { return {{2, 1, 1, 8}, std::uint64_t{6} << 20, 2000, 64}; }

std::unique_ptr<Attention> make_attention(const Model& model) {
    return std::make_unique<HostAttention>(model);
}

}  // namespace engine
