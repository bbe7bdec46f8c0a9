// Writes and looks for the pattern of `contents.rs`, one thread a byte. `pattern.ptx` is made of it:
//     nvcc -ptx -arch=compute_75 -o pattern.ptx pattern.cu
// or, without a toolkit, with NVRTC (in the wheel nvidia-cuda-nvrtc-cu12 12.9.86) and --gpu-architecture=compute_75.

struct Place {
    unsigned char* base;               // the slot's first byte in this layer's keys or values
    unsigned long long token_stride;   // in bytes
    unsigned long long head_stride;    // in bytes
    unsigned long long heads;
    unsigned long long head_bytes;
    unsigned long long first;          // the first token
    unsigned long long tokens;
    unsigned long long owner;
    unsigned long long salt;           // the layer and the part
};

// Which tokens, and whose: for kernels of a captured graph, which look it up when they run.
struct Told {
    unsigned long long first;
    unsigned long long tokens;
    unsigned long long owner;
};

static __device__ Place as_told(Place at, const Told* told) {
    at.first = told->first;
    at.tokens = told->tokens;
    at.owner = told->owner;
    return at;
}

static __device__ unsigned char expected(const Place& at, unsigned long long token, unsigned long long head,
                                         unsigned long long byte) {
    unsigned long long mixed = at.owner * 0x9e3779b97f4a7c15ull + (at.salt | head << 24);
    mixed += token;
    mixed += byte / 8 << 48;
    mixed = (mixed ^ (mixed >> 30)) * 0xbf58476d1ce4e5b9ull;
    mixed = (mixed ^ (mixed >> 27)) * 0x94d049bb133111ebull;
    return (unsigned char)((mixed ^ (mixed >> 31)) >> (byte % 8 * 8));
}

template <typename Visit> static __device__ void each(const Place& at, Visit visit) {
    unsigned long long count = at.tokens * at.heads * at.head_bytes;
    unsigned long long step = (unsigned long long)gridDim.x * blockDim.x;
    for (unsigned long long i = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        unsigned long long byte = i % at.head_bytes;
        unsigned long long head = i / at.head_bytes % at.heads;
        unsigned long long token = at.first + i / at.head_bytes / at.heads;
        visit(at.base + token * at.token_stride + head * at.head_stride + byte, expected(at, token, head, byte));
    }
}

extern "C" __global__ void fill(Place at) {
    each(at, [](unsigned char* place, unsigned char value) { *place = value; });
}

// Counts the bytes that are not what they should be.
extern "C" __global__ void find(Place at, unsigned long long* mismatches) {
    each(at, [&](unsigned char* place, unsigned char value) {
        if (*place != value) atomicAdd(mismatches, 1ull);
    });
}

extern "C" __global__ void fill_told(Place at, const Told* told) {
    each(as_told(at, told), [](unsigned char* place, unsigned char value) { *place = value; });
}

extern "C" __global__ void find_told(Place at, const Told* told, unsigned long long* mismatches) {
    each(as_told(at, told), [&](unsigned char* place, unsigned char value) {
        if (*place != value) atomicAdd(mismatches, 1ull);
    });
}

static __device__ unsigned long long now() {
    unsigned long long time;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
    return time;
}

// Reads several places over and over, for so many nanoseconds. Blocks along y are one place each.
extern "C" __global__ void dwell(const Place* places, unsigned long long nanoseconds, unsigned long long* mismatches) {
    const Place at = places[blockIdx.y];
    unsigned long long start = now();
    do {
        each(at, [&](unsigned char* place, unsigned char value) {
            if (*(volatile unsigned char*)place != value) atomicAdd(mismatches, 1ull);
        });
    } while (now() - start < nanoseconds);
}

// Writes one byte, wherever that is.
extern "C" __global__ void poke(unsigned char* place) { *place = 1; }
