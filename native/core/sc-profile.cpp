#include "sc-profile.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <iomanip>
#include <locale>
#include <numeric>
#include <random>
#include <sstream>

namespace semcache {

namespace {

std::string at_line(const std::string & path, int line, const std::string & expected, const std::string & got) {
    return "profile " + path + ", line " + std::to_string(line) + ": expected " + expected + ", got \"" + got + "\"; calibrate the model again";
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
    auto next = [&]() { ++n; return (bool) std::getline(in, line); };

    if (!next() || line != "semcache-profile 1") {
        return fail("\"semcache-profile 1\"");
    }
    if (!next() || line.compare(0, 9, "model_id ") != 0 || line.size() == 9) {
        return fail("\"model_id ID\"");
    }
    p.model_id = line.substr(9);
    char rest;
    if (!next() || sscanf(line.c_str(), "n_text %d%c", &p.n_text, &rest) != 1 || p.n_text < 1) {
        return fail("\"n_text N\", N >= 1");
    }
    if (!next() || line.compare(0, 7, "ratios ") != 0) {
        return fail("\"ratios R...\"");
    }
    std::istringstream ratios = fields(line.substr(7));
    for (double r; ratios >> r;) {
        if (!(r > 0.0 && r < 1.0) || (!p.ratios.empty() && r >= p.ratios.back())) {
            return fail("descending ratios between 0 and 1");
        }
        p.ratios.push_back(r);
    }
    if (p.ratios.empty() || !ratios.eof()) {
        return fail("\"ratios R...\"");
    }
    while (next()) {
        std::istringstream s = fields(line);
        std::string word;
        head h;
        if (!(s >> word >> h.il >> h.ih) || word != "head") {
            return fail("\"head LAYER HEAD SHARE...\"");
        }
        for (double x; s >> x;) {
            if (!(x >= 0.0 && x <= 1.0)) {
                return fail("shares between 0 and 1");
            }
            h.share.push_back(x);
        }
        if (h.share.size() != p.ratios.size() || !s.eof()) {
            return fail(std::to_string(p.ratios.size()) + " shares");
        }
        if (h.il < 0 || h.ih < 0 || (!p.heads.empty() && std::pair(h.il, h.ih) <= std::pair(p.heads.back().il, p.heads.back().ih))) {
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
    out << "semcache-profile 1\nmodel_id " << model_id << "\nn_text " << n_text << "\nratios";
    for (double r : ratios) {
        out << ' ' << r;
    }
    out << '\n' << std::fixed << std::setprecision(6);
    for (const head & h : heads) {
        out << "head " << h.il << ' ' << h.ih;
        for (double s : h.share) {
            out << ' ' << s;
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

std::vector<double> profile::at(double ratio) const {
    std::vector<double> res;
    res.reserve(heads.size());
    for (const head & h : heads) {
        double x;
        if (ratio <= ratios.back()) {
            x = h.share.back()*ratio/ratios.back();
        } else {
            size_t i = 0;
            while (ratios[i] > ratio) {
                ++i;
            }
            const double r1 = i == 0 ? 1.0 : ratios[i - 1], s1 = i == 0 ? 1.0 : h.share[i - 1];
            const double t  = (std::log2(ratio) - std::log2(ratios[i]))/(std::log2(r1) - std::log2(ratios[i]));
            x = h.share[i] + t*(s1 - h.share[i]);
        }
        res.push_back(x);
    }
    return res;
}

const std::vector<double> & profile_ratios() {
    static const std::vector<double> r = { 0.5, 0.25, 0.125, 0.0625, 0.03125 };
    return r;
}

void profile_add(profile & p, const std::vector<std::pair<int32_t, int32_t>> & heads, const std::vector<std::vector<float>> & scores) {
    if (p.n_text == 0) {
        p.ratios = profile_ratios();
        p.heads.clear();
        for (const auto & [il, ih] : heads) {
            p.heads.push_back({ il, ih, std::vector<double>(p.ratios.size(), 0.0) });
        }
    }
    std::vector<float> all;
    for (const auto & s : scores) {
        all.insert(all.end(), s.begin(), s.end());
    }
    for (size_t r = 0; r < p.ratios.size(); ++r) {
        const size_t keep = std::clamp<size_t>((size_t) std::llround(p.ratios[r]*(double) all.size()), 1, all.size());
        std::nth_element(all.begin(), all.begin() + (keep - 1), all.end(), std::greater<float>());
        const float threshold = all[keep - 1];
        for (size_t h = 0; h < scores.size(); ++h) {
            const auto n = std::count_if(scores[h].begin(), scores[h].end(), [&](float s) { return s >= threshold; });
            double & mean = p.heads[h].share[r];
            mean += ((double) n/(double) scores[h].size() - mean)/(p.n_text + 1);
        }
    }
    ++p.n_text;
}

std::vector<int32_t> budgets(const std::vector<double> & share, double ratio, int32_t n_ctx, int32_t lo) {
    const int64_t total = std::llround(ratio*n_ctx*(double) share.size());
    lo = std::min(lo, n_ctx);
    if ((int64_t) lo*(int64_t) share.size() > total) {
        return {};
    }
    auto rows = [&](double lambda, size_t h) { return std::clamp(lambda*share[h]*n_ctx, (double) lo, (double) n_ctx); };
    double a = 0.0, b = 1e6;
    for (int step = 0; step < 200; ++step) {
        const double mid = 0.5*(a + b);
        double sum = 0.0;
        for (size_t h = 0; h < share.size(); ++h) {
            sum += rows(mid, h);
        }
        (sum > (double) total ? b : a) = mid;
    }
    std::vector<int32_t> res(share.size());
    std::vector<size_t>  order(share.size());
    std::iota(order.begin(), order.end(), 0);
    std::vector<double> frac(share.size());
    int64_t left = total;
    for (size_t h = 0; h < share.size(); ++h) {
        const double x = rows(a, h);
        res[h]  = (int32_t) std::floor(x);
        frac[h] = x - res[h];
        left   -= res[h];
    }
    std::stable_sort(order.begin(), order.end(), [&](size_t x, size_t y) { return frac[x] > frac[y]; });
    for (size_t i = 0; left > 0; i = (i + 1)%order.size()) {
        if (res[order[i]] < n_ctx) {
            ++res[order[i]];
            --left;
        }
    }
    return res;
}

} // namespace semcache
