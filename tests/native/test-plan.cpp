// Where a text stands: positions, chunks and voters from pass to pass, cuts and what is asked again.

#include "pass/plan.h"
#include "sc-test.h"

#include <numeric>

using namespace semcache;
using namespace sc_test;

namespace {

constexpr int32_t N_STAGE = 24, N_WINDOW = 10, N_SINK = 2;

timeline_params params(method how = method::semantic) {
    timeline_params p = {};
    p.how = how;
    p.merge = true;
    p.n_stage = N_STAGE;
    p.n_window = N_WINDOW;
    p.n_sink = N_SINK;
    p.n_chunk = 4;
    p.n_horizon = 16;
    p.vote_every = asks_queries(how) ? VOTE_EVERY : 0;
    p.n_ring = N_STAGE - N_WINDOW;
    return p;
}

// A stage as llama_kv_cache keeps it: cells that are free are filled in order; every seventh token ends a chunk.
struct stage {
    std::vector<int32_t> pos = std::vector<int32_t>(N_STAGE, -1); // of each cell

    void add(int32_t p) { *std::find(pos.begin(), pos.end(), -1) = p; }

    stage_tokens tokens() const {
        stage_tokens st;
        for (int32_t i = 0; i < N_STAGE; ++i) {
            if (pos[i] >= 0) {
                st.cell.push_back(i);
            }
        }
        std::sort(st.cell.begin(), st.cell.end(), [&](int32_t a, int32_t b) { return pos[a] < pos[b]; });
        for (int32_t i : st.cell) {
            st.pos.push_back(pos[i]);
            st.tok.push_back(pos[i]);
            st.is_delimiter.push_back(pos[i] % 7 == 0);
        }
        return st;
    }

    int32_t n() const { return N_STAGE - (int32_t) std::count(pos.begin(), pos.end(), -1); }
};

// Reads tokens [from, to) one by one, with a pass where there is no room; returns the passes' plans.
std::vector<planned_pass> read(timeline & time, stage & s, int32_t from, int32_t to) {
    std::vector<planned_pass> res;
    for (int32_t p = from; p < to; ++p) {
        if (s.n() == 0 && !time.has_cores()) {
            time.start(p);
        }
        if (!time.ring_holds(p, p) || s.n() == N_STAGE) {
            CHECK(time.can_plan(s.n(), p - 1));
            planned_pass next = time.plan(s.tokens(), 1);
            for (int32_t i = 0; i < next.n_stop; ++i) {
                s.pos[next.tokens.cell[i]] = -1;
            }
            planned_pass copy = next; // its plan points into `next`
            res.push_back(copy);
            time.commit(std::move(next));
        }
        s.add(p);
    }
    return res;
}

void test_a_text_from(int32_t begin) {
    CASE("a text from position " + std::to_string(begin));
    timeline time(params());
    stage s;
    const auto passes = read(time, s, begin, begin + 200);
    int32_t end = begin, n_voter = 0, asked = begin;
    std::vector<int32_t> starts;
    for (const planned_pass & p : passes) {
        const stage_tokens & st = p.tokens;
        CHECK_EQ(st.pos.front(), end);
        // every token's queries are asked once, every second one votes
        for (int32_t i : p.voter_token) {
            CHECK_EQ((st.pos[i] - asked) % VOTE_EVERY, 0);
            CHECK(st.pos[i] >= asked);
        }
        n_voter += (int32_t) p.voter_token.size();
        CHECK_EQ((int32_t) p.voter_token.size(), (st.pos.back() + 1 - asked + 1) / VOTE_EVERY);
        asked = st.pos.back() + 1;
        CHECK_EQ(p.n_asked, asked);
        // rows of the ring are in order, without gaps
        for (size_t i = 0; i < p.voter_row.size(); ++i) {
            CHECK_EQ(p.voter_row[i], (int32_t) i);
            CHECK(p.turn[i] > 0);
        }
        CHECK(p.n_stop == 0 || p.n_stop == st.n() - N_WINDOW);
        if (p.n_stop > 0) {
            const int32_t n_sink = end == begin ? N_SINK : 0;
            CHECK_EQ((int32_t) p.chunk.size(), p.n_stop - n_sink);
            for (int32_t i = n_sink; i < p.n_stop; ++i) {
                const bool first = i == n_sink || p.chunk[i - n_sink] != p.chunk[i - n_sink - 1];
                if (first) {
                    starts.push_back(st.pos[i]);
                }
                CHECK_EQ(p.chunk[i - n_sink], (int32_t) starts.size() - 1);
            }
            end = st.pos[p.n_stop - 1] + 1;
        }
        CHECK_EQ(p.n_past, p.n_stop > 0 || end > begin ? end : 0);
    }
    CHECK(passes.size() >= 12);
    CHECK_EQ(time.pos_end(), end);
    CHECK_EQ(time.pos_begin(), begin);
    CHECK(n_voter >= 80);
    for (int32_t p = begin; p < end; ++p) { // cuts are where chunks begin
        const auto it = std::upper_bound(starts.begin(), starts.end(), p);
        CHECK_EQ(time.floor(p), it - starts.begin() <= 1 ? 0 : *(it - 1));
    }
    CHECK_EQ(time.floor(end), end);
    CHECK_EQ(time.floor(end + 5), end + 5);
}

// The tokens behind a cut vote anew, and chunks go on from where it is.
void test_cut() {
    CASE("cut");
    timeline time(params());
    stage s;
    read(time, s, 0, 150);
    const int32_t cut = time.floor(70), chunk = time.chunk_from(cut);
    CHECK(cut > 60 && cut <= 70);
    std::fill(s.pos.begin(), s.pos.end(), -1);
    time.ask_again(cut);
    time.cut(chunk, cut);
    CHECK_EQ(time.pos_end(), cut);
    CHECK_EQ((int32_t) time.get_state().chunk_start.size(), chunk);
    CHECK(time.ring_holds(cut, cut));
    const auto passes = read(time, s, cut, cut + 60);
    CHECK(!passes.empty());
    for (const planned_pass & p : passes) {
        for (int32_t id : p.chunk) {
            CHECK(id >= chunk);
        }
    }
    CHECK(time.pos_end() > cut);

    time.clear();
    CHECK(!time.has_cores() && time.pos_end() == 0 && time.get_state().chunk_start.empty());
}

// More tokens than the window, but not more than the sinks beside it: votes alone unless room is asked for.
void test_room() {
    for (int32_t n = N_WINDOW; n <= N_WINDOW + N_SINK; ++n) {
        CASE(std::to_string(n) + " tokens in the stage");
        timeline time(params());
        stage s;
        read(time, s, 0, n);
        CHECK_EQ(time.plan(s.tokens(), 0).n_stop, 0);
        for (int32_t n_room = 1; n_room <= N_STAGE - N_WINDOW; ++n_room) {
            const planned_pass p = time.plan(s.tokens(), n_room);
            const int32_t n_must = n + n_room - N_STAGE;
            CHECK_EQ(p.n_stop, n_must > 0 ? N_SINK + 1 : 0);
            CHECK(N_STAGE - n + p.n_stop >= n_room);
            CHECK_EQ(p.plan.n_sink + p.plan.n_new, p.n_stop);
        }
    }
}

// Methods of others: some ask from where the query is, some ask none at all.
void test_other_methods() {
    for (method how : { method::paper, method::streaming, method::keydiff, method::snapkv, method::h2o }) {
        CASE("method " + std::to_string((int) how));
        timeline time(params(how));
        stage s;
        for (const planned_pass & p : read(time, s, 0, 100)) {
            CHECK_EQ(p.voter_row.empty(), !asks_queries(how));
            CHECK_EQ(p.plan.n_full > 0, asks_queries(how));
            CHECK(std::all_of(p.turn.begin(), p.turn.end(), [](int64_t x) { return x == 0; }));
        }
        CHECK_EQ(time.ring_end(), asks_queries(how) ? (int64_t) (N_STAGE - N_WINDOW) / VOTE_EVERY : 0);
    }
}

// A state is taken if it can be true.
void test_states() {
    timeline time(params()), other(params());
    stage s;
    read(time, s, 3, 120);
    const std::vector<int32_t> pos = s.tokens().pos;
    const timeline::state good = time.get_state();
    CHECK(other.state_fits(good, pos));
    timeline::state copy = good;
    other.set_state(std::move(copy));
    CHECK_EQ(other.pos_end(), time.pos_end());
    CHECK_EQ(other.pos_begin(), 3);
    CHECK_EQ(other.floor(80), time.floor(80));
    auto bad = [&](auto && change) {
        timeline::state t = good;
        change(t);
        CHECK(!other.state_fits(t, pos));
    };
    bad([](auto & t) { t.n_past = -1; });
    bad([](auto & t) { t.begin = -1; });
    bad([&](auto & t) { t.n_past = pos[0] + 1; });
    bad([](auto & t) { t.n_asked = t.n_past - 1; });
    bad([&](auto & t) { t.n_asked = pos.back() + 2; });
    bad([](auto & t) { std::swap(t.chunk_start.front(), t.chunk_start.back()); });
    bad([](auto & t) { t.chunk_start.back() = t.n_past; });
    bad([](auto & t) { t.begin = t.chunk_start.front() + 1; });
}

} // namespace

int main() {
    test_a_text_from(0);
    test_a_text_from(1000);
    test_cut();
    test_room();
    test_other_methods();
    test_states();
    return finish();
}
