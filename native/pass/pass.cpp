#include "pass.h"

#include "compact.h"
#include "fit.h"
#include "frame.h"

namespace semcache {

namespace {

// What lives through the pass, then what a phase needs for itself, which shares memory with that of the others.
struct pass_scratch {
    pass_rows rows;
    pass_scores scores;
    pass_choice choice;
    pass_merged merged;
    size_t own;
    frame_scratch frame;
    score_scratch score;
    choose_scratch choose;
    fit_scratch fit;

    pass_scratch(arena & a, const head_shape & shape, const pass_sizes & n) :
        rows(a, shape, n), scores(a, shape, n), choice(a, shape, n), merged(a, shape, n), own(a.mark()),
        frame(a, shape), score(again(a), shape, n), choose(again(a), shape, n), fit(again(a), shape, n) {}

private:
    arena & again(arena & a) {
        a.rewind(own);
        return a;
    }
};

} // namespace

size_t pass_scratch_size(const head_shape & shape, const pass_sizes & n) {
    arena a;
    pass_scratch(a, shape, n);
    return a.size();
}

pass_result compress_head(const pass_args & a, const pass_plan & plan, int32_t ih, uint8_t * scratch) {
    const pass_head h(a, plan, ih);
    const bool some_go = h.n_cand > h.budget();
    arena memory(scratch);
    pass_scratch t(memory, a.shape, { h.n_rows, std::max(0, h.n_cand - h.budget()), plan.n_voter });

    load_rows(h, t.rows);
    make_frame(h, t.rows, t.frame);
    if (plan.how == method::semantic) {
        load_queries(h, fit_stride(plan.n_voter, a.shape.n_gqa), t.rows);
        score_rows(h, t.rows, plan.merge && some_go, t.scores, t.score);
    } else if (evicts(plan.how)) {
        load_queries(h, 1, t.rows);
        score_by_policy(h, t.rows, t.scores, t.choose);
    } else {
        std::fill_n(t.scores.s_use, h.n_cand, 0.0f);
    }
    remember(h, t.scores, t.choice);
    if (!some_go) {
        keep_all(h, t.choice, t.merged);
        return compact(h, t.rows, t.choice, t.merged);
    }
    choose(h, t.rows, t.scores, t.choice, t.choose);
    merge(h, t.rows, t.scores, t.choice, t.merged);
    if (t.merged.n > 0 && plan.how == method::semantic && h.n_query > 0) {
        fit(h, t.rows, t.scores, t.choice, t.merged, t.fit);
    }
    return compact(h, t.rows, t.choice, t.merged);
}

} // namespace semcache
