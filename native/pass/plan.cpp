#include "plan.h"

#include <algorithm>

namespace semcache {

timeline::timeline(const timeline_params & p) : p(p), n_voted(p.n_stage) { next_chunk.n_chunk = p.n_chunk; }

bool timeline::can_plan(int32_t n_token, int32_t pos_last) const {
    return pos_last >= n_asked && (int32_t) chunk_start.size() + n_token < N_CHUNK_MAX;
}

planned_pass timeline::plan(stage_tokens && tokens, int32_t n_room) const {
    planned_pass res = {};
    res.tokens = std::move(tokens);
    const stage_tokens & st = res.tokens;
    const int32_t n_token = st.n(), n_sink = has_cores() ? 0 : p.n_sink;
    const int32_t n_must = n_token + n_room - p.n_stage; // tokens that have to leave
    int32_t n_stop = n_token - p.n_window;
    if (n_must > 0) {
        n_stop = std::max({ n_stop, n_must, n_sink + 1 }); // sinks alone are no cores
    }
    if (n_stop <= n_sink) {
        n_stop = 0;
    }
    res.n_stop = n_stop;

    res.n_voted.resize(n_token);
    for (int32_t i = 0; i < n_token; ++i) {
        if (st.pos[i] < n_asked) {
            res.n_voted[i] = n_voted[st.cell[i]];
        } else if (is_voter(st.pos[i])) {
            res.voter_row.push_back((int32_t) ring_row(st.pos[i]));
            res.voter_token.push_back(i);
            // a row is asked when it has left the window; the methods of others ask from where the query is
            const int64_t ahead = (int64_t) st.pos.back() + 1 + p.n_window + look_ahead(p.seed, st.pos[i], p.n_horizon);
            res.turn.push_back(p.how == method::semantic ? ahead - st.pos[i] : 0);
        }
    }

    res.cut = next_chunk;
    res.chunk_start = chunk_start;
    if (n_stop > 0) {
        const std::vector<bool> ends(st.is_delimiter.begin() + n_sink, st.is_delimiter.begin() + n_stop);
        res.cut.run(ends, res.chunk);
        for (int32_t i = n_sink; i < n_stop; ++i) {
            if (i == n_sink || res.chunk[i - n_sink] != res.chunk[i - n_sink - 1]) {
                res.chunk_start.push_back(st.pos[i]);
            }
        }
    }
    res.n_past = n_stop > 0 ? st.pos[n_stop - 1] + 1 : n_past;
    res.n_asked = st.pos.back() + 1;
    res.pos_begin = has_cores() || n_stop == 0 ? begin : st.pos[0];

    pass_plan & plan = res.plan;
    plan.how = p.how;
    plan.merge = p.merge;
    plan.distinct = p.distinct;
    plan.n_row_sink = has_cores() ? p.n_sink : 0;
    plan.n_sink = n_stop > 0 ? n_sink : 0;
    plan.n_new = n_stop - plan.n_sink;
    plan.n_window = n_token - n_stop;
    plan.cell = st.cell.data();
    plan.chunk = res.chunk.data();
    plan.n_voted = res.n_voted.data();
    plan.n_voter = (int32_t) res.voter_row.size();
    plan.n_full = asks() && p.n_ring < p.n_stage ? (p.n_stage - p.n_window - p.n_sink) / p.vote_every : 0;
    plan.voter_row = res.voter_row.data();
    plan.voter_token = res.voter_token.data();
    return res;
}

void timeline::commit(planned_pass && done) {
    for (int32_t i = done.n_stop; i < done.tokens.n(); ++i) {
        n_voted[done.tokens.cell[i]] = done.n_voted[i] + done.plan.n_voter;
    }
    n_past = done.n_past;
    n_asked = done.n_asked;
    begin = done.pos_begin;
    next_chunk = done.cut;
    chunk_start = std::move(done.chunk_start);
}

void timeline::clear() {
    n_past = n_asked = begin = 0;
    next_chunk.next_id = 0;
    chunk_start.clear();
}

int32_t timeline::floor(int32_t pos) const {
    if (pos >= n_past) {
        return pos;
    }
    const auto it = std::upper_bound(chunk_start.begin(), chunk_start.end(), pos);
    // the first chunk begins behind the sinks: cutting there would leave sinks alone, which is no gain over starting
    // anew
    return it - chunk_start.begin() <= 1 ? 0 : *(it - 1);
}

int32_t timeline::chunk_from(int32_t p0) const {
    return (int32_t) (std::lower_bound(chunk_start.begin(), chunk_start.end(), p0) - chunk_start.begin());
}

void timeline::cut(int32_t chunk, int32_t p0) {
    chunk_start.resize(chunk);
    next_chunk.next_id = chunk;
    n_past = p0;
}

bool timeline::state_fits(const state & s, const std::vector<int32_t> & pos) const {
    return s.n_past >= 0 && s.begin >= 0 && (pos.empty() || pos[0] >= s.n_past) && s.n_asked >= s.n_past &&
           s.n_asked <= (pos.empty() ? s.n_past : pos.back() + 1) &&
           (pos.empty() || pos.back() < s.n_asked + p.n_ring) &&
           std::is_sorted(s.chunk_start.begin(), s.chunk_start.end()) &&
           (s.chunk_start.empty() || (s.chunk_start.front() >= s.begin && s.chunk_start.back() < s.n_past));
}

void timeline::set_state(state && s) {
    n_past = s.n_past;
    n_asked = s.n_asked;
    begin = s.begin;
    next_chunk.next_id = (int32_t) s.chunk_start.size();
    chunk_start = std::move(s.chunk_start);
}

} // namespace semcache
