// sc-gpu-words.h - address spaces, function kinds and types of native/gpu, as each compiler spells them
//
//     SC_DEVICE, SC_BOTH                        a function that runs on the device, or on the host too
//     SC_GLOBAL, SC_SHARED, SC_THREAD, SC_CONST address spaces of pointers and references
//     SC_KERNEL(name, function)                 an instance of a kernel of native/metal

#pragma once

#if defined(__METAL_VERSION__)
    #include <metal_stdlib>
using namespace metal;
    #define SC_DEVICE static inline
    #define SC_BOTH static inline
    #define SC_GLOBAL device
    #define SC_SHARED threadgroup
    #define SC_THREAD thread
    #define SC_CONST constant
    #define SC_UNROLL _Pragma("clang loop unroll(full)")
    #if !defined(SC_KERNEL)
        #define SC_KERNEL(name, ...) template [[host_name(#name)]] kernel decltype(__VA_ARGS__) __VA_ARGS__;
    #endif
typedef half sc_half;
typedef long sc_i64;

#else
    #define SC_GLOBAL
    #define SC_SHARED
    #define SC_THREAD
    #define SC_CONST
typedef long long sc_i64;
typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;
    #if defined(__CUDACC__)
        #include <cuda_fp16.h>
        #define SC_DEVICE static __device__ __forceinline__
        #define SC_BOTH static __host__ __device__ inline
        #define SC_UNROLL _Pragma("unroll")
typedef __half sc_half;
    #else
        #define SC_DEVICE static inline
        #define SC_BOTH static inline
        #define SC_UNROLL
typedef unsigned short sc_half;
    #endif
#endif

#define SC_WARP 32 // threads
