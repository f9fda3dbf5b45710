#version 450

// The first kernel of native/gpu/prop-attn.h in GLSL: the same parts, the same tiles. Without subgroup operations, so that
// any device will do; half numbers are packed in words, since shared memory of 16 bits is not to be had everywhere.
//
// Compiled for heads of D values and NQ query rows a block. Blocks: (part, group of NQ query rows).

#extension GL_EXT_shader_16bit_storage : require
#extension GL_EXT_control_flow_attributes : require

#define THREADS 128
#define TILE (D > 128 ? 32 : 64)
#define SUB (THREADS / TILE)  // threads that share a row's logits
#define LD (D / 2 + 1)        // words from one row of a tile to the next
#define GROUPS (THREADS / (D / 4))
#define PER_QUERY (THREADS / NQ)
#define MASKED (-1e30)
#define MASKED_LO (-1e29)

#define F16 0
#define Q8_0 1
#define Q5_0 2
#define Q4_0 3
#define IQ4_NL 4

layout(local_size_x = THREADS) in;

// As prop_attn_args; strides of q in floats, of cells in 2 bytes.
layout(push_constant) uniform P {
    int n_head, n_head_kv, n_tokens, n_kv, n_sink, n_part;
    int k_type, v_type, k_cell_type, v_cell_type;
    int k_rotated, mask_f16;
    float scale, softcap;
    int q_head, q_token, k_head, k_cell, v_head, v_cell, mask_token;
} a;

layout(binding = 0) readonly buffer B0 { float q[]; };
layout(binding = 1) readonly buffer B1 { uint16_t k[]; };
layout(binding = 2) readonly buffer B2 { uint16_t v[]; };
layout(binding = 3) readonly buffer B3 { uint16_t mask[]; };
layout(binding = 4) readonly buffer B4 { uint16_t core_k[]; };
layout(binding = 5) readonly buffer B5 { uint16_t core_v[]; };
layout(binding = 6) readonly buffer B6 { uint16_t bias[]; };
layout(binding = 7) readonly buffer B7 { uint16_t heads[]; };
layout(binding = 8) readonly buffer B8 { int rows[]; };
layout(binding = 9) writeonly buffer B9 { float work[]; };

shared float q_as_is[NQ * D], q_core[NQ * D], o[NQ * D];
shared float x[SUB * NQ * TILE];
shared float factor[NQ], most[NQ], sum[NQ], shift[NQ], red[THREADS];
shared uint tile[TILE * LD];

const int NL[16] = int[](-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113);

float half_of(uint bits) { return unpackHalf2x16(bits & 0xffffu).x; }

// Of 2 bytes: a block of 32 values, and a row.
int units_of_block(int type) { return type == F16 ? 32 : type == Q8_0 ? 17 : type == Q5_0 ? 11 : 9; }
int units_of_row(int type) { return type == F16 ? D : D / 32 * units_of_block(type); }

// Four values of a block whose codes are w: 4 bits each, in bytes' low halves or, of `upper`, in their high ones.
vec4 four_of(int type, uint w, uint high, bool upper, int at) {
    vec4 y;
    [[unroll]] for (int i = 0; i < 4; ++i) {
        const uint code = (w >> (8 * i + (upper ? 4 : 0))) & 15u;
        y[i] = type == IQ4_NL ? float(NL[code])
             : type == Q4_0   ? float(code) - 8.0
                              : float(code | (((high >> (at + i)) & 1u) << 4)) - 16.0;
    }
    return y;
}

// N rows of a type from BUF, the first at unit AT, STRIDE units apart, into the tile.
#define LOAD(BUF, TYPE, AT, STRIDE, N)                                                                            \
    for (int i = id; i < (N) * (D / 8); i += THREADS) {                                                           \
        const int r = i / (D / 8), s = i % (D / 8), j = s % 4;                                                    \
        const int b = (AT) + r * (STRIDE) + s / 4 * units_of_block(TYPE);                                         \
        vec4 y0, y1;                                                                                              \
        int p0 = 8 * j, p1 = 8 * j + 4;                                                                           \
        if (TYPE == F16) {                                                                                        \
            [[unroll]] for (int e = 0; e < 4; ++e) {                                                              \
                y0[e] = half_of(uint(BUF[b + p0 + e]));                                                           \
                y1[e] = half_of(uint(BUF[b + p1 + e]));                                                           \
            }                                                                                                     \
        } else {                                                                                                  \
            const float d = half_of(uint(BUF[b]));                                                                \
            if (TYPE == Q8_0) {                                                                                   \
                [[unroll]] for (int e = 0; e < 4; ++e) {                                                          \
                    const int byte0 = p0 + e, byte1 = p1 + e;                                                     \
                    const uint w0 = uint(BUF[b + 1 + byte0 / 2]) >> (8 * (byte0 % 2));                            \
                    const uint w1 = uint(BUF[b + 1 + byte1 / 2]) >> (8 * (byte1 % 2));                            \
                    y0[e] = float((w0 & 255u) ^ 128u) - 128.0;                                                    \
                    y1[e] = float((w1 & 255u) ^ 128u) - 128.0;                                                    \
                }                                                                                                 \
            } else {                                                                                              \
                const int at = b + (TYPE == Q5_0 ? 3 : 1) + 2 * j;                                                \
                const uint w = uint(BUF[at]) | uint(BUF[at + 1]) << 16;                                           \
                const uint high = TYPE == Q5_0 ? uint(BUF[b + 1]) | uint(BUF[b + 2]) << 16 : 0u;                  \
                p0 = 4 * j;                                                                                       \
                p1 = 16 + 4 * j;                                                                                  \
                y0 = four_of(TYPE, w, high, false, p0);                                                           \
                y1 = four_of(TYPE, w, high, true, p1);                                                            \
            }                                                                                                     \
            y0 *= d;                                                                                              \
            y1 *= d;                                                                                              \
        }                                                                                                         \
        const int to = r * LD + s / 4 * 16;                                                                       \
        tile[to + p0 / 2] = packHalf2x16(y0.xy);                                                                  \
        tile[to + p0 / 2 + 1] = packHalf2x16(y0.zw);                                                              \
        tile[to + p1 / 2] = packHalf2x16(y1.xy);                                                                  \
        tile[to + p1 / 2 + 1] = packHalf2x16(y1.zw);                                                              \
    }

// As sc_rotate().
#define ROTATE(X)                                                                                                 \
    for (int h = 1; h < (D & -D); h *= 2) {                                                                       \
        for (int i = id; i < NQ * D / 2; i += THREADS) {                                                          \
            const int at = i / h * 2 * h + i % h;                                                                 \
            const float y = X[at], z = X[at + h];                                                                 \
            X[at] = y + z;                                                                                        \
            X[at + h] = y - z;                                                                                    \
        }                                                                                                         \
        barrier();                                                                                                \
    }                                                                                                             \
    for (int i = id; i < NQ * D; i += THREADS) {                                                                  \
        X[i] *= inversesqrt(float(D & -D));                                                                       \
    }                                                                                                             \
    barrier();

int id, r0, n_gqa, n_query;

float capped(float y) { return a.softcap > 0.0 ? a.softcap * tanh(y / a.softcap) : y; }

float mask_at(int token, int cell) {
    const int at = token * a.mask_token + cell;
    return a.mask_f16 != 0 ? half_of(uint(mask[at]))
                           : uintBitsToFloat(uint(mask[2 * at]) | uint(mask[2 * at + 1]) << 16);
}

// Shares of a tile's n rows by their keys. core: the row of the first one; -1: no core; cell: likewise.
void shares_of(int n, int core, int cell) {
    {
        const int i = id / SUB, part = id % SUB;
        float y[NQ];
        [[unroll]] for (int r = 0; r < NQ; ++r) {
            y[r] = 0.0;
        }
        if (i < n) {
            for (int e = part * (D / SUB); e < (part + 1) * (D / SUB); e += 2) {
                const vec2 key = unpackHalf2x16(tile[i * LD + e / 2]);
                [[unroll]] for (int r = 0; r < NQ; ++r) {
                    const int at = r * D + e;
                    y[r] += core < 0 ? q_as_is[at] * key.x + q_as_is[at + 1] * key.y
                                     : q_core[at] * key.x + q_core[at + 1] * key.y;
                }
            }
        }
        [[unroll]] for (int r = 0; r < NQ; ++r) {
            x[(part * NQ + r) * TILE + i] = y[r];
        }
    }
    barrier();
    const int r = id / PER_QUERY, at = id % PER_QUERY;
    float mx = MASKED;
    for (int i = at; i < TILE; i += PER_QUERY) {
        float y = MASKED;
        if (i < n && r < n_query) {
            y = 0.0;
            [[unroll]] for (int part = 0; part < SUB; ++part) {
                y += x[(part * NQ + r) * TILE + i];
            }
            y = capped(y + (core < 0 ? 0.0 : shift[r]));
            if (core >= 0) {
                y += half_of(uint(bias[core + i]));
            } else if (cell >= 0) {
                const float b = mask_at((r0 + r) / n_gqa, cell + i);
                y = b > MASKED_LO ? y + b : MASKED;
            }
        }
        x[r * TILE + i] = y;
        mx = max(mx, y);
    }
    red[id] = mx;
    barrier();
    for (int w = PER_QUERY / 2; w > 0; w /= 2) {
        if (at < w) {
            red[id] = max(red[id], red[id + w]);
        }
        barrier();
    }
    const float old = most[r];
    mx = max(old, red[r * PER_QUERY]);
    barrier();
    float total = 0.0;
    for (int i = at; i < TILE; i += PER_QUERY) {
        const float y = x[r * TILE + i] > MASKED_LO ? exp(x[r * TILE + i] - mx) : 0.0;
        x[r * TILE + i] = y;
        total += y;
    }
    red[id] = total;
    barrier();
    for (int w = PER_QUERY / 2; w > 0; w /= 2) {
        if (at < w) {
            red[id] += red[id + w];
        }
        barrier();
    }
    if (at == 0) {
        factor[r] = exp(old - mx);
        most[r] = mx;
        sum[r] = sum[r] * factor[r] + red[id];
    }
    barrier();
}

// Attention to N rows, keys and values of which are at K_AT and V_AT, in tiles.
#define ATTEND(K_BUF, K_TYPE, K_AT, K_STRIDE, V_BUF, V_TYPE, V_AT, V_STRIDE, N, CORE, CELL)                       \
    {                                                                                                             \
        const int g = id / (D / 4), e0 = id % (D / 4) * 4;                                                        \
        vec4 acc[NQ];                                                                                             \
        [[unroll]] for (int r = 0; r < NQ; ++r) {                                                                 \
            acc[r] = vec4(0.0);                                                                                   \
        }                                                                                                         \
        for (int i0 = 0; i0 < (N); i0 += TILE) {                                                                  \
            const int n = min((N) - i0, TILE);                                                                    \
            LOAD(K_BUF, K_TYPE, (K_AT) + i0 * (K_STRIDE), K_STRIDE, n)                                            \
            barrier();                                                                                            \
            shares_of(n, (CORE) < 0 ? -1 : (CORE) + i0, (CELL) < 0 ? -1 : (CELL) + i0);                           \
            LOAD(V_BUF, V_TYPE, (V_AT) + i0 * (V_STRIDE), V_STRIDE, n)                                            \
            for (int i = id; i < NQ * D; i += THREADS) {                                                          \
                o[i] *= factor[i / D];                                                                            \
            }                                                                                                     \
            barrier();                                                                                            \
            if (g < GROUPS) {                                                                                     \
                [[unroll]] for (int r = 0; r < NQ; ++r) {                                                         \
                    acc[r] *= factor[r];                                                                          \
                }                                                                                                 \
                for (int i = g; i < n; i += GROUPS) {                                                             \
                    const uint at = i * LD + e0 / 2;                                                              \
                    const vec4 y = vec4(unpackHalf2x16(tile[at]), unpackHalf2x16(tile[at + 1]));                  \
                    [[unroll]] for (int r = 0; r < NQ; ++r) {                                                     \
                        acc[r] += x[r * TILE + i] * y;                                                            \
                    }                                                                                             \
                }                                                                                                 \
            }                                                                                                     \
            barrier();                                                                                            \
        }                                                                                                         \
        for (int turn = 0; turn < GROUPS; ++turn) {                                                               \
            if (g == turn) {                                                                                      \
                [[unroll]] for (int r = 0; r < NQ; ++r) {                                                         \
                    [[unroll]] for (int j = 0; j < 4; ++j) {                                                      \
                        o[r * D + e0 + j] += acc[r][j];                                                           \
                    }                                                                                             \
                }                                                                                                 \
            }                                                                                                     \
            barrier();                                                                                            \
        }                                                                                                         \
    }

// As prop_attn_queries().
void load_queries(int h, bool cores) {
    for (int i = id; i < NQ * D; i += THREADS) {
        const int r = i / D, row = r0 + r;
        float y = 0.0;
        if (r < n_query) {
            y = q[(h * n_gqa + row % n_gqa) * a.q_head + row / n_gqa * a.q_token + i % D] * a.scale;
        }
        q_as_is[i] = y;
        q_core[i] = y;
        o[i] = 0.0;
    }
    for (int i = id; i < NQ; i += THREADS) {
        most[i] = MASKED;
        sum[i] = 0.0;
        shift[i] = 0.0;
    }
    barrier();
    if (!cores) {
        return;
    }
    if (a.k_rotated != 0) {
        ROTATE(q_core)
    }
    if (a.k_type == F16) {
        return;
    }
    const int mean = h * (2 * D + 2 * D * a.n_sink), r = id / PER_QUERY, at = id % PER_QUERY;
    float y = 0.0;
    for (int e = at; e < D; e += PER_QUERY) {
        y += q_core[r * D + e] * half_of(uint(heads[mean + e]));
        q_core[r * D + e] *= half_of(uint(heads[mean + D + e]));
    }
    red[id] = y;
    barrier();
    for (int w = PER_QUERY / 2; w > 0; w /= 2) {
        if (at < w) {
            red[id] += red[id + w];
        }
        barrier();
    }
    if (at == 0) {
        shift[r] = red[id];
    }
    barrier();
    ROTATE(q_core)
}

void main() {
    id = int(gl_LocalInvocationID.x);
    r0 = int(gl_WorkGroupID.y) * NQ;
    n_gqa = a.n_head / a.n_head_kv;
    n_query = min(n_gqa * a.n_tokens - r0, NQ);
    const int part = int(gl_WorkGroupID.x);

    int total = 0;
    for (int h = 0; h < a.n_head_kv; ++h) {
        total += rows[a.n_head_kv + h] + a.n_kv;
    }
    // total * part / n_part, without a product of more than 31 bits
    const int whole = total / a.n_part, rest = total % a.n_part;
    const int lo = whole * part + rest * part / a.n_part, hi = whole * (part + 1) + rest * (part + 1) / a.n_part;
    int first = 0;
    for (int h = 0; h < a.n_head_kv; ++h) {
        const int n_used = rows[a.n_head_kv + h], n = n_used + a.n_kv, n_sink = min(n_used, a.n_sink);
        const int begin = clamp(lo - first, 0, n), end = clamp(hi - first, 0, n);
        first += n;
        if (begin >= end) {
            continue;
        }
        const int sinks_end = clamp(n_sink, begin, end), cores_end = max(sinks_end, min(end, n_used));
        load_queries(h, cores_end > sinks_end);
        if (cores_end > sinks_end) {
            const int k_row = units_of_row(a.k_type), v_row = units_of_row(a.v_type), row = rows[h] + sinks_end;
            ATTEND(core_k, a.k_type, row * k_row, k_row, core_v, a.v_type, row * v_row, v_row, cores_end - sinks_end,
                row, -1)
            if (a.v_type != F16) {
                ROTATE(o)
            }
        }
        if (begin < sinks_end) {
            const int at = h * (2 * D + 2 * D * a.n_sink) + 2 * D;
            ATTEND(heads, F16, at + begin * D, D, heads, F16, at + (a.n_sink + begin) * D, D, sinks_end - begin, -1, -1)
        }
        if (cores_end < end) {
            const int cell = cores_end - n_used;
            ATTEND(k, a.k_cell_type, h * a.k_head + cell * a.k_cell, a.k_cell, v, a.v_cell_type,
                h * a.v_head + cell * a.v_cell, a.v_cell, end - cores_end, -1, cell)
        }
        for (int i = id; i < n_query * (D + 2); i += THREADS) {
            const int r = i / (D + 2), e = i % (D + 2), row = r0 + r;
            const int slot = (part * a.n_tokens + row / n_gqa) * a.n_head + h * n_gqa + row % n_gqa;
            work[slot * (D + 2) + e] = e < D ? o[r * D + e] : e == D ? most[r] : sum[r];
        }
        barrier();
    }
}
