// ggml-row-type.h - how rows are stored, told by ggml's type of their tensor

#pragma once

#include "ggml.h"
#include "sc-types.h"

namespace semcache {

inline row_type row_type_of(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F16: return row_type::f16;
        case GGML_TYPE_Q8_0: return row_type::q8_0;
        case GGML_TYPE_Q5_0: return row_type::q5_0;
        case GGML_TYPE_Q4_0: return row_type::q4_0;
        case GGML_TYPE_IQ4_NL: return row_type::iq4_nl;
        default: GGML_ABORT("rows of type %s", ggml_type_name(type)); // ggml_prop_attn() and the scope have refused it
    }
}

} // namespace semcache
