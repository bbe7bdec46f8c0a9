/*
 * vattn for C++: vattn.h as classes. C++17 or later, with exceptions; all of it is in this file, and the
 * library is linked as for C. The book is the head of vattn.h: how to size a cache, the life of a slot, fences,
 * threads, kernels. What holds there holds here; this is what is different:
 *
 * - Geometry, Driver, Cache, Buffer and Pin own a handle: they can be moved and not copied. One that was
 *   moved from is empty, and an empty one refuses every call with Status::InvalidArgument.
 * - A call that fails throws an Error. It has the status, the text and the driver's own code. What a server
 *   goes on from has a class of its own: OutOfBudget, OutOfDeviceMemory, NoFreeSlot, StaleSlot, Unsupported,
 *   Broken. A call that throws has changed nothing. Destructors throw nothing.
 * - An array is a Span, and a vector, an array, std::span or a list in braces will do where one is asked for.
 * - Slot, SlotTokens and the statistics are the structs of C under shorter names.
 *
 * A FIRST PROGRAM
 *
 * [example]
 *     #include <cstdint>
 *     #include <cstdio>
 *     #include <vattn.hpp>
 *
 *     int main() {
 *         vattn::Geometry model = vattn::Geometry::preset("llama-3-8b");
 *         vattn::Driver driver = vattn::Driver::host({std::uint64_t{1} << 30});
 *         vattn::Cache cache(vattn::Config().with_max_slots(64), model, driver);
 *
 *         vattn::Slot slot = cache.acquire(1000);
 *         cache.step({{slot, 1000}});                                         // the prompt is backed
 *         auto keys = cache.view(0, vattn::Part::Key).typed<std::uint16_t>(); // bfloat16, as bits
 *         keys(slot.index, 999, 0, 0) = 0x3f80;                               // token 999, head 0, element 0
 *         std::printf("held: %llu MiB\n", static_cast<unsigned long long>(cache.bytes().held >> 20));
 *         cache.retire(slot, vattn::Fence::idle());
 *     }
 * [end]
 *
 * WHAT IS LEFT OUT
 *
 * A slot that retires itself at the end of a scope: only the program knows which streams have touched it, so
 * a destructor would have no fence to give, and could not say that the call was refused.
 */

#ifndef VATTN_HPP
#define VATTN_HPP

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "vattn.h"

namespace vattn {

// ---- numbers ----

/// What a call comes to: vattn_status. New numbers may come; treat one that you do not know as a failure.
enum class Status : std::int32_t {
    Ok = VATTN_OK,                             ///< All is done.
    InvalidGeometry = VATTN_INVALID_GEOMETRY,  ///< A model's dimensions can't be used as they are.
    InvalidConfig = VATTN_INVALID_CONFIG,      ///< An option of the cache can't be used as it is.
    InvalidArgument = VATTN_INVALID_ARGUMENT,  ///< An argument of a call can't be used as it is.
    OutOfBudget = VATTN_OUT_OF_BUDGET,         ///< Slots in use have all of the budget: retire, or raise it.
    OutOfDeviceMemory = VATTN_OUT_OF_DEVICE_MEMORY, ///< The device has no memory left.
    OutOfMappings = VATTN_OUT_OF_MAPPINGS,     ///< The system allows no further mapping.
    OutOfAddressSpace = VATTN_OUT_OF_ADDRESS_SPACE, ///< Not so many addresses can be reserved.
    NoFreeSlot = VATTN_NO_FREE_SLOT,           ///< Every slot is in use.
    StaleSlot = VATTN_STALE_SLOT,              ///< The slot's request has been retired.
    ForeignSlot = VATTN_FOREIGN_SLOT,          ///< The slot is another cache's.
    SlotBusy = VATTN_SLOT_BUSY,                ///< Another thread is working on the slot.
    DuplicateSlot = VATTN_DUPLICATE_SLOT,      ///< One call names a slot twice.
    TooManyTokens = VATTN_TOO_MANY_TOKENS,     ///< More tokens than a slot can hold.
    FewerTokens = VATTN_FEWER_TOKENS,          ///< Fewer tokens than the slot holds: truncate does that.
    CapturingStream = VATTN_CAPTURING_STREAM,  ///< The stream is being captured into a graph.
    Driver = VATTN_DRIVER,                     ///< The driver refused for a reason of its own.
    DeviceLost = VATTN_DEVICE_LOST,            ///< The device or its context is gone.
    Unhealthy = VATTN_UNHEALTHY,               ///< This cache does not work any more.
    Unsupported = VATTN_UNSUPPORTED,           ///< This machine, device or build can't do that.
    Internal = VATTN_INTERNAL,                 ///< A defect of the library; please report it.
    InvalidHandle = VATTN_INVALID_HANDLE,      ///< The object was destroyed, or is of another kind.
    Forked = VATTN_FORKED,                     ///< The object was made before fork, and this is the child.
    Panic = VATTN_PANIC,                       ///< The library panicked, a defect of it; please report it.
    InCallback = VATTN_IN_CALLBACK,            ///< The call was made from inside a log callback.
};

/// The type of a cache's elements: vattn_dtype.
enum class Dtype : std::int32_t {
    Model = VATTN_DTYPE_MODEL,     ///< As the model says. Never found in an output.
    F32 = VATTN_DTYPE_F32,         ///< IEEE single precision, 4 bytes.
    F16 = VATTN_DTYPE_F16,         ///< IEEE half precision, 2 bytes.
    BF16 = VATTN_DTYPE_BF16,       ///< bfloat16, 2 bytes.
    F8E4M3 = VATTN_DTYPE_F8_E4M3,  ///< 8-bit float without infinities.
    F8E5M2 = VATTN_DTYPE_F8_E5M2,  ///< 8-bit float with a wider exponent.
    I8 = VATTN_DTYPE_I8,           ///< Signed byte.
    U8 = VATTN_DTYPE_U8,           ///< Unsigned byte.
};

/// Keys or values: vattn_part.
enum class Part : std::int32_t {
    Key = VATTN_KEY,      ///< The keys, or the latent of a layer that keeps only that.
    Value = VATTN_VALUE,  ///< The values. A latent layer has none.
};

/// Where memory is: vattn_device_type, with DLPack's numbers.
enum class DeviceType : std::int32_t {
    Cpu = VATTN_DEVICE_CPU,    ///< The processor's memory.
    Cuda = VATTN_DEVICE_CUDA,  ///< A CUDA device's.
};

/// The calls of a driver, under CUDA's names: vattn_verb.
enum class Verb : std::int32_t {
    Any = VATTN_ANY_VERB,                     ///< Any of them. Never found in an output.
    Reserve = VATTN_VERB_RESERVE,             ///< `cuMemAddressReserve`
    Create = VATTN_VERB_CREATE,               ///< `cuMemCreate`
    Map = VATTN_VERB_MAP,                     ///< `cuMemMap`
    SetAccess = VATTN_VERB_SET_ACCESS,        ///< `cuMemSetAccess`
    Unmap = VATTN_VERB_UNMAP,                 ///< `cuMemUnmap`
    Release = VATTN_VERB_RELEASE,             ///< `cuMemRelease`
    Free = VATTN_VERB_FREE,                   ///< `cuMemAddressFree`
    MemoryInfo = VATTN_VERB_MEMORY_INFO,      ///< `cuMemGetInfo`
    RecordEvent = VATTN_VERB_RECORD_EVENT,    ///< `cuEventRecord`, with the creation of the event
    FollowEvent = VATTN_VERB_FOLLOW_EVENT,    ///< both, on a stream of the library's own
    QueryEvent = VATTN_VERB_QUERY_EVENT,      ///< `cuEventQuery`
    WaitEvent = VATTN_VERB_WAIT_EVENT,        ///< `cuEventSynchronize`
    DestroyEvent = VATTN_VERB_DESTROY_EVENT,  ///< `cuEventDestroy`
    StreamWait = VATTN_VERB_STREAM_WAIT,      ///< `cuStreamWaitEvent`
};

/// How many layers share a tensor: vattn_layout_kind.
enum class LayoutKind : std::int32_t {
    Sliced = VATTN_LAYOUT_SLICED,       ///< All layers in one tensor: the fewest mappings, the least waste.
    PerLayer = VATTN_LAYOUT_PER_LAYER,  ///< Each layer has tensors of its own, as kernels are written for.
    Grouped = VATTN_LAYOUT_GROUPED,     ///< `layers_per_tensor` successive layers share one.
};

/// Whether keys and values share a tensor: vattn_kv_order.
enum class KvOrder : std::int32_t {
    Apart = VATTN_KV_APART,              ///< Keys in one tensor, values in another.
    Interleaved = VATTN_KV_INTERLEAVED,  ///< A token's values of a layer follow its keys of that layer.
};

/// When physical memory is allocated: vattn_commit.
enum class Commit : std::int32_t {
    OnDemand = VATTN_COMMIT_ON_DEMAND,  ///< When a step needs it.
    Whole = VATTN_COMMIT_WHOLE,         ///< All of the budget when the cache is made.
    Extents = VATTN_COMMIT_EXTENTS,     ///< What `extents` says when the cache is made, the rest on demand.
};

/// Who does the work that need not be done on the path of a request: vattn_background.
enum class Background : std::int32_t {
    Thread = VATTN_BACKGROUND_THREAD,  ///< A thread of the cache's own, the mapper.
    Caller = VATTN_BACKGROUND_CALLER,  ///< Whoever calls Cache::tend, once an iteration.
    Off = VATTN_BACKGROUND_OFF,        ///< Nobody: every call does all of its work before it returns.
};

/// When the memory that a request gave up is unmapped: vattn_reclaim.
enum class Reclaim : std::int32_t {
    Deferred = VATTN_RECLAIM_DEFERRED,  ///< When somebody else needs it.
    Eager = VATTN_RECLAIM_EAGER,        ///< As soon as its fences have fired.
};

/// Whether a cache can be trusted with more work: vattn_health.
enum class Health : std::int32_t {
    Healthy = VATTN_HEALTHY,    ///< All is well.
    Degraded = VATTN_DEGRADED,  ///< Some extents are quarantined, nothing else is affected.
    Failed = VATTN_FAILED,      ///< Only views, statistics and destroying still work.
};

/// How much a message matters: vattn_log_level.
enum class LogLevel : std::int32_t {
    Off = VATTN_LOG_OFF,      ///< Nothing at all.
    Error = VATTN_LOG_ERROR,  ///< Something is lost.
    Warn = VATTN_LOG_WARN,    ///< Something is worse than it should be.
    Info = VATTN_LOG_INFO,    ///< What happens rarely.
    Debug = VATTN_LOG_DEBUG,  ///< What happens often.
    Trace = VATTN_LOG_TRACE,  ///< Everything.
};

/// An amount that the library chooses, where a field says that it can.
inline constexpr std::uint64_t Auto = VATTN_AUTO;

/// No slot: what `Layout::spare_slot` says where there is none.
inline constexpr std::uint32_t NoSlot = VATTN_NO_SLOT;

/// The name of a status in one word, such as `out_of_budget`; `unknown` for a number that is none.
[[nodiscard]] inline const char* name(Status status) noexcept {
    return vattn_status_name(static_cast<std::int32_t>(status));
}

// ---- structs of C ----

/// A request's place in every tensor. `index` is the number that kernels take.
using Slot = vattn_slot;
/// A slot and the number of tokens that it holds in all: `{slot, tokens}`.
using SlotTokens = vattn_slot_tokens;
/// Successive layers that keep the same: `{layers, kv_heads, key_dim, value_dim}`.
using Layers = vattn_layers;
/// So many extents of one size: `{granules, count}`.
using Extents = vattn_extents;
/// How a cache's tensors lie.
using Layout = vattn_layout;
/// One tensor: a range of addresses, as whoever registers memory with a network card wants it.
using Tensor = vattn_tensor;
/// How much memory is used for what, in bytes.
using Bytes = vattn_bytes;
/// Everything that a cache counts. `health` is the number of a Health.
using Stats = vattn_stats;
/// Calls of the driver: how many, how many failed, how long they took.
using CallStats = vattn_call_stats;
/// What is alive of a driver's.
using Live = vattn_live;
/// What a pin keeps: tokens, and bytes of physical memory.
using PinInfo = vattn_pin_info;
/// A buffer in numbers. `device_type` is the number of a DeviceType.
using BufferInfo = vattn_buffer_info;

// ---- errors ----

/// What the driver said of its call that failed.
struct DriverFailure {
    /// Which call.
    Verb verb = Verb::Any;
    /// The driver's own number: a `CUresult`, or an `errno` of the host.
    std::int64_t code = 0;
    /// The bytes that the call was about; 0 where it has none.
    std::uint64_t bytes = 0;
    /// The name of `code`, such as `CUDA_ERROR_OUT_OF_MEMORY`. It ends with a NUL.
    std::array<char, 64> name{};
};

/// A call that failed. `what` names the function, the value, the limit and the cure.
class Error : public std::runtime_error {
public:
    /// An error of that status and text. Its classes are for what a program goes on from; all others are
    /// this one.
    Error(Status status, const std::string& text) : std::runtime_error(text), status_(status) {}

    /// The same, of a driver's call that failed.
    Error(Status status, const std::string& text, const DriverFailure& driver)
        : std::runtime_error(text), status_(status), has_driver_(true), driver_(driver) {}

    /// What the call came to.
    [[nodiscard]] Status status() const noexcept { return status_; }

    /// What the driver said, where a call of it is what failed; else nullptr. It lives as long as this error.
    [[nodiscard]] const DriverFailure* driver() const noexcept { return has_driver_ ? &driver_ : nullptr; }

private:
    Status status_;
    bool has_driver_ = false;
    DriverFailure driver_;
};

/// The budget is used up by slots that are in use. Retire or preempt a request, then call again.
class OutOfBudget : public Error {
public:
    using Error::Error;
};

/// The device has no memory left, though the budget has. Lower the budget, or trim.
class OutOfDeviceMemory : public Error {
public:
    using Error::Error;
};

/// Every slot is in use. Let the request wait.
class NoFreeSlot : public Error {
public:
    using Error::Error;
};

/// The slot's request has been retired already.
class StaleSlot : public Error {
public:
    using Error::Error;
};

/// This machine, device or build can't do that: no GPU, for example. Another driver may.
class Unsupported : public Error {
public:
    using Error::Error;
};

/// The device is lost, the cache has failed, or the library panicked: DeviceLost, Unhealthy or Panic. Destroy
/// the cache; on the device nothing can be saved. The process, and caches on other devices, go on.
class Broken : public Error {
public:
    using Error::Error;
};

namespace detail {

/// The text of this thread's last failure.
inline std::string last_message() {
    std::string text(vattn_last_error_message(nullptr, 0), '\0');
    vattn_last_error_message(text.data(), text.size() + 1);
    return text;
}

template <class E, class... More>
[[noreturn]] void raise(Status status, const std::string& text, const vattn_error* failure) {
    if (failure == nullptr || failure->verb < 0) {
        throw E(status, text);
    }
    DriverFailure driver;
    driver.verb = static_cast<Verb>(failure->verb);
    driver.code = failure->driver_code;
    driver.bytes = failure->driver_bytes;
    static_assert(sizeof driver.name == sizeof failure->driver_name, "a name is copied whole");
    std::memcpy(driver.name.data(), failure->driver_name, driver.name.size());
    throw E(status, text, driver);
}

/// Throws the class that a status has.
[[noreturn]] inline void raise(Status status, const std::string& text, const vattn_error* failure = nullptr) {
    switch (status) {
    case Status::OutOfBudget: raise<OutOfBudget>(status, text, failure);
    case Status::OutOfDeviceMemory: raise<OutOfDeviceMemory>(status, text, failure);
    case Status::NoFreeSlot: raise<NoFreeSlot>(status, text, failure);
    case Status::StaleSlot: raise<StaleSlot>(status, text, failure);
    case Status::Unsupported: raise<Unsupported>(status, text, failure);
    case Status::DeviceLost:
    case Status::Unhealthy:
    case Status::Panic: raise<Broken>(status, text, failure);
    default: raise<Error>(status, text, failure);
    }
}

/// Throws this thread's last failure, which came back as `status`.
[[noreturn]] inline void raise_last(vattn_status status) {
    vattn_error last{};
    last.struct_size = sizeof last;
    // A thread that is ending keeps no errors.
    if (vattn_last_error(&last) != VATTN_OK || last.status != status) {
        raise(static_cast<Status>(status), std::string("vattn: ") + vattn_status_name(status));
    }
    raise(static_cast<Status>(status), last_message(), &last);
}

inline void check(vattn_status status) {
    if (status != VATTN_OK) {
        raise_last(status);
    }
}

/// A refusal of this header's own, before the library is called.
[[noreturn]] inline void refuse(const std::string& text) { raise(Status::InvalidArgument, text); }

/// A text as C takes it.
inline const char* text(const char* function, const std::string& value) {
    if (value.find('\0') != std::string::npos) {
        refuse(std::string(function) + ": the text has a NUL at byte " + std::to_string(value.find('\0')) +
               " of " + std::to_string(value.size()) + ", where C would end it; take it out");
    }
    return value.c_str();
}

/// A string of the library's, copied and given up.
inline std::string take(char* string) {
    struct Destroy {
        void operator()(char* owned) const noexcept { vattn_string_destroy(owned); }
    };
    std::unique_ptr<char, Destroy> owned(string);
    return std::string(owned.get());
}

/// A struct that begins with its size, to be filled by the library.
template <class T>
T sized() noexcept {
    T value{};
    value.struct_size = sizeof value;
    return value;
}

} // namespace detail

// ---- the library ----

/// Throws Unsupported where the library that is linked has another ABI than this header. Whatever makes an
/// object calls it.
inline void check_abi() {
    const std::uint32_t linked = vattn_abi_version();
    if (linked != VATTN_ABI_VERSION) {
        detail::raise(Status::Unsupported,
                      "vattn::check_abi: the library (" + std::string(vattn_version()) + ") has version " +
                          std::to_string(linked) + " of the ABI, and this program was built for version " +
                          std::to_string(VATTN_ABI_VERSION) + "; build it with the library's own headers");
    }
}

/// The version of the library, such as `0.1.0`.
[[nodiscard]] inline const char* version() noexcept { return vattn_version(); }

/// The version of the ABI that the library has.
[[nodiscard]] inline std::uint32_t abi_version() noexcept { return vattn_abi_version(); }

/// What the library finds on this machine, as one JSON object.
[[nodiscard]] inline std::string probe_json() {
    char* json = nullptr;
    detail::check(vattn_probe_json(&json));
    return detail::take(json);
}

/// The models and the kernels that can be named, as one JSON object: vattn_catalog_json says what is in it.
[[nodiscard]] inline std::string catalog_json() {
    char* json = nullptr;
    detail::check(vattn_catalog_json(&json));
    return detail::take(json);
}

/// Is told of a message: its level, the part of the library that speaks, and the text. Both strings live
/// until it returns. It may be called by any thread, by several at once, and while locks are held: it must
/// not call the library (Status::InCallback) and not take long. What it throws is lost.
using LogFunction = std::function<void(LogLevel level, const char* target, const char* text)>;

namespace detail {

/// Who is told, and the lock of those who change it. They are never destroyed: a mapper may outlive `main`.
struct Listener {
    std::mutex changing;
    std::unique_ptr<LogFunction> current;

    static Listener& get() {
        static Listener* const only = new Listener;
        return *only;
    }

    static void tell(void* user, std::int32_t level, const char* target, const char* text) noexcept {
        try {
            (*static_cast<LogFunction*>(user))(static_cast<LogLevel>(level), target, text);
        } catch (...) {
            // There is nobody to hand it to: below this are frames of another language.
        }
    }
};

} // namespace detail

/// Has the process's messages told to `function`, those of `level` and of more importance. It replaces the
/// one before, which is not running any more when this returns. An empty function, or LogLevel::Off, tells
/// nobody: call it so before what the function uses ends.
///
/// Throws Unsupported where the program has a subscriber of its own for Rust's `tracing`, Error of InCallback
/// inside a log callback.
inline void set_log(LogLevel level, LogFunction function) {
    // Inside a log callback this throws: whoever holds the lock may wait for that callback's end.
    detail::check(vattn_string_destroy(nullptr));
    detail::Listener& listener = detail::Listener::get();
    std::unique_ptr<LogFunction> next;
    if (function && level != LogLevel::Off) {
        next = std::make_unique<LogFunction>(std::move(function));
    }
    const std::lock_guard<std::mutex> lock(listener.changing);
    const vattn_log_callback tell = next ? &detail::Listener::tell : nullptr;
    detail::check(vattn_log_set(tell, next.get(), static_cast<std::int32_t>(level)));
    listener.current.swap(next);
}

/// Tells nobody any more.
inline void clear_log() { set_log(LogLevel::Off, nullptr); }

// ---- arrays ----

/// An array of somebody else's: where it is and how many it has. Made from arrays, vectors, std::array,
/// std::span and, for a parameter, from a list in braces, which lives as long as the call.
template <class T>
class Span {
    template <class From>
    using SameElements = std::enable_if_t<std::is_convertible<From (*)[], T (*)[]>::value>;

public:
    /// None.
    constexpr Span() noexcept = default;

    /// `size` elements from `data` on.
    constexpr Span(T* data, std::size_t size) noexcept : data_(data), size_(size) {}

    /// An array.
    template <std::size_t N>
    constexpr Span(T (&array)[N]) noexcept : Span(array, N) {}

    /// Whatever has data() and size() of such elements.
    template <class C, class = std::enable_if_t<!std::is_same<std::decay_t<C>, Span>::value>,
              class = SameElements<std::remove_pointer_t<decltype(std::declval<C&>().data())>>,
              class = decltype(std::declval<C&>().size())>
    constexpr Span(C&& container) noexcept : Span(container.data(), container.size()) {}

    /// A list in braces. It is gone after the full expression, so keep no such Span.
    template <class U = T, class = std::enable_if_t<std::is_const<U>::value>>
    constexpr Span(std::initializer_list<std::remove_const_t<T>> list) noexcept
        : Span(list.begin(), list.size()) {}

    /// The first element.
    [[nodiscard]] constexpr T* data() const noexcept { return data_; }
    /// How many.
    [[nodiscard]] constexpr std::size_t size() const noexcept { return size_; }
    /// Whether there are none.
    [[nodiscard]] constexpr bool empty() const noexcept { return size_ == 0; }
    /// The first element.
    [[nodiscard]] constexpr T* begin() const noexcept { return data_; }
    /// Behind the last.
    [[nodiscard]] constexpr T* end() const noexcept { return data_ + size_; }
    /// One of them. `index` is below size().
    [[nodiscard]] constexpr T& operator[](std::size_t index) const noexcept { return data_[index]; }

private:
    T* data_ = nullptr;
    std::size_t size_ = 0;
};

// ---- fences ----

/// What tells that device work submitted earlier is done with memory. There is no default one.
struct Fence : vattn_fence {
    /// One of C's.
    constexpr Fence(const vattn_fence& fence) noexcept : vattn_fence(fence) {}

    /// Nothing on the device uses the memory any more: after a `cudaStreamSynchronize`, or on the host.
    [[nodiscard]] static constexpr Fence idle() noexcept { return vattn_fence{VATTN_FENCE_IDLE, 0, nullptr}; }

    /// All that is in the stream by now (`cudaStream_t`, `CUstream`). nullptr is CUDA's legacy default
    /// stream.
    [[nodiscard]] static constexpr Fence stream(void* stream) noexcept {
        return vattn_fence{VATTN_FENCE_STREAM, 0, stream};
    }

    /// An event that was recorded (`cudaEvent_t`, `CUevent`). It may be destroyed after the call.
    [[nodiscard]] static constexpr Fence event(void* event) noexcept {
        return vattn_fence{VATTN_FENCE_EVENT, 0, event};
    }
};

static_assert(sizeof(Fence) == sizeof(vattn_fence) && std::is_trivially_copyable<Fence>::value,
              "an array of them is one of C's");

/// One fence, or one for each stream that touched the memory: a Fence, a list of them in braces, an array.
class Fences {
public:
    /// One.
    constexpr Fences(const vattn_fence& one) noexcept : data_(&one), size_(1) {}

    /// A list in braces.
    constexpr Fences(std::initializer_list<Fence> list) noexcept : Fences(list.begin(), list.size()) {}

    /// An array.
    constexpr Fences(Span<const Fence> span) noexcept : Fences(span.data(), span.size()) {}

    /// Whatever a Span of fences can be made from.
    template <class C, class = std::enable_if_t<std::is_convertible<C&, Span<const Fence>>::value>>
    constexpr Fences(const C& container) noexcept : Fences(Span<const Fence>(container)) {}

    /// The first.
    [[nodiscard]] constexpr const vattn_fence* data() const noexcept { return data_; }
    /// How many.
    [[nodiscard]] constexpr std::size_t size() const noexcept { return size_; }

private:
    constexpr Fences(const Fence* data, std::size_t size) noexcept : data_(data), size_(size) {}

    const vattn_fence* data_;
    std::size_t size_;
};

// ---- handles ----

/// What Geometry, Driver, Cache, Buffer and Pin have in common: they own a handle of C, or are empty.
template <class C, vattn_status (*Destroy)(C*)>
class Handle {
public:
    Handle(const Handle&) = delete;
    Handle& operator=(const Handle&) = delete;

    /// The handle, for functions of C. It stays this object's. nullptr where this is empty.
    [[nodiscard]] C* get() const noexcept { return handle_; }

    /// Whether there is a handle.
    [[nodiscard]] explicit operator bool() const noexcept { return handle_ != nullptr; }

    /// Gives the handle away: whoever takes it destroys it. This is empty afterwards.
    [[nodiscard]] C* release() noexcept { return std::exchange(handle_, nullptr); }

    /// Destroys the object now. The destructor does the same and keeps silent where it is refused: in a child
    /// after fork (Status::Forked), or inside a log callback (Status::InCallback). Then it is still owned.
    void close() {
        detail::check(Destroy(handle_));
        handle_ = nullptr;
    }

protected:
    Handle() noexcept = default;
    explicit Handle(C* handle) noexcept : handle_(handle) {}
    Handle(Handle&& from) noexcept : handle_(from.release()) {}

    Handle& operator=(Handle&& from) noexcept {
        // Moved to itself it has given its handle up by the time that it takes one.
        drop(std::exchange(handle_, from.release()));
        return *this;
    }

    ~Handle() { drop(handle_); }

private:
    /// A refusal has nobody to be told to. The next call on the thread that fails replaces its text.
    static void drop(C* handle) noexcept {
        if (handle != nullptr) {
            static_cast<void>(Destroy(handle));
        }
    }

    C* handle_ = nullptr;
};

// ---- geometry ----

/// A geometry in numbers.
struct GeometryInfo {
    /// How many layers keep something.
    std::uint32_t layers;
    /// The type of the elements, the same in all layers.
    Dtype dtype;
    /// Bytes that one token takes in all layers, with no rounding.
    std::uint64_t bytes_per_token;
};

/// What a model (one rank's part of it) keeps for each token: its layers in model order. Never changes. It
/// may be destroyed before the caches that were made from it.
class Geometry : public Handle<vattn_geometry, vattn_geometry_destroy> {
public:
    /// None yet.
    Geometry() noexcept = default;

    /// Takes over a handle of C.
    explicit Geometry(vattn_geometry* handle) noexcept : Handle(handle) {}

    /// A model of those layers, split over `tensor_parallel` ranks; 1 for one in one piece, or for numbers
    /// that are a rank's already.
    ///
    /// Throws InvalidGeometry for no layers, more than 65,536, a dimension of zero, or heads that can't be
    /// split so.
    explicit Geometry(Span<const Layers> groups, std::uint32_t tensor_parallel = 1,
                      Dtype dtype = Dtype::Model)
        : Handle(make([&](vattn_geometry** out) {
              return vattn_geometry_create(groups.data(), groups.size(), tensor_parallel,
                                           static_cast<std::int32_t>(dtype), out);
          })) {}

    /// A model by name, such as `llama-3-8b`; a name that is not known fails with a text that lists those
    /// that are. Otherwise as the constructor.
    [[nodiscard]] static Geometry preset(const std::string& name, std::uint32_t tensor_parallel = 1,
                                         Dtype dtype = Dtype::Model) {
        return Geometry(make([&](vattn_geometry** out) {
            const char* of_c = detail::text("vattn::Geometry::preset", name);
            return vattn_geometry_create_preset(of_c, tensor_parallel, static_cast<std::int32_t>(dtype), out);
        }));
    }

    /// The model that the text of a Hugging Face `config.json` describes. What would make layers keep
    /// something else than the common fields say is refused with a text that names the field, and never
    /// guessed. Otherwise as the constructor.
    [[nodiscard]] static Geometry from_hf_config(const std::string& json, std::uint32_t tensor_parallel = 1,
                                                 Dtype dtype = Dtype::Model) {
        return Geometry(make([&](vattn_geometry** out) {
            const char* of_c = detail::text("vattn::Geometry::from_hf_config", json);
            return vattn_geometry_create_from_hf_config(of_c, tensor_parallel,
                                                        static_cast<std::int32_t>(dtype), out);
        }));
    }

    /// It in numbers.
    [[nodiscard]] GeometryInfo info() const {
        auto info = detail::sized<vattn_geometry_info>();
        detail::check(vattn_geometry_describe(get(), &info));
        return {info.layers, static_cast<Dtype>(info.dtype), info.bytes_per_token};
    }

    /// What one layer keeps, `layers` set to 1. Throws InvalidArgument for a layer that is not there.
    [[nodiscard]] Layers layer(std::uint32_t layer) const {
        Layers one{};
        detail::check(vattn_geometry_layer(get(), layer, &one));
        return one;
    }

    /// The `tile_tokens` that a cache of this model needs for a kernel by name, such as `fa3-decode`, in all
    /// of its layers. For several kernels take the least common multiple.
    ///
    /// Throws InvalidConfig with the names that are known for one that is not, and where it is not known how
    /// far the kernel reads for this model.
    [[nodiscard]] std::uint32_t tile_tokens(const std::string& kernel) const {
        std::uint32_t tokens = 0;
        const char* of_c = detail::text("vattn::Geometry::tile_tokens", kernel);
        detail::check(vattn_geometry_tile_tokens(get(), of_c, &tokens));
        return tokens;
    }

private:
    template <class F>
    static vattn_geometry* make(F create) {
        check_abi();
        vattn_geometry* made = nullptr;
        detail::check(create(&made));
        return made;
    }
};

// ---- drivers ----

/// How the host driver allocates this machine's own memory. Linux only.
struct HostOptions {
    /// Bytes that can be created in all. They are taken from the system when they are first touched, so more
    /// than the machine has ends in `SIGBUS` or the kernel's OOM killer.
    std::uint64_t capacity = 0;
    /// The unit of allocation in bytes: a power of two, and a multiple of the page size. 0 for 2 MiB.
    std::uint64_t granule = 0;
    /// How many of the kernel's mappings may be used; 0 for what `vm.max_map_count` leaves.
    std::uint64_t max_mappings = 0;
};

/// How the CUDA driver allocates a GPU's memory.
struct CudaOptions {
    /// The device's number; -1 for that of the context which is current on this thread, or the first.
    std::int32_t ordinal = -1;
    /// Whether every allocation can be exported through a file descriptor.
    bool exportable = false;
    /// Whether a network card can read and write every allocation.
    bool rdma = false;
};

/// How large a device the ledger driver pretends to be.
struct LedgerOptions {
    /// Bytes that can be created in all.
    std::uint64_t capacity = 0;
    /// The unit of allocation in bytes, a power of two. 0 for 2 MiB.
    std::uint64_t granule = 0;
    /// Bytes of addresses that can be reserved at a time; 0 for no limit.
    std::uint64_t addresses = 0;
};

/// What a driver is; the same for its whole life.
struct DriverInfo {
    /// `host`, `ledger` or `cuda`.
    std::string name;
    /// Where its memory is.
    DeviceType device_type;
    /// The device's number; 0 for the processor.
    std::int32_t device_id;
    /// The unit of allocation in bytes.
    std::uint64_t granule;
    /// Whether allocations can be exported through a file descriptor.
    bool exportable;
    /// Whether a network card can read and write them.
    bool rdma;
};

/// A device as CUDA describes it.
struct CudaDevice {
    /// Such as `NVIDIA H200`.
    std::string name;
    /// The compute capability's first number.
    std::uint32_t major_version;
    /// The compute capability's second number.
    std::uint32_t minor_version;
    /// Bytes of memory in all.
    std::uint64_t memory;
    /// The smallest unit of allocation in bytes; 0 without virtual memory.
    std::uint64_t granule;
    /// The unit that CUDA recommends; 0 without virtual memory.
    std::uint64_t recommended_granule;
    /// Whether it can map memory behind addresses: without that, no cache.
    bool virtual_memory;
    /// Whether allocations can be exported through a file descriptor.
    bool exportable;
    /// Whether a network card can read and write them.
    bool rdma;
    /// Whether they can be exported to other machines of one NVLink fabric, as far as the device goes.
    bool fabric;
};

/// A device's memory in bytes.
struct Memory {
    /// What is free now, by anybody's count.
    std::uint64_t free;
    /// What there is.
    std::uint64_t total;
};

/// How often a checked driver was called.
struct DriverCalls {
    /// How often in all.
    std::uint64_t calls;
    /// How many of them were made to fail.
    std::uint64_t failed;
};

/// Whoever maps memory. Several caches may share one, and it may be destroyed before them.
class Driver : public Handle<vattn_driver, vattn_driver_destroy> {
public:
    /// None yet.
    Driver() noexcept = default;

    /// Takes over a handle of C.
    explicit Driver(vattn_driver* handle) noexcept : Handle(handle) {}

    /// A driver for this machine's own memory, on which a cache can be tried, tested and used without a GPU.
    ///
    /// Throws InvalidConfig for a granule that can't be, Unsupported elsewhere than on Linux, and the
    /// system's refusal.
    [[nodiscard]] static Driver host(const HostOptions& options) {
        auto of_c = detail::sized<vattn_host_options>();
        of_c.granule = options.granule;
        of_c.capacity = options.capacity;
        of_c.max_mappings = options.max_mappings;
        return make([&](vattn_driver** out) { return vattn_driver_create_host(&of_c, out); });
    }

    /// A driver for an NVIDIA GPU. It works in the context that is current on this thread, else in the
    /// device's primary one; it never makes one. A context that is neither must outlive it.
    ///
    /// Throws Unsupported where there is no driver library, no device, or not what was asked for, and the
    /// text says which; InvalidArgument for a device that is not there; DeviceLost where the current context
    /// is gone.
    [[nodiscard]] static Driver cuda(const CudaOptions& options = CudaOptions()) {
        auto of_c = detail::sized<vattn_cuda_options>();
        of_c.ordinal = options.ordinal;
        of_c.exportable = options.exportable ? 1 : 0;
        of_c.rdma = options.rdma ? 1 : 0;
        return make([&](vattn_driver** out) { return vattn_driver_create_cuda(&of_c, out); });
    }

    /// A driver that only keeps books: for simulations of sizes that no machine at hand can map. Its
    /// addresses must not be touched. Throws InvalidConfig for a granule that can't be.
    [[nodiscard]] static Driver ledger(const LedgerOptions& options) {
        auto of_c = detail::sized<vattn_ledger_options>();
        of_c.granule = options.granule;
        of_c.capacity = options.capacity;
        of_c.addresses = options.addresses;
        return make([&](vattn_driver** out) { return vattn_driver_create_ledger(&of_c, out); });
    }

    /// A driver around another that can be told to fail, so that a program can be tested against every
    /// failure there is. It costs some time in each call. It keeps the other alive.
    [[nodiscard]] static Driver checked(const Driver& inner) {
        return make([&](vattn_driver** out) { return vattn_driver_create_checked(inner.get(), out); });
    }

    /// What it is.
    [[nodiscard]] DriverInfo info() const {
        auto info = detail::sized<vattn_driver_info>();
        detail::check(vattn_driver_describe(get(), &info));
        return {info.name,    static_cast<DeviceType>(info.device_type), info.device_id,
                info.granule, info.exportable != 0,                      info.rdma != 0};
    }

    /// How many bytes the device has, and how many of them are free now.
    [[nodiscard]] Memory memory() const {
        Memory memory{};
        detail::check(vattn_driver_memory(get(), &memory.free, &memory.total));
        return memory;
    }

    /// Has the `nth` call of `verb` from now on fail with `status`, 1 for the next; with `onward` every later
    /// one too. Several may be planned. For a checked driver: others throw Unsupported.
    void fail(Verb verb, std::uint64_t nth, Status status, bool onward = false) {
        detail::check(vattn_driver_fail(get(), static_cast<std::int32_t>(verb), nth, onward ? 1 : 0,
                                        static_cast<std::int32_t>(status)));
    }

    /// Has no call fail any more that was planned to. For a checked driver: others throw Unsupported.
    void clear_failures() { detail::check(vattn_driver_clear_failures(get())); }

    /// How many calls there were so far, of `verb` or in all. For a checked driver: others throw Unsupported.
    [[nodiscard]] DriverCalls calls(Verb verb = Verb::Any) const {
        DriverCalls count{};
        detail::check(
            vattn_driver_calls(get(), static_cast<std::int32_t>(verb), &count.calls, &count.failed));
        return count;
    }

    /// What is alive of it; all 0 once every cache of it is destroyed. For a checked driver: others throw
    /// Unsupported.
    [[nodiscard]] Live live() const {
        Live live{};
        detail::check(vattn_driver_live(get(), &live));
        return live;
    }

    /// Holds a stream back: fences that are recorded on it from now on fire when fire() says so. For host and
    /// ledger drivers, on which any number may name a stream: others throw Unsupported.
    void hold(void* stream) { detail::check(vattn_driver_hold(get(), stream)); }

    /// Fires all fences of a stream, and holds it back no longer. Others than host and ledger throw
    /// Unsupported.
    void fire(void* stream) { detail::check(vattn_driver_fire(get(), stream)); }

    /// Says whether a stream is being captured into a graph: fences on it are refused meanwhile with
    /// Status::CapturingStream. Others than host and ledger throw Unsupported.
    void set_capturing(void* stream, bool capturing) {
        detail::check(vattn_driver_set_capturing(get(), stream, capturing ? 1 : 0));
    }

private:
    template <class F>
    static Driver make(F create) {
        check_abi();
        vattn_driver* made = nullptr;
        detail::check(create(&made));
        return Driver(made);
    }
};

/// How many CUDA devices this process may see. Throws Unsupported where there is no driver library or no
/// device.
[[nodiscard]] inline std::uint32_t cuda_device_count() {
    std::uint32_t count = 0;
    detail::check(vattn_cuda_device_count(&count));
    return count;
}

/// What a CUDA device is and can do. Throws Unsupported where there is none, InvalidArgument for one that is
/// not there.
[[nodiscard]] inline CudaDevice cuda_device(std::uint32_t ordinal) {
    auto device = detail::sized<vattn_cuda_device>();
    detail::check(vattn_cuda_device_describe(ordinal, &device));
    return {device.name,
            device.major,
            device.minor,
            device.memory,
            device.granule,
            device.recommended_granule,
            device.virtual_memory != 0,
            device.exportable != 0,
            device.rdma != 0,
            device.fabric != 0};
}

// ---- options of a cache ----

/// All options of a cache, with the library's defaults to begin with. Change the fields, or have a copy
/// changed: `Config().with_budget(bytes).with_max_slots(64)`.
struct Config {
    /// Bytes of physical memory that the cache may hold. Default Auto: what the driver says is free.
    std::uint64_t budget;
    /// The most tokens that a slot can hold. Costs addresses only. Default 131,072.
    std::uint64_t max_tokens;
    /// How many requests can have a slot at a time, up to 2^20. Default 1,024.
    std::uint32_t max_slots;
    /// Whether there is one more slot behind the requests' own, always backed: padded entries of a batch
    /// write there. Default false.
    bool spare_slot;
    /// What a step rounds the tokens it backs up to a multiple of, for kernels that load whole tiles past a
    /// sequence's length: Geometry::tile_tokens. Default 1: exactly the tokens.
    std::uint32_t tile_tokens;
    /// Tokens of a page, for kernels that read the tensors as pages. Default 16.
    std::uint32_t page_tokens;
    /// How many layers share a tensor. Default Sliced.
    LayoutKind layout;
    /// With LayoutKind::Grouped, how many; else 0. Default 0.
    std::uint32_t layers_per_tensor;
    /// Whether keys and values share a tensor. Default Apart.
    KvOrder kv_order;
    /// A plan may round a need up by at most the need divided by this. Default 32.
    std::uint32_t slack_divisor;
    /// Who works beside the requests. Default Thread.
    Background background;
    /// When the memory of retired requests is unmapped. Default Deferred.
    Reclaim reclaim;
    /// With how many tokens to go the memory for a slot's growth is mapped; 0 turns it off. Default 32.
    std::uint64_t look_ahead;
    /// Bytes that may be mapped ahead at a time, for all slots together. Default Auto: an eighth of the
    /// budget.
    std::uint64_t look_ahead_budget;
    /// Bytes that may be kept created and mapped nowhere; 0 turns it off. Default Auto: a sixty-fourth of the
    /// budget.
    std::uint64_t at_hand;
    /// When memory is allocated. Default OnDemand.
    Commit commit;
    /// With Commit::Extents, which. Default none.
    std::vector<Extents> extents;

    /// The defaults.
    Config() {
        const vattn_config defaults = init();
        budget = defaults.budget;
        max_tokens = defaults.max_tokens;
        max_slots = defaults.max_slots;
        spare_slot = defaults.spare_slot != 0;
        tile_tokens = defaults.tile_tokens;
        page_tokens = defaults.page_tokens;
        layout = static_cast<LayoutKind>(defaults.layout);
        layers_per_tensor = defaults.layers_per_tensor;
        kv_order = static_cast<KvOrder>(defaults.kv_order);
        slack_divisor = defaults.slack_divisor;
        background = static_cast<Background>(defaults.background);
        reclaim = static_cast<Reclaim>(defaults.reclaim);
        look_ahead = defaults.look_ahead;
        look_ahead_budget = defaults.look_ahead_budget;
        at_hand = defaults.at_hand;
        commit = static_cast<Commit>(defaults.commit);
    }

    /// The same with another budget, in bytes.
    [[nodiscard]] Config with_budget(std::uint64_t bytes) const { return with(&Config::budget, bytes); }
    /// The same with another limit of a slot's tokens.
    [[nodiscard]] Config with_max_tokens(std::uint64_t tokens) const {
        return with(&Config::max_tokens, tokens);
    }
    /// The same with another number of slots.
    [[nodiscard]] Config with_max_slots(std::uint32_t slots) const { return with(&Config::max_slots, slots); }
    /// The same with a spare slot, or without.
    [[nodiscard]] Config with_spare_slot(bool spare = true) const { return with(&Config::spare_slot, spare); }
    /// The same with another tile.
    [[nodiscard]] Config with_tile_tokens(std::uint32_t tokens) const {
        return with(&Config::tile_tokens, tokens);
    }
    /// The same with another page.
    [[nodiscard]] Config with_page_tokens(std::uint32_t tokens) const {
        return with(&Config::page_tokens, tokens);
    }
    /// The same with another layout; the number is for LayoutKind::Grouped alone.
    [[nodiscard]] Config with_layout(LayoutKind kind, std::uint32_t layers = 0) const {
        return with(&Config::layout, kind).with(&Config::layers_per_tensor, layers);
    }
    /// The same with another order of keys and values.
    [[nodiscard]] Config with_kv_order(KvOrder order) const { return with(&Config::kv_order, order); }
    /// The same with another divisor of the slack.
    [[nodiscard]] Config with_slack_divisor(std::uint32_t divisor) const {
        return with(&Config::slack_divisor, divisor);
    }
    /// The same with somebody else working beside the requests.
    [[nodiscard]] Config with_background(Background who) const { return with(&Config::background, who); }
    /// The same with another time of reclaiming.
    [[nodiscard]] Config with_reclaim(Reclaim when) const { return with(&Config::reclaim, when); }
    /// The same looking ahead so many tokens.
    [[nodiscard]] Config with_look_ahead(std::uint64_t tokens) const {
        return with(&Config::look_ahead, tokens);
    }
    /// The same with other bytes that may be mapped ahead.
    [[nodiscard]] Config with_look_ahead_budget(std::uint64_t bytes) const {
        return with(&Config::look_ahead_budget, bytes);
    }
    /// The same with other bytes that may be kept at hand.
    [[nodiscard]] Config with_at_hand(std::uint64_t bytes) const { return with(&Config::at_hand, bytes); }
    /// The same with another time of allocating.
    [[nodiscard]] Config with_commit(Commit when) const { return with(&Config::commit, when); }
    /// The same with Commit::Extents, of those.
    [[nodiscard]] Config with_extents(Span<const Extents> which) const {
        Config changed = with(&Config::commit, Commit::Extents);
        changed.extents.assign(which.begin(), which.end());
        return changed;
    }

    /// As C takes it. It points into `extents`, so it is good while this lives unchanged.
    [[nodiscard]] vattn_config to_c() const {
        vattn_config of_c = init();
        of_c.budget = budget;
        of_c.max_tokens = max_tokens;
        of_c.max_slots = max_slots;
        of_c.spare_slot = spare_slot ? 1 : 0;
        of_c.tile_tokens = tile_tokens;
        of_c.page_tokens = page_tokens;
        of_c.layout = static_cast<std::int32_t>(layout);
        of_c.layers_per_tensor = layers_per_tensor;
        of_c.kv_order = static_cast<std::int32_t>(kv_order);
        of_c.slack_divisor = slack_divisor;
        of_c.background = static_cast<std::int32_t>(background);
        of_c.reclaim = static_cast<std::int32_t>(reclaim);
        of_c.look_ahead = look_ahead;
        of_c.look_ahead_budget = look_ahead_budget;
        of_c.at_hand = at_hand;
        of_c.commit = static_cast<std::int32_t>(commit);
        of_c.extents = extents.data();
        of_c.extents_count = extents.size();
        return of_c;
    }

private:
    static vattn_config init() {
        check_abi();
        vattn_config defaults{};
        detail::check(vattn_config_init(&defaults, sizeof defaults));
        return defaults;
    }

    template <class T>
    Config with(T Config::*field, T value) const {
        Config changed = *this;
        changed.*field = value;
        return changed;
    }
};

/// How the tensors of a cache with those options would lie, without making one: for sizing. `granule` is the
/// driver's unit of allocation in bytes: 2 MiB on every NVIDIA GPU so far.
///
/// Throws InvalidConfig for options that Cache would refuse, as far as that needs no driver.
[[nodiscard]] inline Layout plan_layout(const Config& config, const Geometry& geometry,
                                        std::uint64_t granule) {
    const vattn_config of_c = config.to_c();
    auto layout = detail::sized<Layout>();
    detail::check(vattn_layout_plan(&of_c, geometry.get(), granule, &layout));
    return layout;
}

// ---- views ----

/// A view's elements as the host reads and writes them. What no step has backed must not be touched.
template <class T>
class Elements {
public:
    /// Those of a view; View::typed checks that they are such.
    explicit Elements(const vattn_view& view) noexcept : data_(static_cast<T*>(view.data)) {
        for (std::size_t dim = 0; dim < 4; ++dim) {
            shape_[dim] = view.shape[dim];
            strides_[dim] = view.strides[dim];
        }
    }

    /// Element `[i, j, h, d]`: slot, token, head, element of the head. Nothing is checked.
    template <class I, class J, class H, class D>
    [[nodiscard]] T& operator()(I i, J j, H h, D d) const noexcept {
        return data_[offset({to_index(i), to_index(j), to_index(h), to_index(d)})];
    }

    /// The same, checked against the shape: throws InvalidArgument with the dimension, the index and the
    /// limit. Whether it is backed is not known here.
    template <class I, class J, class H, class D>
    [[nodiscard]] T& at(I i, J j, H h, D d) const {
        const Index index{to_index(i), to_index(j), to_index(h), to_index(d)};
        for (std::size_t dim = 0; dim < index.size(); ++dim) {
            if (index[dim] < 0 || index[dim] >= shape_[dim]) {
                detail::refuse("vattn::Elements::at: index " + std::to_string(index[dim]) + " of dimension " +
                               std::to_string(dim) + ", which has " + std::to_string(shape_[dim]) +
                               " elements; stay below");
            }
        }
        return data_[offset(index)];
    }

    /// Where element `[0, 0, 0, 0]` is.
    [[nodiscard]] T* data() const noexcept { return data_; }
    /// Elements along a dimension, 0 to 3.
    [[nodiscard]] std::int64_t shape(std::size_t dim) const noexcept { return shape_[dim]; }
    /// From one element to the next along a dimension, in elements.
    [[nodiscard]] std::int64_t stride(std::size_t dim) const noexcept { return strides_[dim]; }

private:
    using Index = std::array<std::int64_t, 4>;

    template <class I>
    static std::int64_t to_index(I value) noexcept {
        static_assert(std::is_integral<I>::value, "an index is a whole number");
        return static_cast<std::int64_t>(value);
    }

    std::ptrdiff_t offset(const Index& index) const noexcept {
        return static_cast<std::ptrdiff_t>(index[0] * strides_[0] + index[1] * strides_[1] +
                                           index[2] * strides_[2] + index[3] * strides_[3]);
    }

    T* data_;
    Index shape_;
    Index strides_;
};

/// A layer's keys or values as a strided array of four dimensions, the way kernels and DLPack take it.
/// Element `[i, j, h, d]` lies `i * stride(0) + j * stride(1) + h * stride(2) + d` elements behind `data`.
///
/// It says where tokens are, not that they are backed: touching what no step has asked for is fatal. It is
/// good while its cache lives, and its address never changes.
class View {
public:
    /// One of C's.
    explicit View(const vattn_view& view) noexcept : view_(view) {}

    /// Where element `[0, 0, 0, 0]` is: what a kernel is given.
    [[nodiscard]] void* data() const noexcept { return view_.data; }

    /// The same as a pointer to elements. Throws InvalidArgument where a T has another size.
    template <class T>
    [[nodiscard]] T* data() const {
        check_size("data", sizeof(T));
        return static_cast<T*>(view_.data);
    }

    /// Elements along a dimension, 0 to 3: slots (pages, 1), tokens, heads, elements of a head.
    [[nodiscard]] std::int64_t shape(std::size_t dim) const noexcept { return view_.shape[dim]; }
    /// From one element to the next along a dimension, in elements. The last is 1.
    [[nodiscard]] std::int64_t stride(std::size_t dim) const noexcept { return view_.strides[dim]; }
    /// All of the shape, as DLPack takes it. It lives as long as this view.
    [[nodiscard]] Span<const std::int64_t> shape() const noexcept { return {view_.shape, 4}; }
    /// All strides, as DLPack takes them. They live as long as this view.
    [[nodiscard]] Span<const std::int64_t> strides() const noexcept { return {view_.strides, 4}; }
    /// The type of an element.
    [[nodiscard]] Dtype dtype() const noexcept { return static_cast<Dtype>(view_.dtype); }
    /// Bytes of an element.
    [[nodiscard]] std::uint32_t element_bytes() const noexcept { return view_.element_bytes; }
    /// Where the memory is.
    [[nodiscard]] DeviceType device_type() const noexcept {
        return static_cast<DeviceType>(view_.device_type);
    }
    /// The device's number; 0 for the processor.
    [[nodiscard]] std::int32_t device_id() const noexcept { return view_.device_id; }
    /// The struct of C.
    [[nodiscard]] const vattn_view& raw() const noexcept { return view_; }

    /// The elements, for reading and writing on the host: `typed<float>()`, `typed<const std::uint16_t>()`.
    ///
    /// Throws InvalidArgument where a T has another size than an element, and for a device's memory.
    template <class T>
    [[nodiscard]] Elements<T> typed() const {
        static_assert(std::is_trivially_copyable<T>::value, "an element is plain bytes");
        check_size("typed", sizeof(T));
        if (device_type() != DeviceType::Cpu) {
            detail::refuse("vattn::View::typed: the memory is that of device " +
                           std::to_string(view_.device_id) +
                           ", and the host can't read it; copy it first, or hand data<T>() to a kernel");
        }
        return Elements<T>(view_);
    }

    /// One element of the first dimension as a view, its shape `[1, token, head, dim]`: one slot's tokens, or
    /// of a paged view one page's. Throws InvalidArgument for one that is not there.
    [[nodiscard]] View slot(std::uint32_t index) const {
        if (static_cast<std::int64_t>(index) >= view_.shape[0]) {
            detail::refuse("vattn::View::slot: index " + std::to_string(index) + ", and the view has " +
                           std::to_string(view_.shape[0]) + "; stay below");
        }
        View one = *this;
        const std::int64_t bytes = view_.strides[0] * static_cast<std::int64_t>(view_.element_bytes);
        one.view_.data = static_cast<char*>(view_.data) + static_cast<std::ptrdiff_t>(index * bytes);
        one.view_.shape[0] = 1;
        return one;
    }

private:
    void check_size(const char* function, std::size_t size) const {
        if (size != view_.element_bytes) {
            detail::refuse(std::string("vattn::View::") + function + ": the type has " +
                           std::to_string(size) + " bytes and an element " +
                           std::to_string(view_.element_bytes) +
                           "; use a type of the element's size");
        }
    }

    vattn_view view_;
};

// ---- pins ----

/// A DLPack tensor that nobody has taken over yet: whoever does calls release(), and its deleter in the end.
/// It can be moved and not copied.
class DlpackTensor {
public:
    /// None.
    DlpackTensor() noexcept = default;

    /// Takes over what vattn_pin_dlpack made with that version.
    DlpackTensor(void* tensor, std::uint32_t version_major) noexcept
        : tensor_(tensor), version_major_(version_major) {}

    /// Leaves `from` empty.
    DlpackTensor(DlpackTensor&& from) noexcept
        : tensor_(from.release()), version_major_(from.version_major_) {}

    /// Gives up what this has, and leaves `from` empty.
    DlpackTensor& operator=(DlpackTensor&& from) noexcept {
        const std::uint32_t version_major = from.version_major_;
        drop(std::exchange(tensor_, from.release()), version_major_);
        version_major_ = version_major;
        return *this;
    }

    DlpackTensor(const DlpackTensor&) = delete;
    DlpackTensor& operator=(const DlpackTensor&) = delete;

    /// Calls the deleter of a tensor that nobody took over.
    ~DlpackTensor() { drop(tensor_, version_major_); }

    /// The `DLManagedTensor`, or the `DLManagedTensorVersioned` of version 1. It stays this object's.
    [[nodiscard]] void* get() const noexcept { return tensor_; }

    /// Whether there is a tensor.
    [[nodiscard]] explicit operator bool() const noexcept { return tensor_ != nullptr; }

    /// Which of the two it is: 0 or 1.
    [[nodiscard]] std::uint32_t version_major() const noexcept { return version_major_; }

    /// Gives the tensor away: whoever takes it calls its deleter. This is empty afterwards.
    [[nodiscard]] void* release() noexcept { return std::exchange(tensor_, nullptr); }

private:
    static void drop(void* tensor, std::uint32_t version_major) noexcept {
        if (tensor != nullptr) {
            static_cast<void>(vattn_dlpack_destroy(tensor, version_major));
        }
    }

    void* tensor_ = nullptr;
    std::uint32_t version_major_ = 1;
};

/// Keeps memory mapped at its addresses, and addresses reserved, for as long as it lives: Cache::pin. It may
/// outlive its cache.
class Pin : public Handle<vattn_pin, vattn_pin_destroy> {
public:
    /// None yet.
    Pin() noexcept = default;

    /// Takes over a handle of C.
    explicit Pin(vattn_pin* handle) noexcept : Handle(handle) {}

    /// What it keeps.
    [[nodiscard]] PinInfo info() const {
        auto info = detail::sized<PinInfo>();
        detail::check(vattn_pin_describe(get(), &info));
        return info;
    }

    /// A DLPack tensor of an array in what its object reserves, as a pin of its own. Shape and strides are in
    /// elements; without strides the elements lie side by side.
    ///
    /// Throws InvalidArgument for an array that reaches beyond what is reserved.
    [[nodiscard]] DlpackTensor dlpack(void* data, Dtype dtype, Span<const std::int64_t> shape,
                                      Span<const std::int64_t> strides = {},
                                      std::uint32_t version_major = 1) const {
        if (!strides.empty() && strides.size() != shape.size()) {
            detail::refuse("vattn::Pin::dlpack: there are " + std::to_string(strides.size()) +
                           " strides for a shape of " + std::to_string(shape.size()) +
                           " dimensions; pass as many, or none");
        }
        auto array = detail::sized<vattn_array>();
        array.data = data;
        array.dtype = static_cast<std::int32_t>(dtype);
        array.ndim = shape.size() > UINT32_MAX ? UINT32_MAX : static_cast<std::uint32_t>(shape.size());
        array.shape = shape.data();
        array.strides = strides.empty() ? nullptr : strides.data();
        void* made = nullptr;
        detail::check(vattn_pin_dlpack(get(), &array, version_major, &made));
        return DlpackTensor(made, version_major);
    }

    /// The same of a whole view, of four dimensions. What of it is not backed must not be touched.
    [[nodiscard]] DlpackTensor dlpack(const View& view, std::uint32_t version_major = 1) const {
        return dlpack(view.data(), view.dtype(), view.shape(), view.strides(), version_major);
    }
};

// ---- caches ----

/// A KV cache. Any thread may call any method at any time; moving and destroying it are for one alone.
class Cache : public Handle<vattn_cache, vattn_cache_destroy> {
public:
    /// None yet.
    Cache() noexcept = default;

    /// Takes over a handle of C.
    explicit Cache(vattn_cache* handle) noexcept : Handle(handle) {}

    /// Makes a cache: reserves the addresses of all tensors, commits what the options say, and starts the
    /// mapper. The driver stays alive as long as the cache does; options and geometry are copied.
    ///
    /// Throws InvalidConfig for options that can't be used, among them a budget below one granule for each
    /// tensor; OutOfAddressSpace; OutOfDeviceMemory for what is committed up front.
    Cache(const Config& config, const Geometry& geometry, const Driver& driver)
        : Handle(make(config, geometry, driver)) {}

    /// How its tensors lie.
    [[nodiscard]] Layout layout() const {
        auto layout = detail::sized<Layout>();
        detail::check(vattn_cache_layout(get(), &layout));
        return layout;
    }

    /// One of the tensors, counted from 0 to `layout().tensors`. Throws InvalidArgument past the last.
    [[nodiscard]] Tensor tensor(std::uint32_t number) const {
        auto tensor = detail::sized<Tensor>();
        detail::check(vattn_cache_tensor(get(), number, &tensor));
        return tensor;
    }

    /// Bytes that a slot of so many tokens takes at the least, in whole granules over all tensors, tiles
    /// included. Throws InvalidArgument for more than a slot can hold.
    [[nodiscard]] std::uint64_t bytes_for(std::uint64_t tokens) const {
        std::uint64_t bytes = 0;
        detail::check(vattn_cache_bytes_for(get(), tokens, &bytes));
        return bytes;
    }

    /// A layer's keys or values by slot: `[slot, token, head, dim]`. Use `slot.index` as the batch index. A
    /// latent layer has keys alone, of one head. Throws InvalidArgument for what is not there.
    [[nodiscard]] View view(std::uint32_t layer, Part part) const {
        return view_by(vattn_cache_view, layer, part);
    }

    /// The same memory by page: `[page, token of the page, head, dim]`. Page p of slot s is
    /// `s * pages_per_slot + p`.
    [[nodiscard]] View paged_view(std::uint32_t layer, Part part) const {
        return view_by(vattn_cache_paged_view, layer, part);
    }

    /// The same memory as one long row of tokens: `[1, token, head, dim]`. Token t of slot s is
    /// `s * stride_tokens + t`.
    [[nodiscard]] View token_view(std::uint32_t layer, Part part) const {
        return view_by(vattn_cache_token_view, layer, part);
    }

    /// Gives a new request a slot, of no tokens yet. `hint` is how many tokens it will soon hold: of the
    /// parked slots the one is adopted whose memory suits that best. What an earlier owner of the memory left
    /// running is waited for here.
    ///
    /// Throws NoFreeSlot.
    [[nodiscard]] Slot acquire(std::uint64_t hint) {
        Slot slot{};
        detail::check(vattn_cache_acquire(get(), hint, &slot));
        return slot;
    }

    /// The same for a request whose work runs on `stream`: what an earlier owner left running on another
    /// stream is waited for there, on the device.
    ///
    /// Throws NoFreeSlot, CapturingStream, or the driver's refusal of a wait.
    [[nodiscard]] Slot acquire_on(std::uint64_t hint, void* stream) {
        Slot slot{};
        detail::check(vattn_cache_acquire_on(get(), hint, stream, &slot));
        return slot;
    }

    /// One iteration of the server: these slots now hold this many tokens in all, `{{slot, tokens}, …}`.
    /// Slots that are not named are untouched. On return every token is backed in every tensor, and so is
    /// what `tile_tokens` adds to it. New memory holds whatever it held before: kernels write before they
    /// read.
    ///
    /// Throws OutOfBudget, which fits tells beforehand and retiring cures; OutOfDeviceMemory; StaleSlot;
    /// Error of ForeignSlot, SlotBusy, DuplicateSlot, TooManyTokens, FewerTokens, OutOfMappings and the
    /// driver's other refusals.
    void step(Span<const SlotTokens> entries) {
        detail::check(vattn_cache_step(get(), entries.data(), entries.size()));
    }

    /// Which of these would succeed now, each together with those before it that would: `out[i]` tells of
    /// `entries[i]`. What `out` has more is left as it is. One step of exactly those succeeds, unless the
    /// driver refuses or another thread takes the memory first.
    ///
    /// Throws as step does, for anything but memory; InvalidArgument where `out` is shorter than `entries`.
    void fits(Span<const SlotTokens> entries, Span<bool> out) const {
        if (out.size() < entries.size()) {
            detail::refuse("vattn::Cache::fits: out has room for " + std::to_string(out.size()) +
                           " answers, and " + std::to_string(entries.size()) +
                           " slots are asked about; give it as many");
        }
        detail::check(vattn_cache_fits(get(), entries.data(), entries.size(), out.data()));
    }

    /// The same in an array of its own, as long as `entries`. It allocates: keep a buffer on a hot path.
    [[nodiscard]] std::unique_ptr<bool[]> fits(Span<const SlotTokens> entries) const {
        auto out = std::make_unique<bool[]>(entries.size());
        fits(entries, Span<bool>(out.get(), entries.size()));
        return out;
    }

    /// How many of these new requests, in order, could each be given a slot and stepped to so many tokens
    /// now. Counting ends at the first that could not, as a queue does.
    [[nodiscard]] std::size_t admits(Span<const std::uint64_t> prompts) const {
        std::size_t count = 0;
        detail::check(vattn_cache_admits(get(), prompts.data(), prompts.size(), &count));
        return count;
    }

    /// Has memory mapped for tokens that these slots will soon hold. Whoever needs the memory first may take
    /// it. Returns at once; with Background::Off it maps on the calling thread. Where it does not fit, less
    /// is mapped: that is no error.
    ///
    /// Throws StaleSlot; Error of ForeignSlot, SlotBusy, TooManyTokens.
    void prefetch(Span<const SlotTokens> entries) {
        detail::check(vattn_cache_prefetch(get(), entries.data(), entries.size()));
    }

    /// Takes tokens away: the slot now holds that many. What held the others stays mapped, as spare memory of
    /// the slot; the fences say when the device is done with it.
    ///
    /// Throws as retire, and InvalidArgument for more tokens than the slot holds.
    void truncate(const Slot& slot, std::uint64_t tokens, Fences fences) {
        detail::check(vattn_cache_truncate(get(), slot, tokens, fences.data(), fences.size()));
    }

    /// The request is done. Its memory stays mapped until another request adopts it or memory is short; the
    /// fences, one for each stream that touched it, say when the device is done with it. The id is dead.
    ///
    /// Streams and events are alive, and of the context that the driver works in; a stream is synchronised
    /// before it is destroyed. Throws StaleSlot; Error of ForeignSlot, SlotBusy, CapturingStream,
    /// InvalidArgument for no fence, and the driver's refusals.
    void retire(const Slot& slot, Fences fences) {
        detail::check(vattn_cache_retire(get(), slot, fences.data(), fences.size()));
    }

    /// Unmaps memory that holds nobody's tokens, the one of least use first, until `bytes` more are free or
    /// nothing is left to unmap, once its fences and `fences` have fired. Returns what is free now, in bytes,
    /// and at once: flush waits until it is done. With Background::Off it is done on return.
    ///
    /// Throws Error of InvalidArgument for no fence, CapturingStream, and the driver's refusals.
    std::uint64_t reclaim(std::uint64_t bytes, Fences fences) {
        std::uint64_t free = 0;
        detail::check(vattn_cache_reclaim(get(), bytes, fences.data(), fences.size(), &free));
        return free;
    }

    /// Gives memory back to the device until no more than `keep` bytes are held, or until all is given back
    /// that holds nobody's tokens, once its fences and `fences` have fired. Returns what is held now, in
    /// bytes, and at once: flush waits until it is done. With Background::Off it is done on return.
    ///
    /// Throws as reclaim.
    std::uint64_t trim(std::uint64_t keep, Fences fences) {
        std::uint64_t held = 0;
        detail::check(vattn_cache_trim(get(), keep, fences.data(), fences.size(), &held));
        return held;
    }

    /// Changes how many bytes may be held. With a smaller budget memory is given back before it returns, and
    /// the fences of what is unmapped are waited for.
    ///
    /// Throws InvalidConfig for a budget that the constructor would refuse, InvalidArgument for Auto, OutOfBudget
    /// where slots in use and pins need more, and the driver's refusals. The old budget stays.
    void set_budget(std::uint64_t budget) { detail::check(vattn_cache_set_budget(get(), budget)); }

    /// Does, on the calling thread, what the mapper would do by now: with Background::Caller, once an
    /// iteration. Waits for nobody. Returns whether something is left that it will do later.
    ///
    /// Throws InvalidArgument with another choice of Background.
    bool tend() {
        bool more = false;
        detail::check(vattn_cache_tend(get(), &more));
        return more;
    }

    /// Waits until all is done that the mapper was asked for before, and for its fences, which therefore have
    /// to fire.
    ///
    /// Throws what a call of the driver in the background failed with since the last flush. Nothing is lost
    /// by it.
    void flush() { detail::check(vattn_cache_flush(get())); }

    /// Keeps what backs the slot's tokens now mapped where it is, for as long as the pin lives: through
    /// retire, truncate, reclaim, trim, a smaller budget, adoption by another request, and the end of this
    /// cache. Its contents are not kept: whoever has the slot writes there.
    ///
    /// Throws StaleSlot; Error of ForeignSlot, SlotBusy.
    [[nodiscard]] Pin pin(const Slot& slot) const {
        vattn_pin* made = nullptr;
        detail::check(vattn_pin_create(get(), &slot, &made));
        return Pin(made);
    }

    /// Keeps the addresses of all tensors reserved, and no memory.
    [[nodiscard]] Pin pin_addresses() const {
        vattn_pin* made = nullptr;
        detail::check(vattn_pin_create(get(), nullptr, &made));
        return Pin(made);
    }

    /// Whether it can be trusted with more work.
    [[nodiscard]] Health health() const {
        std::int32_t health = 0;
        detail::check(vattn_cache_health(get(), &health));
        return static_cast<Health>(health);
    }

    /// How much memory is used for what. Waits for nobody and allocates nothing.
    [[nodiscard]] Bytes bytes() const {
        auto bytes = detail::sized<Bytes>();
        detail::check(vattn_cache_bytes(get(), &bytes));
        return bytes;
    }

    /// What is counted, at any time and without waiting for anybody.
    [[nodiscard]] Stats stats() const {
        auto stats = detail::sized<Stats>();
        detail::check(vattn_cache_stats(get(), &stats));
        return stats;
    }

    /// Calls of the driver of one verb. Throws InvalidArgument for Verb::Any: `stats().driver` has all of
    /// them.
    [[nodiscard]] CallStats calls(Verb verb) const {
        CallStats calls{};
        detail::check(vattn_cache_calls(get(), static_cast<std::int32_t>(verb), &calls));
        return calls;
    }

    /// What stats has and more, as one JSON object.
    [[nodiscard]] std::string stats_json() const { return json(vattn_cache_stats_json); }

    /// Walks through all slots and extents, compares the books, and tells everything as one JSON object.
    /// Waits for operations under way. Throws Error of Internal where the books disagree, which is a defect
    /// of the library.
    [[nodiscard]] std::string report_json() const { return json(vattn_cache_report_json); }

private:
    static vattn_cache* make(const Config& config, const Geometry& geometry, const Driver& driver) {
        const vattn_config of_c = config.to_c();
        vattn_cache* made = nullptr;
        detail::check(vattn_cache_create(&of_c, geometry.get(), driver.get(), &made));
        return made;
    }

    template <class F>
    View view_by(F function, std::uint32_t layer, Part part) const {
        vattn_view view{};
        detail::check(function(get(), layer, static_cast<std::int32_t>(part), &view));
        return View(view);
    }

    template <class F>
    std::string json(F function) const {
        char* json = nullptr;
        detail::check(function(get(), &json));
        return detail::take(json);
    }
};

// ---- buffers ----

/// How large a buffer is, and its extents.
struct BufferOptions {
    /// Bytes of addresses, rounded up to granules. Addresses cost nothing.
    std::uint64_t size;
    /// The most bytes of one allocation: a granule times a power of two. 0 for 32 MiB, or a granule where
    /// that is more. Large ones make commits cheap, small ones make decommits exact.
    std::uint64_t largest_extent = 0;
};

/// A range of addresses that never move, with memory behind the bytes that are committed. Any thread may call
/// any method at any time; moving and destroying it are for one alone.
class Buffer : public Handle<vattn_buffer, vattn_buffer_destroy> {
public:
    /// None yet.
    Buffer() noexcept = default;

    /// Takes over a handle of C.
    explicit Buffer(vattn_buffer* handle) noexcept : Handle(handle) {}

    /// Reserves addresses, with nothing committed. The driver stays alive as long as the buffer does.
    ///
    /// Throws InvalidArgument for a size of 0 or one that granules can't round up, and a largest extent that
    /// is no granule times a power of two; OutOfAddressSpace.
    Buffer(const BufferOptions& options, const Driver& driver) : Handle(make(options, driver)) {}

    /// Backs a range: afterwards every byte of it can be touched. What is committed already stays as it is,
    /// with what is in it; what is in new memory is not defined. Ranges need not begin or end on granules.
    ///
    /// Throws OutOfDeviceMemory; Error of InvalidArgument for a range that is empty or reaches beyond the
    /// buffer, OutOfMappings, and the driver's other refusals.
    void commit(std::uint64_t offset, std::uint64_t size) {
        detail::check(vattn_buffer_commit(get(), offset, size));
    }

    /// Says that the bytes of a range are no longer wanted, and waits for the fences, one for each stream
    /// that touched it. Memory is given back by whole extents of which no byte is committed any more.
    ///
    /// Throws Error of InvalidArgument for a range that is empty or reaches beyond the buffer and for no
    /// fence, CapturingStream, and the driver's refusals: the range is as it was. Broken of Unhealthy where
    /// the driver stopped in the middle and would not undo: the text names the bytes that are not committed
    /// any more, and all others are as they were.
    void decommit(std::uint64_t offset, std::uint64_t size, Fences fences) {
        detail::check(vattn_buffer_decommit(get(), offset, size, fences.data(), fences.size()));
    }

    /// Where it is, and how much of it is committed and held.
    [[nodiscard]] BufferInfo info() const {
        auto info = detail::sized<BufferInfo>();
        detail::check(vattn_buffer_describe(get(), &info));
        return info;
    }

    /// Pins it: its addresses, and what is committed in it, last as long as the pin. Decommitting works as
    /// ever.
    [[nodiscard]] Pin pin() const {
        vattn_pin* made = nullptr;
        detail::check(vattn_pin_create_buffer(get(), &made));
        return Pin(made);
    }

private:
    static vattn_buffer* make(const BufferOptions& options, const Driver& driver) {
        check_abi();
        auto of_c = detail::sized<vattn_buffer_options>();
        of_c.size = options.size;
        of_c.largest_extent = options.largest_extent;
        vattn_buffer* made = nullptr;
        detail::check(vattn_buffer_create(&of_c, driver.get(), &made));
        return made;
    }
};

} // namespace vattn

#endif // VATTN_HPP
