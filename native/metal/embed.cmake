# The kernels as a string in C++. To llama.cpp a library that was compiled with warnings, of unused functions for one,
# is no library: cmake -DIN=preprocessed.metal -DOUT=file.cpp -P embed.cmake
file(READ ${IN} text)
file(WRITE ${OUT} "extern const char PROP_ATTN_MSL[];
const char PROP_ATTN_MSL[] = R\"msl(#include <metal_stdlib>
#pragma clang diagnostic ignored \"-Weverything\"
${text})msl\";
")
