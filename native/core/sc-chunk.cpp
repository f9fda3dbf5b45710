#include "sc-chunk.h"

namespace semcache {

bool is_delimiter(const std::string & piece) {
    const size_t end = piece.find_last_not_of(' ');
    if (end == std::string::npos) {
        return false;
    }
    static const char * const marks[] = {
        ".",
        "!",
        "?",
        ";",
        ":",
        ",",
        "\n",
        "{",
        "}",
        "\u3002",
        "\uff01",
        "\uff1f",
        "\uff1b",
        "\uff1a",
        "\uff0c",
        "\u3001",
        "\u2026",
        "\uff0e",
    };
    for (const char * mark : marks) {
        const std::string m = mark;
        if (end + 1 >= m.size() && piece.compare(end + 1 - m.size(), m.size(), m) == 0) {
            return true;
        }
    }
    return false;
}

void chunker::run(const std::vector<bool> & delimiter, std::vector<int32_t> & ids) {
    ids.resize(delimiter.size());
    int32_t len = 0;
    for (size_t i = 0; i < delimiter.size(); ++i) {
        ids[i] = next_id;
        if (delimiter[i] || ++len == n_chunk) {
            ++next_id;
            len = 0;
        }
    }
    if (len > 0) {
        ++next_id;
    }
}

} // namespace semcache
