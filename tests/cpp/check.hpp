/*
 * What every test of vattn.hpp is made of: checks that are counted, and a small world to check in.
 *
 * A program calls checks, and ends with `return check_end();`. The world is a model of two layers, a host
 * driver with granules of 4 KiB, and a budget of 40 of them for four slots, of which one takes up to 12.
 */
#ifndef CHECK_HPP
#define CHECK_HPP

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <optional>
#include <string>

#include <vattn.hpp>

inline std::atomic<unsigned long> check_passed{0};
inline std::atomic<unsigned long> check_failed{0};

inline bool check_that(bool good, const char* what, const char* file, int line) {
    ++(good ? check_passed : check_failed);
    if (!good) std::fprintf(stderr, "%s:%d: %s\n", file, line, what);
    return good;
}

/* What a call threw: the name of its class, which is the nearest one, and what it said. */
struct Caught {
    std::string kind = "nothing";
    std::optional<vattn::Error> error;
};

template <class F>
Caught catch_from(F call) {
    const auto caught = [](const char* kind, const vattn::Error& error) { return Caught{kind, error}; };
    try {
        call();
        return Caught{};
    } catch (const vattn::OutOfBudget& error) {
        return caught("OutOfBudget", error);
    } catch (const vattn::OutOfDeviceMemory& error) {
        return caught("OutOfDeviceMemory", error);
    } catch (const vattn::NoFreeSlot& error) {
        return caught("NoFreeSlot", error);
    } catch (const vattn::StaleSlot& error) {
        return caught("StaleSlot", error);
    } catch (const vattn::Unsupported& error) {
        return caught("Unsupported", error);
    } catch (const vattn::Broken& error) {
        return caught("Broken", error);
    } catch (const vattn::Error& error) {
        return caught("Error", error);
    } catch (const std::exception& error) {
        return Caught{std::string("another: ") + error.what(), std::nullopt};
    }
}

template <class F>
void check_throws(const char* kind, vattn::Status status, const char* part, F call, const char* what,
                  const char* file, int line) {
    const Caught caught = catch_from(call);
    if (!check_that(caught.kind == kind, what, file, line)) {
        const char* said = caught.error ? caught.error->what() : "";
        std::fprintf(stderr, "    threw %s: %s\n", caught.kind.c_str(), said);
        return;
    }
    if (!check_that(caught.error->status() == status, what, file, line)) {
        std::fprintf(stderr, "    of status %s\n", vattn::name(caught.error->status()));
    }
    if (!check_that(std::string(caught.error->what()).find(part) != std::string::npos, what, file, line)) {
        std::fprintf(stderr, "    said \"%s\", without \"%s\"\n", caught.error->what(), part);
    }
}

#define CHECK(...) check_that((__VA_ARGS__), #__VA_ARGS__, __FILE__, __LINE__)

/* The expression throws exactly that class, with that status and a text that has `part` in it. */
#define THROWS(kind, status, part, ...)                                                                      \
    check_throws(#kind, vattn::Status::status, part, [&] { static_cast<void>(__VA_ARGS__); }, #__VA_ARGS__,  \
                 __FILE__, __LINE__)

inline int check_end() {
    std::printf("%lu passed, %lu failed\n", check_passed.load(), check_failed.load());
    return check_failed != 0 || check_passed == 0;
}

constexpr std::uint64_t granule = 4096;

inline vattn::Geometry small_geometry() { return vattn::Geometry({{2, 2, 16, 8}}, 1, vattn::Dtype::F16); }

inline vattn::Driver small_host() { return vattn::Driver::host({std::uint64_t{1} << 20, granule}); }

inline vattn::Config small_config(vattn::Background background = vattn::Background::Off) {
    return vattn::Config()
        .with_budget(40 * granule)
        .with_max_tokens(256)
        .with_max_slots(4)
        .with_background(background);
}

struct World {
    vattn::Geometry geometry = small_geometry();
    vattn::Driver host = small_host();
    vattn::Driver driver = vattn::Driver::checked(host);
    vattn::Cache cache;

    explicit World(const vattn::Config& config = small_config()) : cache(config, geometry, driver) {}
};

inline bool none_alive(const vattn::Driver& driver) {
    const vattn::Live live = driver.live();
    return live.handles == 0 && live.mappings == 0 && live.reservations == 0 && live.events == 0;
}

inline bool same(const vattn::Slot& a, const vattn::Slot& b) {
    return a.index == b.index && a.cache == b.cache && a.generation == b.generation;
}

/* A stream of a host driver: any number names one. */
inline void* stream(std::uintptr_t number) { return reinterpret_cast<void*>(number); }

#endif
