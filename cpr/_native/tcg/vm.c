#include "vm.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "engine.h"
#include "interrupt.h"
#include "ram.h"

enum { MP_RUNNABLE = 0, MP_HALTED = 3 };
enum { EVENTS = CPR_TCG_INIT | CPR_TCG_SIPI };
enum { CONTINUE = -1 };

static const uint64_t slice_ns = 1000000;
static const uint64_t second_ns = 1000000000;
static const uint64_t page_size = 4096;

struct cpr_tcg {
    pthread_mutex_t lock;
    struct tcg_ram_map ram;
    struct tcg_notifies notifies;
    uint32_t vcpu_count;
    struct cpr_tcg_vcpu *vcpus; /* the newest one */

    /* Who may run guest code.  Tickets make it fair. */
    pthread_cond_t turn_changed;
    uint64_t next_ticket;
    uint64_t serving;
    struct cpr_tcg_vcpu *holder;

    /* The TSC, which is `tsc` while time stands still. */
    int time_runs;
    uint64_t tsc;
    uint64_t tsc_offset;
};

struct cpr_tcg_vcpu {
    struct tcg_engine engine;  /* requests are added with the lock held */
    struct cpr_tcg *tcg;
    struct cpr_tcg_vcpu *older;
    pthread_cond_t wake;
    uint32_t mp_state;
};

static void request_locked(struct cpr_tcg_vcpu *vcpu, uint32_t requests)
{
    tcg_add_requests(&vcpu->engine, requests);
    pthread_cond_signal(&vcpu->wake);
}

void cpr_tcg_request(struct cpr_tcg_vcpu *vcpu, uint32_t requests)
{
    pthread_mutex_lock(&vcpu->tcg->lock);
    request_locked(vcpu, requests);
    pthread_mutex_unlock(&vcpu->tcg->lock);
}

uint32_t cpr_tcg_take_requests(struct cpr_tcg_vcpu *vcpu, uint32_t requests)
{
    return tcg_take_requests(&vcpu->engine, requests);
}

static void wait_for_request(struct cpr_tcg_vcpu *vcpu, uint32_t requests)
{
    pthread_mutex_lock(&vcpu->tcg->lock);
    while (!(tcg_requests(&vcpu->engine) & requests)) {
        pthread_cond_wait(&vcpu->wake, &vcpu->tcg->lock);
    }
    pthread_mutex_unlock(&vcpu->tcg->lock);
}

/* Waits until no other vCPU runs guest code.  Who has waited for a whole slice sends the runner
   away, so that no timer is needed. */
static void take_turn(struct cpr_tcg_vcpu *vcpu)
{
    struct cpr_tcg *tcg = vcpu->tcg;
    uint64_t ticket;

    pthread_mutex_lock(&tcg->lock);
    ticket = tcg->next_ticket++;
    while (ticket != tcg->serving) {
        uint64_t end = tcg_now_ns() + slice_ns;
        struct timespec deadline = {(time_t)(end / second_ns), (long)(end % second_ns)};
        int error = pthread_cond_timedwait(&tcg->turn_changed, &tcg->lock, &deadline);
        if (error == ETIMEDOUT && tcg->holder) {
            request_locked(tcg->holder, TCG_YIELD);
        }
    }
    tcg->holder = vcpu;
    tcg_take_requests(&vcpu->engine, TCG_YIELD);
    pthread_mutex_unlock(&tcg->lock);
}

static void give_turn(struct cpr_tcg *tcg)
{
    pthread_mutex_lock(&tcg->lock);
    tcg->holder = NULL;
    tcg->serving++;
    pthread_cond_broadcast(&tcg->turn_changed);
    pthread_mutex_unlock(&tcg->lock);
}

static uint64_t read_tsc_locked(const struct cpr_tcg *tcg)
{
    return tcg->time_runs ? tcg_now_ns() + tcg->tsc_offset : tcg->tsc;
}

void cpr_tcg_start_time(struct cpr_tcg *tcg, uint64_t now_ns)
{
    pthread_mutex_lock(&tcg->lock);
    tcg->tsc_offset = tcg->tsc - now_ns;
    tcg->time_runs = 1;
    pthread_mutex_unlock(&tcg->lock);
}

void cpr_tcg_stop_time(struct cpr_tcg *tcg, uint64_t now_ns)
{
    pthread_mutex_lock(&tcg->lock);
    tcg->tsc = now_ns + tcg->tsc_offset;
    tcg->time_runs = 0;
    pthread_mutex_unlock(&tcg->lock);
}

static int interrupt(struct cpr_tcg_vcpu *vcpu)
{
    int vector;

    tcg_take_requests(&vcpu->engine, CPR_TCG_INTERRUPT);
    vector = cpr_tcg_take_interrupt(vcpu->engine.handle);
    if (vector < 0) {
        return CONTINUE;
    }
    vcpu->mp_state = MP_RUNNABLE;
    if (tcg_deliver(&vcpu->engine.cpu, TCG_EXTERNAL, (uint32_t)vector, 0) < 0) {
        return CPR_TCG_SHUTDOWN;
    }
    return CONTINUE;
}

static int run_slice(struct cpr_tcg_vcpu *vcpu)
{
    enum tcg_end end;

    take_turn(vcpu);
    if (tcg_take_requests(&vcpu->engine, TCG_STALE)) {
        pthread_mutex_lock(&vcpu->tcg->lock);
        tcg_engine_forget_stale(&vcpu->engine);
        pthread_mutex_unlock(&vcpu->tcg->lock);
    }
    end = tcg_engine_run(&vcpu->engine);
    give_turn(vcpu->tcg);
    if (end == TCG_END_SHUTDOWN) {
        return CPR_TCG_SHUTDOWN;
    }
    if (end == TCG_END_ERROR) {
        return CPR_TCG_ERROR;
    }
    if (end == TCG_END_HALT) {
        vcpu->mp_state = MP_HALTED;
    }
    return CONTINUE;
}

/* One step of the run loop: a request, a wait, or a slice of guest code. */
static int run_step(struct cpr_tcg_vcpu *vcpu)
{
    const uint32_t requests = tcg_requests(&vcpu->engine);
    const int may_interrupt = vcpu->mp_state == MP_RUNNABLE || vcpu->mp_state == MP_HALTED;
    uint32_t awaited = CPR_TCG_KICK | EVENTS;

    if (requests & EVENTS) {
        return CPR_TCG_EVENT;
    }
    if (requests & CPR_TCG_KICK) {
        tcg_take_requests(&vcpu->engine, CPR_TCG_KICK);
        return CPR_TCG_KICKED;
    }
    if (may_interrupt && tcg_engine_is_interruptible(&vcpu->engine)) {
        if (requests & CPR_TCG_INTERRUPT) {
            return interrupt(vcpu);
        }
        awaited |= CPR_TCG_INTERRUPT;
    }
    if (vcpu->mp_state == MP_RUNNABLE) {
        return run_slice(vcpu);
    }
    wait_for_request(vcpu, awaited);
    return CONTINUE;
}

int cpr_tcg_run(struct cpr_tcg_vcpu *vcpu)
{
    int result;

    do {
        result = run_step(vcpu);
    } while (result == CONTINUE);
    return result;
}

const char *cpr_tcg_problem(const struct cpr_tcg_vcpu *vcpu)
{
    return vcpu->engine.problem;
}

struct cpr_tcg *cpr_tcg_new(void)
{
    struct cpr_tcg *tcg = calloc(1, sizeof(*tcg));
    pthread_condattr_t monotonic;

    if (!tcg) {
        return NULL;
    }
    pthread_mutex_init(&tcg->lock, NULL);
    pthread_mutex_init(&tcg->notifies.lock, NULL);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&tcg->turn_changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    return tcg;
}

void cpr_tcg_free(struct cpr_tcg *tcg)
{
    tcg_ram_clear(&tcg->ram);
    pthread_cond_destroy(&tcg->turn_changed);
    pthread_mutex_destroy(&tcg->notifies.lock);
    pthread_mutex_destroy(&tcg->lock);
    free(tcg);
}

int cpr_tcg_map_ram(struct cpr_tcg *tcg, uint64_t address, uint64_t size, uint64_t host,
                    int readonly)
{
    const struct tcg_ram ram = {address, size, (uint8_t *)(uintptr_t)host, readonly != 0, NULL};

    return tcg_ram_add(&tcg->ram, &ram);
}

int cpr_tcg_unmap_ram(struct cpr_tcg *tcg, uint64_t address, uint64_t size)
{
    return tcg_ram_remove(&tcg->ram, address, size);
}

int cpr_tcg_add_notify(struct cpr_tcg *tcg, uint64_t address, uint32_t size, int fd)
{
    const struct tcg_notify notify = {address, size, fd};

    return tcg_notify_add(&tcg->notifies, &notify);
}

int cpr_tcg_remove_notify(struct cpr_tcg *tcg, uint64_t address, uint32_t size, int fd)
{
    const struct tcg_notify notify = {address, size, fd};

    return tcg_notify_remove(&tcg->notifies, &notify);
}

/* A device has written a page from which the vCPUs of `bits` have translated code. */
static void add_stale(struct cpr_tcg *tcg, uint64_t address, uint8_t bits)
{
    pthread_mutex_lock(&tcg->lock);
    for (struct cpr_tcg_vcpu *vcpu = tcg->vcpus; vcpu; vcpu = vcpu->older) {
        struct tcg_engine *engine = &vcpu->engine;

        if (!(bits & engine->code_pages.bit)) {
            continue;
        }
        if (engine->stale_count < TCG_STALE_MAX) {
            engine->stale[engine->stale_count] = address;
        }
        if (engine->stale_count <= TCG_STALE_MAX) {
            engine->stale_count++;
        }
        request_locked(vcpu, TCG_STALE);
    }
    pthread_mutex_unlock(&tcg->lock);
}

void cpr_tcg_written(void *of, const void *place, uint64_t size)
{
    struct cpr_tcg *tcg = of;

    for (uint32_t i = 0; i < tcg->ram.count; i++) {
        const struct tcg_ram *ram = &tcg->ram.slots[i];
        const uint64_t offset = (uint64_t)((const uint8_t *)place - ram->host);

        if (offset >= ram->size) {
            continue;
        }
        for (uint64_t page = offset / page_size; page <= (offset + size - 1) / page_size; page++) {
            uint8_t bits = __atomic_load_n(&ram->notes[page], __ATOMIC_SEQ_CST);

            bits = tcg_code_pages_are_known() ? bits : 0xff;
            if (bits) {
                add_stale(tcg, ram->address + page * page_size, bits);
            }
        }
        return;
    }
}

struct cpr_tcg_vcpu *cpr_tcg_vcpu_new(struct cpr_tcg *tcg, uint32_t index, void *handle,
                                      const char **problem)
{
    struct cpr_tcg_vcpu *vcpu = calloc(1, sizeof(*vcpu));

    if (!vcpu) {
        *problem = strerror(ENOMEM);
        return NULL;
    }
    vcpu->tcg = tcg;
    vcpu->engine.handle = handle;
    vcpu->engine.tsc_offset = &tcg->tsc_offset;
    vcpu->engine.vcpu_count = &tcg->vcpu_count;
    vcpu->engine.notifies = &tcg->notifies;
    *problem = tcg_engine_open(&vcpu->engine, &tcg->ram, index);
    if (*problem) {
        free(vcpu);
        return NULL;
    }
    pthread_cond_init(&vcpu->wake, NULL);
    pthread_mutex_lock(&tcg->lock);
    tcg->vcpu_count++;
    vcpu->older = tcg->vcpus;
    tcg->vcpus = vcpu;
    pthread_mutex_unlock(&tcg->lock);
    return vcpu;
}

void cpr_tcg_vcpu_free(struct cpr_tcg_vcpu *vcpu)
{
    struct cpr_tcg_vcpu **place = &vcpu->tcg->vcpus;

    pthread_mutex_lock(&vcpu->tcg->lock);
    while (*place != vcpu) {
        place = &(*place)->older;
    }
    *place = vcpu->older;
    pthread_mutex_unlock(&vcpu->tcg->lock);
    tcg_engine_close(&vcpu->engine);
    pthread_cond_destroy(&vcpu->wake);
    free(vcpu);
}

void cpr_tcg_get_state(struct cpr_tcg_vcpu *vcpu, struct cpr_tcg_state *state)
{
    tcg_cpu_get_state(&vcpu->engine.cpu, state);
    state->mp_state = vcpu->mp_state;
    pthread_mutex_lock(&vcpu->tcg->lock);
    state->tsc = read_tsc_locked(vcpu->tcg);
    pthread_mutex_unlock(&vcpu->tcg->lock);
}

void cpr_tcg_set_state(struct cpr_tcg_vcpu *vcpu, const struct cpr_tcg_state *state)
{
    tcg_cpu_set_state(&vcpu->engine.cpu, state);
    vcpu->mp_state = state->mp_state;
    pthread_mutex_lock(&vcpu->tcg->lock);
    if (!vcpu->tcg->time_runs) { /* else it is a SIPI or an INIT, and all vCPUs have one TSC */
        vcpu->tcg->tsc = state->tsc;
    }
    request_locked(vcpu, CPR_TCG_INTERRUPT);
    pthread_mutex_unlock(&vcpu->tcg->lock);
}

uint64_t cpr_tcg_read_msr(struct cpr_tcg_vcpu *vcpu, uint32_t index)
{
    return tcg_cpu_read_msr(&vcpu->engine.cpu, index);
}

void cpr_tcg_write_msr(struct cpr_tcg_vcpu *vcpu, uint32_t index, uint64_t value)
{
    tcg_cpu_write_msr(&vcpu->engine.cpu, index, value);
}
