// Attention on a GPU with libtorch: the cache's views become tensors, and two kernels that know nothing of
// vattn run over them, PyTorch's FlashAttention and FlashAttention-3. Each step compares both with float32.

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <stdexcept>

#include "attention.hpp"

namespace engine {
namespace {

// A view as a tensor over the cache's memory. The device is named, because CUDA can't tell where an address
// lies that nothing is mapped at yet.
at::Tensor tensor_of(const vattn::View& view) {
    const at::Device device(at::kCUDA, static_cast<c10::DeviceIndex>(view.device_id()));
    return at::for_blob(view.data(), {view.shape().data(), 4})
        .strides(at::IntArrayRef(view.strides().data(), 4))
        .options(at::TensorOptions(device).dtype(at::kBFloat16))
        .target_device(device)
        .make_tensor();
}

struct Layer {
    at::Tensor keys, values;          // [slot, token, head, dim]
    at::Tensor key_row, value_row;    // the same as [token, head, dim]
};

// From pinned memory, so that the host does not wait.
template <class T>
at::Tensor upload(const std::vector<T>& numbers) {
    const auto here = at::tensor(at::ArrayRef<T>(numbers));
    return (numbers.empty() ? here : here.pin_memory()).to(at::kCUDA, /*non_blocking=*/true);
}

// `word` and `element` of model.hpp on the device. There is no unsigned type to shift there: products of
// int32 are the same, and shifts lose the sign to a mask.
at::Tensor shifted(const at::Tensor& x, std::uint32_t by) {
    return x.bitwise_right_shift(static_cast<std::int64_t>(by))
        .bitwise_and_(static_cast<std::int64_t>(0xffffffffU >> by));
}

std::int64_t as_int32(std::uint32_t x) { return static_cast<std::int32_t>(x); }

at::Tensor mixed(at::Tensor x) {
    x = x.bitwise_xor(shifted(x, SHIFTS[0])).mul_(as_int32(FACTORS[0]));
    x = x.bitwise_xor_(shifted(x, SHIFTS[1])).mul_(as_int32(FACTORS[1]));
    return x.bitwise_xor_(shifted(x, SHIFTS[2]));
}

// Tokens by the seeds of their heads, `[token, head]`, and by their numbers, `[token]`: `[token, head, dim]`.
at::Tensor content(const Model& model, const at::Tensor& seeds, const at::Tensor& tokens) {
    const auto int32 = tokens.options();
    const auto first = tokens.mul(as_int32(model.words())).view({-1, 1, 1});
    const auto numbers = first + at::arange(model.words(), int32);
    const auto words = mixed(numbers.mul(as_int32(ODD)).bitwise_xor(seeds.unsqueeze(2)));
    const auto bytes = words.unsqueeze(3).bitwise_right_shift(at::arange(0, 32, 8, int32)).bitwise_and_(255);
    return bytes.to(at::kFloat).sub_(128).mul_(1.0 / 128).flatten(2);
}

// Calls an operator by the names of its arguments; the others have their defaults.
at::Tensor call(const c10::OperatorHandle& operation, std::map<std::string, c10::IValue> arguments) {
    torch::jit::Stack stack;
    for (const auto& argument : operation.schema().arguments()) {
        const auto given = arguments.find(argument.name());
        if (given != arguments.end()) {
            stack.push_back(given->second);
            arguments.erase(given);
        } else {
            stack.push_back(argument.default_value().value_or(c10::IValue()));
        }
    }
    if (!arguments.empty()) {
        throw std::runtime_error("the operator has no argument " + arguments.begin()->first);
    }
    operation.callBoxed(stack);
    return stack.at(0).toTensor();
}

// FlashAttention-3's operator, which its library registers where it is loaded.
std::optional<c10::OperatorHandle> find_fa3() {
    const char* path = std::getenv("FA3_LIBRARY");
    if (path == nullptr) {
        std::printf("SKIP: FlashAttention-3: FA3_LIBRARY does not name the fa3-fwd wheel's _C.abi3.so\n");
        return std::nullopt;
    }
    // Lazily: it names functions of Python, which nobody calls here.
    if (dlopen(path, RTLD_LAZY | RTLD_LOCAL) == nullptr) throw std::runtime_error(dlerror());
    return c10::Dispatcher::singleton().findSchemaOrThrow("fa3_fwd::fwd", "");
}

// A step's batch, laid out for the kernels. Everything is by token unless it says otherwise.
struct Batch {
    Batch(const Model& model, const std::vector<Piece>& pieces, std::int64_t stride, std::uint64_t tile,
          std::uint64_t max_tokens);

    std::vector<Piece> pieces;
    std::int64_t most_new = 0, most_tokens = 0;
    at::Tensor rows, numbers, piece_of;     // the new tokens: their places in a row view, numbers, pieces
    at::Tensor beyond;                      // rows that a tile reaches and that hold nothing yet
    at::Tensor all_numbers, all_piece_of;   // every token of the batch, for the reference
    at::Tensor seeds;                       // [piece, layer, head of keys, of values, of queries]
    at::Tensor query_starts, key_starts, used;           // variable lengths: [piece + 1] twice, [piece]
    at::Tensor decoding, decoding_slots, decoding_used;  // the pieces of one new token
};

Batch::Batch(const Model& model, const std::vector<Piece>& all, std::int64_t stride, std::uint64_t tile,
             std::uint64_t max_tokens)
    : pieces(all) {
    std::vector<std::int64_t> new_rows, beyond_rows, decoding_queries;
    std::vector<std::int32_t> new_numbers, new_piece_of, every_number, every_piece_of, seed;
    std::vector<std::int32_t> starts{0}, begins, lengths, slots, slot_lengths;
    const auto rounded = [&](std::uint64_t tokens) {
        return std::min((tokens + tile - 1) / tile * tile, max_tokens);
    };
    const auto heads = [&](const Piece& piece, std::uint32_t layer, Part part, std::uint32_t count) {
        for (std::uint32_t head = 0; head < count; ++head) {
            seed.push_back(static_cast<std::int32_t>(head_seed(piece.request, layer, part, head)));
        }
    };
    for (std::size_t number = 0; number < all.size(); ++number) {
        const auto& piece = all[number];
        const auto at = static_cast<std::int32_t>(number);
        const auto begin = piece.slot * stride;
        for (std::uint64_t token = 0; token < piece.tokens; ++token) {
            every_number.push_back(static_cast<std::int32_t>(token));
            every_piece_of.push_back(at);
            if (token < piece.first) continue;
            new_rows.push_back(begin + static_cast<std::int64_t>(token));
            new_numbers.push_back(static_cast<std::int32_t>(token));
            new_piece_of.push_back(at);
        }
        const auto backed = rounded(piece.tokens);
        for (auto token = std::max(piece.tokens, rounded(piece.first)); token < backed; ++token) {
            beyond_rows.push_back(begin + static_cast<std::int64_t>(token));
        }
        for (std::uint32_t layer = 0; layer < model.layers; ++layer) {
            heads(piece, layer, Part::Key, model.kv_heads);
            heads(piece, layer, Part::Value, model.kv_heads);
            heads(piece, layer, Part::Query, model.query_heads());
        }
        if (piece.tokens - piece.first == 1) {
            decoding_queries.push_back(starts.back());
            slots.push_back(static_cast<std::int32_t>(piece.slot));
            slot_lengths.push_back(static_cast<std::int32_t>(piece.tokens));
        }
        starts.push_back(static_cast<std::int32_t>(new_rows.size()));
        begins.push_back(static_cast<std::int32_t>(begin));
        lengths.push_back(static_cast<std::int32_t>(piece.tokens));
        most_new = std::max(most_new, static_cast<std::int64_t>(piece.tokens - piece.first));
        most_tokens = std::max(most_tokens, static_cast<std::int64_t>(piece.tokens));
    }
    begins.push_back(begins.back() + lengths.back());
    rows = upload(new_rows), numbers = upload(new_numbers), piece_of = upload(new_piece_of);
    beyond = upload(beyond_rows);
    all_numbers = upload(every_number), all_piece_of = upload(every_piece_of);
    seeds = upload(seed).view({static_cast<std::int64_t>(all.size()), model.layers, -1});
    query_starts = upload(starts), key_starts = upload(begins), used = upload(lengths);
    decoding = upload(decoding_queries), decoding_slots = upload(slots), decoding_used = upload(slot_lengths);
}

class TorchAttention final : public Attention {
public:
    explicit TorchAttention(const Model& model);

    vattn::Driver driver() override { return vattn::Driver::cuda({0}); }
    vattn::Geometry geometry() override {
        const vattn::Layers layers{model_.layers, model_.kv_heads, model_.dim, model_.dim};
        return vattn::Geometry({layers}, 1, vattn::Dtype::BF16);
    }
    // PyTorch's kernel reads nothing past a length. FlashAttention-3 over the whole batch does.
    std::uint32_t tile_tokens(const vattn::Geometry& geometry) override {
        const auto tokens = geometry.tile_tokens(fa3_ ? "fa3-decode" : "torch-varlen");
        tile_ = tokens;
        return tokens;
    }
    void* stream() override { return stream_.stream(); }
    void attach(const vattn::Cache& cache) override;
    void step(const std::vector<Piece>& pieces) override;
    void compare(const Piece& piece) override;
    void spoil(const Piece& piece) override;
    void wait() override;
    std::uint64_t differing() override { return static_cast<std::uint64_t>(differing_.item<std::int64_t>()); }
    const std::vector<Errors>& errors() override;

private:
    // What a kernel's errors come to so far, on the device.
    struct Tally {
        at::Tensor worst, sum;
        std::uint64_t outputs = 0;
    };

    // A part's elements of a layer for tokens of the batch, from the hash.
    at::Tensor elements(const Batch& batch, std::uint32_t layer, Part part, const at::Tensor& piece_of,
                        const at::Tensor& numbers) const {
        const std::int64_t kv = model_.kv_heads, first = kv * static_cast<std::int64_t>(part);
        const auto heads = part == Part::Query ? static_cast<std::int64_t>(model_.query_heads()) : kv;
        const auto seeds = batch.seeds.select(1, layer).narrow(1, first, heads).index_select(0, piece_of);
        return content(model_, seeds, numbers);
    }
    at::Tensor torch_varlen(const Batch& batch, const Layer& layer, const at::Tensor& queries) const;
    at::Tensor fa3(const Batch& batch, const Layer& layer, const at::Tensor& queries) const;
    at::Tensor reference(const Batch& batch, std::uint32_t layer, const at::Tensor& queries) const;
    void check(Tally& tally, const at::Tensor& outputs, const at::Tensor& expected) const;

    Model model_;
    c10::cuda::CUDAStream stream_;
    std::optional<c10::OperatorHandle> fa3_;
    std::uint64_t tile_ = 1, max_tokens_ = 0;
    std::int64_t stride_ = 0;  // tokens from one slot to the next
    std::vector<Layer> layers_;
    std::array<Tally, 2> tallies_;
    at::Tensor differing_;
    std::vector<Errors> errors_;
};

TorchAttention::TorchAttention(const Model& model)
    : model_(model), stream_((at::globalContext().lazyInitDevice(at::kCUDA), c10::cuda::getStreamFromPool())),
      fa3_(find_fa3()) {
    const c10::cuda::CUDAStreamGuard guard(stream_);
    // The reference is float32 throughout, and not TF32.
    at::globalContext().setFloat32MatmulPrecision("highest");
    for (auto& tally : tallies_) {
        tally.worst = at::zeros({}, at::TensorOptions(at::kCUDA).dtype(at::kFloat));
        tally.sum = at::zeros({}, at::TensorOptions(at::kCUDA).dtype(at::kDouble));
    }
    differing_ = at::zeros({}, at::TensorOptions(at::kCUDA).dtype(at::kLong));
}

void TorchAttention::attach(const vattn::Cache& cache) {
    const auto layout = cache.layout();
    stride_ = static_cast<std::int64_t>(layout.stride_tokens);
    max_tokens_ = layout.max_tokens;
    for (std::uint32_t layer = 0; layer < model_.layers; ++layer) {
        layers_.push_back({tensor_of(cache.view(layer, vattn::Part::Key)),
                           tensor_of(cache.view(layer, vattn::Part::Value)),
                           tensor_of(cache.token_view(layer, vattn::Part::Key)).select(0, 0),
                           tensor_of(cache.token_view(layer, vattn::Part::Value)).select(0, 0)});
    }
}

void TorchAttention::step(const std::vector<Piece>& pieces) {
    const c10::cuda::CUDAStreamGuard guard(stream_);
    const Batch batch(model_, pieces, stride_, tile_, max_tokens_);
    for (std::uint32_t number = 0; number < model_.layers; ++number) {
        auto& layer = layers_[number];
        for (const auto part : {Part::Key, Part::Value}) {
            auto& row = part == Part::Key ? layer.key_row : layer.value_row;
            const auto written = elements(batch, number, part, batch.piece_of, batch.numbers);
            row.index_copy_(0, batch.rows, written.to(at::kBFloat16));
            // Memory that is new may hold NaN, and FlashAttention-3 multiplies what is past a length by zero.
            row.index_fill_(0, batch.beyond, 0);
        }
        const auto queries = elements(batch, number, Part::Query, batch.piece_of, batch.numbers);
        const auto expected = reference(batch, number, queries);
        check(tallies_[0], torch_varlen(batch, layer, queries.to(at::kBFloat16)), expected);
        if (fa3_) check(tallies_[1], fa3(batch, layer, queries.to(at::kBFloat16)), expected);
    }
}

// One call for the whole batch, prompts and single tokens alike: every slot is a piece of one long row.
at::Tensor TorchAttention::torch_varlen(const Batch& batch, const Layer& layer,
                                        const at::Tensor& queries) const {
    return std::get<0>(at::_flash_attention_forward(
        queries, layer.key_row, layer.value_row, batch.query_starts, batch.key_starts, batch.most_new,
        batch.most_tokens, 0.0, /*is_causal=*/true, /*return_debug_mask=*/false,
        static_cast<double>(model_.scale()), std::nullopt, std::nullopt, batch.used));
}

// One call for all that decode, over the whole tensor with lengths and slots given; one for each prompt, over
// its slot's exact view, which needs no tile.
at::Tensor TorchAttention::fa3(const Batch& batch, const Layer& layer, const at::Tensor& queries) const {
    auto outputs = at::empty_like(queries);
    const auto scale = static_cast<double>(model_.scale());
    if (batch.decoding.size(0) > 0) {
        const auto attended = call(*fa3_, {{"q", queries.index_select(0, batch.decoding).unsqueeze(1)},
                                           {"k", layer.keys},
                                           {"v", layer.values},
                                           {"seqused_k", batch.decoding_used},
                                           {"kv_batch_idx", batch.decoding_slots},
                                           {"softmax_scale", scale}});
        outputs.index_copy_(0, batch.decoding, attended.squeeze(1));
    }
    std::int64_t start = 0;
    for (const auto& piece : batch.pieces) {
        const auto count = static_cast<std::int64_t>(piece.tokens - piece.first);
        if (count > 1) {
            const auto exact = [&](const at::Tensor& all) {
                return all.narrow(0, piece.slot, 1).narrow(1, 0, static_cast<std::int64_t>(piece.tokens));
            };
            const auto attended = call(*fa3_, {{"q", queries.narrow(0, start, count).unsqueeze(0)},
                                               {"k", exact(layer.keys)},
                                               {"v", exact(layer.values)},
                                               {"softmax_scale", scale},
                                               {"is_causal", true}});
            outputs.narrow(0, start, count).copy_(attended.squeeze(0));
        }
        start += count;
    }
    return outputs;
}

// Attention in float32 by plain matrix products, over what the hash says and never over the cache.
at::Tensor TorchAttention::reference(const Batch& batch, std::uint32_t layer,
                                     const at::Tensor& queries) const {
    constexpr std::int64_t AT_ONCE = 512;  // queries: more would need much memory for their scores
    const std::int64_t kv = model_.kv_heads, group = model_.group, dim = model_.dim;
    const auto all_keys = elements(batch, layer, Part::Key, batch.all_piece_of, batch.all_numbers);
    const auto all_values = elements(batch, layer, Part::Value, batch.all_piece_of, batch.all_numbers);
    std::vector<at::Tensor> outputs;
    std::int64_t key_start = 0, query_start = 0;
    for (const auto& piece : batch.pieces) {
        const auto tokens = static_cast<std::int64_t>(piece.tokens);
        const auto first = static_cast<std::int64_t>(piece.first);
        const auto keys = all_keys.narrow(0, key_start, tokens).permute({1, 2, 0});
        const auto values = all_values.narrow(0, key_start, tokens).permute({1, 0, 2});
        for (auto from = first; from < tokens; from += AT_ONCE) {
            const auto count = std::min(AT_ONCE, tokens - from);
            const auto asked =
                queries.narrow(0, query_start + from - first, count).view({count, kv, group, dim});
            auto scores = at::matmul(asked.permute({1, 2, 0, 3}).reshape({kv, group * count, dim}), keys)
                              .mul_(static_cast<double>(model_.scale()))
                              .view({kv, group, count, tokens});
            if (count > 1) {
                const auto seen = at::arange(tokens, batch.numbers.options()) -
                                  at::arange(from, from + count, batch.numbers.options()).unsqueeze(1);
                scores.masked_fill_(seen > 0, -INFINITY);
            }
            const auto out = at::matmul(scores.softmax(-1).view({kv, group * count, tokens}), values);
            outputs.push_back(out.view({kv, group, count, dim}).permute({2, 0, 1, 3}).flatten(1, 2));
        }
        key_start += tokens;
        query_start += tokens - first;
    }
    return at::cat(outputs);
}

void TorchAttention::check(Tally& tally, const at::Tensor& outputs, const at::Tensor& expected) const {
    const auto apart = at::linalg_vector_norm(outputs.to(at::kFloat) - expected, 2, {-1});
    const auto errors = apart / at::linalg_vector_norm(expected, 2, {-1});
    tally.worst = at::maximum(tally.worst, errors.max());
    tally.sum += errors.sum(at::kDouble);
    tally.outputs += static_cast<std::uint64_t>(errors.numel());
}

void TorchAttention::compare(const Piece& piece) {
    const c10::cuda::CUDAStreamGuard guard(stream_);
    const Batch batch(model_, {piece}, stride_, 1, max_tokens_);
    for (std::uint32_t number = 0; number < model_.layers; ++number) {
        const auto& layer = layers_[number];
        for (const auto part : {Part::Key, Part::Value}) {
            const auto& row = part == Part::Key ? layer.key_row : layer.value_row;
            const auto expected = elements(batch, number, part, batch.piece_of, batch.numbers);
            differing_ += row.index_select(0, batch.rows).ne(expected.to(at::kBFloat16)).sum();
        }
    }
}

void TorchAttention::spoil(const Piece& piece) {
    const c10::cuda::CUDAStreamGuard guard(stream_);
    const auto last = static_cast<std::int64_t>(piece.tokens) - 1;
    const auto token = layers_.back().keys.select(0, piece.slot).select(0, last);
    token.select(0, 0).narrow(0, 0, 1).add_(1.0 / 128);
}

// What the device failed with has been thrown where it was asked for something.
void TorchAttention::wait() {
    try {
        stream_.synchronize();
    } catch (const c10::Error& error) {
        std::fprintf(stderr, "%s\n", error.what_without_backtrace());
    }
}

const std::vector<Errors>& TorchAttention::errors() {
    const c10::cuda::CUDAStreamGuard guard(stream_);
    const char* const names[] = {"PyTorch FlashAttention", "FlashAttention-3"};
    errors_.clear();
    for (std::size_t number = 0; number < (fa3_ ? 2 : 1); ++number) {
        const auto& tally = tallies_[number];
        // bfloat16 leaves about 0.002.
        errors_.push_back({names[number], 0.01});
        errors_.back().add(tally.outputs, tally.worst.item<double>(), tally.sum.item<double>());
    }
    return errors_;
}

}  // namespace

// Llama-3-8B's heads, in fewer layers.
Defaults defaults() { return {{4, 8, 4, 128}, std::uint64_t{512} << 20, 200, 32}; }

std::unique_ptr<Attention> make_attention(const Model& model) {
    return std::make_unique<TorchAttention>(model);
}

}  // namespace engine
