/* Log callbacks: who is told what, what they may throw, and that one which was replaced is left alone. */
#include "check.hpp"

#include <chrono>
#include <memory>
#include <thread>
#include <vector>

using vattn::LogLevel;

static void make_a_cache() { World world; }

int main() {
    std::atomic<int> told{0};
    std::atomic<bool> sound{true};
    vattn::set_log(LogLevel::Debug, [&](LogLevel level, const char* target, const char* text) {
        ++told;
        if (level > LogLevel::Debug || level == LogLevel::Off || !*target || !*text) sound = false;
    });
    make_a_cache();
    CHECK(told > 0 && sound);

    int before = told;
    vattn::set_log(LogLevel::Error, [&](LogLevel, const char*, const char*) { ++told; });
    make_a_cache();
    CHECK(told == before);

    // What it throws is lost, and so is its attempt to call the library.
    std::atomic<int> refused{0};
    const vattn::Geometry geometry = small_geometry();
    vattn::set_log(LogLevel::Trace, [&](LogLevel, const char*, const char*) {
        try {
            static_cast<void>(geometry.info());
        } catch (const vattn::Error& error) {
            if (error.status() == vattn::Status::InCallback) ++refused;
        }
        throw 5;
    });
    make_a_cache();
    CHECK(refused > 0);

    // What a function holds lives until it is replaced, and not longer.
    const auto held = std::make_shared<int>(0);
    vattn::set_log(LogLevel::Trace, [held](LogLevel, const char*, const char*) { ++*held; });
    CHECK(held.use_count() == 2);
    make_a_cache();
    CHECK(*held > 0);
    // One that is refused changes nothing.
    THROWS(Error, InvalidArgument, "vattn_log_set: ",
           vattn::set_log(static_cast<LogLevel>(9), [](LogLevel, const char*, const char*) {}));
    CHECK(held.use_count() == 2);
    vattn::clear_log();
    CHECK(held.use_count() == 1);
    before = *held;
    make_a_cache();
    CHECK(*held == before);
    vattn::set_log(LogLevel::Info, vattn::LogFunction());
    vattn::set_log(LogLevel::Off, [&](LogLevel, const char*, const char*) { sound = false; });
    make_a_cache();
    CHECK(sound);

    // Nor may it set another, which is refused and not waited for while somebody else sets one.
    std::atomic<bool> inside{false}, tried{false};
    vattn::set_log(LogLevel::Trace, [&](LogLevel, const char*, const char*) {
        if (inside.exchange(true)) return;
        std::this_thread::sleep_for(std::chrono::milliseconds(200));
        THROWS(Error, InCallback, "inside a log callback", vattn::clear_log());
        tried = true;
    });
    std::thread speaker(make_a_cache);
    while (!inside) std::this_thread::yield();
    vattn::clear_log();
    CHECK(tried);
    speaker.join();

    std::vector<std::thread> threads;
    for (int i = 0; i < 4; ++i) {
        threads.emplace_back([&] {
            for (int round = 0; round < 20; ++round) {
                vattn::set_log(LogLevel::Trace, [&](LogLevel, const char*, const char*) { ++told; });
                make_a_cache();
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    vattn::clear_log();
    return check_end();
}
