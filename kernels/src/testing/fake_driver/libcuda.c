// A CUDA driver with no card behind it: memory is the host's, kernels do nothing, everything is done when the call returns.
//
// It refuses what the driver refuses (handles that it did not give, calls without a current context, whatever may not be done
// while a stream is recorded), counts calls and living handles, and fails where a test says so: see fake_driver.rs.

#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int CUresult;
typedef unsigned long long CUdeviceptr;

enum {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201,
    INVALID_PTX = 218,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CONTEXT_IS_DESTROYED = 709,
};

enum Kind { MEMORY, PINNED, STREAM, EVENT, MODULE, FUNCTION, GRAPH, GRAPH_EXEC, LINK };

struct Handle {
    enum Kind kind;
    void *value;
    size_t bytes;
    int payload;
    // Of a function.
    const void *module;
    char name[64];
    struct Handle *next;
};

struct Injection {
    char function[64];
    // Calls of it that still pass, and those that then fail.
    long passing, failing;
    CUresult error;
};

#define MAX_INJECTIONS 16
#define MAX_FUNCTIONS 64

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct {
    int num_devices, major, minor, version;
    size_t total_bytes, used_bytes;
    long context_references;
    // Of the context: a new one each time that the last holder let go of it.
    long generation;
    // What every call gives from now on; 0 while all is well.
    CUresult broken;
    int is_capturing, is_invalidated, num_captured;
    struct Handle *handles;
    struct Injection injections[MAX_INJECTIONS];
    struct { char name[64]; long count; } calls[MAX_FUNCTIONS];
    long launches, replays;
    unsigned last_grid, last_shared_bytes;
    unsigned long long last_first_argument;
} fake;

static __thread long current;

void fake_reset(void) {
    pthread_mutex_lock(&lock);
    for (struct Handle *handle = fake.handles; handle;) {
        struct Handle *next = handle->next;
        free(handle->kind == MEMORY || handle->kind == PINNED ? handle->value : NULL);
        free(handle);
        handle = next;
    }
    long generation = fake.generation;
    memset(&fake, 0, sizeof fake);
    fake.generation = generation + 1;
    fake.num_devices = 1;
    fake.major = 9;
    fake.version = 13000;
    fake.total_bytes = (size_t)1 << 28;
    pthread_mutex_unlock(&lock);
}

void fake_set(const char *what, long value) {
    pthread_mutex_lock(&lock);
    if (!strcmp(what, "num_devices")) fake.num_devices = (int)value;
    if (!strcmp(what, "major")) fake.major = (int)value;
    if (!strcmp(what, "minor")) fake.minor = (int)value;
    if (!strcmp(what, "version")) fake.version = (int)value;
    if (!strcmp(what, "total_bytes")) fake.total_bytes = (size_t)value;
    if (!strcmp(what, "broken")) fake.broken = (CUresult)value;
    pthread_mutex_unlock(&lock);
}

// After `passing` more calls, `failing` calls of a function give `error`.
void fake_fail(const char *function, long passing, long failing, int error) {
    pthread_mutex_lock(&lock);
    for (int index = 0; index < MAX_INJECTIONS; ++index) {
        struct Injection *injection = &fake.injections[index];
        if (!injection->function[0] || !strcmp(injection->function, function)) {
            snprintf(injection->function, sizeof injection->function, "%s", function);
            injection->passing = passing;
            injection->failing = failing;
            injection->error = error;
            break;
        }
    }
    pthread_mutex_unlock(&lock);
}

// Calls of a function, or what its name says.
long fake_count(const char *what) {
    pthread_mutex_lock(&lock);
    long count = 0;
    if (!strcmp(what, "living")) {
        // Functions are part of their modules.
        for (struct Handle *handle = fake.handles; handle; handle = handle->next) count += handle->kind != FUNCTION;
        count += fake.context_references;
    } else if (!strcmp(what, "launches")) {
        count = fake.launches;
    } else if (!strcmp(what, "replays")) {
        count = fake.replays;
    } else if (!strcmp(what, "last_grid")) {
        count = fake.last_grid;
    } else if (!strcmp(what, "last_shared_bytes")) {
        count = fake.last_shared_bytes;
    } else if (!strcmp(what, "last_first_argument")) {
        count = (long)fake.last_first_argument;
    } else {
        for (int index = 0; index < MAX_FUNCTIONS; ++index)
            if (!strcmp(fake.calls[index].name, what)) count = fake.calls[index].count;
    }
    pthread_mutex_unlock(&lock);
    return count;
}

// What a call is, as far as the driver cares.
enum Needs { NOTHING = 0, CONTEXT = 1, NO_CAPTURE = 2 };

// Counts the call, and says whether it goes on. The lock is held from here to `done`.
static CUresult begin(const char *function, int needs) {
    pthread_mutex_lock(&lock);
    for (int index = 0; index < MAX_FUNCTIONS; ++index) {
        if (!fake.calls[index].name[0] || !strcmp(fake.calls[index].name, function)) {
            snprintf(fake.calls[index].name, sizeof fake.calls[index].name, "%s", function);
            ++fake.calls[index].count;
            break;
        }
    }
    if (fake.broken) return fake.broken;
    for (int index = 0; index < MAX_INJECTIONS; ++index) {
        struct Injection *injection = &fake.injections[index];
        if (strcmp(injection->function, function) || injection->failing <= 0) continue;
        if (injection->passing > 0) {
            --injection->passing;
            continue;
        }
        --injection->failing;
        // Errors of the device itself stay: nothing works in this context any more.
        if (injection->error >= 700 && injection->error < 800) fake.broken = injection->error;
        if (fake.is_capturing) fake.is_invalidated = 1;
        return injection->error;
    }
    if (needs & CONTEXT) {
        if (!current) return INVALID_CONTEXT;
        if (current != fake.generation || !fake.context_references) return CONTEXT_IS_DESTROYED;
    }
    if ((needs & NO_CAPTURE) && fake.is_capturing) {
        fake.is_invalidated = 1;
        return CAPTURE_UNSUPPORTED;
    }
    return SUCCESS;
}

static CUresult done(CUresult result) {
    pthread_mutex_unlock(&lock);
    return result;
}

#define BEGIN(needs) \
    CUresult begun = begin(__func__, needs); \
    if (begun) return done(begun)

static struct Handle *add(enum Kind kind, void *value, size_t bytes) {
    struct Handle *handle = calloc(1, sizeof *handle);
    handle->kind = kind;
    handle->value = value ? value : (void *)handle;
    handle->bytes = bytes;
    handle->next = fake.handles;
    fake.handles = handle;
    return handle;
}

static struct Handle *find(enum Kind kind, const void *value) {
    for (struct Handle *handle = fake.handles; handle; handle = handle->next)
        if (handle->kind == kind && handle->value == value) return handle;
    return NULL;
}

// Whether so many bytes from an address on were given as memory.
static int is_inside(enum Kind kind, const void *at, size_t bytes) {
    for (struct Handle *handle = fake.handles; handle; handle = handle->next) {
        const char *start = handle->value;
        if (handle->kind == kind && (const char *)at >= start && (const char *)at + bytes <= start + handle->bytes) return 1;
    }
    return 0;
}

static CUresult give_back(enum Kind kind, const void *value) {
    for (struct Handle **link = &fake.handles; *link; link = &(*link)->next) {
        struct Handle *handle = *link;
        if (handle->kind != kind || handle->value != value) continue;
        *link = handle->next;
        if (kind == MEMORY) fake.used_bytes -= handle->bytes;
        if (kind == MEMORY || kind == PINNED) free(handle->value);
        free(handle);
        return SUCCESS;
    }
    return INVALID_HANDLE;
}

CUresult cuInit(unsigned flags) {
    BEGIN(NOTHING);
    return done(flags ? INVALID_VALUE : SUCCESS);
}

CUresult cuDriverGetVersion(int *version) {
    BEGIN(NOTHING);
    *version = fake.version;
    return done(SUCCESS);
}

CUresult cuGetErrorName(CUresult error, const char **text) {
    switch (error) {
        case OUT_OF_MEMORY: *text = "CUDA_ERROR_OUT_OF_MEMORY"; break;
        case 100: *text = "CUDA_ERROR_NO_DEVICE"; break;
        case INVALID_PTX: *text = "CUDA_ERROR_INVALID_PTX"; break;
        case 700: *text = "CUDA_ERROR_ILLEGAL_ADDRESS"; break;
        case CAPTURE_UNSUPPORTED: *text = "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"; break;
        case CAPTURE_INVALIDATED: *text = "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"; break;
        case CONTEXT_IS_DESTROYED: *text = "CUDA_ERROR_CONTEXT_IS_DESTROYED"; break;
        case 999: *text = "CUDA_ERROR_UNKNOWN"; break;
        default: *text = "CUDA_ERROR"; break;
    }
    return SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
    (void)error;
    *text = "the fake driver's words";
    return SUCCESS;
}

CUresult cuDeviceGetCount(int *count) {
    BEGIN(NOTHING);
    *count = fake.num_devices;
    return done(SUCCESS);
}

CUresult cuDeviceGet(int *device, int ordinal) {
    BEGIN(NOTHING);
    if (ordinal < 0 || ordinal >= fake.num_devices) return done(INVALID_DEVICE);
    *device = ordinal;
    return done(SUCCESS);
}

CUresult cuDeviceGetName(char *name, int len, int device) {
    BEGIN(NOTHING);
    snprintf(name, (size_t)len, "fake card %d", device);
    return done(SUCCESS);
}

CUresult cuDeviceGetAttribute(int *value, int attribute, int device) {
    BEGIN(NOTHING);
    (void)device;
    switch (attribute) {
        case 16: *value = 132; break;
        case 38: *value = 50 << 20; break;
        case 75: *value = fake.major; break;
        case 76: *value = fake.minor; break;
        case 97: *value = 227 << 10; break;
        default: return done(INVALID_VALUE);
    }
    return done(SUCCESS);
}

CUresult cuDeviceTotalMem_v2(size_t *bytes, int device) {
    BEGIN(NOTHING);
    (void)device;
    *bytes = fake.total_bytes;
    return done(SUCCESS);
}

CUresult cuDevicePrimaryCtxRetain(void **context, int device) {
    BEGIN(NOTHING);
    (void)device;
    if (!fake.context_references++) ++fake.generation;
    // As the driver does it, a later context may have an earlier one's address.
    *context = (void *)0x1000;
    return done(SUCCESS);
}

// Handles go with a device that failed, whatever the calls say.
CUresult cuDevicePrimaryCtxRelease_v2(int device) {
    CUresult begun = begin(__func__, NOTHING);
    (void)device;
    if (fake.context_references > 0 && !--fake.context_references && fake.broken) {
        while (fake.handles) give_back(fake.handles->kind, fake.handles->value);
    }
    return done(begun);
}

CUresult cuCtxSetCurrent(void *context) {
    BEGIN(NOTHING);
    if (context && !fake.context_references) return done(INVALID_CONTEXT);
    current = context ? fake.generation : 0;
    return done(SUCCESS);
}

CUresult cuCtxSynchronize(void) {
    BEGIN(CONTEXT | NO_CAPTURE);
    return done(SUCCESS);
}

CUresult cuMemGetInfo_v2(size_t *free_bytes, size_t *total_bytes) {
    BEGIN(CONTEXT);
    *free_bytes = fake.total_bytes - fake.used_bytes;
    *total_bytes = fake.total_bytes;
    return done(SUCCESS);
}

CUresult cuMemAlloc_v2(CUdeviceptr *ptr, size_t bytes) {
    BEGIN(CONTEXT | NO_CAPTURE);
    if (!bytes) return done(INVALID_VALUE);
    if (bytes > fake.total_bytes - fake.used_bytes) return done(OUT_OF_MEMORY);
    void *memory = NULL;
    if (posix_memalign(&memory, 256, bytes)) return done(OUT_OF_MEMORY);
    // Whatever was there before.
    memset(memory, 0xa5, bytes);
    fake.used_bytes += bytes;
    add(MEMORY, memory, bytes);
    *ptr = (CUdeviceptr)(uintptr_t)memory;
    return done(SUCCESS);
}

CUresult cuMemFree_v2(CUdeviceptr ptr) {
    BEGIN(CONTEXT);
    return done(give_back(MEMORY, (void *)(uintptr_t)ptr));
}

CUresult cuMemHostAlloc(void **memory, size_t bytes, unsigned flags) {
    BEGIN(CONTEXT | NO_CAPTURE);
    (void)flags;
    *memory = malloc(bytes);
    if (!*memory) return done(OUT_OF_MEMORY);
    memset(*memory, 0xa5, bytes);
    add(PINNED, *memory, bytes);
    return done(SUCCESS);
}

CUresult cuMemFreeHost(void *memory) {
    BEGIN(CONTEXT);
    return done(give_back(PINNED, memory));
}

CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t bytes, void *stream) {
    BEGIN(CONTEXT | NO_CAPTURE);
    // From page-locked memory, or the call would wait for the device.
    if (!find(STREAM, stream) || !is_inside(MEMORY, (void *)(uintptr_t)to, bytes) || !is_inside(PINNED, from, bytes)) return done(INVALID_VALUE);
    memcpy((void *)(uintptr_t)to, from, bytes);
    return done(SUCCESS);
}

CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t bytes, void *stream) {
    BEGIN(CONTEXT | NO_CAPTURE);
    if (!find(STREAM, stream) || !is_inside(MEMORY, (void *)(uintptr_t)from, bytes)) return done(INVALID_VALUE);
    memcpy(to, (void *)(uintptr_t)from, bytes);
    return done(SUCCESS);
}

CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char byte, size_t bytes, void *stream) {
    BEGIN(CONTEXT);
    if (!find(STREAM, stream) || !is_inside(MEMORY, (void *)(uintptr_t)to, bytes)) return done(INVALID_VALUE);
    if (fake.is_capturing) ++fake.num_captured;
    else memset((void *)(uintptr_t)to, byte, bytes);
    return done(SUCCESS);
}

CUresult cuStreamCreate(void **stream, unsigned flags) {
    BEGIN(CONTEXT);
    (void)flags;
    *stream = add(STREAM, NULL, 0)->value;
    return done(SUCCESS);
}

CUresult cuStreamDestroy_v2(void *stream) {
    BEGIN(CONTEXT);
    return done(give_back(STREAM, stream));
}

CUresult cuStreamSynchronize(void *stream) {
    BEGIN(CONTEXT | NO_CAPTURE);
    return done(find(STREAM, stream) ? SUCCESS : INVALID_HANDLE);
}

CUresult cuEventCreate(void **event, unsigned flags) {
    BEGIN(CONTEXT);
    (void)flags;
    *event = add(EVENT, NULL, 0)->value;
    return done(SUCCESS);
}

CUresult cuEventDestroy_v2(void *event) {
    BEGIN(CONTEXT);
    return done(give_back(EVENT, event));
}

CUresult cuEventRecord(void *event, void *stream) {
    BEGIN(CONTEXT);
    return done(find(EVENT, event) && find(STREAM, stream) ? SUCCESS : INVALID_HANDLE);
}

CUresult cuEventSynchronize(void *event) {
    BEGIN(CONTEXT | NO_CAPTURE);
    return done(find(EVENT, event) ? SUCCESS : INVALID_HANDLE);
}

// What is linked is the text itself, behind a mark: modules are made of nothing else.
static const char MARK[8] = "FAKECUB";

CUresult cuLinkCreate_v2(unsigned num_options, int *options, void **values, void **state) {
    BEGIN(CONTEXT);
    struct Handle *handle = add(LINK, NULL, 0);
    handle->payload = (int)num_options;
    // The log's buffer comes with the options, in this order.
    if (num_options == 2 && options[0] == 5) snprintf(values[0], (size_t)(uintptr_t)values[1], "line 7: the fake driver\n takes  no PTX");
    *state = handle->value;
    return done(SUCCESS);
}

CUresult cuLinkAddData_v2(void *state, int type, void *data, size_t bytes, const char *name, unsigned num_options, int *options, void **values) {
    BEGIN(CONTEXT);
    (void)name, (void)options, (void)values;
    struct Handle *handle = find(LINK, state);
    // PTX is text that ends with a zero, and its end is counted.
    if (!handle || type != 1 || num_options || !bytes || ((const char *)data)[bytes - 1] || strlen(data) + 1 != bytes) return done(INVALID_VALUE);
    if (!strstr(data, ".entry")) return done(INVALID_PTX);
    handle->bytes = bytes;
    return done(SUCCESS);
}

CUresult cuLinkComplete(void *state, void **image, size_t *bytes) {
    BEGIN(CONTEXT);
    struct Handle *handle = find(LINK, state);
    if (!handle || !handle->bytes) return done(INVALID_VALUE);
    *image = (void *)MARK;
    *bytes = sizeof MARK;
    return done(SUCCESS);
}

CUresult cuLinkDestroy(void *state) {
    BEGIN(CONTEXT);
    return done(give_back(LINK, state));
}

CUresult cuModuleLoadData(void **module, const void *image) {
    BEGIN(CONTEXT | NO_CAPTURE);
    if (memcmp(image, MARK, sizeof MARK)) return done(200);
    *module = add(MODULE, NULL, 0)->value;
    return done(SUCCESS);
}

CUresult cuModuleUnload(void *module) {
    BEGIN(CONTEXT);
    for (struct Handle *handle = fake.handles; handle;) {
        struct Handle *next = handle->next;
        if (handle->kind == FUNCTION && handle->module == module) give_back(FUNCTION, handle->value);
        handle = next;
    }
    return done(give_back(MODULE, module));
}

CUresult cuModuleGetFunction(void **function, void *module, const char *name) {
    BEGIN(CONTEXT);
    if (!find(MODULE, module)) return done(INVALID_HANDLE);
    if (!strncmp(name, "no_", 3)) return done(NOT_FOUND);
    struct Handle *found = fake.handles;
    while (found && (found->kind != FUNCTION || found->module != module || strcmp(found->name, name))) found = found->next;
    if (!found) {
        found = add(FUNCTION, NULL, 0);
        found->module = module;
        snprintf(found->name, sizeof found->name, "%s", name);
    }
    *function = found->value;
    return done(SUCCESS);
}

CUresult cuFuncSetAttribute(void *function, int attribute, int value) {
    BEGIN(CONTEXT);
    if (!find(FUNCTION, function)) return done(INVALID_HANDLE);
    // MAX_DYNAMIC_SHARED_SIZE_BYTES
    if (attribute != 8 || value < 0 || value > 227 << 10) return done(INVALID_VALUE);
    find(FUNCTION, function)->payload = value;
    return done(SUCCESS);
}

CUresult cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                        void *stream, void **arguments, void **extra) {
    BEGIN(CONTEXT);
    struct Handle *of_module = find(FUNCTION, function);
    if (!of_module || !find(STREAM, stream) || extra) return done(INVALID_HANDLE);
    if (!x || !y || !z || y > 65535 || z > 65535 || !block_x || block_x * block_y * block_z > 1024) return done(INVALID_VALUE);
    if (shared_bytes > 48 << 10 && (int)shared_bytes > of_module->payload) return done(INVALID_VALUE);
    fake.last_grid = x;
    fake.last_shared_bytes = shared_bytes;
    if (arguments && arguments[0]) memcpy(&fake.last_first_argument, arguments[0], sizeof fake.last_first_argument);
    if (fake.is_capturing) ++fake.num_captured;
    else ++fake.launches;
    return done(SUCCESS);
}

CUresult cuStreamBeginCapture_v2(void *stream, int mode) {
    BEGIN(CONTEXT);
    (void)mode;
    if (!find(STREAM, stream) || fake.is_capturing) return done(INVALID_VALUE);
    fake.is_capturing = 1;
    fake.is_invalidated = 0;
    fake.num_captured = 0;
    return done(SUCCESS);
}

CUresult cuStreamEndCapture(void *stream, void **graph) {
    CUresult begun = begin(__func__, CONTEXT);
    int was_capturing = fake.is_capturing, was_invalidated = fake.is_invalidated;
    // It is over, whatever else is said.
    fake.is_capturing = fake.is_invalidated = 0;
    *graph = NULL;
    if (begun) return done(begun);
    if (!was_capturing || !find(STREAM, stream)) return done(INVALID_VALUE);
    if (was_invalidated) return done(CAPTURE_INVALIDATED);
    struct Handle *handle = add(GRAPH, NULL, 0);
    handle->payload = fake.num_captured;
    *graph = handle->value;
    return done(SUCCESS);
}

CUresult cuGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long flags) {
    BEGIN(CONTEXT | NO_CAPTURE);
    struct Handle *from = find(GRAPH, graph);
    if (!from || flags) return done(INVALID_VALUE);
    struct Handle *handle = add(GRAPH_EXEC, NULL, 0);
    handle->payload = from->payload;
    *executable = handle->value;
    return done(SUCCESS);
}

CUresult cuGraphDestroy(void *graph) {
    BEGIN(CONTEXT);
    return done(give_back(GRAPH, graph));
}

CUresult cuGraphExecDestroy(void *executable) {
    BEGIN(CONTEXT);
    return done(give_back(GRAPH_EXEC, executable));
}

CUresult cuGraphLaunch(void *executable, void *stream) {
    BEGIN(CONTEXT | NO_CAPTURE);
    struct Handle *handle = find(GRAPH_EXEC, executable);
    if (!handle || !find(STREAM, stream)) return done(INVALID_HANDLE);
    fake.launches += handle->payload;
    ++fake.replays;
    return done(SUCCESS);
}
