// Compiled where backends are modules that are chosen when the program runs (GGML_BACKEND_DL): they lie beside this
// library and are loaded with it, so that llama_cpp, which knows nothing of them, finds the same as where they are
// linked.

#include "ggml-backend.h"

#include <dlfcn.h>

#include <cstdio>
#include <string>

namespace {

void errors_only(ggml_log_level level, const char * text, void *) {
    if (level >= GGML_LOG_LEVEL_WARN) {
        std::fputs(text, stderr);
    }
}

struct backends {
    backends() {
        Dl_info info{};
        if (dladdr((const void *) &ggml_backend_load_all_from_path, &info) == 0 || !info.dli_fname) {
            return; // loading a model then says that there are no backends
        }
        ggml_log_callback log = nullptr;
        void * data = nullptr;
        ggml_log_get(&log, &data);
        ggml_log_set(errors_only, nullptr); // nobody has had the time yet to say that the log is not wanted
        const std::string path = info.dli_fname;
        ggml_backend_load_all_from_path(path.substr(0, path.find_last_of('/')).c_str());
        ggml_log_set(log, data);
    }
};

const backends loaded;

} // namespace
