// The engine's command line, and the table that it ends with. Exits with 1 where a check fails, and with 2
// for a mistake on the command line.

#include <chrono>
#include <cinttypes>
#include <cstdio>
#include <map>
#include <stdexcept>

#include "engine.hpp"

namespace {

const char* const USAGE =
    "usage: engine [--trace FILE] [--limit N] [--budget MIB] [--batch N] [--max-tokens N] [--layers N]\n"
    "              [--step-ms N] [--spoil STEP] [--require-turnover]\n"
    "\n"
    "  --trace FILE         an Azure LLM inference trace; without it requests are made up\n"
    "  --limit N            its first N requests\n"
    "  --budget MIB         memory of the cache: less leads to more preemption\n"
    "  --batch N            the most requests in a step\n"
    "  --max-tokens N       the longest request; others are an error\n"
    "  --layers N           layers of the model\n"
    "  --step-ms N          how long a step takes by the trace's clock\n"
    "  --spoil STEP         change one element in that step: the checks have to find it\n"
    "  --require-turnover   fail unless slots were adopted, grew, were parked and were preempted\n";

struct CommandLine {
    engine::Defaults defaults = engine::defaults();
    std::string trace;
    std::uint64_t limit = defaults.limit, budget_mib = defaults.budget >> 20, batch = defaults.batch;
    std::uint64_t layers = defaults.model.layers, max_tokens = 8192, step_ms = 30, spoil = 0;
    bool require_turnover = false;

    engine::Options options() const {
        return {budget_mib << 20, max_tokens, static_cast<std::uint32_t>(batch),
                static_cast<double>(step_ms) / 1000, spoil};
    }
    engine::Model model() const {
        auto model = defaults.model;
        model.layers = static_cast<std::uint32_t>(layers);
        return model;
    }
};

struct Mistake : std::runtime_error {
    using std::runtime_error::runtime_error;
};

std::uint64_t number(const std::string& option, const std::string& text) {
    const bool digits = !text.empty() && text.find_first_not_of("0123456789") == std::string::npos;
    const std::uint64_t value = digits && text.size() < 8 ? std::stoull(text) : 0;
    if (value == 0) throw Mistake(option + " takes a number from 1 to 9999999, not '" + text + "'");
    return value;
}

CommandLine parse(int count, char** arguments) {
    CommandLine line;
    const std::map<std::string, std::uint64_t*> numbers{
        {"--limit", &line.limit},           {"--budget", &line.budget_mib}, {"--batch", &line.batch},
        {"--max-tokens", &line.max_tokens}, {"--layers", &line.layers},     {"--step-ms", &line.step_ms},
        {"--spoil", &line.spoil}};
    for (int at = 1; at < count; ++at) {
        const std::string option = arguments[at];
        if (option == "--require-turnover") {
            line.require_turnover = true;
            continue;
        }
        if (at + 1 == count) throw Mistake("no such option, or no value for it: " + option);
        const std::string value = arguments[++at];
        if (option == "--trace") {
            line.trace = value;
            continue;
        }
        const auto known = numbers.find(option);
        if (known == numbers.end()) throw Mistake("no such option: " + option);
        *known->second = number(option, value);
    }
    return line;
}

void row(const char* what, std::uint64_t value) { std::printf("%-42s %14" PRIu64 "\n", what, value); }

void print(const engine::Totals& totals, const std::vector<engine::Errors>& errors, double seconds) {
    const auto& cache = totals.cache;
    row("requests", totals.finished);
    row("steps", totals.steps);
    row("tokens written", totals.tokens);
    row("most requests in a step", totals.most_running);
    row("slots acquired", cache.acquired);
    row("  adopted with memory in them", cache.adopted);
    row("requests preempted", totals.preempted);
    row("steps in which a request's memory grew", totals.grown);
    row("driver calls on the path of requests", cache.driver.calls - cache.background.calls);
    row("driver calls beside it", cache.background.calls);
    row("extents unmapped for others", cache.reclaimed);
    row("bytes held at the most", totals.most_held);
    row("bytes needed at the most", totals.most_needed);
    row("bytes parked at the most", totals.most_parked);
    row("tokens compared bit for bit", totals.checked);
    row("  elements that differ", totals.differing);
    for (const auto& error : errors) {
        std::printf("%s: %" PRIu64 " outputs, error against float32 %.2e at the most, %.2e in the mean\n",
                    error.kernel.c_str(), error.outputs, error.worst,
                    error.sum / static_cast<double>(std::max<std::uint64_t>(error.outputs, 1)));
    }
    std::printf("%.1f s\n", seconds);
}

// What is wrong with a run, a line each.
std::vector<std::string> complaints(const CommandLine& line, const engine::Totals& totals,
                                    const std::vector<engine::Errors>& errors) {
    std::vector<std::string> found;
    const auto require = [&found](bool holds, const std::string& otherwise) {
        if (!holds) found.push_back(otherwise);
    };
    for (const auto& error : errors) {
        require(error.outputs > 0, error.kernel + " computed nothing");
        require(error.worst <= error.bound, error.kernel + " is further from float32 than it may be");
    }
    require(totals.differing == 0, "elements of the cache are not what was written");
    require(totals.cache.health == VATTN_HEALTHY, "the cache is not healthy");
    if (line.require_turnover) {
        require(totals.cache.adopted > 0, "no slot was adopted");
        require(totals.preempted > 0, "no request was preempted");
        require(totals.grown > 0, "no request's memory grew");
        require(totals.most_parked > 0, "no memory was parked");
        require(totals.cache.reclaimed > 0, "no parked memory was taken for others");
    }
    return found;
}

int run(const CommandLine& line) {
    auto requests =
        line.trace.empty() ? engine::generated(line.limit) : engine::read_azure(line.trace, line.limit);
    engine::Engine engine(line.options(), line.model(), std::move(requests));
    const auto start = std::chrono::steady_clock::now();
    const auto totals = engine.run();
    const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
    print(totals, engine.errors(), time.count());
    const auto found = complaints(line, totals, engine.errors());
    for (const auto& complaint : found) std::fprintf(stderr, "FAILED: %s\n", complaint.c_str());
    return found.empty() ? 0 : 1;
}

}  // namespace

int main(int count, char** arguments) {
    try {
        return run(parse(count, arguments));
    } catch (const Mistake& mistake) {
        std::fprintf(stderr, "%s\n%s", mistake.what(), USAGE);
        return 2;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
}
