// bench-attn - the op alone: GGML_OP_PROP_ATTN against llama.cpp's flash attention over as many rows, in one process
//
//     bench-attn [n_threads [n_rounds]]
//
// Both ops run on the same CPU backend, in turns, over the layers of a cache that is larger than the processor's
// caches. Prints a Markdown table: times per layer, the ratio round by round, and the bytes of K and V that ours reads
// per second next to what a plain loop reads on this machine.

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml-cpu.h"
#include "ggml-prop-attn.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr int64_t N_STAGE = 384;
constexpr int64_t MIN_BYTES = 256ll << 20; // of K and V in all layers together

struct shape {
    const char * name;
    int64_t d, n_head_kv, n_gqa;
};

using seconds = std::chrono::duration<double>;

template <typename F> double time_of(F && f) {
    const auto start = std::chrono::steady_clock::now();
    f();
    return seconds(std::chrono::steady_clock::now() - start).count();
}

double median(std::vector<double> x) {
    std::sort(x.begin(), x.end());
    return x.size() % 2 ? x[x.size() / 2] : 0.5 * (x[x.size() / 2 - 1] + x[x.size() / 2]);
}

// Bytes per second that a plain loop reads.
double read_bandwidth(int n_threads) {
    std::vector<uint64_t> data((size_t) MIN_BYTES / sizeof(uint64_t), 1);
    std::vector<double> rates;
    volatile uint64_t sink = 0;
    for (int round = 0; round < 5; ++round) {
        rates.push_back((double) MIN_BYTES / time_of([&] {
            std::vector<std::thread> threads;
            std::vector<uint64_t> sums(n_threads);
            for (int i = 0; i < n_threads; ++i) {
                threads.emplace_back([&, i] {
                    const size_t part = data.size() / n_threads;
                    sums[i] = std::accumulate(data.begin() + i * part, data.begin() + (i + 1) * part, (uint64_t) 0);
                });
            }
            for (auto & t : threads) {
                t.join();
            }
            sink = sink + std::accumulate(sums.begin(), sums.end(), (uint64_t) 0);
        }));
    }
    return median(rates);
}

// One graph with the op of every layer.
struct bench {
    ggml_context_ptr ctx;
    ggml_backend_buffer_ptr buffer;
    ggml_cgraph * graph;
    int64_t n_layer;
    int64_t bytes = 0; // of K and V, per layer

    void allocate(ggml_backend_t cpu) {
        buffer.reset(ggml_backend_alloc_ctx_tensors(ctx.get(), cpu));
        if (!buffer) {
            fprintf(stderr, "expected memory for the rows, got none; free some\n");
            exit(1);
        }
        std::mt19937 random(1);
        std::normal_distribution<float> normal;
        std::vector<float> values(1 << 16);
        for (float & x : values) {
            x = normal(random);
        }
        for (ggml_tensor * t = ggml_get_first_tensor(ctx.get()); t; t = ggml_get_next_tensor(ctx.get(), t)) {
            if (t->op != GGML_OP_NONE || t->view_src) {
                continue;
            }
            const std::string name = t->name;
            if (name == "mask") {
                std::fill_n((ggml_fp16_t *) t->data, ggml_nelements(t), ggml_fp32_to_fp16(0.0f));
                for (int64_t i = 0; i < t->ne[1]; ++i) {
                    for (int64_t j = t->ne[0] - t->ne[1] + i + 1; j < t->ne[0]; ++j) {
                        ((ggml_fp16_t *) t->data)[i * t->ne[0] + j] = ggml_fp32_to_fp16(-INFINITY);
                    }
                }
            } else if (name == "bias") {
                std::fill_n((ggml_fp16_t *) t->data, ggml_nelements(t), ggml_fp32_to_fp16(0.0f));
            } else if (name != "rows") {
                for (int64_t i = 0; i < ggml_nrows(t); ++i) {
                    const float * x = values.data() + (i * 37) % ((int64_t) values.size() - t->ne[0]);
                    char * y = (char *) t->data + i * t->nb[1];
                    if (t->type == GGML_TYPE_F32) {
                        std::copy_n(x, t->ne[0], (float *) y);
                    } else {
                        ggml_get_type_traits(t->type)->from_float_ref(x, y, t->ne[0]);
                    }
                }
            }
        }
    }

    explicit bench(int64_t n_layer) :
        ctx(ggml_init(
            { (size_t) (n_layer * 16 + 64) * ggml_tensor_overhead() + ggml_graph_overhead_custom(n_layer * 16, false),
                nullptr, true })),
        graph(ggml_new_graph_custom(ctx.get(), n_layer * 16, false)), n_layer(n_layer) {}

    ggml_tensor * tensor(const char * name, ggml_type type, std::initializer_list<int64_t> ne) {
        ggml_tensor * t = ggml_new_tensor(ctx.get(), type, (int) ne.size(), ne.begin());
        return ggml_set_name(t, name);
    }

    double run(ggml_backend_t cpu) {
        return time_of([&] { ggml_backend_graph_compute(cpu, graph); }) / (double) n_layer;
    }
};

std::unique_ptr<bench> flash_attention(
    ggml_backend_t cpu, const shape & s, int64_t n_rows, int64_t n_tokens, int64_t n_layer) {
    auto b = std::make_unique<bench>(n_layer);
    ggml_context * c = b->ctx.get();
    ggml_tensor * mask = b->tensor("mask", GGML_TYPE_F16, { n_rows, n_tokens });
    for (int64_t il = 0; il < n_layer; ++il) {
        ggml_tensor * q = b->tensor("q", GGML_TYPE_F32, { s.d, s.n_head_kv * s.n_gqa, n_tokens });
        ggml_tensor * k = b->tensor("k", GGML_TYPE_F16, { s.d, s.n_head_kv, n_rows });
        ggml_tensor * v = b->tensor("v", GGML_TYPE_F16, { s.d, s.n_head_kv, n_rows });
        ggml_build_forward_expand(
            b->graph, ggml_flash_attn_ext(c, ggml_permute(c, q, 0, 2, 1, 3), ggml_permute(c, k, 0, 2, 1, 3),
                          ggml_permute(c, v, 0, 2, 1, 3), mask, 1.0f / std::sqrt((float) s.d), 0.0f, 0.0f));
        b->bytes = (int64_t) (ggml_nbytes(k) + ggml_nbytes(v));
    }
    b->allocate(cpu);
    return b;
}

// All rows but those of the stage are cores; as many of every head. Beside quantized rows the stage is in q8_0.
std::unique_ptr<bench> proportional_attention(ggml_backend_t cpu, const shape & s, int64_t n_rows, int64_t n_tokens,
    int64_t n_layer, ggml_type type_k, ggml_type type_v) {
    auto b = std::make_unique<bench>(n_layer);
    ggml_context * c = b->ctx.get();
    const int64_t n_core = n_rows - N_STAGE;
    const ggml_type type_stage = type_k == GGML_TYPE_F16 ? GGML_TYPE_F16 : GGML_TYPE_Q8_0;
    ggml_tensor * mask = b->tensor("mask", GGML_TYPE_F16, { N_STAGE, n_tokens });
    ggml_tensor * rows = b->tensor("rows", GGML_TYPE_I32, { s.n_head_kv, 2 });
    for (int64_t il = 0; il < n_layer; ++il) {
        ggml_tensor * q = b->tensor("q", GGML_TYPE_F32, { s.d, s.n_head_kv * s.n_gqa, n_tokens });
        ggml_tensor * k = b->tensor("k", type_stage, { s.d, s.n_head_kv, N_STAGE });
        ggml_tensor * v = b->tensor("v", type_stage, { s.d, s.n_head_kv, N_STAGE });
        ggml_tensor * ck = b->tensor("core_k", type_k, { s.d, s.n_head_kv * n_core });
        ggml_tensor * cv = b->tensor("core_v", type_v, { s.d, s.n_head_kv * n_core });
        ggml_tensor * bias = b->tensor("bias", GGML_TYPE_F16, { s.n_head_kv * n_core });
        ggml_tensor * heads = b->tensor("heads", GGML_TYPE_F16, { 2 * s.d, s.n_head_kv }); // no sinks
        ggml_build_forward_expand(b->graph, ggml_prop_attn(c, q, k, v, mask, ck, cv, bias, rows, heads, nullptr,
                                                1.0f / std::sqrt((float) s.d), 0.0f, false));
        b->bytes = (int64_t) (ggml_nbytes(k) + ggml_nbytes(v) + ggml_nbytes(ck) + ggml_nbytes(cv) + ggml_nbytes(bias));
    }
    b->allocate(cpu);
    for (int64_t h = 0; h < s.n_head_kv; ++h) {
        ((int32_t *) rows->data)[h] = (int32_t) (h * n_core);
        ((int32_t *) rows->data)[s.n_head_kv + h] = (int32_t) n_core;
    }
    return b;
}

int positive(const char * text, const char * what) {
    const int n = atoi(text);
    if (n <= 0) {
        fprintf(stderr, "%s: expected a positive number, got %s\n", what, text);
        exit(1);
    }
    return n;
}

} // namespace

int main(int argc, char ** argv) {
    const int n_threads = argc > 1 ? positive(argv[1], "n_threads") : (int) std::thread::hardware_concurrency();
    const int n_rounds = argc > 2 ? positive(argv[2], "n_rounds") : 7;
    ggml_backend_ptr cpu{ ggml_backend_cpu_init() };
    ggml_backend_cpu_set_n_threads(cpu.get(), n_threads);

    const shape shapes[] = { { "SmolLM2-135M", 64, 3, 3 }, { "Qwen2.5-Coder-0.5B", 64, 2, 7 },
        { "Llama-3-8B", 128, 8, 4 } };
    const int64_t n_rows = 8192;
    const std::pair<ggml_type, ggml_type> types[] = {
        { GGML_TYPE_F16, GGML_TYPE_F16 },
        { GGML_TYPE_Q8_0, GGML_TYPE_Q8_0 },
        { GGML_TYPE_Q5_0, GGML_TYPE_IQ4_NL },
        { GGML_TYPE_Q4_0, GGML_TYPE_Q4_0 },
        { GGML_TYPE_IQ4_NL, GGML_TYPE_IQ4_NL },
    };
    const double bandwidth = read_bandwidth(n_threads);
    printf("%d threads, %d rounds, %lld rows per head, times per layer; a plain loop reads %.1f GB/s\n\n", n_threads,
        n_rounds, (long long) n_rows, bandwidth * 1e-9);
    printf("| heads of | tokens | rows of ours | flash attention, f16 | ours | times faster | GB/s | of the loop's | "
           "GFLOP/s |\n|---|---|---|---|---|---|---|---|---|\n");
    for (const shape & s : shapes) {
        for (int64_t n_tokens : { 1, 512 }) { // a batch is bound by arithmetic: one layer will do
            const int64_t n_layer =
                n_tokens > 1 ? 1 : std::max<int64_t>(1, MIN_BYTES / (n_rows * s.n_head_kv * s.d * 4));
            auto theirs = flash_attention(cpu.get(), s, n_rows, n_tokens, n_layer);
            for (const auto & [type_k, type_v] : types) {
                auto ours = proportional_attention(cpu.get(), s, n_rows, n_tokens, n_layer, type_k, type_v);
                std::vector<double> a, b, ratio;
                for (int round = -1; round < n_rounds; ++round) {
                    const double ta = theirs->run(cpu.get()), tb = ours->run(cpu.get());
                    if (round >= 0) { // the first one warms up
                        a.push_back(ta);
                        b.push_back(tb);
                        ratio.push_back(ta / tb);
                    }
                }
                const double rate = (double) ours->bytes / median(b),
                             flops = 4.0 * (double) (s.d * s.n_head_kv * s.n_gqa * n_rows * n_tokens) / median(b);
                printf("| %s | %lld | %s/%s | %.3f ms | %.3f ms | %.2f (%.2f to %.2f) | %.1f | %.0f%% | %.0f |\n",
                    s.name, (long long) n_tokens, ggml_type_name(type_k), ggml_type_name(type_v), 1e3 * median(a),
                    1e3 * median(b), median(ratio), *std::min_element(ratio.begin(), ratio.end()),
                    *std::max_element(ratio.begin(), ratio.end()), rate * 1e-9, 100.0 * rate / bandwidth, flops * 1e-9);
                fflush(stdout);
            }
        }
    }
}
