#version 450

// A kernel of native/gpu/pass.h in GLSL: the same pieces, the same sums. Without subgroup operations, so that any device
// will do.
//
// Compiled for every STEP of that file. Blocks: (piece, kv head).

#extension GL_EXT_shader_16bit_storage : require
#extension GL_EXT_control_flow_attributes : require

#define PASS_LOAD 0
#define PASS_FRAME 1
#define PASS_QUERIES 2
#define PASS_LOGITS 3
#define PASS_SHARES 4
#define PASS_SCORE 5
#define PASS_OUTPUT 6
#define PASS_DISTANCES 7
#define PASS_CHOOSE 8
#define PASS_METRIC 9
#define PASS_KEY_METRIC 10
#define PASS_ASSIGN 11
#define PASS_COUNT 12
#define PASS_MERGE 13
#define PASS_MASS 14
#define PASS_GONE 15
#define PASS_MERGED_LOGITS 16
#define PASS_FIT_BIAS 17
#define PASS_EQUATIONS 18
#define PASS_MISSING 19
#define PASS_NORMAL 20
#define PASS_MOVE 21
#define PASS_SOLVE 22
#define PASS_STORE_SINKS 23
#define PASS_STORE 24
#define PASS_REPLACE 25
#define PASS_SET_COUNTS 26

#define THREADS 128
#define ROWS 16 // of a piece where rows are loaded or stored
#define QUERIES 8
#define D_MOST 256 // values of a head at the most
#define GEMM 64
#define GEMM_K 16
#define GEMM_LD (GEMM + 4)
#define MASKED (-1e30)
#define HUGE 3e38
#define DROPPED (-1)
#define FRAME_FLOOR 1e-3
#define FRAME_MIN 0.0009765625
#define FRAME_MAX 32768.0

#define F16 0
#define Q8_0 1
#define Q5_0 2
#define Q4_0 3
#define IQ4_NL 4

layout(local_size_x = THREADS) in;

// Places in the work memory, in words of 4 bytes: see pass_layout.
layout(push_constant) uniform P {
    int first_head, params, counts;
    int turn, back, mean_turn, q_weight, cell, chunk, n_voted, voter_row;
} at;

// The work memory, three times; blocks hand work on in it.
layout(binding = 0) coherent buffer B0 { float wf[]; };
layout(binding = 1) coherent buffer B1 { int wi[]; };
layout(binding = 2) coherent buffer B2 { uint16_t wh[]; };
layout(binding = 3) buffer B3 { int rows[]; };
layout(binding = 4) buffer B4 { uint16_t heads[]; };
#if STEP == PASS_LOAD
layout(binding = 5) readonly buffer B5 { uint16_t core_k[]; };
layout(binding = 6) readonly buffer B6 { uint16_t core_v[]; };
layout(binding = 7) readonly buffer B7 { uint16_t bias[]; };
layout(binding = 8) readonly buffer B8 { uint16_t k_stage[]; };
layout(binding = 9) readonly buffer B9 { uint16_t v_stage[]; };
#elif STEP == PASS_FRAME || STEP == PASS_QUERIES
layout(binding = 5) readonly buffer B5 { uint16_t ring[]; };
#elif STEP == PASS_SCORE
layout(binding = 5) readonly buffer B5 { int origin[]; };
layout(binding = 6) readonly buffer B6 { uint16_t s_use[]; };
layout(binding = 7) buffer B7 { float vote_p4[]; };
layout(binding = 8) buffer B8 { float vote_p[]; };
#elif STEP == PASS_STORE
layout(binding = 5) readonly buffer B5 { uint16_t core_k[]; };
layout(binding = 6) readonly buffer B6 { uint16_t core_v[]; };
#elif STEP == PASS_REPLACE
layout(binding = 5) writeonly buffer B5 { uint16_t core_k[]; };
layout(binding = 6) writeonly buffer B6 { uint16_t core_v[]; };
layout(binding = 7) writeonly buffer B7 { uint16_t bias[]; };
layout(binding = 8) writeonly buffer B8 { uint16_t s_use[]; };
layout(binding = 9) writeonly buffer B9 { int origin[]; };
#endif

// Words of pass_dims; what is 8 bytes there is below 2^31.
#define DIM(I) wi[at.params + (I)]
#define d_k DIM(0)
#define d_v DIM(1)
#define n_gqa DIM(2)
#define n_head_kv DIM(3)
#define scale_of_logits intBitsToFloat(DIM(6))
#define softcap intBitsToFloat(DIM(7))
#define k_type DIM(8)
#define v_type DIM(9)
#define k_cell_type DIM(10)
#define v_cell_type DIM(11)
#define q_type DIM(12)
#define k_rotated DIM(13)
#define n_row DIM(14)
#define n_sink_max DIM(15)
#define n_row_sink DIM(16)
#define n_sink DIM(17)
#define n_new DIM(18)
#define n_window DIM(19)
#define n_voter DIM(20)
#define n_full DIM(21)
#define stride DIM(22)
#define merges DIM(23)
#define distinct DIM(24)
#define n_rot DIM(26)
#define neox DIM(27)
#define n_q_layer DIM(28)
#define has_weight DIM(29)
#define ld DIM(30)
#define ld_merged DIM(31)
#define k_head DIM(32)
#define k_cell DIM(34)
#define v_head DIM(36)
#define v_cell DIM(38)
#define v_elem DIM(40)
#define q_row DIM(42)
#define vote_head DIM(44)
#define N_DIM 46

// Parts of the work, in the order of SC_PASS_WORK: the word where each begins.
#define PART(I) wi[at.params + N_DIM + (I)]
#define W_K PART(0)
#define W_V PART(1)
#define W_BIAS PART(2)
#define W_Q PART(3)
#define W_Z PART(4)
#define W_P PART(5)
#define W_W_FIT PART(6)
#define W_OUT PART(7)
#define W_S_USE PART(8)
#define W_W PART(9)
#define W_DEV PART(10)
#define W_DIFFERENCE PART(11)
#define W_METRIC PART(12)
#define W_K_METRIC PART(13)
#define W_CHUNK PART(14)
#define W_N_TOK PART(15)
#define W_STAYS PART(16)
#define W_WINNER PART(17)
#define W_COUNT PART(18)
#define W_PLACE PART(19)
#define W_FIRST PART(20)
#define W_MK PART(22)
#define W_MV PART(23)
#define W_M_BIAS PART(24)
#define W_MASS PART(25)
#define W_SHARES PART(26)
#define W_SHARE PART(27)
#define W_R PART(28)
#define W_NORMAL PART(29)
#define W_MOVE PART(30)
#define W_NEW_K PART(31)
#define W_NEW_V PART(32)
#define W_NEW_BIAS PART(33)
#define W_NEW_S_USE PART(34)
#define W_NEW_ORIGIN PART(35)

// Counts of a head.
#define N_MERGED(H) wi[at.counts + 4 * (H)]
#define N_KEPT(H) wi[at.counts + 4 * (H) + 1]
#define N_GONE_MERGED(H) wi[at.counts + 4 * (H) + 2]
#define N_GONE_DROPPED(H) wi[at.counts + 4 * (H) + 3]

const int NL[16] = int[](-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113);

int id, px, h;

void sync() {
    memoryBarrierBuffer();
    barrier();
}

// One head of a layer, as pass_kv.
struct kv_head {
    int ih, first, n_alloc, n_used, n_core, n_cand, n_rows, budget;
};

kv_head kv_of() {
    kv_head s;
    s.ih = at.first_head + h;
    s.first = rows[s.ih];
    s.n_used = rows[n_head_kv + s.ih];
    s.n_alloc = (s.ih + 1 < n_head_kv ? rows[s.ih + 1] : n_row) - s.first;
    s.n_core = s.n_used - n_row_sink;
    s.n_cand = s.n_core + n_new;
    s.n_rows = s.n_used + n_sink + n_new + n_window;
    s.budget = s.n_alloc - n_row_sink - n_sink;
    return s;
}

int n_query() { return n_voter * n_gqa; }
int n_fit() { return (n_voter + stride - 1) / stride * n_gqa; }

// As pass_row_at().
int row_at(const kv_head s, int i) {
    if (i < s.n_core) {
        return n_row_sink + i;
    }
    i -= s.n_core;
    if (i < n_new) {
        return -1 - (n_sink + i);
    }
    i -= n_new;
    if (i < n_row_sink) {
        return i;
    }
    i -= n_row_sink;
    return i < n_sink ? -1 - i : -1 - (n_new + i);
}

int head_size() { return 2 * d_k + n_sink_max * (d_k + d_v); }

float half_of(uint bits) { return unpackHalf2x16(bits & 0xffffu).x; }

// To the nearest even, which packHalf2x16() need not do.
uint bits_of(float x) {
    const uint u = floatBitsToUint(x), sign = u >> 16 & 0x8000u, a = u & 0x7fffffffu;
    if (a > 0x7f800000u) {
        return sign | 0x7e00u;
    }
    if (a >= 0x477ff000u) {
        return sign | 0x7c00u;
    }
    if (a < 0x38800000u) {
        return sign | uint(roundEven(abs(x) * 16777216.0));
    }
    return sign | (a - 0x38000000u + 0xfffu + (a >> 13 & 1u)) >> 13;
}

bool is_nan(float x) { return (floatBitsToUint(x) & 0x7fffffffu) > 0x7f800000u; }

float capped(float y) { return softcap > 0.0 ? softcap * tanh(y / softcap) : y; }

// Of 2 bytes: a block of 32 values, and a row of d.
int units_of_block(int type) { return type == F16 ? 32 : type == Q8_0 ? 17 : type == Q5_0 ? 11 : 9; }
int units_of_row(int type, int d) { return type == F16 ? d : d / 32 * units_of_block(type); }

// The e-th value of a row of BUF that begins at unit `row`, as it is stored.
#define DEFINE_VALUE_AT(NAME, BUF)                                                               \
    float NAME(int type, int row, int e) {                                                       \
        if (type == F16) {                                                                       \
            return half_of(uint(BUF[row + e]));                                                  \
        }                                                                                        \
        const int b = row + e / 32 * units_of_block(type), i = e % 32;                           \
        const float d = half_of(uint(BUF[b]));                                                   \
        if (type == Q8_0) {                                                                      \
            const uint w = uint(BUF[b + 1 + i / 2]) >> (8 * (i % 2)) & 255u;                     \
            return d * float(int(w ^ 128u) - 128);                                               \
        }                                                                                        \
        const int j = i % 16;                                                                    \
        const uint w = uint(BUF[b + (type == Q5_0 ? 3 : 1) + j / 2]) >> (8 * (j % 2)) & 255u;    \
        const uint code = i < 16 ? w & 15u : w >> 4;                                             \
        if (type == Q5_0) {                                                                      \
            const uint high = uint(BUF[b + 1]) | uint(BUF[b + 2]) << 16;                         \
            return d * float(int(code | (high >> i & 1u) << 4) - 16);                            \
        }                                                                                        \
        return d * (type == IQ4_NL ? float(NL[code]) : float(int(code) - 8));                    \
    }

shared float red[THREADS];
shared int red_int[THREADS];

float block_sum(float x) {
    red[id] = x;
    sync();
    for (int n = THREADS / 2; n > 0; n /= 2) {
        if (id < n) {
            red[id] += red[id + n];
        }
        sync();
    }
    const float y = red[0];
    sync();
    return y;
}

float block_max(float x) {
    red[id] = x;
    sync();
    for (int n = THREADS / 2; n > 0; n /= 2) {
        if (id < n) {
            red[id] = max(red[id], red[id + n]);
        }
        sync();
    }
    const float y = red[0];
    sync();
    return y;
}

// As sc_block_scan().
int block_scan(int x, out int total) {
    red_int[id] = x;
    sync();
    for (int n = 1; n < THREADS; n *= 2) {
        const int add = id >= n ? red_int[id - n] : 0;
        sync();
        red_int[id] += add;
        sync();
    }
    total = red_int[THREADS - 1];
    const int y = red_int[id] - x;
    sync();
    return y;
}

// The chunk of the i-th of n candidates.
void chunk_of(int n, int i, out int begin, out int end) {
    const int chunk = W_CHUNK + h * ld, its = wi[chunk + i];
    begin = i;
    end = i + 1;
    while (begin > 0 && wi[chunk + begin - 1] == its) {
        --begin;
    }
    while (end < n && wi[chunk + end] == its) {
        ++end;
    }
}

#if STEP == PASS_LOAD || STEP == PASS_STORE || STEP == PASS_STORE_SINKS || STEP == PASS_QUERIES || STEP == PASS_FRAME

shared float y[ROWS * D_MOST];
shared int rotated[ROWS], flag[ROWS];

// As sc_rotate(): n rows of d values of y, those that `rotated` names.
void rotate(int n, int d) {
    const int size = d & -d;
    for (int step = 1; step < size; step *= 2) {
        for (int i = id; i < n * d / 2; i += THREADS) {
            const int to = i / step * 2 * step + i % step;
            if (rotated[to / d] != 0) {
                const float a = y[to], b = y[to + step];
                y[to] = a + b;
                y[to + step] = a - b;
            }
        }
        sync();
    }
    for (int i = id; i < n * d; i += THREADS) {
        y[i] *= rotated[i / d] != 0 ? inversesqrt(float(size)) : 1.0;
    }
    sync();
}

#endif

#if STEP == PASS_LOAD

DEFINE_VALUE_AT(value_of_core_k, core_k)
DEFINE_VALUE_AT(value_of_core_v, core_v)
DEFINE_VALUE_AT(value_of_k_stage, k_stage)
DEFINE_VALUE_AT(value_of_v_stage, v_stage)

void load_values(const kv_head s, bool keys, int i0, int n) {
    const int d = keys ? d_k : d_v, core_type = keys ? k_type : v_type, size = units_of_row(core_type, d);
    const int head = s.ih * head_size(), sinks = head + 2 * d_k + (keys ? 0 : n_sink_max * d_k);
    for (int i = id; i < n * d; i += THREADS) {
        const int from = row_at(s, i0 + i / d), e = i % d;
        float v;
        if (from >= n_row_sink) {
            const int row = (s.first + from) * size;
            v = keys ? value_of_core_k(core_type, row, e) : value_of_core_v(core_type, row, e);
        } else if (from >= 0) {
            v = half_of(uint(heads[sinks + from * d + e]));
        } else {
            const int cell = wi[at.cell - 1 - from];
            if (keys) {
                v = value_of_k_stage(k_cell_type, s.ih * (k_head / 2) + cell * (k_cell / 2), e);
            } else if (v_elem > 2) {
                v = half_of(uint(v_stage[s.ih * (v_head / 2) + cell * (v_cell / 2) + e * (v_elem / 2)]));
            } else {
                v = value_of_v_stage(v_cell_type, s.ih * (v_head / 2) + cell * (v_cell / 2), e);
            }
        }
        y[i] = v;
    }
    for (int r = id; r < ROWS; r += THREADS) {
        const int from = r < n ? row_at(s, i0 + r) : 0;
        flag[r] = int(keys && from >= n_row_sink && core_type != F16); // in the frame
        rotated[r] = int(r < n && (from >= n_row_sink ? core_type != F16 : keys && k_rotated != 0));
    }
    sync();
    rotate(n, d);
    for (int i = id; i < n * d; i += THREADS) {
        if (flag[i / d] != 0) {
            y[i] = half_of(uint(heads[head + i % d])) + half_of(uint(heads[head + d_k + i % d])) * y[i];
        }
    }
    sync();
}

void run() {
    const kv_head s = kv_of();
    const int i0 = px * ROWS, n = min(s.n_rows - i0, ROWS);
    if (n <= 0) {
        return;
    }
    load_values(s, true, i0, n);
    for (int i = id; i < n * d_k; i += THREADS) {
        wf[W_K + (h * ld + i0) * d_k + i] = y[i];
    }
    sync();
    load_values(s, false, i0, n);
    for (int i = id; i < n * d_v; i += THREADS) {
        wf[W_V + (h * ld + i0) * d_v + i] = y[i];
    }
    for (int r = id; r < n; r += THREADS) {
        const int from = row_at(s, i0 + r);
        wf[W_BIAS + h * ld + i0 + r] = from >= n_row_sink ? half_of(uint(bias[s.first + from])) : 0.0;
    }
}

#elif STEP == PASS_QUERIES || STEP == PASS_FRAME

DEFINE_VALUE_AT(value_of_ring, ring)

// As pass_load_query().
void load_query(int voter, int g0, int n) {
    const int d = d_k, n_layer = n_gqa / n_q_layer, row = wi[at.voter_row + voter] * (q_row / 2);
    for (int i = id; i < n * d; i += THREADS) {
        const int g = g0 + i / d, l = g / n_layer;
        y[i] = value_of_ring(
            q_type, row, (l * n_head_kv + at.first_head + h) * n_layer * d + g % n_layer * d + i % d);
    }
    for (int g = id; g < n; g += THREADS) {
        rotated[g] = k_rotated;
    }
    sync();
    rotate(n, d);
}

    #if STEP == PASS_QUERIES

void run() {
    const int voter = px, d = d_k, n_layer = n_gqa / n_q_layer, half_rot = n_rot / 2;
    const int n_kept = (n_voter + stride - 1) / stride;
    const int place = voter % stride == 0 ? voter / stride : n_kept + voter - voter / stride - 1;
    const int to = W_Q + (h * n_voter + place) * n_gqa * d;
    for (int g0 = 0; g0 < n_gqa; g0 += QUERIES) {
        const int n = min(n_gqa - g0, QUERIES);
        load_query(voter, g0, n);
        for (int i = id; has_weight != 0 && i < n * d; i += THREADS) {
            const float weight = wf[at.q_weight + (g0 + i / d) / n_layer * d + i % d];
            y[i] = weight != 0.0 ? y[i] / weight : 0.0;
        }
        sync();
        for (int i = id; i < n * half_rot; i += THREADS) {
            const int x = i / half_rot * d, j = i % half_rot, cs = at.turn + voter * n_rot + 2 * j;
            const int a = x + (neox != 0 ? j : 2 * j), b = x + (neox != 0 ? j + half_rot : 2 * j + 1);
            const float x0 = y[a], x1 = y[b];
            y[a] = x0 * wf[cs] - x1 * wf[cs + 1];
            y[b] = x0 * wf[cs + 1] + x1 * wf[cs];
        }
        sync();
        for (int i = id; i < n * d; i += THREADS) {
            const float weight = has_weight != 0 ? wf[at.q_weight + (g0 + i / d) / n_layer * d + i % d] : 1.0;
            wf[to + g0 * d + i] = y[i] * (weight * scale_of_logits);
        }
        sync();
    }
}

    #else

shared float mean[D_MOST], dev[D_MOST], ask[D_MOST];

// As pass_to_rms().
#define TO_RMS(X, N)                                                        \
    for (int i = id; i < n_rot / 2; i += THREADS) {                         \
        const int a = neox != 0 ? i : 2 * i;                                \
        const int b = neox != 0 ? i + n_rot / 2 : 2 * i + 1;                \
        X[a] = X[b] = 0.5 * (X[a] + X[b]);                                  \
    }                                                                       \
    sync();                                                                 \
    {                                                                       \
        float most = 0.0;                                                   \
        for (int e = id; e < d_k; e += THREADS) {                           \
            X[e] = sqrt(X[e] / float(max(N, 1)));                           \
            most = max(most, X[e]);                                         \
        }                                                                   \
        most = block_max(most);                                             \
        for (int e = id; e < d_k; e += THREADS) {                           \
            X[e] = most > 0.0 ? max(X[e], FRAME_FLOOR * most) : 1.0;        \
        }                                                                   \
        sync();                                                             \
    }

void run() {
    const kv_head s = kv_of();
    const int d = d_k, n_key = n_new + n_window, k = W_K + h * ld * d, finite = W_DEV + h * ld, half_rot = n_rot / 2;
    float n = 0.0;
    for (int i = id; i < n_key; i += THREADS) {
        const int row = i < n_new ? s.n_core + i : s.n_rows - n_key + i;
        float kk = 0.0;
        for (int e = 0; e < d; ++e) {
            kk += wf[k + row * d + e] * wf[k + row * d + e];
        }
        wf[finite + i] = kk < HUGE ? 1.0 : 0.0;
        n += wf[finite + i];
    }
    n = block_sum(n);
    for (int i = id; i < d - half_rot; i += THREADS) {
        const bool pair = i < half_rot;
        const int a = pair ? (neox != 0 ? i : 2 * i) : i + half_rot;
        const int b = pair ? (neox != 0 ? i + half_rot : 2 * i + 1) : a;
        float mean_a = 0.0, mean_b = 0.0, dev_a = 0.0, dev_b = 0.0;
        for (int round = 0; round < 2; ++round) {
            for (int j = 0; j < n_key; ++j) {
                if (wf[finite + j] == 0.0) {
                    continue;
                }
                const int row = j < n_new ? s.n_core + j : s.n_rows - n_key + j;
                float u = wf[k + row * d + a], v = wf[k + row * d + b];
                if (pair) {
                    const int cs = at.back + ((n_sink + j) * half_rot + i) * 2;
                    const float u0 = u;
                    u = u0 * wf[cs] - v * wf[cs + 1];
                    v = u0 * wf[cs + 1] + v * wf[cs];
                }
                if (round == 0) {
                    mean_a += u;
                    mean_b += v;
                } else {
                    dev_a += (u - mean_a) * (u - mean_a);
                    dev_b += (v - mean_b) * (v - mean_b);
                }
            }
            if (round == 0) {
                mean_a /= max(n, 1.0);
                mean_b /= max(n, 1.0);
            }
        }
        if (pair) {
            const float c = wf[at.mean_turn + 2 * i], si = wf[at.mean_turn + 2 * i + 1];
            const float lost = n * 0.5 * max(0.0, 1.0 - c * c - si * si) * (mean_a * mean_a + mean_b * mean_b);
            dev[a] = dev_a + lost;
            dev[b] = dev_b + lost;
            mean[a] = mean_a * c - mean_b * si;
            mean[b] = mean_a * si + mean_b * c;
        } else {
            dev[a] = dev_a;
            mean[a] = mean_a;
        }
    }
    for (int e = id; e < d; e += THREADS) {
        ask[e] = 0.0;
    }
    sync();
    TO_RMS(dev, int(n))
    int n_asked = 0;
    for (int voter = 0; voter < n_voter; ++voter) {
        for (int g0 = 0; g0 < n_gqa; g0 += QUERIES) {
            const int n_g = min(n_gqa - g0, QUERIES);
            load_query(voter, g0, n_g);
            const int g = id / (THREADS / QUERIES), part = id % (THREADS / QUERIES);
            float qq = 0.0;
            for (int e = part; g < n_g && e < d; e += THREADS / QUERIES) {
                qq += y[g * d + e] * y[g * d + e];
            }
            red[id] = qq;
            sync();
            if (id < n_g) {
                float sum = 0.0;
                for (int i = 0; i < THREADS / QUERIES; ++i) {
                    sum += red[id * (THREADS / QUERIES) + i];
                }
                flag[id] = int(sum < HUGE);
            }
            sync();
            for (int e = id; e < d; e += THREADS) {
                for (int g = 0; g < n_g; ++g) {
                    ask[e] += flag[g] != 0 ? y[g * d + e] * y[g * d + e] : 0.0;
                }
            }
            for (int g = 0; g < n_g; ++g) {
                n_asked += flag[g];
            }
            sync();
        }
    }
    if (n_asked > 0) {
        TO_RMS(ask, n_asked)
    } else {
        for (int e = id; e < d; e += THREADS) {
            ask[e] = 1.0 / dev[e];
        }
        sync();
    }
    float unit = 0.0;
    for (int e = id; e < d; e += THREADS) {
        unit += dev[e] * ask[e];
    }
    unit = sqrt(block_sum(unit) / float(d));
    const int head = s.ih * head_size();
    for (int e = id; e < d; e += THREADS) {
        const float scale = unit * sqrt(dev[e] / ask[e]);
        heads[head + e] = uint16_t(bits_of(mean[e]));
        heads[head + d + e] = uint16_t(bits_of(scale >= FRAME_MIN ? min(scale, FRAME_MAX) : FRAME_MIN));
    }
}

    #endif

#elif STEP == PASS_LOGITS || STEP == PASS_METRIC || STEP == PASS_KEY_METRIC || STEP == PASS_GONE ||                    \
    STEP == PASS_MERGED_LOGITS || STEP == PASS_MISSING || STEP == PASS_NORMAL || STEP == PASS_MOVE

shared float as[GEMM_K * GEMM_LD], bs[GEMM_K * GEMM_LD];

// As sc_gemm(); count: none if negative.
void gemm(int a, int lda, bool ta, int b, int ldb, bool tb, int c, int ldc, int n_m, int n_n, int n_k, bool add,
    int count) {
    if (n_n <= 0) {
        return;
    }
    const int n_tile = (n_n + GEMM - 1) / GEMM, m0 = px / n_tile * GEMM, n0 = px % n_tile * GEMM;
    if (m0 >= n_m) {
        return;
    }
    const int tm = id / 16 * 8, tn = id % 16 * 4;
    float acc[8][4];
    [[unroll]] for (int i = 0; i < 8; ++i) {
        acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = 0.0;
    }
    for (int k0 = 0; k0 < n_k; k0 += GEMM_K) {
        for (int i = id; i < GEMM * GEMM_K; i += THREADS) {
            const int am = ta ? i % GEMM : i / GEMM_K, ak = ta ? i / GEMM : i % GEMM_K;
            const int bn = tb ? i / GEMM_K : i % GEMM, bk = tb ? i % GEMM_K : i / GEMM;
            float x = 0.0, z = 0.0;
            if (m0 + am < n_m && k0 + ak < n_k && (count < 0 || wi[max(count, 0) + k0 + ak] != 1)) {
                x = wf[a + (ta ? (k0 + ak) * lda + m0 + am : (m0 + am) * lda + k0 + ak)];
            }
            if (n0 + bn < n_n && k0 + bk < n_k) {
                z = wf[b + (tb ? (n0 + bn) * ldb + k0 + bk : (k0 + bk) * ldb + n0 + bn)];
            }
            as[ak * GEMM_LD + am] = x;
            bs[bk * GEMM_LD + bn] = z;
        }
        sync();
        for (int k = 0; k < GEMM_K; ++k) {
            [[unroll]] for (int i = 0; i < 8; ++i) {
                [[unroll]] for (int j = 0; j < 4; ++j) {
                    acc[i][j] += as[k * GEMM_LD + tm + i] * bs[k * GEMM_LD + tn + j];
                }
            }
        }
        sync();
    }
    [[unroll]] for (int i = 0; i < 8; ++i) {
        [[unroll]] for (int j = 0; j < 4; ++j) {
            if (m0 + tm + i < n_m && n0 + tn + j < n_n) {
                const int to = c + (m0 + tm + i) * ldc + n0 + tn + j;
                wf[to] = add ? wf[to] + acc[i][j] : acc[i][j];
            }
        }
    }
}

void run() {
    const kv_head s = kv_of();
    const int q = W_Q + h * n_query() * d_k, p = W_P + h * n_query() * ld, k = W_K + h * ld * d_k,
              v = W_V + h * ld * d_v, metric = W_METRIC + h * d_k * d_k, n = N_MERGED(h), f = n_fit(),
              shares = W_SHARES + h * f * ld_merged, r = W_R + h * f * d_v, mk = W_MK + h * ld_merged * d_k,
              mv = W_MV + h * ld_merged * d_v;
    #if STEP == PASS_LOGITS
    gemm(q, d_k, false, k, d_k, true, p, ld, n_query(), s.n_rows, d_k, false, -1);
    #elif STEP == PASS_METRIC
    gemm(q, d_k, true, q, d_k, false, metric, d_k, d_k, d_k, f, false, -1);
    #elif STEP == PASS_KEY_METRIC
    gemm(k, d_k, false, metric, d_k, false, W_K_METRIC + h * ld * d_k, d_k, s.n_cand, d_k, d_k, false, -1);
    #elif STEP == PASS_GONE
    gemm(p, ld, false, v, d_v, false, r, d_v, f, d_v, s.n_cand, false, W_COUNT + h * ld);
    #elif STEP == PASS_MERGED_LOGITS
    gemm(q, d_k, false, mk, d_k, true, shares, ld_merged, f, n, d_k, false, -1);
    #elif STEP == PASS_MISSING
    gemm(shares, ld_merged, false, mv, d_v, false, r, d_v, f, d_v, n, true, -1);
    #elif STEP == PASS_NORMAL
    gemm(shares, ld_merged, true, shares, ld_merged, false, W_NORMAL + h * ld_merged * ld_merged, ld_merged, n, n, f,
        false, -1);
    #else
    gemm(shares, ld_merged, true, r, d_v, false, W_MOVE + h * ld_merged * d_v, d_v, n, d_v, f, false, -1);
    #endif
}

#elif STEP == PASS_SHARES

void run() {
    const kv_head s = kv_of();
    if (px >= n_query()) {
        return;
    }
    const int p = W_P + (h * n_query() + px) * ld, b = W_BIAS + h * ld;
    float most = MASKED;
    for (int i = id; i < s.n_rows; i += THREADS) {
        const float z = capped(wf[p + i]) + wf[b + i];
        wf[p + i] = z;
        most = max(most, z);
    }
    most = block_max(most);
    float sum = 0.0;
    for (int i = id; i < s.n_rows; i += THREADS) {
        const float z = exp(wf[p + i] - most);
        wf[p + i] = z;
        sum += z;
    }
    sum = block_sum(sum);
    for (int i = id; i < s.n_rows; i += THREADS) {
        wf[p + i] *= 1.0 / sum;
    }
    if (id == 0) {
        wf[W_Z + h * n_query() + px] = most + log(sum);
    }
}

#elif STEP == PASS_SCORE

void run() {
    const kv_head s = kv_of();
    const int i = px * THREADS + id, n = n_query();
    if (i >= s.n_rows) {
        return;
    }
    const int p = W_P + h * n * ld + i;
    float p4 = 0.0, p1 = 0.0;
    for (int r = 0; r < n; ++r) {
        const float z = wf[p + r * ld];
        p4 += z * z * (z * z);
        p1 += z;
        if (r + 1 == n_fit()) {
            wf[W_W_FIT + h * ld + i] = p1;
        }
    }
    const int from = row_at(s, i);
    int n_before = 0;
    if (from < 0) {
        const int token = -1 - from, vote = s.ih * vote_head + wi[at.cell + token];
        n_before = wi[at.n_voted + token];
        p4 += n_before > 0 ? vote_p4[vote] : 0.0;
        p1 += n_before > 0 ? vote_p[vote] : 0.0;
        vote_p4[vote] = p4;
        vote_p[vote] = p1;
    }
    if (i >= s.n_cand) {
        return;
    }
    const bool is_core = from >= 0;
    const int n_asked = max(n + n_before * n_gqa, 1), n_mean = is_core ? max(n_full * n_gqa, n_asked) : n_asked;
    const float use = sqrt(sqrt(p4 * (1.0 / float(n_mean))));
    const int to = h * ld + i, its = is_core ? origin[s.first + from] : 0;
    wi[W_CHUNK + to] = is_core ? int(uint(its) >> 8) : wi[at.chunk + i - s.n_core];
    wi[W_N_TOK + to] = is_core ? its & 255 : 1;
    wf[W_S_USE + to] = is_core ? max(half_of(uint(s_use[s.first + from])), use) : use;
    wf[W_W + to] = p1 * (1.0 / float(n_asked)) + 1e-9;
}

#elif STEP == PASS_OUTPUT

void run() {
    const kv_head s = kv_of();
    float sum = 0.0;
    for (int i = id; i < s.n_rows; i += THREADS) {
        sum += wf[W_W_FIT + h * ld + i] * wf[W_V + (h * ld + i) * d_v + px];
    }
    sum = block_sum(sum);
    if (id == 0) {
        wf[W_OUT + h * d_v + px] = sum / float(n_fit());
    }
}

#elif STEP == PASS_DISTANCES

shared float mean[D_MOST];

void run() {
    const kv_head s = kv_of();
    const int v = W_V + h * ld * d_v, k = W_K + h * ld * d_k, dev = W_DEV + h * ld, difference = W_DIFFERENCE + h * ld;
    const float inv = s.n_cand > 0 ? 1.0 / float(s.n_cand) : 0.0;
    for (int e = id; e < d_v; e += THREADS) {
        float sum = 0.0;
        for (int i = 0; i < s.n_cand; ++i) {
            sum += inv * wf[v + i * d_v + e];
        }
        mean[e] = sum;
    }
    sync();
    float sum = 0.0;
    for (int i = id; i < s.n_cand; i += THREADS) {
        float d2 = 0.0;
        for (int e = 0; e < d_v; ++e) {
            const float z = wf[v + i * d_v + e] - mean[e];
            d2 += z * z;
        }
        wf[dev + i] = sqrt(d2);
        sum += sqrt(d2);
    }
    sum = block_sum(sum);
    for (int i = id; i < s.n_cand; i += THREADS) {
        wf[dev + i] = sum > 0.0 ? wf[dev + i] * (float(s.n_cand) / sum) : 1.0;
        float kk = 0.0;
        for (int e = 0; e < d_k; ++e) {
            kk += wf[k + i * d_k + e] * wf[k + i * d_k + e];
        }
        wf[difference + i] = 1.0 / max(sqrt(kk), 1e-12);
    }
    sync();
    for (int e = id; e < d_k; e += THREADS) {
        float z = 0.0;
        for (int i = 0; i < s.n_cand; ++i) {
            z += wf[difference + i] * wf[k + i * d_k + e];
        }
        mean[e] = z;
    }
    sync();
    float norm = 0.0;
    for (int e = id; e < d_k; e += THREADS) {
        norm += mean[e] * mean[e];
    }
    norm = 1.0 / max(sqrt(block_sum(norm)), 1e-12);
    for (int i = id; i < s.n_cand; i += THREADS) {
        float z = 0.0;
        for (int e = 0; e < d_k; ++e) {
            z += wf[k + i * d_k + e] * mean[e];
        }
        wf[difference + i] *= -norm * z;
    }
}

#elif STEP == PASS_CHOOSE

uint sortable(float x) {
    const uint b = is_nan(x) ? 0xff800000u : floatBitsToUint(x);
    return (b & 0x80000000u) != 0u ? ~b : b | 0x80000000u;
}

// As pass_key().
uint key_of(int i, bool again) {
    if (!again) {
        return sortable(wf[W_DIFFERENCE + i]);
    }
    return (wi[W_STAYS + i] & 1) != 0 ? 0xffffffffu : sortable(wf[W_S_USE + i] * wf[W_DEV + i]);
}

void take_best(int first, bool again, int n_cand, int n) {
    uint least = 0u;
    int total;
    for (int bit = 31; bit >= 0; --bit) {
        const uint tried = least | 1u << bit;
        int count = 0;
        for (int i = id; i < n_cand; i += THREADS) {
            count += int(key_of(first + i, again) >= tried);
        }
        block_scan(count, total);
        least = total >= n ? tried : least;
    }
    int above = 0, seen = 0;
    for (int i = id; i < n_cand; i += THREADS) {
        above += int(key_of(first + i, again) > least);
    }
    block_scan(above, total);
    const int n_equal = n - total;
    for (int i0 = 0; i0 < n_cand; i0 += THREADS) {
        const int i = i0 + id;
        const uint key = i < n_cand ? key_of(first + i, again) : 0u;
        const bool equal = i < n_cand && key == least;
        const int before = block_scan(int(equal), total);
        if (i < n_cand && n > 0 && (key > least || (equal && seen + before < n_equal))) {
            wi[W_STAYS + first + i] |= 2;
        }
        seen += total;
    }
    for (int i = id; i < n_cand; i += THREADS) {
        wi[W_STAYS + first + i] >>= 1;
    }
    sync();
}

void run() {
    const kv_head s = kv_of();
    const int first = h * ld;
    const bool all = s.n_cand <= s.budget;
    for (int i = id; i < s.n_cand; i += THREADS) {
        wi[W_STAYS + first + i] = int(all);
    }
    if (all) {
        return;
    }
    sync();
    // the product may have 33 bits
    const int n_distinct = s.budget / 100 * distinct + s.budget % 100 * distinct / 100;
    take_best(first, false, s.n_cand, n_distinct);
    take_best(first, true, s.n_cand, s.budget);
}

#elif STEP == PASS_ASSIGN

// By the whole block, one candidate after the other: the nearest winner, of equals the first.
void run() {
    const kv_head s = kv_of();
    const int d = d_k, k = W_K + h * ld * d, km = W_K_METRIC + h * ld * d, stays = W_STAYS + h * ld;
    for (int c = 0; c < 4; ++c) { // as many as there are warps elsewhere
        const int i = 4 * px + c;
        if (i >= s.n_cand) {
            return;
        }
        int winner = wi[stays + i] != 0 ? i : DROPPED;
        if (wi[stays + i] == 0 && merges != 0) {
            int begin, end, best_at = -1;
            float best = 0.0;
            chunk_of(s.n_cand, i, begin, end);
            for (int j = begin + id; j < end; j += THREADS) {
                if (wi[stays + j] == 0) {
                    continue;
                }
                float z = 0.0;
                for (int e = 0; e < d; ++e) {
                    z += (wf[k + i * d + e] - wf[k + j * d + e]) * (wf[km + i * d + e] - wf[km + j * d + e]);
                }
                z = is_nan(z) ? HUGE : z;
                if (best_at < 0 || z < best) {
                    best = z;
                    best_at = j;
                }
            }
            red[id] = best;
            red_int[id] = best_at;
            sync();
            for (int n = THREADS / 2; n > 0; n /= 2) {
                if (id < n && red_int[id + n] >= 0) {
                    const bool nearer = red[id + n] < red[id];
                    const bool first = red[id + n] == red[id] && red_int[id + n] < red_int[id];
                    if (red_int[id] < 0 || nearer || first) {
                        red[id] = red[id + n];
                        red_int[id] = red_int[id + n];
                    }
                }
                sync();
            }
            winner = red_int[0];
            sync();
        }
        if (id == 0) {
            wi[W_WINNER + h * ld + i] = winner;
        }
    }
}

#elif STEP == PASS_COUNT

void run() {
    const kv_head s = kv_of();
    const int first = h * ld, winner = W_WINNER + first;
    int n_merged = 0, n_kept = 0, n_lost = 0, n_dropped = 0, total;
    for (int i0 = 0; i0 < s.n_cand; i0 += THREADS) {
        const int i = i0 + id;
        int count = 0;
        if (i < s.n_cand && wi[winner + i] == i) {
            int begin, end;
            chunk_of(s.n_cand, i, begin, end);
            for (int j = begin; j < end; ++j) {
                count += int(wi[winner + j] == i);
            }
        }
        if (i < s.n_cand && wi[winner + i] != i) {
            n_lost += int(wi[winner + i] != DROPPED);
            n_dropped += int(wi[winner + i] == DROPPED);
        }
        const int merged = block_scan(int(count > 1), total) + n_merged;
        n_merged += total;
        const int kept = block_scan(int(count > 0), total) + n_kept;
        n_kept += total;
        if (i < s.n_cand) {
            wi[W_COUNT + first + i] = count;
            wi[W_STAYS + first + i] = count > 0 ? 1 + kept : 0;
            if (count > 1) {
                wi[W_PLACE + first + i] = merged;
                wi[W_FIRST + h * ld_merged + merged] = i;
            }
        }
    }
    block_scan(n_lost, total);
    if (id == 0) {
        N_GONE_MERGED(h) = total;
    }
    block_scan(n_dropped, total);
    if (id == 0) {
        N_GONE_DROPPED(h) = total;
        N_MERGED(h) = n_merged;
        N_KEPT(h) = n_kept;
    }
}

#elif STEP == PASS_MERGE

void run() {
    const int first_row = h * ld, j = px;
    if (j >= N_MERGED(h)) {
        return;
    }
    const kv_head s = kv_of();
    const int first = wi[W_FIRST + h * ld_merged + j], winner = W_WINNER + first_row;
    int begin, end, n_tok = 0;
    chunk_of(s.n_cand, first, begin, end);
    float weight = 0.0;
    for (int i = begin; i < end; ++i) {
        if (wi[winner + i] == first) {
            weight += wf[W_W + first_row + i];
            n_tok += wi[W_N_TOK + first_row + i];
        }
    }
    const float inv = 1.0 / weight;
    for (int e = id; e < d_k + d_v; e += THREADS) {
        float sum = 0.0;
        for (int i = begin; i < end; ++i) {
            if (wi[winner + i] == first) {
                const int row = first_row + i;
                sum += wf[W_W + row] * (e < d_k ? wf[W_K + row * d_k + e] : wf[W_V + row * d_v + e - d_k]);
            }
        }
        const int to = h * ld_merged + j;
        if (e < d_k) {
            wf[W_MK + to * d_k + e] = sum * inv;
        } else {
            wf[W_MV + to * d_v + e - d_k] = sum * inv;
        }
    }
    sync();
    if (id == 0) {
        wi[W_N_TOK + first_row + first] = n_tok;
        wf[W_M_BIAS + h * ld_merged + j] = log(float(n_tok));
    }
}

#elif STEP == PASS_MASS

void run() {
    const kv_head s = kv_of();
    const int first_row = h * ld, n_merged = N_MERGED(h), p = W_P + (h * n_query() + px) * ld;
    for (int j = id; j < n_merged; j += THREADS) {
        const int first = wi[W_FIRST + h * ld_merged + j];
        int begin, end;
        chunk_of(s.n_cand, first, begin, end);
        float sum = 0.0;
        for (int i = begin; i < end; ++i) {
            sum += wi[W_WINNER + first_row + i] == first ? wf[p + i] : 0.0;
        }
        wf[W_MASS + (h * n_fit() + px) * ld_merged + j] = sum;
    }
    float gone = 0.0;
    for (int i = id; i < s.n_cand; i += THREADS) {
        gone += wi[W_COUNT + first_row + i] == 1 ? 0.0 : wf[p + i];
    }
    gone = block_sum(gone);
    if (id == 0) {
        wf[W_SHARE + h * n_fit() + px] = gone;
    }
}

#elif STEP == PASS_FIT_BIAS

void run() {
    const int j = px * THREADS + id, n = n_fit();
    if (j >= N_MERGED(h)) {
        return;
    }
    float sum = 0.0;
    for (int r = 0; r < n; ++r) {
        const int to = (h * n + r) * ld_merged + j;
        sum += log(max(wf[W_MASS + to], 1e-20)) - (capped(wf[W_SHARES + to]) - wf[W_Z + h * n_query() + r]);
    }
    wf[W_M_BIAS + h * ld_merged + j] = clamp(sum / float(n), -6.0, 8.0);
}

#elif STEP == PASS_EQUATIONS

void run() {
    const int n_merged = N_MERGED(h), row = h * n_fit() + px, shares = W_SHARES + row * ld_merged, r = W_R + row * d_v;
    const float z = wf[W_Z + h * n_query() + px];
    float sum = 0.0;
    for (int j = id; j < n_merged; j += THREADS) {
        const float p = exp(capped(wf[shares + j]) + wf[W_M_BIAS + h * ld_merged + j] - z);
        wf[shares + j] = p;
        sum += p;
    }
    const float kept = 1.0 - wf[W_SHARE + row] + block_sum(sum);
    const bool none = kept < 1e-3;
    const float inv = none ? 0.0 : 1.0 / kept;
    for (int j = id; j < n_merged; j += THREADS) {
        wf[shares + j] *= -inv;
    }
    for (int e = id; e < d_v; e += THREADS) {
        wf[r + e] = none ? 0.0 : (1.0 - inv) * wf[W_OUT + h * d_v + e] + inv * wf[r + e];
    }
}

#elif STEP == PASS_SOLVE

void run() {
    const kv_head s = kv_of();
    const int first_row = h * ld, f = n_fit(), n = N_MERGED(h), l = ld_merged;
    float missing = 0.0, scatter = 0.0, members = 0.0;
    for (int i = id; i < f * d_v; i += THREADS) {
        const float z = wf[W_R + h * f * d_v + i];
        missing += z * z;
    }
    for (int i = id; i < s.n_cand; i += THREADS) {
        const int j = wi[W_WINNER + first_row + i];
        if (j != DROPPED && wi[W_COUNT + first_row + j] > 1) {
            const int to = h * l + wi[W_PLACE + first_row + j];
            for (int e = 0; e < d_v; ++e) {
                const float z = wf[W_V + (first_row + i) * d_v + e] - wf[W_MV + to * d_v + e];
                scatter += z * z;
            }
            members += 1.0;
        }
    }
    missing = block_sum(missing) / float(f);
    scatter = block_sum(scatter);
    members = block_sum(members);
    const float ridge = 10.0 * missing / (scatter / members);
    if (is_nan(ridge) || ridge <= 0.0 || ridge >= HUGE) {
        return;
    }
    const int a = W_NORMAL + h * l * l, b = W_MOVE + h * l * d_v;
    for (int j = 0; j < n; ++j) {
        const float pivot = sqrt(max(wf[a + j * l + j], 0.0) + ridge);
        sync();
        for (int i = j + id; i < n; i += THREADS) {
            wf[a + i * l + j] = i == j ? pivot : wf[a + i * l + j] / pivot;
        }
        sync();
        const int left = n - j - 1;
        for (int i = id; i < left * left; i += THREADS) {
            const int r = j + 1 + i / left, c = j + 1 + i % left;
            if (c <= r) {
                wf[a + r * l + c] -= wf[a + r * l + j] * wf[a + c * l + j];
            }
        }
        sync();
    }
    for (int e = id; e < d_v; e += THREADS) {
        for (int i = 0; i < n; ++i) {
            float z = wf[b + i * d_v + e];
            for (int j = 0; j < i; ++j) {
                z -= wf[a + i * l + j] * wf[b + j * d_v + e];
            }
            wf[b + i * d_v + e] = z / wf[a + i * l + i];
        }
        for (int i = n - 1; i >= 0; --i) {
            float z = wf[b + i * d_v + e];
            for (int j = i + 1; j < n; ++j) {
                z -= wf[a + j * l + i] * wf[b + j * d_v + e];
            }
            z /= wf[a + i * l + i];
            wf[b + i * d_v + e] = z;
            wf[W_MV + (h * l + i) * d_v + e] -= z;
        }
    }
}

#elif STEP == PASS_STORE_SINKS

void run() {
    const kv_head s = kv_of();
    const int k = s.ih * head_size() + 2 * d_k, v = k + n_sink_max * d_k;
    for (int i0 = 0; i0 < n_sink; i0 += ROWS) {
        const int n = min(n_sink - i0, ROWS), row = h * ld + s.n_cand + n_row_sink + i0;
        for (int i = id; i < n * d_k; i += THREADS) {
            y[i] = wf[W_K + row * d_k + i];
        }
        for (int r = id; r < ROWS; r += THREADS) {
            rotated[r] = k_rotated;
        }
        sync();
        rotate(n, d_k);
        for (int i = id; i < n * d_k; i += THREADS) {
            heads[k + i0 * d_k + i] = uint16_t(bits_of(y[i]));
        }
        for (int i = id; i < n * d_v; i += THREADS) {
            heads[v + i0 * d_v + i] = uint16_t(bits_of(wf[W_V + row * d_v + i]));
        }
        sync();
    }
}

#elif STEP == PASS_STORE

int nearest_nl(float x) {
    int code = 0;
    for (int c = 1; c < 16; ++c) {
        code = x > 0.5 * float(NL[c - 1] + NL[c]) ? c : code;
    }
    return code;
}

// As sc_encode(): 32 values from y[x] on to units from b on.
void encode(int type, int x, int b) {
    float most = 0.0, extreme = 0.0;
    for (int i = 0; i < 32; ++i) {
        if (abs(y[x + i]) > most) {
            most = abs(y[x + i]);
            extreme = y[x + i];
        }
    }
    if (type == Q8_0) {
        const float d = most / 127.0, inv = d > 0.0 ? 1.0 / d : 0.0;
        wh[b] = uint16_t(bits_of(d));
        for (int i = 0; i < 32; i += 2) {
            const float z0 = y[x + i] * inv, z1 = y[x + i + 1] * inv; // round() may go to the even one
            const int lo = int(sign(z0) * floor(abs(z0) + 0.5)), hi = int(sign(z1) * floor(abs(z1) + 0.5));
            wh[b + 1 + i / 2] = uint16_t((uint(lo) & 255u) | (uint(hi) & 255u) << 8);
        }
        return;
    }
    float d, inv;
    if (type == IQ4_NL) {
        float best = -1.0;
        d = inv = 0.0;
        for (int to = -151; to <= -103 && extreme != 0.0; to += 8) {
            const float tried = float(to) / extreme;
            float xy = 0.0, yy = 0.0;
            for (int i = 0; i < 32; ++i) {
                const float z = float(NL[nearest_nl(y[x + i] * tried)]);
                xy += y[x + i] * z;
                yy += z * z;
            }
            if (xy * xy / yy > best) {
                best = xy * xy / yy;
                d = xy / yy;
                inv = tried;
            }
        }
    } else {
        d = extreme / (type == Q5_0 ? -16.0 : -8.0);
        inv = d != 0.0 ? 1.0 / d : 0.0;
    }
    const float half_range = type == Q5_0 ? 16.0 : 8.0;
    wh[b] = uint16_t(bits_of(d));
    uint high = 0u;
    for (int i = 0; i < 16; i += 2) {
        uint codes = 0u;
        for (int j = 0; j < 4; ++j) {
            const int from = i + j / 2 + j % 2 * 16;
            const float z = y[x + from] * inv;
            uint code;
            if (type == IQ4_NL) {
                code = extreme != 0.0 ? uint(nearest_nl(z)) : 0u;
            } else {
                code = uint(int(min(z + half_range + 0.5, 2.0 * half_range - 1.0)));
                high |= (code >> 4) << from;
            }
            codes |= (code & 15u) << (4 * j);
        }
        wh[b + (type == Q5_0 ? 3 : 1) + i / 2] = uint16_t(codes);
    }
    if (type == Q5_0) {
        wh[b + 1] = uint16_t(high & 0xffffu);
        wh[b + 2] = uint16_t(high >> 16);
    }
}

void run() {
    const kv_head s = kv_of();
    const int i0 = px * ROWS, first_row = h * ld, n = min(s.n_cand - i0, ROWS), mean = s.ih * head_size();
    if (n <= 0) {
        return;
    }
    for (int kind = 0; kind < 2; ++kind) {
        const bool keys = kind == 0;
        const int d = keys ? d_k : d_v, type = keys ? k_type : v_type, size = units_of_row(type, d);
        const int to = 2 * (keys ? W_NEW_K : W_NEW_V) + first_row * size;
        for (int r = id; r < ROWS; r += THREADS) {
            const int i = first_row + i0 + r;
            flag[r] = int(r < n && wi[W_STAYS + i] != 0 && (i0 + r >= s.n_core || wi[W_COUNT + i] > 1));
            rotated[r] = int(flag[r] != 0 && type != F16);
        }
        sync();
        for (int k = id; k < n * d; k += THREADS) {
            const int r = k / d, e = k % d, i = first_row + i0 + r;
            float z = 0.0;
            if (flag[r] != 0) {
                const bool merged = wi[W_COUNT + i] > 1;
                const int row = merged ? h * ld_merged + wi[W_PLACE + i] : i;
                z = wf[(merged ? (keys ? W_MK : W_MV) : (keys ? W_K : W_V)) + row * d + e];
                if (keys && type != F16) {
                    z = (z - half_of(uint(heads[mean + e]))) / half_of(uint(heads[mean + d + e]));
                }
            }
            y[k] = z;
        }
        sync();
        rotate(n, d);
        const int n_block = type == F16 ? 1 : d / 32;
        for (int k = id; k < n * n_block; k += THREADS) {
            const int r = k / n_block, b = k % n_block, i = first_row + i0 + r;
            if (wi[W_STAYS + i] == 0) {
                continue;
            }
            const int row = to + (wi[W_STAYS + i] - 1) * size;
            if (flag[r] == 0) {
                const int old = (s.first + n_row_sink + i0 + r) * size;
                for (int c = b * size / n_block; c < (b + 1) * size / n_block; ++c) {
                    wh[row + c] = uint16_t(keys ? uint(core_k[old + c]) : uint(core_v[old + c]));
                }
            } else if (type == F16) {
                for (int e = 0; e < d; ++e) {
                    wh[row + e] = uint16_t(bits_of(y[r * d + e]));
                }
            } else {
                encode(type, r * d + b * 32, row + b * units_of_block(type));
            }
        }
        sync();
    }
    for (int r = id; r < n; r += THREADS) {
        const int i = first_row + i0 + r;
        if (wi[W_STAYS + i] != 0) {
            const int to = first_row + wi[W_STAYS + i] - 1;
            const bool merged = wi[W_COUNT + i] > 1;
            const float b = merged ? wf[W_M_BIAS + h * ld_merged + wi[W_PLACE + i]] : wf[W_BIAS + i];
            wh[2 * W_NEW_BIAS + to] = uint16_t(bits_of(i0 + r < s.n_core || merged ? b : 0.0));
            wh[2 * W_NEW_S_USE + to] = uint16_t(bits_of(wf[W_S_USE + i]));
            wi[W_NEW_ORIGIN + to] = int(uint(wi[W_CHUNK + i]) << 8 | uint(wi[W_N_TOK + i]));
        }
    }
}

#elif STEP == PASS_REPLACE

void run() {
    const int i0 = px * THREADS, from = h * ld + i0, n = min(N_KEPT(h) - i0, THREADS);
    if (n <= 0) {
        return;
    }
    const int to = rows[at.first_head + h] + n_row_sink + n_sink + i0;
    const int k_size = units_of_row(k_type, d_k), v_size = units_of_row(v_type, d_v);
    for (int c = id; c < n * k_size; c += THREADS) {
        core_k[to * k_size + c] = wh[2 * W_NEW_K + from * k_size + c];
    }
    for (int c = id; c < n * v_size; c += THREADS) {
        core_v[to * v_size + c] = wh[2 * W_NEW_V + from * v_size + c];
    }
    for (int i = id; i < n; i += THREADS) {
        bias[to + i] = wh[2 * W_NEW_BIAS + from + i];
        s_use[to + i] = wh[2 * W_NEW_S_USE + from + i];
        origin[to + i] = wi[W_NEW_ORIGIN + from + i];
    }
}

#else

void run() {
    if (id == 0) {
        rows[n_head_kv + at.first_head + h] = n_row_sink + n_sink + N_KEPT(h);
    }
}

#endif

void main() {
    id = int(gl_LocalInvocationID.x);
    px = int(gl_WorkGroupID.x + gl_WorkGroupID.z * gl_NumWorkGroups.x); // there are many of products and queries
    h = int(gl_WorkGroupID.y);
    run();
}
