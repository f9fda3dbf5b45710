// semcache-state.cpp - the store in a state: a head that says what it fits, then cores, votes and queries, and a
// checksum over these and over K and V of the stage

#include "llama-io.h"
#include "llama-kv-cache.h"
#include "semcache-parts.h"

#include <algorithm>
#include <cstring>

namespace {

constexpr uint32_t STATE_MAGIC = 0x6d657363; // "csem": no stock cache state begins with so many streams
constexpr uint32_t STATE_VERSION = 8;

[[noreturn]] void throw_damaged(const std::string & expected, const std::string & got) {
    throw semcache_error(
        SEMCACHE_ERR_IO, "state: expected " + expected + ", got " + got + "; the file is damaged, save it again");
}

// FNV-1a (Fowler, Noll, Vo) over 64-bit words, however the bytes come; the last word is filled up with zeros.
class checksum {
public:
    void add(const void * data, size_t size) {
        const auto * p = (const uint8_t *) data;
        for (; size > 0 && n_word > 0; --size) {
            add_byte(*p++);
        }
        for (; size >= sizeof(word); size -= sizeof(word), p += sizeof(word)) {
            memcpy(&word, p, sizeof(word));
            add_word();
        }
        for (; size > 0; --size) {
            add_byte(*p++);
        }
    }

    uint64_t finish() {
        add_word();
        return hash;
    }

private:
    void add_byte(uint8_t x) {
        memcpy((uint8_t *) &word + n_word, &x, 1);
        if (++n_word == sizeof(word)) {
            add_word();
        }
    }

    void add_word() {
        hash = (hash ^ word) * 0x100000001b3ull;
        hash ^= hash >> 29; // else the high bits of a word never reach the low ones
        word = 0;
        n_word = 0;
    }

    uint64_t hash = 0xcbf29ce484222325ull, word = 0;
    size_t n_word = 0; // bytes of the word so far
};

// Pass everything on, and sum it up. Tensors are read and written at once, where llama.cpp's own put that off.
class summing_write : public llama_io_write_i {
public:
    explicit summing_write(llama_io_write_i & io) : io(io) {}

    void write(const void * src, size_t size) override {
        io.write(src, size);
        sum.add(src, size);
    }

    void write_tensor(ggml_tensor * tensor, size_t offset, size_t size) override {
        io.write_tensor(tensor, offset, size);
        copy.resize(size);
        ggml_backend_tensor_get(tensor, copy.data(), offset, size);
        sum.add(copy.data(), size);
    }

    size_t n_bytes() override { return io.n_bytes(); }

    void finish() {
        const uint64_t hash = sum.finish();
        io.write(&hash, sizeof(hash));
    }

private:
    llama_io_write_i & io;
    checksum sum;
    std::vector<uint8_t> copy;
};

class summing_read : public llama_io_read_i {
public:
    explicit summing_read(llama_io_read_i & io) : io(io) {}

    void read(void * dst, size_t size) override {
        io.read(dst, size);
        sum.add(dst, size);
    }

    void read_tensor(ggml_tensor * tensor, size_t offset, size_t size) override {
        copy.resize(size);
        read(copy.data(), size);
        ggml_backend_tensor_set(tensor, copy.data(), offset, size);
    }

    size_t n_bytes() override { return io.n_bytes(); }

    bool finish() {
        uint64_t want;
        io.read(&want, sizeof(want));
        return want == sum.finish();
    }

private:
    llama_io_read_i & io;
    checksum sum;
    std::vector<uint8_t> copy;
};

template <typename T> void write_value(llama_io_write_i & io, const T & x) { io.write(&x, sizeof(x)); }

template <typename T> void write_values(llama_io_write_i & io, const std::vector<T> & v) {
    write_value(io, (uint64_t) v.size());
    io.write(v.data(), v.size() * sizeof(T));
}

template <typename T> T read_value(llama_io_read_i & io) {
    T x;
    io.read(&x, sizeof(x));
    return x;
}

template <typename T> std::vector<T> read_values(llama_io_read_i & io, uint64_t n_max) {
    const auto n = read_value<uint64_t>(io);
    if (n > n_max) {
        throw_damaged("at most " + std::to_string(n_max) + " entries", std::to_string(n));
    }
    std::vector<T> v(n);
    io.read(v.data(), n * sizeof(T));
    return v;
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

// What a state and the context that reads it must have in common, with names for errors.
std::vector<std::pair<const char *, uint32_t>> head_of(const llama_semcache::parts & p) {
    const semcache_params & params = p.store.params;
    return {
        { "magic", STATE_MAGIC },
        { "version", STATE_VERSION },
        { "method", (uint32_t) params.method },
        { "n_ctx", (uint32_t) p.n_ctx },
        { "n_stage", (uint32_t) params.n_stage },
        { "n_window", (uint32_t) params.n_window },
        { "n_sink", (uint32_t) params.n_sink },
        { "n_chunk", (uint32_t) params.n_chunk },
        { "n_layer", (uint32_t) p.store.layers.size() },
        { "type_k", (uint32_t) params.type_k },
        { "type_v", (uint32_t) params.type_v },
        { "type_stage", (uint32_t) params.type_stage },
        { "k_rotated", p.k_rotated() },
        { "calibrate", params.calibrate != 0 },
    };
}

// Calls f(tensor, offset, bytes) for the queries or, of tokens that have been asked, the votes.
template <typename F>
void for_tokens(const llama_semcache::parts & p, const semcache_store::layer & l, const semcache::stage_tokens & st,
    int32_t n_asked, F && f) {
    const size_t n_stage = p.store.params.n_stage;
    for (int32_t i = 0; i < st.n(); ++i) {
        if (st.pos[i] >= n_asked) {
            if (p.time.is_voter(st.pos[i])) {
                f(l.q, p.time.ring_row(st.pos[i]) * l.q->nb[1], l.q->nb[1]);
            }
            continue;
        }
        for (int32_t ih = 0; ih < l.n_head_kv(); ++ih) {
            for (ggml_tensor * t : { l.vote_p4, l.vote_p }) {
                f(t, (ih * n_stage + st.cell[i]) * sizeof(float), sizeof(float));
            }
        }
    }
}

// Cores of a head in use are in the order of their chunks and stand for tokens.
void check_cores(const semcache_store & store, const semcache_store::layer & l, int32_t ih, int32_t n_chunk) {
    const int32_t n = l.row_count[ih], n_sink = store.params.n_sink;
    std::vector<int32_t> origin(n);
    ggml_backend_tensor_get(l.origin, origin.data(), l.row_first[ih] * sizeof(int32_t), n * sizeof(int32_t));
    int32_t last = 0;
    for (int32_t i = n_sink; i < n; ++i) {
        const int32_t chunk = semcache::chunk_of(origin[i]), n_tok = semcache::n_tok_of(origin[i]);
        if (chunk < last || chunk >= n_chunk) {
            throw_damaged("rows in the order of their chunks", "others");
        }
        if (n_tok < 1 || n_tok > store.params.n_chunk) {
            throw_damaged("rows of 1 to " + std::to_string(store.params.n_chunk) + " tokens", std::to_string(n_tok));
        }
        last = chunk;
    }
}

// Calls f(tensor, offset, bytes) for what the layer holds besides the stage: frames and sinks, then the cores in use.
template <typename F>
void for_cores(const semcache_store & store, const semcache_store::layer & l, bool has_cores, F && f) {
    const int32_t n_sink = store.params.n_sink;
    if (!has_cores) {
        return;
    }
    f(l.heads, 0, ggml_nbytes(l.heads));
    for (int32_t ih = 0; ih < l.n_head_kv(); ++ih) {
        for (ggml_tensor * t : l.row_tensors()) {
            if (l.row_count[ih] > n_sink) {
                f(t, (l.row_first[ih] + n_sink) * l.row_bytes(t), (l.row_count[ih] - n_sink) * l.row_bytes(t));
            }
        }
    }
}

void read_rows(
    llama_io_read_i & io, semcache_store & store, semcache_store::layer & l, bool has_cores, int32_t n_chunk) {
    const int32_t least = has_cores ? store.params.n_sink : 0;
    std::vector<int32_t> count(l.row_count.size());
    io.read(count.data(), count.size() * sizeof(int32_t));
    for (int32_t ih = 0; ih < l.n_head_kv(); ++ih) {
        const int32_t most = has_cores ? l.n_alloc(ih) : 0;
        if (count[ih] < least || count[ih] > most) {
            throw_damaged(
                std::to_string(least) + " to " + std::to_string(most) + " rows per head", std::to_string(count[ih]));
        }
    }
    l.row_count = count;
    for_cores(store, l, has_cores, [&](ggml_tensor * t, size_t at, size_t n) { io.read_tensor(t, at, n); });
    for (int32_t ih = 0; ih < l.n_head_kv(); ++ih) {
        check_cores(store, l, ih, n_chunk);
    }
    l.put_counts();
}

} // namespace

bool llama_semcache::write_with_sum(
    llama_io_write_i & io, const std::function<void(llama_io_write_i &)> & write) const {
    if (dynamic_cast<summing_write *>(&io)) {
        return false;
    }
    p->synchronize();
    summing_write sum(io);
    write(sum);
    sum.finish();
    return true;
}

bool llama_semcache::read_with_sum(llama_io_read_i & io, const std::function<void(llama_io_read_i &)> & read) {
    if (dynamic_cast<summing_read *>(&io)) {
        return false;
    }
    p->synchronize();
    summing_read sum(io);
    read(sum);
    if (!sum.finish()) {
        p->kv.clear(true);
        throw_damaged("its checksum", "another");
    }
    return true;
}

void llama_semcache::state_write_head(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    check_state_call(seq_id, flags);
    for (const auto & [name, value] : head_of(*p)) {
        write_value(io, value);
    }
    for (const auto & l : p->store.layers) {
        write_values(io, l.row_first);
    }
}

void llama_semcache::state_read_head(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    check_state_call(seq_id, flags);
    for (const auto & [name, want] : head_of(*p)) {
        const auto got = read_value<uint32_t>(io);
        if (got != want) {
            throw semcache_error(SEMCACHE_ERR_STATE,
                std::string("state: expected ") + name + " " + std::to_string(want) + ", got " + std::to_string(got) +
                    "; load it into a context with the settings and the version it was saved with");
        }
    }
    for (const auto & l : p->store.layers) {
        if (read_values<int32_t>(io, l.row_first.size()) != l.row_first) {
            throw semcache_error(SEMCACHE_ERR_STATE, "state: expected the same rows per head, got others in layer " +
                                                         std::to_string(l.il) + "; use the same kv_ratio and profile");
        }
    }
}

void llama_semcache::state_write_data(llama_io_write_i & io) const {
    const auto s = p->time.get_state();
    write_value(io, s.n_past);
    write_value(io, s.n_asked);
    write_value(io, s.begin);
    write_values(io, s.chunk_start);
    write_value(io, p->rows_merged);
    write_value(io, p->rows_dropped);

    const semcache::stage_tokens st = p->collect();
    write_values(io, st.pos);
    write_values(io, st.tok);
    for (int32_t cell : st.cell) {
        write_value(io, p->time.n_voted[cell]);
    }
    for (const auto & l : p->store.layers) {
        io.write(l.row_count.data(), l.row_count.size() * sizeof(int32_t));
        for_cores(
            p->store, l, p->time.has_cores(), [&](ggml_tensor * t, size_t at, size_t n) { io.write_tensor(t, at, n); });
        for_tokens(*p, l, st, s.n_asked, [&](ggml_tensor * t, size_t at, size_t n) { io.write_tensor(t, at, n); });
    }
}

void llama_semcache::state_read_data(llama_io_read_i & io) {
    p->clear();
    try {
        semcache::timeline::state s;
        s.n_past = read_value<int32_t>(io);
        s.n_asked = read_value<int32_t>(io);
        s.begin = read_value<int32_t>(io);
        s.chunk_start = read_values<int32_t>(io, semcache::N_CHUNK_MAX);
        const auto merged = read_value<int64_t>(io), dropped = read_value<int64_t>(io);
        const auto pos = read_values<int32_t>(io, p->store.params.n_stage);
        const auto tok = read_values<int32_t>(io, p->store.params.n_stage);

        const semcache::stage_tokens st = p->collect(); // restored by the cache itself just before
        if (pos != st.pos || tok.size() != pos.size() || !p->time.state_fits(s, pos)) {
            throw_damaged("the tokens of the stage and their chunks", "others");
        }
        for (int32_t cell : st.cell) {
            p->time.n_voted[cell] = read_value<int32_t>(io);
            if (p->time.n_voted[cell] < 0) {
                throw_damaged("at least 0 votes on a token", std::to_string(p->time.n_voted[cell]));
            }
        }
        const int32_t n_asked = s.n_asked, n_chunk = (int32_t) s.chunk_start.size();
        p->time.set_state(std::move(s)); // it tells the rows of the ring
        for (auto & l : p->store.layers) {
            read_rows(io, p->store, l, p->time.has_cores(), n_chunk);
            for_tokens(*p, l, st, n_asked, [&](ggml_tensor * t, size_t at, size_t n) { io.read_tensor(t, at, n); });
        }
        auto & cells = p->kv.v_cells[0];
        for (int32_t i = 0; i < st.n(); ++i) {
            llama_kv_cell_ext ext = cells.ext_get(st.cell[i]);
            ext.tok = tok[i];
            cells.ext_set(st.cell[i], ext);
        }
        p->rows_merged = merged;
        p->rows_dropped = dropped;
    } catch (...) {
        p->kv.clear(true);
        throw;
    }
}
