// The kernels of the example, which compiles them when it runs and defines HEADS (of keys and values), GROUP (query heads that
// share one of those) and DIM. No header is needed.

// A layer's keys or values as vattn describes them: [slot, token, head, dim] of bfloat16, strides in elements.
struct View {
    unsigned short* data;
    unsigned long long strides[4];
};

// Tokens of a slot whose keys and values are new, and what their content is made from.
struct Span { unsigned slot, first, end, seed; };

// A request that decodes: its slot, how many tokens it has there, and what its query is made from.
struct Query { unsigned slot, tokens, seed; };

enum Kind { QUERY, KEY, VALUE };

static __device__ unsigned short* at(const View& view, unsigned slot, unsigned token, unsigned head, unsigned dim) {
    return view.data + slot * view.strides[0] + token * view.strides[1] + head * view.strides[2] + dim * view.strides[3];
}

// bfloat16 is the upper half of a float.
static __device__ float from_bf16(unsigned short half) { return __uint_as_float((unsigned)half << 16); }

// Rounds to the nearest, and to the even one of two.
static __device__ unsigned short to_bf16(float value) {
    unsigned bits = __float_as_uint(value);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static __device__ unsigned mixed(unsigned hash, unsigned word) {
    hash = (hash ^ word) * 0x9e3779b1u;
    return hash ^ hash >> 15;
}

// What a model would compute: here a hash of its place, as a multiple of 1/128 in [-1, 1).
static __device__ float content(unsigned seed, Kind kind, unsigned layer, unsigned token, unsigned head, unsigned dim) {
    unsigned hash = mixed(mixed(mixed(mixed(mixed(0, seed), layer << 8 | kind), token), head), dim);
    return (hash >> 24) / 128.0f - 1.0f;
}

// The model's part: keys and values of new tokens, straight into the cache. A row of blocks is one span.
extern "C" __global__ void write(View keys, View values, unsigned layer, const Span* spans) {
    Span span = spans[blockIdx.y];
    for (unsigned token = span.first + blockIdx.x; token < span.end; token += gridDim.x)
        for (unsigned i = threadIdx.x; i < HEADS * DIM; i += blockDim.x) {
            unsigned head = i / DIM, dim = i % DIM;
            *at(keys, span.slot, token, head, dim) = to_bf16(content(span.seed, KEY, layer, token, head, dim));
            *at(values, span.slot, token, head, dim) = to_bf16(content(span.seed, VALUE, layer, token, head, dim));
        }
}

// The model's part: the query of each request's last token, as [request, query head, dim]. A block is one head's.
extern "C" __global__ void ask(unsigned layer, const Query* batch, float* queries) {
    Query request = batch[blockIdx.x];
    unsigned head = blockIdx.y, dim = threadIdx.x;
    queries[(blockIdx.x * gridDim.y + head) * DIM + dim] =
        content(request.seed, QUERY, layer, request.tokens - 1, head, dim);
}

const unsigned WARPS = DIM / 32, EACH = DIM / 32;

// Attention of one query over its request's tokens. A block is one request and one query head, and has a thread for
// each dimension. It knows of the cache what any kernel for contiguous tensors knows, and reads no token past the
// length.
extern "C" __global__ void attend(View keys, View values, const Query* batch, const float* queries, float* outputs) {
    Query request = batch[blockIdx.x];
    unsigned head = blockIdx.y / GROUP;
    unsigned place = (blockIdx.x * gridDim.y + blockIdx.y) * DIM;
    unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    // Each warp takes every WARPS-th token, and each lane every 32nd dimension. What was summed so far is scaled
    // down whenever a larger score turns up.
    float peak = -1e30f, weight = 0, sum[EACH] = {};
    for (unsigned token = warp; token < request.tokens; token += WARPS) {
        float score = 0;
        for (unsigned i = 0; i < EACH; i++) {
            unsigned dim = lane + 32 * i;
            score += queries[place + dim] * from_bf16(*at(keys, request.slot, token, head, dim));
        }
        for (unsigned other = 16; other > 0; other /= 2) score += __shfl_xor_sync(0xffffffff, score, other);
        score /= sqrtf(DIM);

        float higher = fmaxf(peak, score), kept = expf(peak - higher), gained = expf(score - higher);
        peak = higher;
        weight = weight * kept + gained;
        for (unsigned i = 0; i < EACH; i++)
            sum[i] = sum[i] * kept + gained * from_bf16(*at(values, request.slot, token, head, lane + 32 * i));
    }

    // What the warps have is brought to one scale, and each thread writes its dimension.
    __shared__ float peaks[WARPS], weights[WARPS], sums[WARPS][DIM];
    for (unsigned i = 0; i < EACH; i++) sums[warp][lane + 32 * i] = sum[i];
    if (lane == 0) {
        peaks[warp] = peak;
        weights[warp] = weight;
    }
    __syncthreads();
    float highest = peaks[0], total = 0, output = 0;
    for (unsigned i = 1; i < WARPS; i++) highest = fmaxf(highest, peaks[i]);
    for (unsigned i = 0; i < WARPS; i++) {
        float scale = expf(peaks[i] - highest);
        total += weights[i] * scale;
        output += sums[i][threadIdx.x] * scale;
    }
    outputs[place + threadIdx.x] = output / total;
}
