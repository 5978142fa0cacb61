#include "unicorn_api.h"

#include <dlfcn.h>
#include <stdio.h>

#include "code_pages.h"

struct unicorn_api unicorn;

static const struct {
    const char *name;
    size_t slot;
} symbols[] = {
    {"uc_version", offsetof(struct unicorn_api, version)},
    {"uc_strerror", offsetof(struct unicorn_api, strerror)},
    {"uc_open", offsetof(struct unicorn_api, open)},
    {"uc_close", offsetof(struct unicorn_api, close)},
    {"uc_ctl", offsetof(struct unicorn_api, ctl)},
    {"uc_reg_read", offsetof(struct unicorn_api, reg_read)},
    {"uc_reg_write", offsetof(struct unicorn_api, reg_write)},
    {"uc_mem_map", offsetof(struct unicorn_api, mem_map)},
    {"uc_mem_map_ptr", offsetof(struct unicorn_api, mem_map_ptr)},
    {"uc_mmio_map", offsetof(struct unicorn_api, mmio_map)},
    {"uc_mem_unmap", offsetof(struct unicorn_api, mem_unmap)},
    {"uc_mem_write", offsetof(struct unicorn_api, mem_write)},
    {"uc_hook_add", offsetof(struct unicorn_api, hook_add)},
    {"uc_hook_del", offsetof(struct unicorn_api, hook_del)},
    {"uc_emu_start", offsetof(struct unicorn_api, emu_start)},
    {"uc_emu_stop", offsetof(struct unicorn_api, emu_stop)},
    {"uc_context_size", offsetof(struct unicorn_api, context_size)},
    {"uc_context_alloc", offsetof(struct unicorn_api, context_alloc)},
    {"uc_context_save", offsetof(struct unicorn_api, context_save)},
    {"uc_context_restore", offsetof(struct unicorn_api, context_restore)},
    {"uc_context_free", offsetof(struct unicorn_api, context_free)},
};

/* The hook and register numbers of unicorn_api.h, and RDTSC hooks, are those of 2.1 onwards. */
static const unsigned int wanted_major = 2, wanted_minor = 1;

static char message[256];

static const char *load_symbols(void *library)
{
    unsigned int major, minor;

    for (size_t i = 0; i < sizeof(symbols) / sizeof(symbols[0]); i++) {
        void *address = dlsym(library, symbols[i].name);
        if (!address) {
            snprintf(message, sizeof(message), "it has no function %s", symbols[i].name);
            return message;
        }
        *(void **)((char *)&unicorn + symbols[i].slot) = address;
    }
    unicorn.version(&major, &minor);
    if (major != wanted_major || minor < wanted_minor) {
        snprintf(message, sizeof(message), "it is version %u.%u, and %u.%u or a later 2.x is needed",
                 major, minor, wanted_major, wanted_minor);
        return message;
    }
    return NULL;
}

const char *unicorn_load(const char *path)
{
    static void *loaded;
    const char *problem;
    void *library;

    if (loaded) {
        return NULL;
    }
    library = dlopen(path, RTLD_LAZY | RTLD_LOCAL);
    if (!library) {
        return dlerror();
    }
    problem = load_symbols(library);
    if (!problem) {
        problem = tcg_code_pages_hook(library);
    }
    if (problem) {
        dlclose(library);
        return problem;
    }
    loaded = library;
    return NULL;
}
