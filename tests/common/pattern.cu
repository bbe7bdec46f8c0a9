// Writes and looks for the pattern of `contents.rs`, one thread a byte. `pattern.ptx` is made of it:
//     nvcc -ptx -arch=compute_75 -o pattern.ptx pattern.cu

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

// Writes one byte, wherever that is.
extern "C" __global__ void poke(unsigned char* place) { *place = 1; }
