#include "fpu.h"

#include <string.h>

#include "unicorn_api.h"

enum { CS = 1, SEGMENT_L = 1 << 21, EFER_LMA = 1 << 10 };

/* Offsets in an FXSAVE image (Intel SDM vol. 1, table 10-2). */
enum {
    FXSAVE_FCW = 0,
    FXSAVE_FSW = 2,
    FXSAVE_FTW = 4,
    FXSAVE_FOP = 6,
    FXSAVE_FIP = 8,
    FXSAVE_FCS = 12,
    FXSAVE_FDP = 16,
    FXSAVE_FDS = 20,
    FXSAVE_MXCSR = 24,
    FXSAVE_MXCSR_MASK = 28,
    FXSAVE_ST0 = 32,
    FXSAVE_XMM0 = 160
};

static int in_64bit_code(const struct tcg_registers *r)
{
    return (r->efer & EFER_LMA) && (r->segs[CS].flags & SEGMENT_L);
}

void tcg_fpu_get(struct tcg_cpu *cpu, struct cpr_tcg_state *state)
{
    uint8_t *area = state->fxsave;
    const uint32_t mxcsr_mask = 0xffff;
    uint16_t tags;
    uint8_t ymm[32];

    unicorn.reg_read(cpu->uc, UC_X86_REG_FPCW, area + FXSAVE_FCW);
    unicorn.reg_read(cpu->uc, UC_X86_REG_FPSW, area + FXSAVE_FSW);
    unicorn.reg_read(cpu->uc, UC_X86_REG_FPTAG, &tags);
    for (int i = 0; i < 8; i++) {
        area[FXSAVE_FTW] |= (uint8_t)(((tags >> 2 * i & 3) != 3) << i);
        unicorn.reg_read(cpu->uc, UC_X86_REG_ST0 + i, area + FXSAVE_ST0 + 16 * i);
    }
    unicorn.reg_read(cpu->uc, UC_X86_REG_FOP, area + FXSAVE_FOP);
    unicorn.reg_read(cpu->uc, UC_X86_REG_FIP, area + FXSAVE_FIP);
    unicorn.reg_read(cpu->uc, UC_X86_REG_FDP, area + FXSAVE_FDP);
    if (!in_64bit_code(cpu->registers)) {
        memset(area + FXSAVE_FCS, 0, 4);
        memset(area + FXSAVE_FDS, 0, 4);
        unicorn.reg_read(cpu->uc, UC_X86_REG_FCS, area + FXSAVE_FCS);
        unicorn.reg_read(cpu->uc, UC_X86_REG_FDS, area + FXSAVE_FDS);
    }
    unicorn.reg_read(cpu->uc, UC_X86_REG_MXCSR, area + FXSAVE_MXCSR);
    memcpy(area + FXSAVE_MXCSR_MASK, &mxcsr_mask, sizeof(mxcsr_mask));
    for (int i = 0; i < 16; i++) {
        unicorn.reg_read(cpu->uc, UC_X86_REG_YMM0 + i, ymm);
        memcpy(area + FXSAVE_XMM0 + 16 * i, ymm, 16);
        memcpy(state->ymm_high + 16 * i, ymm + 16, 16);
    }
}

void tcg_fpu_set(struct tcg_cpu *cpu, const struct cpr_tcg_state *state)
{
    const uint8_t *area = state->fxsave;
    uint16_t tags = 0, fcs = 0, fds = 0;
    uint64_t fip, fdp;
    uint8_t ymm[32];

    memcpy(&fip, area + FXSAVE_FIP, sizeof(fip));
    memcpy(&fdp, area + FXSAVE_FDP, sizeof(fdp));
    if (!in_64bit_code(cpu->registers)) {
        fip = (uint32_t)fip;
        fdp = (uint32_t)fdp;
        memcpy(&fcs, area + FXSAVE_FCS, sizeof(fcs));
        memcpy(&fds, area + FXSAVE_FDS, sizeof(fds));
    }
    unicorn.reg_write(cpu->uc, UC_X86_REG_FPCW, area + FXSAVE_FCW);
    /* The status word has the top of the stack, which ST0 to ST7 are counted from. */
    unicorn.reg_write(cpu->uc, UC_X86_REG_FPSW, area + FXSAVE_FSW);
    for (int i = 0; i < 8; i++) {
        tags |= (uint16_t)((area[FXSAVE_FTW] >> i & 1 ? 0 : 3) << 2 * i);
        unicorn.reg_write(cpu->uc, UC_X86_REG_ST0 + i, area + FXSAVE_ST0 + 16 * i);
    }
    unicorn.reg_write(cpu->uc, UC_X86_REG_FPTAG, &tags);
    unicorn.reg_write(cpu->uc, UC_X86_REG_FOP, area + FXSAVE_FOP);
    unicorn.reg_write(cpu->uc, UC_X86_REG_FIP, &fip);
    unicorn.reg_write(cpu->uc, UC_X86_REG_FDP, &fdp);
    unicorn.reg_write(cpu->uc, UC_X86_REG_FCS, &fcs);
    unicorn.reg_write(cpu->uc, UC_X86_REG_FDS, &fds);
    unicorn.reg_write(cpu->uc, UC_X86_REG_MXCSR, area + FXSAVE_MXCSR);
    for (int i = 0; i < 16; i++) {
        memcpy(ymm, area + FXSAVE_XMM0 + 16 * i, 16);
        memcpy(ymm + 16, state->ymm_high + 16 * i, 16);
        unicorn.reg_write(cpu->uc, UC_X86_REG_YMM0 + i, ymm);
    }
}
