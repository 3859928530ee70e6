// What a function is compiled for. There is no -march and no flag for a file: a function names its target, and what is
// inlined into it takes it on.
#pragma once

#define DK_BODY inline __attribute__((always_inline))
#define DK_INLINE __attribute__((always_inline))  // of a lambda

#if defined(__x86_64__)
#define DK_AVX2 __attribute__((target("avx2,fma,f16c")))
#define DK_AVX512 __attribute__((target("avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl,prefer-vector-width=512")))
#define DK_AVX512_BF16 \
  __attribute__((target("avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,prefer-vector-width=512")))
#endif
