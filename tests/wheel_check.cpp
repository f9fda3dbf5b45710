// Reads tokens into a compressed cache by the C API alone and prints the logits of the last one: for a wheel of another
// processor, whose Python is not here. See tests/wheel.py.
//
//     wheel_check MODEL TOKEN...

#include "llama.h"
#include "semcache.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

int main(int argc, char ** argv) {
    std::vector<llama_token> tokens;
    for (int i = 2; i < argc; ++i) {
        tokens.push_back(std::atoi(argv[i]));
    }
    llama_log_set(
        [](ggml_log_level level, const char * text, void *) {
            if (level == GGML_LOG_LEVEL_ERROR) {
                fputs(text, stderr);
            }
        },
        nullptr);
    llama_backend_init();
    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    semcache_params cache = semcache_default_params();
    cache.ratio = 0.25f;
    cache.n_stage = 128;
    cache.n_window = 32;
    llama_context_params params = llama_context_default_params();
    params.n_ctx = 1024;
    params.n_threads = params.n_threads_batch = 1;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    params.swa_full = false;
    if (!model || semcache_configure_next(&cache) != SEMCACHE_OK) {
        fprintf(stderr, "%s\n", model ? semcache_last_error() : "no model");
        return 1;
    }
    llama_context * ctx = llama_init_from_model(model, params);
    if (!ctx) {
        fprintf(stderr, "%s\n", semcache_last_error());
        return 1;
    }
    for (size_t i = 0; i < tokens.size(); i += 64) {
        const int32_t n = (int32_t) std::min<size_t>(64, tokens.size() - i);
        if (llama_decode(ctx, llama_batch_get_one(tokens.data() + i, n)) != 0) {
            fprintf(stderr, "decode: %s\n", semcache_last_error());
            return 1;
        }
    }
    semcache_stats stats;
    semcache_get_stats(ctx, &stats);
    printf("%lld\n", (long long) stats.n_pass);
    const float * logits = llama_get_logits_ith(ctx, -1);
    for (int32_t i = 0; i < llama_vocab_n_tokens(llama_model_get_vocab(model)); ++i) {
        printf("%.9g\n", logits[i]);
    }
    llama_free(ctx);
    llama_model_free(model);
}
