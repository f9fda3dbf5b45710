// semcache-state.cpp - the store in a state: a head that says what it fits, then cores, votes and queries

#include "semcache-store.h"

#include "llama-io.h"
#include "llama-kv-cache.h"

#include <algorithm>

namespace {

constexpr uint32_t STATE_MAGIC = 0x6d657363; // "csem": no stock cache state begins with so many streams
constexpr uint32_t STATE_VERSION = 6;

template <typename T> void write_vector(llama_io_write_i & io, const std::vector<T> & v) {
    const uint64_t n = v.size();
    io.write(&n, sizeof(n));
    io.write(v.data(), n * sizeof(T));
}

template <typename T> void read_vector(llama_io_read_i & io, std::vector<T> & v, uint64_t n_max) {
    uint64_t n;
    io.read(&n, sizeof(n));
    if (n > n_max) {
        throw semcache_error(SEMCACHE_ERR_IO, "state: expected at most " + std::to_string(n_max) + " entries, got " +
                                                  std::to_string(n) + "; the file is damaged");
    }
    v.resize(n);
    io.read(v.data(), n * sizeof(T));
}

void check_state_call(llama_seq_id seq_id, llama_state_seq_flags flags) {
    if (flags & LLAMA_STATE_SEQ_FLAGS_ON_DEVICE) { // llama.cpp takes the blocks of quantized rows for values
        throw semcache_error(SEMCACHE_ERR_STATE,
            "state: expected one in host memory, got LLAMA_STATE_SEQ_FLAGS_ON_DEVICE; leave the flag out");
    }
    if (seq_id > 0) {
        throw semcache_error(
            SEMCACHE_ERR_STATE, "state: expected sequence 0, the only one, got " + std::to_string(seq_id) + "; pass 0");
    }
}

} // namespace

std::vector<std::pair<const char *, uint32_t>> llama_semcache::state_head() const {
    return {
        { "magic", STATE_MAGIC },
        { "version", STATE_VERSION },
        { "method", (uint32_t) params.method },
        { "n_ctx", (uint32_t) n_ctx },
        { "n_stage", (uint32_t) params.n_stage },
        { "n_window", (uint32_t) params.n_window },
        { "n_sink", (uint32_t) params.n_sink },
        { "n_chunk", (uint32_t) params.n_chunk },
        { "n_layer", (uint32_t) layers.size() },
        { "type_k", (uint32_t) params.type_k },
        { "type_v", (uint32_t) params.type_v },
        { "calibrate", params.calibrate != 0 },
    };
}

void llama_semcache::state_write_head(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    check_state_call(seq_id, flags);
    for (const auto & [name, value] : state_head()) {
        io.write(&value, sizeof(value));
    }
    for (const auto & l : layers) {
        write_vector(io, l.row_first);
    }
}

void llama_semcache::state_read_head(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    check_state_call(seq_id, flags);
    for (const auto & [name, want] : state_head()) {
        uint32_t got;
        io.read(&got, sizeof(got));
        if (got != want) {
            throw semcache_error(SEMCACHE_ERR_STATE,
                std::string("state: expected ") + name + " " + std::to_string(want) + ", got " + std::to_string(got) +
                    "; load it into a context with the settings it was saved with");
        }
    }
    for (const auto & l : layers) {
        std::vector<int32_t> first;
        read_vector(io, first, l.row_first.size());
        if (first != l.row_first) {
            throw semcache_error(SEMCACHE_ERR_STATE, "state: expected the same rows per head, got others in layer " +
                                                         std::to_string(l.il) + "; use the same kv_ratio and profile");
        }
    }
}

void llama_semcache::state_write_data(llama_io_write_i & io) const {
    io.write(&n_past, sizeof(n_past));
    io.write(&n_asked, sizeof(n_asked));
    io.write(&chunker.next_id, sizeof(chunker.next_id));
    write_vector(io, chunk_start);
    const int64_t counts[] = { rows_merged, rows_dropped };
    io.write(counts, sizeof(counts));

    const stage_tokens st = collect();
    write_vector(io, st.pos);
    write_vector(io, st.tok);
    for (int32_t cell : st.cell) {
        io.write(&n_voted[cell], sizeof(n_voted[cell]));
    }

    for (const auto & l : layers) {
        io.write(l.row_count.data(), l.row_count.size() * sizeof(int32_t));
        for (int32_t ih = 0; ih < l.n_head_kv(); ++ih) {
            const size_t first = l.row_first[ih], n = l.row_count[ih];
            if (n > 0) {
                for (ggml_tensor * t : { l.k, l.v, l.bias }) {
                    const size_t row = t == l.bias ? sizeof(float) : t->nb[1];
                    io.write_tensor(t, first * row, n * row);
                }
                io.write(l.meta.data() + first, n * sizeof(l.meta[0]));
            }
        }
        for (size_t i = 0; i < st.cell.size(); ++i) {
            if (st.pos[i] >= n_asked) {
                if (is_voter(st.pos[i])) {
                    io.write_tensor(l.q, ring_row(st.pos[i]) * l.q->nb[1], l.q->nb[1]);
                }
                continue;
            }
            for (int32_t ih = 0; ih < l.n_head_kv(); ++ih) {
                io.write(&l.votes[(size_t) ih * params.n_stage + st.cell[i]], sizeof(l.votes[0]));
            }
        }
    }
}

void llama_semcache::state_read_data(llama_io_read_i & io) {
    clear();
    try {
        int32_t n_past_new, n_asked_new, next_id;
        std::vector<int32_t> starts, pos, tok;
        int64_t counts[2];
        io.read(&n_past_new, sizeof(n_past_new));
        io.read(&n_asked_new, sizeof(n_asked_new));
        io.read(&next_id, sizeof(next_id));
        read_vector(io, starts, N_CHUNK_MAX);
        io.read(counts, sizeof(counts));
        read_vector(io, pos, params.n_stage);
        read_vector(io, tok, params.n_stage);

        const stage_tokens st = collect(); // restored by the cache itself just before
        const bool fits =
            pos == st.pos && tok.size() == pos.size() && n_past_new >= 0 && (pos.empty() || pos[0] >= n_past_new) &&
            n_asked_new >= n_past_new && n_asked_new <= (pos.empty() ? n_past_new : pos.back() + 1) &&
            (pos.empty() || pos.back() < n_asked_new + n_ring) && (size_t) next_id == starts.size() &&
            std::is_sorted(starts.begin(), starts.end()) && (starts.empty() || starts.back() < n_past_new);
        if (!fits) {
            throw semcache_error(SEMCACHE_ERR_IO,
                "state: expected the tokens of the stage and their chunks, got others; the file is damaged");
        }
        n_asked = n_asked_new; // tells the rows of the ring
        for (int32_t cell : st.cell) {
            io.read(&n_voted[cell], sizeof(n_voted[cell]));
            if (n_voted[cell] < 0) {
                throw semcache_error(SEMCACHE_ERR_IO, "state: expected at least 0 votes on a token, got " +
                                                          std::to_string(n_voted[cell]) + "; the file is damaged");
            }
        }
        for (auto & l : layers) {
            std::vector<int32_t> count(l.row_count.size());
            io.read(count.data(), count.size() * sizeof(int32_t));
            for (int32_t ih = 0; ih < l.n_head_kv(); ++ih) {
                const size_t first = l.row_first[ih], n = count[ih];
                const int32_t least = n_past_new > 0 ? params.n_sink : 0,
                              most = n_past_new > 0 ? l.row_first[ih + 1] - l.row_first[ih] : 0;
                if (count[ih] < least || count[ih] > most) {
                    throw semcache_error(SEMCACHE_ERR_IO, "state: expected " + std::to_string(least) + " to " +
                                                              std::to_string(most) + " rows per head, got " +
                                                              std::to_string(count[ih]) + "; the file is damaged");
                }
                if (n > 0) {
                    for (ggml_tensor * t : { l.k, l.v, l.bias }) {
                        const size_t row = t == l.bias ? sizeof(float) : t->nb[1];
                        io.read_tensor(t, first * row, n * row);
                    }
                    io.read(l.meta.data() + first, n * sizeof(l.meta[0]));
                    for (size_t i = first + params.n_sink; i < first + n; ++i) {
                        if ((int32_t) l.meta[i].chunk >= next_id ||
                            (i > first + params.n_sink && l.meta[i].chunk < l.meta[i - 1].chunk)) {
                            throw semcache_error(SEMCACHE_ERR_IO,
                                "state: expected rows in the order of their chunks, got others; the file is damaged");
                        }
                    }
                }
            }
            l.row_count = count;
            l.publish();
            for (size_t i = 0; i < st.cell.size(); ++i) {
                if (st.pos[i] >= n_asked) {
                    if (is_voter(st.pos[i])) {
                        io.read_tensor(l.q, ring_row(st.pos[i]) * l.q->nb[1], l.q->nb[1]);
                    }
                    continue;
                }
                for (int32_t ih = 0; ih < l.n_head_kv(); ++ih) {
                    io.read(&l.votes[(size_t) ih * params.n_stage + st.cell[i]], sizeof(l.votes[0]));
                }
            }
        }
        auto & cells = kv.v_cells[0];
        for (size_t i = 0; i < st.cell.size(); ++i) {
            llama_kv_cell_ext ext = cells.ext_get(st.cell[i]);
            ext.tok = tok[i];
            cells.ext_set(st.cell[i], ext);
        }
        n_past = n_past_new;
        chunker.next_id = next_id;
        chunk_start = std::move(starts);
        rows_merged = counts[0];
        rows_dropped = counts[1];
    } catch (...) {
        kv.clear(true);
        throw;
    }
}
