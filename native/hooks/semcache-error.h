// semcache-error.h - errors on their way to the C API, and the configuration on its way from there

#pragma once

#include "sc-profile.h"
#include "semcache.h"

#include <memory>
#include <stdexcept>
#include <string>

// The thread's last error, for the C API.
void semcache_set_error(semcache_status status, const std::string & message);

// A user's mistake or a lack of memory. It also becomes the thread's last error, since llama.cpp catches exceptions of
// its constructors and state functions itself and reports no more than that they failed.
struct semcache_error : std::runtime_error {
    semcache_error(semcache_status status, const std::string & what) : std::runtime_error(what) {
        semcache_set_error(status, what);
    }
};

// Parameters of the next context, with the profile already read.
struct semcache_config {
    semcache_params params;
    semcache::profile profile; // no heads: equal budgets
    std::string profile_path;
};

// What semcache_configure_next() left for the next context of this thread, if anything.
std::unique_ptr<semcache_config> semcache_take_pending();
