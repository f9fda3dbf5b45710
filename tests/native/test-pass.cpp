// What must hold of a pass on any head; what a pass computes is in test-golden.cpp.

#include "pass-text.h"
#include "sc-attn.h"

#include <cstring>

using namespace sc_test;

namespace {

constexpr double F16_RTOL = 0x1p-11;

// ---- what holds after every pass

struct sinks {
    std::vector<f16> k, v;

    sinks(const tokens & t, const head_shape & s) :
        k(t.k.begin(), t.k.begin() + (int64_t) t.n_sink * s.n_embd_head_k),
        v(t.v.begin(), t.v.begin() + (int64_t) t.n_sink * s.n_embd_head_v) {}
};

void check_invariants(const text_source & text, const head_store & h, const sinks & first, int64_t n_dropped_tok) {
    CHECK(h.guards_hold());
    CHECK_EQ(h.n_sink, text.s.n_sink);
    CHECK(h.n_used >= h.n_sink && h.n_used <= h.n_alloc);
    CHECK_BITS(h.key(0), first.k.data(), (int64_t) first.k.size());
    CHECK_BITS(h.val(0), first.v.data(), (int64_t) first.v.size());

    std::map<int32_t, int32_t> tok;
    int64_t n_tok = 0;
    for (int32_t i = h.n_sink; i < h.n_used; ++i) {
        const row_meta m = h.meta(i);
        CHECK(i == h.n_sink || m.chunk >= h.meta(i - 1).chunk); // text order
        CHECK(m.n_tok >= 1);
        CHECK(std::isfinite(h.bias_of(i)) && h.bias_of(i) >= -6.0f && h.bias_of(i) <= 8.0f);
        CHECK_EQ(f16_to_f32(h.key(i)[text.s.d_k - 1]), chunk_mark(m.chunk)); // all members are of this chunk
        tok[(int32_t) m.chunk] += m.n_tok;
        n_tok += m.n_tok;
    }
    CHECK_EQ(n_tok + n_dropped_tok, (int64_t) text.n_past - text.s.n_sink);
    for (const auto & [chunk, n] : tok) {
        // merging loses a chunk as a whole or not at all
        CHECK(n == text.chunk_len.at(chunk) || !text.s.merge || text.s.how == method::streaming);
        CHECK(n <= text.chunk_len.at(chunk));
    }
}

int64_t tokens_in(const head_store & h) {
    int64_t n = 0;
    for (int32_t i = h.n_sink; i < h.n_used; ++i) {
        n += h.meta(i).n_tok;
    }
    return n;
}

// ---- tests

// A long text: ten passes in place.
void test_long_text() {
    std::vector<spec> specs(12);
    specs[1].merge = false;
    specs[2].how = method::paper;
    specs[3].how = method::streaming;
    specs[4].d_k = 80;
    specs[4].d_v = 80;
    specs[4].n_gqa = 1;
    specs[4].n_rot = 32;
    specs[4].softcap = 20.0f;
    specs[5].d_k = 32;
    specs[5].d_v = 32;
    specs[5].n_gqa = 7;
    specs[5].n_rot = 32;
    specs[5].neox = false;
    specs[5].n_alloc = 20;
    specs[6].n_rot = 0;
    specs[6].n_alloc = 200;
    specs[6].n_new = 250;
    specs[6].n_window = 40; // fits look at every third query
    specs[7].n_sink = 0;
    specs[7].n_alloc = 5;
    specs[7].n_window = 1;
    specs[7].n_chunk = 40;
    specs[8].how = method::paper;
    specs[8].n_alloc = 9; // fewer rows than chunks
    specs[9].voted = true;
    specs[10].distinct = 0;
    specs[11].distinct = 100;
    for (size_t c = 0; c < specs.size(); ++c) {
        const spec & s = specs[c];
        text_source text(s, 40 + c);
        head_store h(text.shape, s.n_alloc);
        std::vector<sinks> first;
        int64_t n_dropped_tok = 0;
        for (int pass = 0; pass < 10; ++pass) {
            CASE("text " + std::to_string(c) + ", pass " + std::to_string(pass));
            const int32_t n_new = pass == 0 || pass % 3 ? s.n_new : s.n_new / 2;
            const tokens t = text.draw(pass == 0, n_new);
            text.accept(t);
            if (pass == 0) {
                first.emplace_back(t, text.shape);
            }
            const int64_t before = tokens_in(h) + n_new;
            const int32_t n_cand = h.n_used - h.n_sink + n_new;
            const pass_result res =
                run_pass(h, t, text.rp, text.params(), { 2, pass % 2, pass % 3 == 1, 10, (uint64_t) pass });
            CHECK_EQ(res.n_merged + res.n_dropped + h.n_used - h.n_sink, (int64_t) n_cand);
            if (s.how == method::semantic) {
                CHECK_EQ(h.n_used, s.n_alloc);
            }
            if (!s.merge || s.how == method::streaming) {
                CHECK_EQ(res.n_merged, 0);
                CHECK_EQ(tokens_in(h), (int64_t) h.n_used - h.n_sink);
            }
            for (int32_t i = h.n_sink; s.how == method::paper && i < h.n_used; ++i) {
                CHECK(std::fabs(h.bias_of(i) - std::log((double) h.meta(i).n_tok)) < 0x1p-9); // half a unit of f16
            }
            n_dropped_tok += before - tokens_in(h);
            CHECK((before == tokens_in(h)) == (res.n_dropped == 0));
            check_invariants(text, h, first[0], n_dropped_tok);
        }
    }
}

// The newest candidates are kept as they are.
void test_streaming() {
    CASE("streaming");
    spec s;
    s.how = method::streaming;
    text_source text(s, 3);
    head_store h(text.shape, s.n_alloc);
    const tokens a = text.draw(true, 30), b = text.draw(false, 25);
    run_pass(h, a, text.rp, text.params());
    CHECK_EQ(h.n_used, N_SINK + 30);
    const pass_result res = run_pass(h, b, text.rp, text.params());
    CHECK_EQ(h.n_used, s.n_alloc);
    CHECK_EQ(res.n_dropped, 30 + 25 - (s.n_alloc - N_SINK));
    CHECK_EQ(res.n_merged, 0);
    const int32_t kept = s.n_alloc - N_SINK - 25; // of a
    CHECK_BITS(h.key(N_SINK), a.k.data() + (int64_t) (N_SINK + 30 - kept) * s.d_k, (int64_t) kept * s.d_k);
    CHECK_BITS(h.val(N_SINK), a.v.data() + (int64_t) (N_SINK + 30 - kept) * s.d_v, (int64_t) kept * s.d_v);
    CHECK_BITS(h.key(N_SINK + kept), b.k.data(), 25 * s.d_k);
    CHECK_BITS(h.val(N_SINK + kept), b.v.data(), 25 * s.d_v);
}

// With room for all, nothing changes to the last bit; only the scores are new.
void test_below_budget() {
    for (method how : ALL_METHODS) {
        CASE("below budget, method " + std::to_string((int) how));
        spec s;
        s.how = how;
        text_source text(s, 5);
        head_store h(text.shape, N_SINK + 40 + 30);
        for (int pass = 0; pass < 2; ++pass) {
            const tokens t = text.draw(pass == 0, pass == 0 ? 40 : 30);
            const head_store old = h;
            const pass_result res = run_pass(h, t, text.rp, text.params(), { 1, 0, true, 3, 8 });
            const int32_t at = pass == 0 ? 0 : old.n_used, n = t.n_sink + t.n_new;
            CHECK_EQ(res.n_merged, 0);
            CHECK_EQ(res.n_dropped, 0);
            CHECK_EQ(h.n_used, at + n);
            for (int32_t i = 0; i < at; ++i) {
                CHECK_BITS(h.key(i), old.key(i), s.d_k);
                CHECK_BITS(h.val(i), old.val(i), s.d_v);
                CHECK_EQ(h.bias_of(i), old.bias_of(i));
            }
            for (int32_t i = at; i < h.n_used; ++i) {
                CHECK_BITS(h.key(i), t.k.data() + (int64_t) (i - at) * s.d_k, s.d_k);
                CHECK_BITS(h.val(i), t.v.data() + (int64_t) (i - at) * s.d_v, s.d_v);
            }
            for (int32_t i = at; i < h.n_used; ++i) {
                CHECK_EQ(h.bias_of(i), 0.0f);
                CHECK(i < N_SINK || h.meta(i).n_tok == 1);
                CHECK(i < N_SINK || h.meta(i).chunk == t.chunk[i - at - t.n_sink]);
            }
        }
    }
}

// Same input, same bits, whatever is in the scratch, and however large it is.
void test_scratch() {
    for (method how : ALL_METHODS) {
        CASE("scratch, method " + std::to_string((int) how));
        spec s;
        s.how = how;
        text_source text(s, 6);
        const tokens t0 = text.draw(true, 50), t1 = text.draw(false, 60);
        auto both = [&](int value, size_t more) {
            head_store h(text.shape, s.n_alloc);
            for (const tokens * t : { &t0, &t1 }) {
                stage_store stage(*t, text.shape, {});
                pass_call call(h, stage, text.rp, text.params());
                const size_t size = call.scratch_size() + arena::ALIGNMENT;
                std::vector<uint8_t> scratch(size + more, (uint8_t) value); // 0xff: every float is a NaN
                call.run(arena::align(scratch.data()));
                CHECK(std::all_of(scratch.begin() + size, scratch.end(), [&](uint8_t x) { return x == value; }));
            }
            return h;
        };
        const head_store want = both(0, 0);
        CHECK_SAME_ROWS(both(0xff, 0), want);
        CHECK_SAME_ROWS(both(0xff, 1 << 20), want);
        CHECK_SAME_ROWS(both(0x7f, 0), want);
    }
}

// The host lays the scratch out, the CPU backend works in it: they may be compiled for different instruction sets.
void test_scratch_size() {
    CASE("scratch is of the same size on every target");
    spec s;
    const text_source text(s, 7);
    CHECK_EQ(pass_scratch_size(text.shape, { 1000, 200, 64 }), (size_t) 2475200);
    CHECK_EQ(pass_scratch_size(text.shape, { 33, 3, 1 }), (size_t) 632128);
}

// Attention of one query over rows of a head, then tokens.
std::vector<float> attend(const head_store & h, const tokens & t, const std::vector<float> & q) {
    const head_shape & s = h.shape;
    const int32_t first = 0, count = h.n_used;
    const std::vector<float> mask(t.n(), 0.0f);
    const int64_t size = sizeof(f16);
    attn_args a = { s.n_embd_head_k, s.n_embd_head_v, s.n_gqa, 1, 1, t.n(), s.scale, s.softcap, false, q.data(),
        s.n_embd_head_k, 0, (const uint8_t *) t.k.data(), row_type::f16, 0, s.n_embd_head_k * size,
        (const uint8_t *) t.v.data(), row_type::f16, 0, s.n_embd_head_v * size, size, mask.data(), false, t.n(),
        nullptr, h.k.data(), h.type, h.v.data(), h.type, h.bias.data(), count, &first, &count, h.heads.data(),
        h.n_sink_room };
    std::vector<float> work(attn_work_size(a, 1)), out((size_t) s.n_gqa * s.n_embd_head_v);
    attn_part(a, work.data(), out.data(), 0, 1);
    attn_reduce(a, work.data(), out.data(), 0, 1);
    return out;
}

// n equal tokens in a chunk: cores with bias log n, and attention as it was.
void test_equal_tokens() {
    for (method how : { method::semantic, method::paper }) {
        for (float softcap : { 0.0f, 10.0f }) {
            for (int32_t n_group : { 1, 5 }) {
                CASE("equal tokens, method " + std::to_string((int) how) + ", " + std::to_string(n_group) + " chunks");
                spec s;
                s.how = how;
                s.softcap = softcap;
                text_source text(s, 9);
                tokens t = text.draw(true, 12 * n_group);
                for (int32_t i = 0; i < t.n_new; ++i) {
                    const int32_t g = i / 12, from = t.n_sink + g * 12, to = t.n_sink + i;
                    t.chunk[i] = g;
                    std::copy_n(t.k.begin() + (int64_t) from * s.d_k, s.d_k, t.k.begin() + (int64_t) to * s.d_k);
                    std::copy_n(t.v.begin() + (int64_t) from * s.d_v, s.d_v, t.v.begin() + (int64_t) to * s.d_v);
                }
                head_store h(text.shape, N_SINK + (n_group == 1 ? 1 : 3 * n_group));
                const pass_result res = run_pass(h, t, text.rp, text.params());
                CHECK(res.n_merged > 0);
                for (int32_t i = N_SINK; i < h.n_used; ++i) {
                    const int64_t from = N_SINK + (int64_t) h.meta(i).chunk * 12;
                    CHECK(std::fabs(h.bias_of(i) - std::log((double) h.meta(i).n_tok)) < 0x1p-9);
                    CHECK_BITS(h.key(i), t.k.data() + from * s.d_k, s.d_k); // a mean of equal rows is that row
                    CHECK_BITS(h.val(i), t.v.data() + from * s.d_v, s.d_v);
                    const bool first = i == N_SINK || h.meta(i - 1).chunk != h.meta(i).chunk;
                    CHECK(first || h.meta(i).n_tok == 1); // of equally near winners the first takes all
                }
                if (how == method::semantic && n_group > 1) {
                    continue; // equal scores: a chunk takes all places or none, so some are dropped
                }
                CHECK_EQ(res.n_dropped, 0);
                CHECK_EQ(tokens_in(h), (int64_t) t.n_new);

                tokens window = t; // what stays in the stage
                window.n_new = window.n_sink = 0;
                window.k.erase(window.k.begin(), window.k.begin() + (int64_t) (t.n_sink + t.n_new) * s.d_k);
                window.v.erase(window.v.begin(), window.v.begin() + (int64_t) (t.n_sink + t.n_new) * s.d_v);
                const head_store empty(text.shape, 0);
                for (int n = 0; n < 20; ++n) {
                    std::vector<float> q((size_t) s.n_gqa * s.d_k);
                    for (float & e : q) {
                        e = (float) (1.5 * text.r.normal());
                    }
                    // the bias errs by half a unit of f16, which moves the shares, and with them values up to 4, by as
                    // much
                    const std::vector<float> before = attend(empty, t, q), after = attend(h, window, q);
                    CHECK_CLOSE(after.data(), before.data(), (int64_t) after.size(), 0.0, 4.0 * 0x1p-10);
                }
            }
        }
    }
}

// Broken numbers may give a useless head, but the memory around it, its sinks and its order hold.
void test_not_finite() {
    const float bad[] = { NAN, INFINITY, -INFINITY, 65504.0f };
    for (method how : ALL_METHODS) {
        for (float x : bad) {
            for (int where = 0; where < 8; ++where) {
                CASE("method " + std::to_string((int) how) + ", " + text(x) + " in place " + std::to_string(where));
                spec s;
                s.how = how;
                s.softcap = where == 7 ? 20.0f : 0.0f;
                text_source source(s, 20 + where);
                head_store h(source.shape, s.n_alloc);
                std::vector<sinks> first;
                for (int pass = 0; pass < 4; ++pass) {
                    tokens t = source.draw(pass == 0, s.n_new);
                    source.accept(t);
                    if (pass == 0) {
                        first.emplace_back(t, source.shape);
                    }
                    const f16 b = f32_to_f16(x);
                    const int32_t token = t.n_sink + source.r.below(t.n_new), e = source.r.below(s.d_k);
                    if (pass == 1 || pass == 2) {
                        switch (where) {
                            case 0: t.k[(size_t) token * s.d_k + e] = b; break;                         // one number
                            case 1: std::fill_n(t.k.begin() + (size_t) token * s.d_k, s.d_k, b); break; // one key
                            case 2:
                                std::fill_n(t.k.begin() + (size_t) t.n_sink * s.d_k, t.n_new * s.d_k / 2, b);
                                break; // half of them
                            case 3: std::fill(t.k.begin(), t.k.end(), b); break;
                            case 4: t.q[((size_t) (token - t.n_sink) * s.n_gqa + 1) * s.d_k + e] = b; break;
                            case 5: std::fill(t.q.begin(), t.q.end(), b); break;
                            case 6: std::fill(t.v.begin(), t.v.end(), b); break;
                            case 7:
                                std::fill(t.k.begin(), t.k.end(), b);
                                std::fill(t.q.begin(), t.q.end(), b);
                                break;
                        }
                    }
                    const pass_result res = run_pass(h, t, source.rp, source.params());
                    CHECK(h.guards_hold());
                    CHECK(h.n_used <= h.n_alloc && h.n_used >= h.n_sink);
                    CHECK(res.n_merged >= 0 && res.n_dropped >= 0);
                    CHECK_BITS(h.key(0), first[0].k.data(), (int64_t) first[0].k.size());
                    CHECK_BITS(h.val(0), first[0].v.data(), (int64_t) first[0].v.size());
                    for (int32_t i = h.n_sink; i < std::min(h.n_used, h.n_alloc); ++i) {
                        CHECK(i == h.n_sink || h.meta(i).chunk >= h.meta(i - 1).chunk);
                        CHECK(h.meta(i).n_tok >= 1 && h.meta(i).n_tok <= source.chunk_len[h.meta(i).chunk]);
                    }
                    if (h.n_used > h.n_alloc) {
                        break;
                    }
                }
            }
        }
    }
}

// A key of zero has cosine 0 with every key: it is no duplicate of another, and merges after what is alike.
void test_zero_keys() {
    for (method how : { method::semantic, method::paper }) {
        CASE("zero keys, method " + std::to_string((int) how));
        spec s;
        s.how = how;
        text_source text(s, 31);
        head_store h(text.shape, s.n_alloc);
        for (int pass = 0; pass < 3; ++pass) {
            tokens t = text.draw(pass == 0, s.n_new);
            text.accept(t);
            for (int32_t i = t.n_sink; i < t.n_sink + t.n_new; i += 1 + pass) {
                std::fill_n(t.k.begin() + (size_t) i * s.d_k, s.d_k, (f16) 0);
            }
            run_pass(h, t, text.rp, text.params());
            CHECK(h.guards_hold());
            CHECK(h.n_used <= h.n_alloc);
            for (int32_t i = h.n_sink; i < h.n_used; ++i) {
                CHECK(std::isfinite(h.bias_of(i)));
            }
        }
    }
    CASE("zero keys beside equal ones");
    spec s;
    s.how = method::paper;
    text_source text(s, 32);
    tokens t = text.draw(
        true, 8); // one chunk of 0 0 a a a a 0 b for 5 rows: the equal ones merge, then there is room for the rest
    std::fill(t.chunk.begin(), t.chunk.end(), 0);
    for (int32_t i : { 0, 1, 6 }) {
        std::fill_n(t.k.begin() + (size_t) (N_SINK + i) * s.d_k, s.d_k, (f16) 0);
    }
    for (int32_t i : { 3, 4, 5 }) {
        std::copy_n(t.k.begin() + (size_t) (N_SINK + 2) * s.d_k, s.d_k, t.k.begin() + (size_t) (N_SINK + i) * s.d_k);
    }
    head_store h(text.shape, N_SINK + 5);
    const pass_result res = run_pass(h, t, text.rp, text.params());
    CHECK_EQ(res.n_merged, 3);
    CHECK_EQ(h.n_used, N_SINK + 5);
    CHECK_EQ((int) h.meta(N_SINK + 2).n_tok, 4);
}

// The ends of what may be asked for.
void test_extremes() {
    for (method how : ALL_METHODS) {
        for (int32_t budget : { 0, 1, 2 }) {
            for (int32_t n_new : { 0, 1, 2, 3 }) {
                CASE("method " + std::to_string((int) how) + ", " + std::to_string(n_new) + " tokens for " +
                     std::to_string(budget) + " rows");
                spec s;
                s.how = how;
                s.n_window = 1;
                text_source text(s, 50);
                head_store h(text.shape, N_SINK + budget);
                for (int pass = 0; pass < 3; ++pass) {
                    const tokens t = text.draw(pass == 0, n_new);
                    text.accept(t);
                    const int32_t before = h.n_used - h.n_sink;
                    const pass_result res = run_pass(h, t, text.rp, text.params());
                    CHECK(h.guards_hold());
                    CHECK_EQ(h.n_sink, N_SINK);
                    CHECK(h.n_used <= h.n_alloc);
                    CHECK_EQ(res.n_merged + res.n_dropped + h.n_used - h.n_sink, (int64_t) before + n_new);
                }
            }
        }
    }
}

// Queries in q8_0 are what their f16 values are; a head's group may begin inside a block.
void test_q8_queries() {
    for (int32_t d_k : { 64, 48, 80 }) {
        spec s;
        s.d_k = d_k;
        s.n_rot = 32;
        text_source text(s, 60 + d_k);
        const int32_t n_head_kv = 4, ih = 1, n_group = s.n_gqa * d_k;
        head_store a(text.shape, 40), b(text.shape, 40);
        for (int pass = 0; pass < 2; ++pass) {
            tokens t = text.draw(pass == 0, 60);
            text.accept(t);
            const int32_t n_blocks = n_head_kv * n_group / Q_BLOCK;
            std::vector<q8_block> ring(t.n_q * n_blocks);
            for (auto & block : ring) {
                block.d = f32_to_f16(0.0625f);
                std::fill_n(block.qs, Q_BLOCK, 127);
            }
            for (int32_t i = 0; i < t.n_q; ++i) {
                for (int32_t e = 0; e < n_group; ++e) {
                    const int32_t code = text.r.below(255) - 127, at = ih * n_group + e;
                    t.q[(size_t) i * n_group + e] = f32_to_f16(0.0625f * (float) code);
                    ring[i * n_blocks + at / Q_BLOCK].qs[at % Q_BLOCK] = (int8_t) code;
                }
            }
            run_pass(a, t, text.rp, text.params());

            stage_store stage(t, b.shape, { n_head_kv, ih, false, 0, 0 });
            stage.q8 = ring;
            run_pass(b, stage, text.rp, text.params());
            CHECK_EQ(a.n_used, b.n_used);
            for (int32_t i = 0; i < a.n_used; ++i) {
                CHECK(std::equal(a.key(i), a.key(i) + d_k, b.key(i)));
                CHECK_EQ(a.bias_of(i), b.bias_of(i));
                CHECK(i < N_SINK || a.meta(i).s_use == b.meta(i).s_use);
            }
        }
    }
}

// Layers that read another one's rows ask as more query heads of its groups would. A weight that queries got after RoPE
// is taken off before they are turned, and put back: with keys divided by it all is as without.
void test_readers_and_weights() {
    for (bool weighed : { false, true }) {
        CASE(weighed ? "queries weighed after RoPE" : "queries of two layers");
        spec s;
        s.n_gqa = 4;
        s.distinct = weighed ? 0 : DISTINCT; // how unlike keys are depends on their weights
        text_source text(s, 80);
        const int32_t n_head_kv = 3, ih = 1, n_q_layer = 2, d = s.d_k, n_group = s.n_gqa / n_q_layer * d;
        head_store a(text.shape, 40), b(text.shape, 40);
        std::vector<float> weight(n_q_layer * d, 1.0f);
        for (int32_t e = 0; weighed && e < d; ++e) {
            weight[e] = weight[d + e] = text.r.below(2) ? 0.5f : -2.0f; // exact, and so is its inverse
        }
        for (int pass = 0; pass < 3; ++pass) {
            const tokens t = text.draw(pass == 0, 60);
            text.accept(t);
            const layout l = { n_head_kv, ih, false, 0, 0 };
            stage_store one(t, text.shape, l), two(t, text.shape, l);
            two.q.assign(two.q.size(), F16_NAN);
            for (int32_t i = 0; i < t.n_q; ++i) { // a row holds the heads of the first layer, then those of the second
                for (int32_t at = 0; at < n_q_layer * n_group; ++at) {
                    const int32_t layer = at / n_group, e = at % n_group;
                    const float x = f16_to_f32(t.q[(size_t) i * n_q_layer * n_group + at]);
                    two.q[i * two.q_row + (layer * n_head_kv + ih) * n_group + e] = f32_to_f16(x * weight[e % d]);
                }
            }
            for (size_t at = 0; at < two.k.size(); ++at) {
                two.k[at] = f32_to_f16(f16_to_f32(two.k[at]) / weight[at % d]);
            }
            run_pass(a, one, text.rp, text.params());
            pass_call call(b, two, text.rp, text.params());
            call.args.n_q_layer = n_q_layer;
            call.args.q_weight = weighed ? weight.data() : nullptr;
            call.run();

            head_store same = b;
            for (int32_t i = 0; i < b.n_used; ++i) {
                for (int32_t e = 0; e < d; ++e) {
                    same.key(i)[e] = f32_to_f16(f16_to_f32(b.key(i)[e]) * weight[e]);
                }
            }
            CHECK_SAME_ROWS(a, same);
        }
    }
}

// A stage of q8_0 whose keys are rotated, with the queries: what a pass loads is what was there before.
void test_quantized_stage() {
    CASE("stage of q8_0");
    spec s;
    s.d_k = s.d_v = 64;
    text_source text(s, 90);
    const int32_t n_head_kv = 3, ih = 1, d = 64, n_blocks = n_head_kv * d / Q_BLOCK;
    tokens t = text.draw(true, 40);
    head_store h(text.shape, 60);
    stage_store stage(t, text.shape, { n_head_kv, ih, false, 5, 3 });
    pass_call call(h, stage, text.rp, text.params());
    std::vector<q8_block> k(stage.n_cell * n_blocks), v(k.size()), ring(stage.ring.size() * n_blocks * s.n_gqa);
    std::vector<float> want_k, want_v, want_q, x(d);
    auto put = [&](const f16 * from, bool rotated, q8_block * to, std::vector<float> & want) {
        f16_to_f32_row(from, x.data(), d);
        if (rotated) {
            hadamard(x.data(), d);
        }
        f32_to_q8_0_row(x.data(), to, d);
        decode_row(row_type::q8_0, to, x.data(), d);
        if (rotated) {
            hadamard(x.data(), d);
        }
        want.insert(want.end(), x.begin(), x.end());
    };
    for (int32_t i = 0; i < t.n(); ++i) {
        const int64_t at = stage.cell[i] * n_blocks + ih * d / Q_BLOCK;
        put(t.k.data() + i * d, true, &k[at], want_k);
        put(t.v.data() + i * d, false, &v[at], want_v);
    }
    for (int32_t i = 0; i < t.n_q; ++i) {
        for (int32_t g = 0; g < s.n_gqa; ++g) {
            put(t.q.data() + (i * s.n_gqa + g) * d, true,
                &ring[(stage.ring[i] * n_blocks + ih * d / Q_BLOCK) * s.n_gqa + g * d / Q_BLOCK], want_q);
        }
    }
    pass_args & a = call.args;
    a.k_rotated = true;
    a.k_stage = (const uint8_t *) k.data();
    a.v_stage = (const uint8_t *) v.data();
    a.k_cell_type = a.v_cell_type = row_type::q8_0;
    a.k_head = a.v_head = row_size(row_type::q8_0, d);
    a.k_cell = a.v_cell = a.k_head * n_head_kv;
    a.q = (const uint8_t *) ring.data();
    a.q_type = row_type::q8_0;
    a.q_row = row_size(row_type::q8_0, n_head_kv * s.n_gqa * d);
    const pass_head head(a, call.plan, ih);
    std::vector<float> got(d * s.n_gqa);
    for (int32_t i = 0; i < t.n(); ++i) {
        head.load_token_key(i, got.data());
        CHECK_CLOSE(got.data(), want_k.data() + i * d, d, 0.0, 1e-6);
        head.load_token_value(i, got.data());
        CHECK_BITS(got.data(), want_v.data() + i * d, d);
    }
    for (int32_t i = 0; i < t.n_q; ++i) {
        head.load_query(i, got.data());
        CHECK_CLOSE(got.data(), want_q.data() + i * d * s.n_gqa, d * s.n_gqa, 0.0, 1e-6);
    }
    call.run(); // sinks come out as their keys were
    for (int32_t i = 0; i < N_SINK; ++i) {
        pass_plan after = call.plan;
        after.n_row_sink = N_SINK;
        pass_head(a, after, ih).load_core_key(i, got.data());
        CHECK_CLOSE(got.data(), want_k.data() + i * d, d, 0.0, 1e-2); // of f16
        pass_head(a, after, ih).load_core_value(i, got.data());
        CHECK_CLOSE(got.data(), want_v.data() + i * d, d, F16_RTOL, 0.0);
    }
}

// Quantized rows: the pass reads and writes what f16 rows hold, but for half a step of the rotated row; a row that
// stays keeps its bytes, however many passes it sees.
void test_quantized_rows() {
    for (row_type type : { row_type::q8_0, row_type::q5_0, row_type::q4_0, row_type::iq4_nl }) {
        CASE("rows of type " + std::to_string((int) type));
        spec s;
        s.d_k = s.d_v = 64;
        text_source text(s, 70);
        head_store h(text.shape, s.n_alloc, 0, type);
        for (int pass = 0; pass < 6; ++pass) {
            const tokens t = text.draw(pass == 0, s.n_new);
            text.accept(t);
            const head_store before = h;
            head_store twin(text.shape, s.n_alloc); // what the quantized rows say, in f16
            twin.n_sink = h.n_sink;
            twin.n_used = h.n_used;
            twin.bias = h.bias;
            for (int32_t i = 0; i < h.n_used; ++i) {
                twin.set_meta(i, h.meta(i));
            }
            for (int32_t i = 0; i < h.n_used; ++i) {
                f32_to_f16_row(h.key_f32(i).data(), twin.key(i), s.d_k);
                f32_to_f16_row(h.val_f32(i).data(), twin.val(i), s.d_v);
            }
            run_pass(h, t, text.rp, text.params());
            run_pass(twin, t, text.rp, text.params());
            CHECK(h.guards_hold());
            CHECK_EQ(h.n_used, twin.n_used);
            int32_t kept = 0;
            for (int32_t i = 0; i < std::min(h.n_used, twin.n_used); ++i) {
                CHECK_EQ(h.meta(i).chunk, twin.meta(i).chunk);
                const auto k = h.key_f32(i), want_k = twin.key_f32(i), v = h.val_f32(i), want_v = twin.val_f32(i);
                if (i < N_SINK) {
                    CHECK_BITS(h.key(i), twin.key(i), s.d_k);
                    CHECK_BITS(h.val(i), twin.val(i), s.d_v);
                    continue;
                }
                // half a step for every rotated value, a whole one at the far end of codes that are not symmetric; the
                // rounding of f16 adds a little
                auto bound = [type](std::vector<float> x) {
                    hadamard(x.data(), (int32_t) x.size());
                    float amax = 0.0f;
                    for (float e : x) {
                        amax = std::max(amax, std::fabs(e));
                    }
                    const float step = type == row_type::q8_0   ? 0.5f / 127.0f
                                       : type == row_type::q5_0 ? 1.0f / 16.0f
                                                                : 1.0f / 8.0f;
                    return amax * step * std::sqrt((float) x.size()) + 2e-2f;
                };
                auto in_frame = [&](std::vector<float> x) {
                    for (int32_t e = 0; e < s.d_k; ++e) {
                        x[e] = (x[e] - f16_to_f32(h.parts().mean[e])) / f16_to_f32(h.parts().scale[e]);
                    }
                    return x;
                };
                const auto own = in_frame(k), want = in_frame(want_k);
                CHECK(std::sqrt(distance2(own.data(), want.data(), s.d_k)) < bound(want));
                CHECK(std::sqrt(distance2(v.data(), want_v.data(), s.d_v)) < bound(want_v));
                for (int32_t j = 0; j < before.n_used; ++j) {
                    kept += std::equal(h.k.begin() + i * h.size_k(), h.k.begin() + (i + 1) * h.size_k(),
                        before.k.begin() + j * h.size_k());
                }
            }
            CHECK(pass == 0 || kept >= N_SINK + 5);
        }
    }
}

} // namespace

int main() {
    test_quantized_stage();
    test_quantized_rows();
    test_q8_queries();
    test_readers_and_weights();
    test_long_text();
    test_streaming();
    test_below_budget();
    test_scratch();
    test_scratch_size();
    test_equal_tokens();
    test_not_finite();
    test_zero_keys();
    test_extremes();
    return finish();
}
