// Requests by time of arrival: read from the Azure Public Dataset's LLM inference trace (Patel et al., ISCA
// 2024), or made up where it is not at hand. Refuses a line that it does not understand, by its number.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace engine {

struct Request {
    double arrival;  // seconds after the first
    std::uint64_t prompt;
    std::uint64_t output;

    std::uint64_t tokens() const { return prompt + output; }
};

// Days since 1970-01-01 in the Gregorian calendar, counting years from March, whose leap day is the last.
inline std::int64_t days(std::int64_t year, std::int64_t month, std::int64_t day) {
    year -= month <= 2 ? 1 : 0;
    const auto of_year = (153 * ((month + 9) % 12) + 2) / 5 + day;
    return year * 365 + year / 4 - year / 100 + year / 400 + of_year - 719469;
}

// `2023-11-16 18:15:46.6805900,374,44`: a UTC time, the tokens of the prompt and those of the answer.
inline bool parse(const std::string& line, Request& out) {
    const auto comma = std::min(line.find(','), line.size());
    auto time = line.substr(0, comma);
    const std::string zone = "+00:00";
    if (time.size() > zone.size() && time.compare(time.size() - zone.size(), zone.size(), zone) == 0) {
        time.resize(time.size() - zone.size());
    }
    long long year = 0, month = 0, day = 0, hour = 0, minute = 0;
    double second = 0;
    unsigned long long prompt = 0, output = 0;
    int time_end = 0, end = 0;
    const bool read = std::sscanf(time.c_str(), "%lld-%lld-%lld%*1[ T]%lld:%lld:%lf%n", &year, &month, &day,
                                  &hour, &minute, &second, &time_end) == 6 &&
                      std::sscanf(line.c_str() + comma, ",%llu,%llu%n", &prompt, &output, &end) == 2;
    if (!read || prompt == 0 || static_cast<std::size_t>(time_end) != time.size() ||
        comma + static_cast<std::size_t>(end) != line.size()) {
        return false;
    }
    const auto minutes = (days(year, month, day) * 24 + hour) * 60 + minute;
    out = {static_cast<double>(minutes) * 60 + second, prompt, output};
    return true;
}

inline const std::string COLUMNS = "TIMESTAMP,ContextTokens,GeneratedTokens";

// The first `limit` requests of a trace in the order of their arrival.
inline std::vector<Request> read_azure(const std::string& path, std::size_t limit) {
    std::ifstream file(path);
    if (!file) throw std::runtime_error("cannot open the trace " + path);
    std::vector<Request> requests;
    std::string line;
    for (std::size_t number = 1; requests.size() < limit && std::getline(file, line); ++number) {
        if (!line.empty() && line.back() == '\r') line.pop_back();
        Request request{};
        if (number == 1 && line == COLUMNS) continue;
        if (!parse(line, request)) {
            throw std::runtime_error(path + ", line " + std::to_string(number) + ": expected " + COLUMNS +
                                     ", not '" + line + "'");
        }
        requests.push_back(request);
    }
    std::stable_sort(requests.begin(), requests.end(),
                     [](const Request& a, const Request& b) { return a.arrival < b.arrival; });
    const double start = requests.empty() ? 0 : requests.front().arrival;
    for (auto& request : requests) request.arrival -= start;
    return requests;
}

// Five requests a second, their prompts spread over seven powers of two.
inline std::vector<Request> generated(std::size_t limit) {
    std::mt19937_64 random(1);
    std::vector<Request> requests;
    for (std::size_t number = 0; number < limit; ++number) {
        const auto prompt = (std::uint64_t{32} << random() % 7) + random() % 64;
        requests.push_back({static_cast<double>(number) * 0.2, prompt, 1 + random() % 300});
    }
    return requests;
}

}  // namespace engine
