// What all kernels share.
#pragma once
#include <cuda_bf16.h>
#include <stdint.h>

typedef __nv_bfloat16 bf16;

// d += a * b of 16 x 16 by 16 x 8 bf16 values, sums in f32 (PTX ISA, mma.m16n8k16). With g = lane / 4 and t = lane % 4 a lane
// holds of a the rows g and g + 8 at the inputs 2t, 2t + 1, 2t + 8 and 2t + 9, of b the column g at the same inputs, and of d
// the rows g and g + 8 at the columns 2t and 2t + 1.
__device__ inline void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Kernels are launched before the work before them is done. Each says at once that the next may come, and waits for that work
// itself before it reads or writes what others do; so the next, which waits for all of this one, waits for all before it.
__device__ inline void let_next_come() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ inline void after_work_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

constexpr int WARPS = 8;
