// Figures and faults of the emulated NVML.
// RUN: MIRAI_EMU_MEMORY=1000000 MIRAI_EMU_XID=48
#include "nvml_api.h"
#include "test.h"

#define NVML_MUST(call) EXPECT((call) == NVML_SUCCESS)

int main() {
    nvmlDevice_t device = nullptr, other = nullptr;
    unsigned n = 0;
    EXPECT(nvmlDeviceGetCount_v2(&n) == NVML_ERROR_UNINITIALIZED);
    NVML_MUST(nvmlInit_v2());
    NVML_MUST(nvmlDeviceGetCount_v2(&n));
    EXPECT(n == 1);
    NVML_MUST(nvmlDeviceGetHandleByIndex_v2(0, &device));
    EXPECT(nvmlDeviceGetHandleByIndex_v2(1, &other) == NVML_ERROR_NOT_FOUND);

    MUST(cuInit(0));
    char bus[32] = "";
    MUST(cuDeviceGetPCIBusId(bus, sizeof bus, 0));
    NVML_MUST(nvmlDeviceGetHandleByPciBusId_v2(bus, &other));
    EXPECT(other == device);
    NVML_MUST(nvmlDeviceGetHandleByPciBusId_v2(("0000" + std::string(bus)).c_str(), &other));
    EXPECT(nvmlDeviceGetHandleByPciBusId_v2("0000:0B:00.0", &other) == NVML_ERROR_NOT_FOUND);
    char uuid[96] = "";
    NVML_MUST(nvmlDeviceGetUUID(device, uuid, sizeof uuid));
    NVML_MUST(nvmlDeviceGetHandleByUUID(uuid, &other));
    EXPECT(other == device);
    EXPECT(nvmlDeviceGetUUID(device, uuid, 4) == NVML_ERROR_INSUFFICIENT_SIZE);
    CUuuid driver{};
    MUST(cuDeviceGetUuid_v2(&driver, 0));
    char first[16];
    snprintf(first, sizeof first, "GPU-%02x%02x", driver.bytes[0], driver.bytes[1]);
    EXPECT(!strncmp(uuid, first, 8));

    CUcontext context = nullptr;
    MUST(cuDevicePrimaryCtxRetain(&context, 0));
    MUST(cuCtxSetCurrent(context));
    CUdeviceptr memory = 0;
    MUST(cuMemAlloc_v2(&memory, 1000));
    nvmlMemory_t info{};
    NVML_MUST(nvmlDeviceGetMemoryInfo(device, &info));
    EXPECT(info.total == 1000000 && info.used == 1000 && info.free == 999000);
    nvmlMemory_v2_t info2{};
    EXPECT(nvmlDeviceGetMemoryInfo_v2(device, &info2) == NVML_ERROR_ARGUMENT_VERSION_MISMATCH);
    info2.version = sizeof info2 | 2u << 24;
    NVML_MUST(nvmlDeviceGetMemoryInfo_v2(device, &info2));
    EXPECT(info2.used == 1000);

    unsigned long long before = 0, after = 0;
    NVML_MUST(nvmlDeviceGetTotalEnergyConsumption(device, &before));
    while (after <= before) {
        NVML_MUST(nvmlDeviceGetTotalEnergyConsumption(device, &after));
    }
    NVML_MUST(nvmlDeviceGetPowerUsage(device, &n));
    EXPECT(n == 100000);
    NVML_MUST(nvmlDeviceGetClockInfo(device, NVML_CLOCK_MEM, &n));
    EXPECT(n == 3201);
    EXPECT(nvmlDeviceGetClockInfo(device, 9, &n) == NVML_ERROR_INVALID_ARGUMENT);
    NVML_MUST(nvmlDeviceGetTemperature(device, NVML_TEMPERATURE_GPU, &n));
    EXPECT(n == 40);

    nvmlEventSet_t set = nullptr;
    nvmlEventData_t event{};
    NVML_MUST(nvmlEventSetCreate(&set));
    EXPECT(nvmlDeviceRegisterEvents(device, 1, set) == NVML_ERROR_NOT_SUPPORTED);
    NVML_MUST(nvmlDeviceRegisterEvents(device, nvmlEventTypeXidCriticalError, set));
    NVML_MUST(nvmlEventSetWait_v2(set, &event, 0));
    EXPECT(event.device == device && event.eventType == nvmlEventTypeXidCriticalError && event.eventData == 48);
    EXPECT(nvmlEventSetWait_v2(set, &event, 1) == NVML_ERROR_TIMEOUT);
    std::thread raiser([] { mirai_emu_raise_xid(79); });
    NVML_MUST(nvmlEventSetWait_v2(set, &event, 10000));
    EXPECT(event.eventData == 79);
    raiser.join();
    NVML_MUST(nvmlEventSetFree(set));
    EXPECT(nvmlEventSetWait_v2(set, &event, 0) == NVML_ERROR_INVALID_ARGUMENT);
    NVML_MUST(nvmlShutdown());
    EXPECT(nvmlShutdown() == NVML_ERROR_UNINITIALIZED);
    return report();
}
