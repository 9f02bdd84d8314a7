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

// out[row, n] (+)= x[row, k] . w[n, k] (+ bias[n]).
//
// Weights are read once, straight into the operands of the matrix units: which input stands in which slot does not matter as
// long as both operands agree, so a lane's slots of two products are the 8 consecutive inputs that it reads at once. A block
// computes 16 * MT outputs of 8 * NT rows; each of its warps takes every eighth step of 32 inputs, and their sums are added in
// their order. That order is the same in all kernels, so a row has the same bits whatever rows are beside it.
template <int NT, int MT, int AHEAD>
__device__ inline void linear(const bf16 *x, const bf16 *__restrict__ w, const float *__restrict__ bias,
                              float *out, int rows, int n, int k, int add) {
    constexpr int OUTPUTS = 16 * MT, ROWS = 8 * NT;
    __shared__ float sums[OUTPUTS * ROWS];
    let_next_come();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int first = blockIdx.x * OUTPUTS, row0 = blockIdx.y * ROWS;
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
    for (int p = 0; p < WARPS; p++) {
        if (warp == p) {
#pragma unroll
            for (int i = 0; i < MT; i++) {
#pragma unroll
                for (int j = 0; j < NT; j++) {
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const int output = 16 * i + g + e / 2 * 8, row = 8 * j + 2 * t + e % 2;
                        float &sum = sums[row * OUTPUTS + output];
                        sum = p == 0 ? d[i][j][e] : sum + d[i][j][e];
                    }
                }
            }
        }
        __syncthreads();
    }
    for (int at = threadIdx.x; at < OUTPUTS * ROWS; at += 32 * WARPS) {
        const int output = first + at % OUTPUTS, row = row0 + at / OUTPUTS;
        if (output < n && row < rows) {
            float *to = out + (size_t)row * n + output;
            const float value = bias ? sums[at] + bias[output] : sums[at];
            *to = add ? *to + value : value;
        }
    }
}

#define LINEAR(NAME, NT, MT, AHEAD)                                                                                     \
    extern "C" __global__ void __launch_bounds__(32 * WARPS)                                                                \
        NAME(const bf16 *x, const bf16 *w, const float *bias, float *out, int rows, int n, int k, int add) {                \
        linear<NT, MT, AHEAD>(x, w, bias, out, rows, n, k, add);                                                        \
    }

// How far ahead the weights are read, and how many outputs a warp has, was chosen by the bench on an H200.
LINEAR(linear_8, 1, 1, 1)
LINEAR(linear_16, 2, 1, 1)
LINEAR(linear_32, 4, 2, 4)
LINEAR(linear_64, 8, 1, 1)

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

// Root-mean-square norm of each row: x / sqrt(mean(x^2) + eps) * weight, rounded to bf16. One block a row.
extern "C" __global__ void rms_norm(const float *x, const float *weight, bf16 *out, int n, float eps) {
    let_next_come();
    after_work_before();
    x += (size_t)blockIdx.x * n;
    out += (size_t)blockIdx.x * n;
    float squares = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) squares = fmaf(x[i], x[i], squares);
    const float scale = 1 / sqrtf(block_sum(squares) / n + eps);
    for (int i = threadIdx.x; i < n; i += blockDim.x) out[i] = __float2bfloat16(x[i] * scale * weight[i]);
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
