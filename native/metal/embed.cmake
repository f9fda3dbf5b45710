# The kernels as a string in C++: cmake -DIN=preprocessed.metal -DOUT=file.cpp -P embed.cmake
file(READ ${IN} text)
file(WRITE ${OUT} "extern const char PROP_ATTN_MSL[];
const char PROP_ATTN_MSL[] = R\"msl(#include <metal_stdlib>
${text})msl\";
")
