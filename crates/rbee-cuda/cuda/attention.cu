// Rope, the write into the paged KV, and causal attention over it, in bf16 with f32 sums.
//
// A block of KV has 16 positions of one head: its keys as [16][D], its values as [D][16], which is how the matrix units take
// them. Tables say which blocks a row's sequence has; they and the positions are checked before a launch.
#include "common.cuh"

constexpr int BLOCK = 16;    // positions of a block of KV
constexpr int PARTIAL = 256; // positions whose sum is made apart
constexpr float NONE = -INFINITY;

// Turns the pairs (i, i + half) of each head of q and k by the angles of the row, rounds to bf16, and writes k and v to the
// block of its position. A block of threads has one head of one row of [rows, heads + 2 kv_heads, d]. A row at -1 is none.
extern "C" __global__ void rope_write(const float *qkv, const float *cos, const float *sin, const int *positions,
                                      const int *angles, const int *sequences, const int *tables, int width, bf16 *q,
                                      bf16 *keys, bf16 *values, int heads, int kv_heads, int d, int half) {
    let_next_come();
    after_work_before();
    const int row = blockIdx.x, head = blockIdx.y, i = threadIdx.x, position = positions[row];
    if (position < 0) return;
    const float *x = qkv + ((size_t)row * (heads + 2 * kv_heads) + head) * d;
    float value = x[i];
    if (head < heads + kv_heads && i < 2 * half) {
        const size_t angle = (size_t)angles[row] * half + i % half;
        const float c = cos[angle], s = sin[angle];
        value = i < half ? value * c - x[i + half] * s : value * c + x[i - half] * s;
    }
    const size_t block = tables[(size_t)sequences[row] * width + position / BLOCK];
    const int at = position % BLOCK;
    if (head < heads) {
        q[((size_t)row * heads + head) * d + i] = __float2bfloat16(value);
    } else if (head < heads + kv_heads) {
        keys[((block * kv_heads + head - heads) * BLOCK + at) * d + i] = __float2bfloat16(value);
    } else {
        values[((block * kv_heads + head - heads - kv_heads) * d + i) * BLOCK + at] = __float2bfloat16(value);
    }
}

__device__ inline uint32_t pair(float a, float b) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(a, b);
    return *(const uint32_t *)&both;
}

// Of one tile of rows and one KV head, over one partial of positions: for each query head of each row the greatest score, the
// sum of what the scores' exponentials are beside it, and that sum over the values (Milakov and Gimelshein 2018; Dao et al.
// 2022).
//
// The 16 rows of the matrix units' tiles are the query heads that share a KV head, of as many neighbouring rows of one sequence
// as have room: what one row has masked adds nothing to it. Each warp takes every eighth block of the
// partial and the warps' sums are added in their order, so a row's bits hang on its own positions alone. Which of the 16
// positions stands in which slot of a product is free; it is chosen so that the scores' place in the registers is the
// probabilities' and a lane reads four neighbouring positions of the values at once.
template <int D>
__device__ inline void attention(const bf16 *q, const bf16 *keys, const bf16 *values, const int *positions,
                                 const int *sequences, const int *tables, int width, const int *tiles, int row0, float *sums,
                                 float *scales, int heads, int kv_heads, int partials, int window, float scale, float cap) {
    // The columns that all warps' sums are brought together of at a time. Rows are a quarter of the banks apart, so that no lane
    // waits for another when they are written.
    constexpr int COLUMNS = D < 64 ? D : D % 64 ? 32 : 64;
    __shared__ float all[WARPS][16][COLUMNS + 8], high[WARPS][16], total[WARPS][16], part[WARPS][16];
    let_next_come();
    after_work_before();
    const int head = blockIdx.x % kv_heads, partial = blockIdx.x / kv_heads, group = heads / kv_heads;
    const int row = tiles[2 * blockIdx.y], used = tiles[2 * blockIdx.y + 1] * group;
    const int end = min((partial + 1) * PARTIAL, positions[row + used / group - 1] + 1), begin = partial * PARTIAL;
    if (begin >= end) return;
    const int from = window > 0 ? max(0, positions[row] + 1 - window) : 0;
    const int *table = tables + (size_t)sequences[row] * width;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    // Of the slots g and g + 8: where they begin and end to attend.
    int first[2], last[2];
    uint4 lo[D / 32], hi[D / 32];
    for (int r = 0; r < 2; r++) {
        const int slot = g + 8 * r;
        last[r] = slot < used ? positions[row + slot / group] : -1;
        first[r] = window > 0 ? max(0, last[r] + 1 - window) : 0;
        const bf16 *query = q + ((size_t)(row + slot / group) * heads + head * group + slot % group) * D + 8 * t;
        uint4 *to = r ? hi : lo;
#pragma unroll
        for (int s = 0; s < D / 32; s++) to[s] = slot < used ? *(const uint4 *)(query + 32 * s) : make_uint4(0, 0, 0, 0);
    }
    float o[D / 8][4] = {}, m[2] = {NONE, NONE}, l[2] = {};
    for (int base = begin + warp * BLOCK; base < end; base += WARPS * BLOCK) {
        if (base + BLOCK <= from) continue;
        const size_t block = (size_t)table[base / BLOCK] * kv_heads + head;
        float score[2][4] = {};
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const bf16 *key = keys + (block * BLOCK + g / 2 * 4 + 2 * c + g % 2) * D + 8 * t;
#pragma unroll
            for (int s = 0; s < D / 32; s++) {
                const uint4 k = *(const uint4 *)(key + 32 * s);
                mma(score[c], lo[s].x, hi[s].x, lo[s].y, hi[s].y, k.x, k.y);
                mma(score[c], lo[s].z, hi[s].z, lo[s].w, hi[s].w, k.z, k.w);
            }
        }
        float most[2] = {NONE, NONE};
#pragma unroll
        for (int c = 0; c < 2; c++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int position = base + 4 * t + 2 * c + e % 2;
                float value = score[c][e] * scale;
                if (cap > 0) value = cap * tanhf(value / cap);
                score[c][e] = position >= first[e / 2] && position <= last[e / 2] ? value : NONE;
                most[e / 2] = fmaxf(most[e / 2], score[c][e]);
            }
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 1));
            most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 2));
            most[r] = fmaxf(most[r], m[r]);
            // Until a position counts there is nothing to scale.
            const float less = most[r] == NONE ? 1 : expf(m[r] - most[r]);
            m[r] = most[r];
            l[r] *= less;
#pragma unroll
            for (int i = 0; i < D / 8; i++) {
                o[i][2 * r] *= less;
                o[i][2 * r + 1] *= less;
            }
#pragma unroll
            for (int c = 0; c < 2; c++) {
#pragma unroll
                for (int e = 2 * r; e < 2 * r + 2; e++) {
                    score[c][e] = score[c][e] == NONE ? 0 : expf(score[c][e] - m[r]);
                    l[r] += score[c][e];
                }
            }
        }
        const uint32_t a0 = pair(score[0][0], score[0][1]), a1 = pair(score[0][2], score[0][3]);
        const uint32_t a2 = pair(score[1][0], score[1][1]), a3 = pair(score[1][2], score[1][3]);
#pragma unroll
        for (int i = 0; i < D / 8; i++) {
            const uint2 v = *(const uint2 *)(values + (block * D + 8 * i + g) * BLOCK + 4 * t);
            mma(o[i], a0, a1, a2, a3, v.x, v.y);
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        l[r] += __shfl_xor_sync(~0u, l[r], 1);
        l[r] += __shfl_xor_sync(~0u, l[r], 2);
        if (t == 0) {
            high[warp][g + 8 * r] = m[r];
            total[warp][g + 8 * r] = l[r];
        }
    }
    __syncthreads();
    const auto place = [&](int slot) {
        return ((size_t)(row - row0 + slot / group) * heads + head * group + slot % group) * partials + partial;
    };
    // How much of each warp's sums counts, beside the greatest score of all.
    if (threadIdx.x < 16 * WARPS) {
        const int w = threadIdx.x / 16, slot = threadIdx.x % 16;
        float most = NONE;
        for (int v = 0; v < WARPS; v++) most = fmaxf(most, high[v][slot]);
        part[w][slot] = high[w][slot] == NONE ? 0 : expf(high[w][slot] - most);
    }
    for (int column0 = 0; column0 < D; column0 += COLUMNS) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < D / 8; i++) {
            if (8 * i / COLUMNS * COLUMNS == column0) {
                for (int r = 0; r < 2; r++) {
                    *(float2 *)&all[warp][g + 8 * r][8 * i % COLUMNS + 2 * t] = make_float2(o[i][2 * r], o[i][2 * r + 1]);
                }
            }
        }
        __syncthreads();
        for (int at = threadIdx.x; at < used * COLUMNS; at += 32 * WARPS) {
            const int slot = at / COLUMNS, column = at % COLUMNS;
            float sum = all[0][slot][column] * part[0][slot];
#pragma unroll
            for (int w = 1; w < WARPS; w++) sum = fmaf(all[w][slot][column], part[w][slot], sum);
            sums[place(slot) * D + column0 + column] = sum;
        }
    }
    if (threadIdx.x < used) {
        const int slot = threadIdx.x;
        float most = NONE, sum = 0;
        for (int w = 0; w < WARPS; w++) most = fmaxf(most, high[w][slot]);
        for (int w = 0; w < WARPS; w++) {
            if (high[w][slot] != NONE) sum = fmaf(total[w][slot], expf(high[w][slot] - most), sum);
        }
        float *to = scales + 2 * place(slot);
        to[0] = most;
        to[1] = sum;
    }
}

#define ATTENTION(D)                                                                                                        \
    extern "C" __global__ void __launch_bounds__(32 * WARPS)                                                                \
        attention_##D(const bf16 *q, const bf16 *keys, const bf16 *values, const int *positions, const int *sequences,      \
                      const int *tables, int width, const int *tiles, int row0, float *sums, float *scales, int heads,      \
                      int kv_heads, int partials, int window, float scale, float cap) {                                     \
        attention<D>(q, keys, values, positions, sequences, tables, width, tiles, row0, sums, scales, heads, kv_heads,      \
                     partials, window, scale, cap);                                                                         \
    }

ATTENTION(32)
ATTENTION(64)
ATTENTION(96)
ATTENTION(128)
ATTENTION(256)

// Adds the partials of one head of one row in ascending order, and rounds to bf16. One thread a dimension.
extern "C" __global__ void attention_merge(const float *sums, const float *scales, const int *positions, bf16 *out, int row0,
                                           int heads, int partials, int d, int window) {
    let_next_come();
    after_work_before();
    const int row = row0 + blockIdx.x, head = blockIdx.y, i = threadIdx.x;
    const int last = positions[row], first = window > 0 ? max(0, last + 1 - window) : 0;
    const size_t at = ((size_t)blockIdx.x * heads + head) * partials;
    float m = NONE, l = 0, o = 0;
    for (int p = first / PARTIAL; last >= 0 && p <= last / PARTIAL; p++) {
        const float high = scales[2 * (at + p)], total = scales[2 * (at + p) + 1];
        const float most = fmaxf(m, high), old = expf(m - most), fresh = expf(high - most);
        o = fmaf(o, old, sums[(at + p) * d + i] * fresh);
        l = fmaf(l, old, total * fresh);
        m = most;
    }
    out[((size_t)row * heads + head) * d + i] = __float2bfloat16(last < 0 ? 0 : o / l);
}
