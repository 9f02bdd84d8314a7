// Kernels on bf16 weights and f32 sums. Every kernel is called through the driver by its name; shapes are checked there.
#include "common.cuh"

// 16 bytes that nobody writes meanwhile and that are read once.
__device__ inline uint4 stream(const bf16 *at) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(at));
    return v;
}

constexpr int STEP = 32;

// out[row, n] = x[row, k] . w[n, k] (+ bias[n]), or scale times that is added to out.
//
// Weights are read once, straight into the operands of the matrix units: which input stands in which slot does not matter as
// long as both operands agree, so a lane's slots of two products are the 8 consecutive inputs that it reads at once. A block
// computes 16 * MT outputs of 8 * NT rows; each of its warps takes every eighth step of 32 inputs, and their sums are added in
// their order. That order is the same in all kernels, so a row has the same bits whatever rows are beside it.
template <int NT, int MT, int AHEAD>
__device__ inline void linear(const bf16 *x, const bf16 *__restrict__ w, const float *__restrict__ bias, float *out, int row0,
                              int rows, int n, int k, int add, float scale) {
    constexpr int OUTPUTS = 16 * MT, ROWS = 8 * NT;
    // Rows do not begin in the same bank, so that fewer lanes wait for each other when they write.
    constexpr int WIDTH = OUTPUTS + 4;
    __shared__ float sums[WARPS][ROWS * WIDTH];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int first = blockIdx.x * OUTPUTS;
    const bf16 *a[2 * MT], *b[NT];
    for (int i = 0; i < 2 * MT; i++) {
        // Outputs beyond the last are computed as the last and not written.
        a[i] = w + (size_t)min(first + 8 * i + g, n - 1) * k + 8 * t;
    }
    for (int i = 0; i < NT; i++) b[i] = row0 + 8 * i + g < rows ? x + (size_t)(row0 + 8 * i + g) * k + 8 * t : nullptr;
    float d[MT][NT][4] = {};
    const int steps = k / STEP;
    uint4 now[AHEAD][2 * MT], next[AHEAD][2 * MT];
    const auto load = [&](uint4(&into)[AHEAD][2 * MT], int s) {
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
#pragma unroll
            for (int i = 0; i < 2 * MT; i++) {
                if (s + u * WARPS < steps) into[u][i] = stream(a[i] + (s + u * WARPS) * STEP);
            }
        }
    };
    load(now, warp);
    // The weights are nobody's work, so they are on their way before the input is there.
    after_work_before();
    for (int s = warp; s < steps; s += WARPS * AHEAD) {
        load(next, s + WARPS * AHEAD);
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            if (s + u * WARPS < steps) {
                uint4 v[NT];
#pragma unroll
                for (int j = 0; j < NT; j++) {
                    v[j] = b[j] ? *(const uint4 *)(b[j] + (s + u * WARPS) * STEP) : make_uint4(0, 0, 0, 0);
                }
#pragma unroll
                for (int j = 0; j < NT; j++) {
#pragma unroll
                    for (int i = 0; i < MT; i++) {
                        const uint4 lo = now[u][2 * i], hi = now[u][2 * i + 1];
                        mma(d[i][j], lo.x, hi.x, lo.y, hi.y, v[j].x, v[j].y);
                        mma(d[i][j], lo.z, hi.z, lo.w, hi.w, v[j].z, v[j].w);
                    }
                }
            }
        }
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
#pragma unroll
            for (int i = 0; i < 2 * MT; i++) now[u][i] = next[u][i];
        }
    }
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int j = 0; j < NT; j++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                sums[warp][(8 * j + 2 * t + e % 2) * WIDTH + 16 * i + g + e / 2 * 8] = d[i][j][e];
            }
        }
    }
    __syncthreads();
    for (int at = threadIdx.x; at < OUTPUTS * ROWS; at += 32 * WARPS) {
        const int output = first + at % OUTPUTS, row = row0 + at / OUTPUTS;
        if (output < n && row < rows) {
            const int place = at / OUTPUTS * WIDTH + at % OUTPUTS;
            float value = sums[0][place];
#pragma unroll
            for (int p = 1; p < WARPS; p++) value += sums[p][place];
            if (bias) value += bias[output];
            float *to = out + (size_t)row * n + output;
            *to = add ? fmaf(value, scale, *to) : value;
        }
    }
}

#define LINEAR(NAME, NT, MT, AHEAD, BLOCKS)                                                                                \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)                                                        \
        NAME(const bf16 *x, const bf16 *w, const float *bias, float *out, int rows, int n, int k, int add, float scale) {   \
        let_next_come();                                                                                                    \
        linear<NT, MT, AHEAD>(x, w, bias, out, blockIdx.y * 8 * NT, rows, n, k, add, scale);                                \
    }

// How far ahead the weights are read, how many outputs a warp has and how many blocks share the registers was chosen by trial
// on an H200.
LINEAR(linear_8, 1, 1, 2, 3)
LINEAR(linear_16, 2, 1, 2, 3)
LINEAR(linear_32, 4, 2, 1, 2)
LINEAR(linear_64, 8, 1, 1, 2)

// 16 bytes on their way into shared memory; zeros where there are none.
__device__ inline void fetch(uint4 *to, const bf16 *from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((unsigned)__cvta_generic_to_shared(to)), "l"(from),
                 "r"(there ? 16 : 0));
}

// The same products for many rows, which share what they read in shared memory. The sums are those of the kernels above: the
// steps of one warp there follow each other here, and each of the eight sums is added when it is complete.
//
// WO x WR warps have 16 * MT outputs of 8 * NT rows each. A step's inputs of an output or a row lie together, in the order in
// which lanes read them: 8 lanes read 128 neighbouring bytes at once. With FAR the complete sums lie in shared memory, and the
// registers they leave free hold more rows.
extern __shared__ uint4 pool[];

constexpr int STAGES = 3, PARTS = STEP / 8;

template <int WO, int WR, int MT, int NT, bool FAR>
__device__ inline void linear_tile(const bf16 *x, const bf16 *__restrict__ w, const float *__restrict__ bias, float *out, int rows,
                                   int n, int k, int add, float scale) {
    constexpr int OUTPUTS = 16 * MT * WO, ROWS = 8 * NT * WR, THREADS = 32 * WO * WR, STAGE = (OUTPUTS + ROWS) * PARTS;
    float4 *far = (float4 *)(pool + STAGES * STAGE) + threadIdx.x;
    let_next_come();
    after_work_before();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    // Neighbouring blocks have the same outputs, whose weights one of them brings near for all.
    const int row0 = blockIdx.x * ROWS, first = blockIdx.y * OUTPUTS, steps = k / STEP;
    const auto load = [&](uint4 *to, int s) {
#pragma unroll
        for (int c = threadIdx.x; c < OUTPUTS * PARTS; c += THREADS) {
            fetch(to + c, w + (size_t)min(first + c / PARTS, n - 1) * k + s * STEP + c % PARTS * 8, true);
        }
#pragma unroll
        for (int c = threadIdx.x; c < ROWS * PARTS; c += THREADS) {
            const int row = row0 + c / PARTS;
            fetch(to + OUTPUTS * PARTS + c, x + (size_t)min(row, rows - 1) * k + s * STEP + c % PARTS * 8, row < rows);
        }
    };
    // All steps of the first sum, then all of the second.
    const auto next = [&](int &sum, int &s) {
        s += WARPS;
        if (s >= steps) s = ++sum;
    };
    int load_sum = 0, load_step = 0, sum = 0, step = 0;
    for (int stage = 0; stage < STAGES - 1; stage++) {
        if (stage < steps) {
            load(pool + stage * STAGE, load_step);
            next(load_sum, load_step);
        }
        asm volatile("cp.async.commit_group;");
    }
    float d[MT][NT][4] = {}, near[FAR ? 1 : MT][NT][4] = {};
    const int output = warp / WR * 16 * MT + g, row = warp % WR * 8 * NT + g;
    for (int it = 0; it < steps; it++) {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2));
        __syncthreads();
        if (it + STAGES - 1 < steps) {
            load(pool + (it + STAGES - 1) % STAGES * STAGE, load_step);
            next(load_sum, load_step);
        }
        asm volatile("cp.async.commit_group;");
        const uint4 *weights = pool + it % STAGES * STAGE, *inputs = weights + OUTPUTS * PARTS;
        uint4 v[NT];
#pragma unroll
        for (int j = 0; j < NT; j++) v[j] = inputs[(row + 8 * j) * PARTS + t];
#pragma unroll
        for (int i = 0; i < MT; i++) {
            const uint4 lo = weights[(output + 16 * i) * PARTS + t], hi = weights[(output + 16 * i + 8) * PARTS + t];
#pragma unroll
            for (int j = 0; j < NT; j++) mma(d[i][j], lo.x, hi.x, lo.y, hi.y, v[j].x, v[j].y);
#pragma unroll
            for (int j = 0; j < NT; j++) mma(d[i][j], lo.z, hi.z, lo.w, hi.w, v[j].z, v[j].w);
        }
        const int before = sum;
        next(sum, step);
        if (sum == before) continue;
#pragma unroll
        for (int i = 0; i < MT; i++) {
#pragma unroll
            for (int j = 0; j < NT; j++) {
                float *total = near[FAR ? 0 : i][j];
                float4 *at = far + (i * NT + j) * THREADS;
                if (FAR) *(float4 *)total = before == 0 ? make_float4(0, 0, 0, 0) : *at;
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    total[e] += d[i][j][e];
                    d[i][j][e] = 0;
                }
                if (FAR) *at = *(float4 *)total;
            }
        }
    }
#pragma unroll
    for (int j = 0; j < NT; j++) {
#pragma unroll
        for (int i = 0; i < MT; i++) {
            float *total = near[FAR ? 0 : i][j];
            if (FAR) *(float4 *)total = far[(i * NT + j) * THREADS];
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int r = row0 + warp % WR * 8 * NT + 8 * j + 2 * t + e % 2, o = first + output + 16 * i + e / 2 * 8;
                if (o < n && r < rows) {
                    float *to = out + (size_t)r * n + o;
                    const float value = bias ? total[e] + bias[o] : total[e];
                    *to = add ? fmaf(value, scale, *to) : value;
                }
            }
        }
    }
}

// For chips whose blocks have 112 KiB of shared memory: two blocks share a multiprocessor's.
extern "C" __global__ void __launch_bounds__(128, 2)
    linear_128(const bf16 *x, const bf16 *w, const float *bias, float *out, int rows, int n, int k, int add, float scale) {
    linear_tile<2, 2, 4, 8, true>(x, w, bias, out, rows, n, k, add, scale);
}

// For all others.
extern "C" __global__ void __launch_bounds__(256)
    linear_128_near(const bf16 *x, const bf16 *w, const float *bias, float *out, int rows, int n, int k, int add, float scale) {
    linear_tile<2, 4, 4, 4, false>(x, w, bias, out, rows, n, k, add, scale);
}

// The same product of one row by the matrix of one expert, for each (row, expert) that was picked: pair p has the expert
// experts[p], the row p / share of x and the row p of out.
extern "C" __global__ void __launch_bounds__(32 * WARPS) linear_experts(const bf16 *x, const bf16 *w, const int *experts,
                                                                        float *out, int share, int n, int k) {
    let_next_come();
    // Which weights are needed is work of the kernels before.
    after_work_before();
    const size_t pair = blockIdx.y;
    linear<1, 1, 2>(x + pair / share * k, w + (size_t)experts[pair] * n * k, nullptr, out + pair * n, 0, 1, n, k, 0, 1);
}

// The sum of one value of each thread of a block of up to 1024, by a fixed tree.
__device__ inline float block_sum(float value) {
    __shared__ float warps[32];
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
    __syncthreads();
    value = threadIdx.x % 32 < blockDim.x / 32 ? warps[threadIdx.x % 32] : 0;
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
    return value;
}

// One over the root of the mean square of `real` values, where what lies beyond them is zero.
__device__ inline float norm_scale(const float *x, int n, int real, float eps) {
    float squares = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) squares = fmaf(x[i], x[i], squares);
    return 1 / sqrtf(block_sum(squares) / real + eps);
}

// Root-mean-square norm of each row, or of the rows that `picks` names: x / sqrt(mean(x^2) + eps) * weight. One block a row.
// To bf16:
extern "C" __global__ void rms_norm(const float *x, const float *weight, bf16 *out, const int *picks, int n, int real,
                                    float eps) {
    let_next_come();
    after_work_before();
    x += (size_t)(picks ? picks[blockIdx.x] : blockIdx.x) * n;
    out += (size_t)blockIdx.x * n;
    const float scale = norm_scale(x, n, real, eps);
    for (int i = threadIdx.x; i < n; i += blockDim.x) out[i] = __float2bfloat16(x[i] * scale * weight[i]);
}

// As f32, the first `real` values of each row:
extern "C" __global__ void rms_norm_f32(const float *x, const float *weight, float *out, const int *picks, int n, int real,
                                        float eps) {
    let_next_come();
    after_work_before();
    x += (size_t)(picks ? picks[blockIdx.x] : blockIdx.x) * n;
    out += (size_t)blockIdx.x * real;
    const float scale = norm_scale(x, n, real, eps);
    for (int i = threadIdx.x; i < real; i += blockDim.x) out[i] = x[i] * scale * weight[i];
}

// Times a factor and added to out:
extern "C" __global__ void rms_norm_add(const float *x, const float *weight, float *out, int n, int real, float eps,
                                        float factor) {
    let_next_come();
    after_work_before();
    x += (size_t)blockIdx.x * n;
    out += (size_t)blockIdx.x * n;
    const float scale = norm_scale(x, n, real, eps);
    for (int i = threadIdx.x; i < n; i += blockDim.x) out[i] = fmaf(x[i] * scale * weight[i], factor, out[i]);
}

// In place, of stretches of each row of `width` values: `queries` of q_len values each with the weights wq, then others of k_len
// with wk. One block a stretch.
extern "C" __global__ void qk_norm(float *x, const float *wq, const float *wk, int width, int queries, int q_len, int q_real,
                                   int k_len, int k_real, float eps) {
    let_next_come();
    after_work_before();
    const int at = blockIdx.y;
    const bool query = at < queries;
    const int len = query ? q_len : k_len;
    const float *weight = query ? wq : wk;
    x += (size_t)blockIdx.x * width + (query ? at * q_len : queries * q_len + (at - queries) * k_len);
    const float scale = norm_scale(x, len, query ? q_real : k_real, eps);
    for (int i = threadIdx.x; i < len; i += blockDim.x) x[i] = x[i] * scale * weight[i];
}

// Rows of a table of `n` values each, times a factor.
extern "C" __global__ void embed(const bf16 *table, const int *tokens, float *out, int n, float factor) {
    let_next_come();
    after_work_before();
    const bf16 *row = table + (size_t)tokens[blockIdx.x] * n;
    for (int i = threadIdx.x; i < n; i += blockDim.x) out[(size_t)blockIdx.x * n + i] = __bfloat162float(row[i]) * factor;
}

// Rounds n values to bf16.
extern "C" __global__ void round_bf16(const float *x, bf16 *out, int n) {
    let_next_come();
    after_work_before();
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) out[i] = __float2bfloat16(x[i]);
}

// Scales n values, and bends them towards a bound if there is one.
extern "C" __global__ void bend(float *x, int n, float factor, float cap) {
    let_next_come();
    after_work_before();
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
        const float value = x[i] * factor;
        x[i] = cap > 0 ? cap * tanhf(value / cap) : value;
    }
}

// Sets the flag if any of n values is not a number, or infinite.
extern "C" __global__ void find_not_finite(const bf16 *x, size_t n, int *flag) {
    let_next_come();
    after_work_before();
    const uint16_t *bits = (const uint16_t *)x;
    bool found = false;
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        found |= (bits[i] & 0x7f80) == 0x7f80;
    }
    if (found) *flag = 1;
}

// The `picked` greatest of each row's `n` scores, in the order of their indices, and their shares of the sum of exponentials:
// of all scores, or of the picked ones where that is asked for. Of equal scores the lower index wins. One warp a row.
extern "C" __global__ void pick_experts(const float *scores, int *experts, float *shares, int n, int picked, int normalised) {
    let_next_come();
    after_work_before();
    scores += (size_t)blockIdx.x * n;
    experts += (size_t)blockIdx.x * picked;
    shares += (size_t)blockIdx.x * picked;
    const int lane = threadIdx.x;
    float high = -INFINITY, total = 0;
    for (int i = lane; i < n; i += 32) high = fmaxf(high, scores[i]);
    for (int step = 16; step > 0; step /= 2) high = fmaxf(high, __shfl_xor_sync(~0u, high, step));
    // Picks lie before a score in the order of falling scores; those with fewer than `picked` before them are picked, and their
    // place is how many picks have a lower index.
    int place = 0;
    for (int base = 0; base < n; base += 32) {
        const int i = base + lane;
        int before = 0;
        if (i < n) {
            for (int j = 0; j < n; j++) before += scores[j] > scores[i] || (scores[j] == scores[i] && j < i);
        }
        const bool pick = i < n && before < picked;
        const unsigned picks = __ballot_sync(~0u, pick);
        const float share = i < n ? expf(scores[i] - high) : 0;
        total += normalised && !pick ? 0 : share;
        if (pick) {
            const int to = place + __popc(picks & ((1u << lane) - 1));
            experts[to] = i;
            shares[to] = share;
        }
        place += __popc(picks);
    }
    for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(~0u, total, step);
    __syncwarp();
    for (int i = lane; i < picked; i += 32) shares[i] /= total;
}

// The rows of a row's picks times their shares, summed in the order of the picks: to out, or factor times that is added to it.
extern "C" __global__ void sum_experts(const float *x, const float *shares, float *out, int n, int picked, int add,
                                       float factor) {
    let_next_come();
    after_work_before();
    const size_t row = blockIdx.x;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        float sum = 0;
        for (int p = 0; p < picked; p++) sum = fmaf(x[(row * picked + p) * n + i], shares[row * picked + p], sum);
        float *to = out + row * n + i;
        *to = add ? fmaf(sum, factor, *to) : sum;
    }
}

// act(gate) * up of rows that hold n gates and then n ups. gelu: by its approximation with tanh, else x * sigmoid(x).
extern "C" __global__ void gate_mul(const float *x, bf16 *out, int rows, int n, int gelu) {
    let_next_come();
    after_work_before();
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < (size_t)rows * n; i += (size_t)gridDim.x * blockDim.x) {
        const size_t row = i / n, at = i % n;
        const float gate = x[row * 2 * n + at], up = x[row * 2 * n + n + at];
        const float bent = gelu ? 0.5f * gate * (1 + tanhf(0.7978846f * (gate + 0.044715f * gate * gate * gate)))
                                : gate / (1 + expf(-gate));
        out[i] = __float2bfloat16(bent * up);
    }
}
