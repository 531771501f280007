// The emulated NVML: one H200 that draws a steady power, with the memory that the emulated driver says.
//
// Owns figures and events of faults. MIRAI_EMU_XID=N: that fault has happened when a program begins to listen.
#include "nvml_api.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <set>

#include "cuda_api.h"

struct nvmlDevice_st {};
struct nvmlEventSet_st {
    bool faults = false;
    std::deque<unsigned long long> queue;
};

namespace {

constexpr unsigned kPower = 100000, kPowerLimit = 700000;  // milliwatts
constexpr unsigned kTemperature = 40;
constexpr char kBusId[] = "0000:0A:00.0";
constexpr char kUuid[] = "GPU-6d697261-692d-656d-756c-617465640001";
constexpr size_t kMaxEvents = 1024;
constexpr unsigned kMemoryVersion2 = sizeof(nvmlMemory_v2_t) | 2u << 24;

struct State {
    std::mutex mutex;
    std::condition_variable raised;
    int users = 0;
    nvmlDevice_st device;
    std::set<nvmlEventSet_t> sets;
};
State& state() {
    static State* the_state = new State;
    return *the_state;
}

nvmlReturn_t copy_text(char* to, unsigned length, const char* text) {
    if (!to) {
        return NVML_ERROR_INVALID_ARGUMENT;
    }
    if (strlen(text) >= length) {
        return NVML_ERROR_INSUFFICIENT_SIZE;
    }
    memcpy(to, text, strlen(text) + 1);
    return NVML_SUCCESS;
}

template <class Body>
nvmlReturn_t started(Body body) {
    std::lock_guard<std::mutex> lock(state().mutex);
    return state().users ? body() : NVML_ERROR_UNINITIALIZED;
}

// A figure of the one device.
template <class T, class Body>
nvmlReturn_t figure(nvmlDevice_t device, T* place, Body body) {
    return started([&] {
        if (device != &state().device || !place) {
            return NVML_ERROR_INVALID_ARGUMENT;
        }
        return body();
    });
}

template <class T>
nvmlReturn_t number(nvmlDevice_t device, T* place, T value) {
    return figure(device, place, [&] {
        *place = value;
        return NVML_SUCCESS;
    });
}

nvmlReturn_t handle_if(bool right, nvmlDevice_t* device) {
    return started([&] {
        if (!device) {
            return NVML_ERROR_INVALID_ARGUMENT;
        }
        *device = right ? &state().device : nullptr;
        return right ? NVML_SUCCESS : NVML_ERROR_NOT_FOUND;
    });
}

nvmlReturn_t clock_of(nvmlDevice_t device, unsigned clock, unsigned* mhz) {
    if (clock > NVML_CLOCK_VIDEO) {
        return NVML_ERROR_INVALID_ARGUMENT;
    }
    return number(device, mhz, clock == NVML_CLOCK_MEM ? 3201u : 1980u);
}

// A domain may have four digits or eight.
bool is_bus_id(const char* id) {
    if (!id) {
        return false;
    }
    const size_t length = strlen(id), mine = sizeof kBusId - 1;
    return !strcasecmp(id, kBusId) || (length == mine + 4 && !strncmp(id, "0000", 4) && !strcasecmp(id + 4, kBusId));
}

}  // namespace

extern "C" {

nvmlReturn_t nvmlInitWithFlags(unsigned) {
    std::lock_guard<std::mutex> lock(state().mutex);
    state().users++;
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlInit_v2() { return nvmlInitWithFlags(0); }

nvmlReturn_t nvmlShutdown() {
    return started([] {
        state().users--;
        return NVML_SUCCESS;
    });
}

const char* nvmlErrorString(nvmlReturn_t code) {
    switch (code) {
        case NVML_SUCCESS:
            return "The operation was successful";
        case NVML_ERROR_UNINITIALIZED:
            return "NVML was not first initialized with nvmlInit()";
        case NVML_ERROR_INVALID_ARGUMENT:
            return "A supplied argument is invalid";
        case NVML_ERROR_NOT_SUPPORTED:
            return "The requested operation is not available on target device";
        case NVML_ERROR_NOT_FOUND:
            return "A query to find an object was unsuccessful";
        case NVML_ERROR_INSUFFICIENT_SIZE:
            return "An input argument is not large enough";
        case NVML_ERROR_TIMEOUT:
            return "User provided timeout passed";
        case NVML_ERROR_ARGUMENT_VERSION_MISMATCH:
            return "The provided version is invalid/unsupported";
        case NVML_ERROR_UNKNOWN:
            break;
    }
    return "An internal driver error occurred";
}

nvmlReturn_t nvmlSystemGetDriverVersion(char* version, unsigned length) {
    return started([&] { return copy_text(version, length, "580.0.0 (emulated)"); });
}

nvmlReturn_t nvmlDeviceGetCount_v2(unsigned* count) {
    return started([&] {
        *count = 1;
        return NVML_SUCCESS;
    });
}
nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned index, nvmlDevice_t* device) {
    return handle_if(index == 0, device);
}
nvmlReturn_t nvmlDeviceGetHandleByPciBusId_v2(const char* id, nvmlDevice_t* device) {
    return handle_if(is_bus_id(id), device);
}
nvmlReturn_t nvmlDeviceGetHandleByUUID(const char* uuid, nvmlDevice_t* device) {
    return handle_if(uuid && !strcmp(uuid, kUuid), device);
}
nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t device, char* name, unsigned length) {
    return figure(device, name, [&] { return copy_text(name, length, "Emulated H200"); });
}
nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t device, char* uuid, unsigned length) {
    return figure(device, uuid, [&] { return copy_text(uuid, length, kUuid); });
}

nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t device, nvmlMemory_t* memory) {
    return figure(device, memory, [&] {
        size_t used = 0, total = 0;
        mirai_emu_memory(&used, &total);
        *memory = {total, total - used, used};
        return NVML_SUCCESS;
    });
}
nvmlReturn_t nvmlDeviceGetMemoryInfo_v2(nvmlDevice_t device, nvmlMemory_v2_t* memory) {
    return figure(device, memory, [&] {
        if (memory->version != kMemoryVersion2) {
            return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
        }
        size_t used = 0, total = 0;
        mirai_emu_memory(&used, &total);
        *memory = {kMemoryVersion2, total, 0, total - used, used};
        return NVML_SUCCESS;
    });
}

nvmlReturn_t nvmlDeviceGetTotalEnergyConsumption(nvmlDevice_t device, unsigned long long* millijoules) {
    static const auto start = std::chrono::steady_clock::now();
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    return number(device, millijoules, static_cast<unsigned long long>(elapsed.count() * kPower) + 1);
}
nvmlReturn_t nvmlDeviceGetPowerUsage(nvmlDevice_t device, unsigned* milliwatts) {
    return number(device, milliwatts, kPower);
}
nvmlReturn_t nvmlDeviceGetEnforcedPowerLimit(nvmlDevice_t device, unsigned* milliwatts) {
    return number(device, milliwatts, kPowerLimit);
}
nvmlReturn_t nvmlDeviceGetClockInfo(nvmlDevice_t device, unsigned clock, unsigned* mhz) {
    return clock_of(device, clock, mhz);
}
nvmlReturn_t nvmlDeviceGetMaxClockInfo(nvmlDevice_t device, unsigned clock, unsigned* mhz) {
    return clock_of(device, clock, mhz);
}
nvmlReturn_t nvmlDeviceGetTemperature(nvmlDevice_t device, unsigned sensor, unsigned* celsius) {
    return sensor == NVML_TEMPERATURE_GPU ? number(device, celsius, kTemperature) : NVML_ERROR_INVALID_ARGUMENT;
}
nvmlReturn_t nvmlDeviceGetUtilizationRates(nvmlDevice_t device, nvmlUtilization_t* rates) {
    return number(device, rates, nvmlUtilization_t{0, 0});
}

nvmlReturn_t nvmlDeviceGetSupportedEventTypes(nvmlDevice_t device, unsigned long long* types) {
    return number(device, types, nvmlEventTypeXidCriticalError);
}

nvmlReturn_t nvmlEventSetCreate(nvmlEventSet_t* set) {
    return started([&] {
        if (!set) {
            return NVML_ERROR_INVALID_ARGUMENT;
        }
        *set = new nvmlEventSet_st;
        state().sets.insert(*set);
        return NVML_SUCCESS;
    });
}

nvmlReturn_t nvmlDeviceRegisterEvents(nvmlDevice_t device, unsigned long long types, nvmlEventSet_t set) {
    return figure(device, set, [&] {
        if (!state().sets.count(set)) {
            return NVML_ERROR_INVALID_ARGUMENT;
        }
        if (types & ~nvmlEventTypeXidCriticalError) {
            return NVML_ERROR_NOT_SUPPORTED;
        }
        set->faults = types != 0;
        const char* already = getenv("MIRAI_EMU_XID");
        if (already && set->faults) {
            set->queue.push_back(strtoull(already, nullptr, 10));
        }
        return NVML_SUCCESS;
    });
}

nvmlReturn_t nvmlEventSetWait_v2(nvmlEventSet_t set, nvmlEventData_t* data, unsigned milliseconds) {
    std::unique_lock<std::mutex> lock(state().mutex);
    if (!state().users) {
        return NVML_ERROR_UNINITIALIZED;
    }
    if (!state().sets.count(set) || !data) {
        return NVML_ERROR_INVALID_ARGUMENT;
    }
    const bool came = state().raised.wait_for(lock, std::chrono::milliseconds(milliseconds),
                                              [&] { return !set->queue.empty(); });
    if (!came) {
        return NVML_ERROR_TIMEOUT;
    }
    *data = {&state().device, nvmlEventTypeXidCriticalError, set->queue.front(), 0xffffffff, 0xffffffff};
    set->queue.pop_front();
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlEventSetFree(nvmlEventSet_t set) {
    return started([&] {
        if (!state().sets.erase(set)) {
            return NVML_ERROR_INVALID_ARGUMENT;
        }
        delete set;
        return NVML_SUCCESS;
    });
}

void mirai_emu_raise_xid(unsigned long long number) {
    std::lock_guard<std::mutex> lock(state().mutex);
    for (nvmlEventSet_t set : state().sets) {
        if (set->faults && set->queue.size() < kMaxEvents) {
            set->queue.push_back(number);
        }
    }
    state().raised.notify_all();
}
}
