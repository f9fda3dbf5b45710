// plan.h - where a text stands, and what the next pass does with it
//
// Positions, chunks and voters are the same for all layers and heads, so the host keeps them; nothing here knows a
// tensor.

#pragma once

#include "args.h"
#include "sc-chunk.h"
#include "sc-lookahead.h"

#include <algorithm>
#include <vector>

namespace semcache {

// Tokens in the stage in position order.
struct stage_tokens {
    std::vector<int32_t> cell, pos, tok;
    std::vector<bool> is_delimiter;

    int32_t n() const { return (int32_t) cell.size(); }
};

struct timeline_params {
    method how;
    bool merge;
    int32_t distinct;
    int32_t n_stage, n_window, n_sink, n_chunk, n_horizon;
    uint64_t seed;
    int32_t vote_every; // as VOTE_EVERY; 0: the method asks no queries
    int32_t n_ring;     // tokens between two passes at the most
};

// One pass: the plan, what it points to, and the timeline afterwards. Moving it leaves the plan valid.
struct planned_pass {
    pass_plan plan;
    int32_t n_stop; // tokens that leave the stage, sinks included
    stage_tokens tokens;
    std::vector<int32_t> voter_row, voter_token, n_voted, chunk;
    std::vector<int64_t> turn; // [n_voter] positions by which each voter's queries are turned

    int32_t n_past, n_asked, pos_begin;
    chunker cut;
    std::vector<int32_t> chunk_start;
};

class timeline {
public:
    explicit timeline(const timeline_params & p);

    // The tokens before position n_past went into the cores: the stage begins here.
    bool has_cores() const { return n_past > 0; }
    int32_t pos_end() const { return n_past; }
    // Position of the text's first token, if there are cores.
    int32_t pos_begin() const { return begin; }

    // Whether a token that no pass has asked votes in the next one, and the row of the query ring that its queries then
    // go to. The row behind those of the voters may be written too and is never read.
    bool asks() const { return p.vote_every > 0; }
    bool is_voter(int32_t pos) const { return asks() && (pos - n_asked) % p.vote_every == 0; }
    int64_t ring_row(int32_t pos) const { return (pos - n_asked) / p.vote_every; }
    int64_t ring_end() const { return n_vote(p.n_ring); }

    // Of n tokens in a row, those that vote at the most.
    int32_t n_vote(int32_t n) const { return asks() ? (n + p.vote_every - 1) / p.vote_every : 0; }

    // Whether the ring has room for the queries of tokens at [first, last].
    bool ring_holds(int32_t first, int32_t last) const { return first >= n_asked && last - n_asked < p.n_ring; }

    // The same after a pass over tokens up to pos_last.
    bool ring_holds_behind(int32_t pos_last, int32_t last) const { return last - pos_last <= p.n_ring; }

    // A text begins at this position; the cache is empty.
    void start(int32_t pos) { n_asked = pos; }

    // Whether there is something for a pass to do.
    bool can_plan(int32_t n_token, int32_t pos_last) const;

    // The next pass, which frees at least n_room cells if it has to compress for that.
    planned_pass plan(stage_tokens && tokens, int32_t n_room) const;

    // After the pass has run.
    void commit(planned_pass && done);

    void clear();

    // The largest position up to pos at which the cores can be cut; 0: only altogether.
    int32_t floor(int32_t pos) const;

    // The first chunk that begins at p0 or behind it.
    int32_t chunk_from(int32_t p0) const;

    // Cores from this chunk on, which begins at p0, are gone.
    void cut(int32_t chunk, int32_t p0);

    // The tokens from this position on, as far as there were any, vote anew.
    void ask_again(int32_t pos) { n_asked = std::min(n_asked, pos); }

    const timeline_params p;

    // What a state holds besides; state_fits() says whether values of a state can be true.
    struct state {
        int32_t n_past = 0, n_asked = 0, begin = 0;
        std::vector<int32_t> chunk_start; // [n_chunk] first position of each chunk
    };
    state get_state() const { return { n_past, n_asked, begin, chunk_start }; }
    bool state_fits(const state & s, const std::vector<int32_t> & pos) const;
    void set_state(state && s);

    std::vector<int32_t> n_voted; // [n_stage] tokens whose queries voted on the token in each cell

private:
    int32_t n_past = 0;  // see has_cores
    int32_t n_asked = 0; // the queries of the tokens before this position have voted
    int32_t begin = 0;
    chunker next_chunk;
    std::vector<int32_t> chunk_start;
};

} // namespace semcache
