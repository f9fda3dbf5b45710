#include "sc-profile.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <iomanip>
#include <locale>
#include <random>
#include <sstream>

namespace semcache {

namespace {

std::string at_line(const std::string & path, int line, const std::string & expected, const std::string & got) {
    return "profile " + path + ", line " + std::to_string(line) + ": expected " + expected + ", got \"" + got +
           "\"; calibrate the model again";
}

// Numbers with a decimal point whatever the program's locale.
std::istringstream fields(const std::string & line) {
    std::istringstream s(line);
    s.imbue(std::locale::classic());
    return s;
}

} // namespace

bool profile::read(const std::string & path, std::string & error) {
    std::ifstream in(path);
    if (!in) {
        error = "profile " + path + ": expected a readable file, got none; calibrate the model or pass no profile";
        return false;
    }
    profile p;
    std::string line;
    int n = 0;
    auto fail = [&](const std::string & expected) {
        error = at_line(path, n, expected, line);
        return false;
    };
    auto next = [&]() {
        ++n;
        return (bool) std::getline(in, line);
    };

    if (!next() || line != "semcache-profile 3") {
        return fail("\"semcache-profile 3\"");
    }
    if (!next() || line.compare(0, 9, "model_id ") != 0 || line.size() == 9) {
        return fail("\"model_id ID\"");
    }
    p.model_id = line.substr(9);
    char rest;
    if (!next() || sscanf(line.c_str(), "n_text %d%c", &p.n_text, &rest) != 1 || p.n_text < 1) {
        return fail("\"n_text N\", N >= 1");
    }
    if (!next() || line.compare(0, 6, "parts ") != 0) {
        return fail("\"parts P...\"");
    }
    std::istringstream parts = fields(line.substr(6));
    for (double x; parts >> x;) {
        if (!(x > 0.0 && x < 1.0) || (!p.parts.empty() && x <= p.parts.back())) {
            return fail("ascending parts between 0 and 1");
        }
        p.parts.push_back(x);
    }
    if (p.parts.empty() || !parts.eof()) {
        return fail("\"parts P...\"");
    }
    while (next()) {
        std::istringstream s = fields(line);
        std::string word;
        head h;
        if (!(s >> word >> h.il >> h.ih) || word != "head") {
            return fail("\"head LAYER HEAD ERROR...\"");
        }
        for (double x; s >> x;) {
            if (!(x >= 0.0 && std::isfinite(x))) {
                return fail("errors of at least 0");
            }
            h.error.push_back(x);
        }
        if (h.error.size() != p.parts.size() || !s.eof()) {
            return fail(std::to_string(p.parts.size()) + " errors");
        }
        if (h.il < 0 || h.ih < 0 ||
            (!p.heads.empty() && std::pair(h.il, h.ih) <= std::pair(p.heads.back().il, p.heads.back().ih))) {
            return fail("heads ordered by layer and head, each once");
        }
        p.heads.push_back(std::move(h));
    }
    if (p.heads.empty()) {
        return fail("at least one head");
    }
    *this = std::move(p);
    return true;
}

bool profile::write(const std::string & path, std::string & error) const {
    const std::string part = path + "." + std::to_string(std::random_device()()) + ".partial"; // of this writer alone
    std::ofstream out(part, std::ios::binary);
    out.imbue(std::locale::classic());
    out << "semcache-profile 3\nmodel_id " << model_id << "\nn_text " << n_text << "\nparts";
    for (double x : parts) {
        out << ' ' << x;
    }
    out << '\n' << std::scientific << std::setprecision(4);
    for (const head & h : heads) {
        out << "head " << h.il << ' ' << h.ih;
        for (double x : h.error) {
            out << ' ' << x;
        }
        out << '\n';
    }
    out.close();
    const bool ok = out.good();
    if (!ok || rename(part.c_str(), path.c_str()) != 0) {
        remove(part.c_str());
        error = "profile " + path + ": expected a writable place, could not write; choose another path";
        return false;
    }
    return true;
}

const std::vector<double> & profile_parts() {
    static const std::vector<double> parts = { 0.0078125, 0.015625, 0.03125, 0.0625, 0.125, 0.25, 0.5 };
    return parts;
}

void profile::add(
    const std::vector<std::pair<int32_t, int32_t>> & heads, const std::vector<std::vector<double>> & errors) {
    if (n_text == 0) {
        parts = profile_parts();
        this->heads.clear();
        for (const auto & [il, ih] : heads) {
            this->heads.push_back({ il, ih, std::vector<double>(parts.size(), 0.0) });
        }
    }
    ++n_text;
    for (size_t h = 0; h < errors.size(); ++h) {
        for (size_t i = 0; i < parts.size(); ++i) {
            double & mean = this->heads[h].error[i];
            mean += (errors[h][i] - mean) / n_text;
        }
    }
}

namespace {

constexpr int32_t N_GRID = 64; // steps from lo to n_ctx in which rows are given out

// Error at any part: a power law between the measured parts, that of the first below it, linear to none at 1.
double error_at(const std::vector<double> & parts, const std::vector<double> & error, double x) {
    if (x <= parts.front()) {
        return error.front();
    }
    if (x >= parts.back()) {
        return error.back() * std::max(0.0, 1.0 - x) / (1.0 - parts.back());
    }
    const size_t i = std::upper_bound(parts.begin(), parts.end(), x) - parts.begin();
    const double a = error[i - 1], b = error[i];
    if (a <= 0.0 || b <= 0.0) {
        return b;
    }
    return a * std::pow(b / a, std::log(x / parts[i - 1]) / std::log(parts[i] / parts[i - 1]));
}

// Some more rows for a head, and how much error each of them takes away.
struct step {
    double gain;
    size_t head;
    int32_t n_row;
};

// The lower convex hull of the error over the rows, as steps of falling gain.
void add_steps(const std::vector<double> & parts, std::vector<double> error, size_t head, int32_t n_ctx, int32_t lo,
    std::vector<step> & steps) {
    for (size_t i = 1; i < error.size(); ++i) {
        error[i] = std::min(error[i], error[i - 1]); // more rows are never worse, but for noise
    }
    std::vector<std::pair<int32_t, double>> hull; // rows, error
    for (int32_t j = 0; j <= N_GRID; ++j) {
        const int32_t r = (int32_t) std::llround(lo * std::pow((double) n_ctx / lo, (double) j / N_GRID));
        if (!hull.empty() && r <= hull.back().first) {
            continue;
        }
        const double e = error_at(parts, error, (double) r / n_ctx);
        auto gain = [&](const auto & from, int32_t rows, double err) {
            return (from.second - err) / (rows - from.first);
        };
        while (hull.size() > 1 && gain(hull[hull.size() - 2], r, e) >=
                                      gain(hull[hull.size() - 2], hull.back().first, hull.back().second)) {
            hull.pop_back();
        }
        hull.emplace_back(r, e);
    }
    for (size_t j = 1; j < hull.size(); ++j) {
        const int32_t n = hull[j].first - hull[j - 1].first;
        steps.push_back({ (hull[j - 1].second - hull[j].second) / n, head, n });
    }
}

int64_t total_rows(double ratio, int32_t n_ctx, size_t n_head) { return std::llround(ratio * n_ctx * (double) n_head); }

} // namespace

std::vector<int32_t> profile::budgets(double ratio, int32_t n_ctx, int32_t lo) const {
    lo = std::min(std::max(lo, 1), n_ctx);
    int64_t left = total_rows(ratio, n_ctx, heads.size()) - (int64_t) lo * (int64_t) heads.size();
    if (left < 0) {
        return {};
    }
    std::vector<step> steps;
    for (size_t h = 0; h < heads.size(); ++h) {
        add_steps(parts, heads[h].error, h, n_ctx, lo, steps);
    }
    std::stable_sort(steps.begin(), steps.end(), [](const step & a, const step & b) { return a.gain > b.gain; });
    std::vector<int32_t> rows(heads.size(), lo);
    for (const step & s : steps) {
        const int32_t n = (int32_t) std::min<int64_t>(s.n_row, left);
        rows[s.head] += n;
        left -= n;
    }
    return rows;
}

std::vector<int32_t> equal_budgets(size_t n_head, double ratio, int32_t n_ctx, int32_t lo) {
    const int64_t total = total_rows(ratio, n_ctx, n_head);
    if ((int64_t) std::min(lo, n_ctx) * (int64_t) n_head > total) {
        return {};
    }
    std::vector<int32_t> rows(n_head, (int32_t) (total / (int64_t) n_head));
    for (size_t h = 0; h < (size_t) (total % (int64_t) n_head); ++h) {
        ++rows[h];
    }
    return rows;
}

} // namespace semcache
