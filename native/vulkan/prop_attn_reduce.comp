#version 450

// The second kernel of native/gpu/prop-attn.h in GLSL: puts the parts together. Block (head, token).

#define THREADS 128
#define MASKED (-1e30)
#define MASKED_LO (-1e29)

layout(local_size_x = THREADS) in;

layout(push_constant) uniform P { int n_head, n_head_kv, n_kv, n_part, n_query, has_sinks; } a; // n_query: of all heads

layout(binding = 0) readonly buffer B0 { int rows[]; };
layout(binding = 1) readonly buffer B1 { float sinks[]; };
layout(binding = 2) readonly buffer B2 { float work[]; };
layout(binding = 3) writeonly buffer B3 { float dst[]; };

void main() {
    const int id = int(gl_LocalInvocationID.x), query = int(gl_WorkGroupID.y) * a.n_head + int(gl_WorkGroupID.x);
    const int head = query % a.n_head, kv = head / (a.n_head / a.n_head_kv);
    int total = 0, first = 0;
    for (int h = 0; h < a.n_head_kv; ++h) {
        first = h == kv ? total : first;
        total += rows[a.n_head_kv + h] + a.n_kv;
    }
    const int end = first + rows[a.n_head_kv + kv] + a.n_kv;
    const int whole = total / a.n_part, rest = total % a.n_part;
    for (int e = id; e < D; e += THREADS) {
        float y = 0.0, m = MASKED, l = 0.0;
        for (int p = 0; p < a.n_part; ++p) {
            const int lo = whole * p + rest * p / a.n_part, hi = whole * (p + 1) + rest * (p + 1) / a.n_part;
            if (hi <= first || lo >= end || lo == hi) {
                continue;
            }
            const int slot = (p * a.n_query + query) * (D + 2);
            const float mx = max(m, work[slot + D]), old = exp(m - mx);
            const float f = work[slot + D] > MASKED_LO ? exp(work[slot + D] - mx) : 0.0;
            m = mx;
            l = l * old + f * work[slot + D + 1];
            y = y * old + f * work[slot + e];
        }
        float f = 1.0;
        if (a.has_sinks != 0) {
            const float s = sinks[head];
            if (s > m) {
                f = exp(m - s);
                l = l * f + 1.0;
            } else {
                l += exp(s - m);
            }
        }
        dst[query * D + e] = l > 0.0 ? y * f / l : 0.0;
    }
}
