/* All blocks of a decoder in one call: norm, products, rotation, storing, attention, norm, gated MLP, block by block.
 * Included by `ops.c` once; includes itself once per pair of dtypes, as `paged.h` has them.
 *
 * Owns the order of a block's operations and where each leaves its result. Computes nothing itself: what it calls are
 * the operations of the other files, so every bit is theirs. With one token an operation takes some microseconds, as
 * much as a call from Python does: that is what one call for all of them saves. Each still has a parallel region of its
 * own: with two threads that wait for it one takes 0.8 us, one that has too little to do for two 0.4 us, together one
 * hundredth of such a step.
 */
#ifndef KV
#define MOST_ROTATIONS 2

/* One block, as `BlockParts` of kernels/blocks.py; NULL and 0: there is none. kernels/cpu/blocks.py writes this and the
 * next two field by field. */
typedef struct {
    long heads, kv_heads, dim, rotary_dim, inner, activation, rotation, window;
    float eps, offset, head_eps, head_offset, scale, softcap;
    const float *slopes, *sinks;
    const void *attention_norm, *q_norm, *k_norm, *mlp_norm;
    const void *qkv, *qkv_bias, *out, *out_bias, *gate_up, *gate_up_bias, *down, *down_bias; /* weights are packed */
} block_weights;

typedef struct {
    void *keys, *values;
    uint16_t *key_scales, *value_scales;
} block_pages;

/* What all blocks are told of a step; `cos` and `sin` of a rotation one after the other. */
typedef struct {
    long tokens, rows, hidden, page_size, table_stride, groups;
    const int64_t *slots;
    const int32_t *page_table, *query_start, *context_lens, *shared_tokens, *shared_members, *shared_starts;
    const float *rotations[2 * MOST_ROTATIONS];
    long padding; /* whether a row without context may be among them */
    const int64_t *read; /* tokens that the last block is wanted of, num_read; NULL: all of them */
    long num_read;
} block_step;

#define SCALAR uint16_t
#define FN(name) name##_bf16
#define STORED uint16_t
#define KV(name) name##_bf16
#include "blocks.h"
#define SCALAR float
#define FN(name) name##_f32
#define STORED float
#define KV(name) name##_f32
#include "blocks.h"
#define SCALAR uint16_t
#define FN(name) name##_bf16
#define STORED int8_t
#define KV(name) name##_bf16_i8
#include "blocks.h"
#define SCALAR float
#define FN(name) name##_f32
#define STORED int8_t
#define KV(name) name##_f32_i8
#include "blocks.h"

#else

/* q and k of all tokens, each head normed by itself, in place. */
static void KV(norm_heads)(const block_weights *block, long tokens, SCALAR *qkv, long stride, int threads) {
    const long dim = block->dim;
#pragma omp parallel for num_threads(threads) if (tokens * stride > PARALLEL_WORK)
    for (long t = 0; t < tokens; t++) {
        SCALAR *q = qkv + t * stride, *k = q + block->heads * dim;
        FN(rms_norm)(block->heads, dim, q, dim, NULL, 0, block->q_norm, block->head_eps, block->head_offset, q, 1);
        FN(rms_norm)(block->kv_heads, dim, k, dim, NULL, 0, block->k_norm, block->head_eps, block->head_offset, k, 1);
    }
}

/* mixed [tokens, heads * dim] of qkv [tokens, (heads + 2 * kv_heads) * dim], whose K and V are stored. */
static int KV(attention_of_block)(const block_weights *block, const block_pages *pages, const block_step *step,
                                  SCALAR *qkv, SCALAR *mixed, int threads) {
    const long dim = block->dim, heads = block->heads, kv_heads = block->kv_heads, tokens = step->tokens;
    const long stride = (heads + 2 * kv_heads) * dim, width = heads * dim;
    SCALAR *q = qkv, *k = q + width, *v = k + kv_heads * dim;
    if (block->q_norm) KV(norm_heads)(block, tokens, qkv, stride, threads);
    if (block->rotary_dim)
        FN(rope)(tokens, heads, kv_heads, block->rotary_dim, q, stride, dim, k, stride, dim,
                 step->rotations[2 * block->rotation], step->rotations[2 * block->rotation + 1], threads);
    KV(store_kv)(tokens, kv_heads, dim, step->page_size, k, stride, v, stride, pages->keys, pages->values,
                 pages->key_scales, pages->value_scales, step->slots, threads);
    if (KV(paged_attention)(step->rows, kv_heads, heads / kv_heads, dim, step->page_size, q, stride, pages->keys,
                            pages->values, pages->key_scales, pages->value_scales, step->page_table,
                            step->table_stride, step->query_start, step->context_lens, block->scale, block->window,
                            block->softcap, block->slopes, block->sinks, step->shared_tokens,
                            step->shared_members, step->shared_starts, step->groups, mixed, threads))
        return -1;
    const long covered = step->query_start[step->rows];
    memset(mixed + covered * width, 0, (tokens - covered) * width * sizeof *mixed);
    for (long r = 0; step->padding && r < step->rows; r++) /* then every row has one query */
        if (!step->context_lens[r]) memset(mixed + r * width, 0, width * sizeof *mixed);
    return 0;
}

/* to [count, width]: the rows of `from` that `rows` names. */
static void KV(gather)(const SCALAR *from, const int64_t *rows, long count, long width, SCALAR *to) {
    for (long i = 0; i < count; i++) memcpy(to + i * width, from + rows[i] * width, width * sizeof *to);
}

/* residual [tokens, hidden], and behind the last block `added` [tokens, hidden], which it does not contain yet; of
 * both what is read comes first. workspace: for one block's results. -1 where there is no memory. */
int KV(blocks)(long count, const block_weights *blocks, const block_pages *pages, const block_step *step,
               SCALAR *residual, SCALAR *added, SCALAR *workspace, int threads) {
    const long hidden = step->hidden;
    long tokens = step->tokens;
    for (long i = 0; i < count; i++) {
        const block_weights *block = blocks + i;
        const long mixed_width = block->heads * block->dim, inner = block->inner;
        const long qkv_width = mixed_width + 2 * block->kv_heads * block->dim;
        SCALAR *normed = workspace, *qkv = normed + tokens * hidden, *mixed = qkv + tokens * qkv_width;
        SCALAR *gate_up = qkv, *active = gate_up + tokens * 2 * inner;
        int failed = 0;
        FN(rms_norm)(tokens, hidden, i ? added : residual, hidden, i ? residual : NULL, hidden, block->attention_norm,
                     block->eps, block->offset, normed, threads);
        failed |= FN(matmul)(tokens, qkv_width, hidden, normed, hidden, block->qkv, block->qkv_bias, qkv, threads);
        failed |= KV(attention_of_block)(block, pages + i, step, qkv, mixed, threads);
        if (step->read && i == count - 1) { /* into places whose contents nobody needs any more */
            tokens = step->num_read;
            KV(gather)(mixed, step->read, tokens, mixed_width, qkv);
            KV(gather)(residual, step->read, tokens, hidden, normed);
            memcpy(residual, normed, tokens * hidden * sizeof *residual);
            mixed = qkv, active = gate_up + tokens * 2 * inner;
        }
        failed |= FN(matmul)(tokens, hidden, mixed_width, mixed, mixed_width, block->out, block->out_bias, added,
                             threads);
        FN(rms_norm)(tokens, hidden, added, hidden, residual, hidden, block->mlp_norm, block->eps, block->offset,
                     normed, threads);
        failed |= FN(matmul)(tokens, 2 * inner, hidden, normed, hidden, block->gate_up, block->gate_up_bias, gate_up,
                             threads);
        FN(act)(tokens, inner, gate_up, gate_up + inner, 2 * inner, active, block->activation, threads);
        failed |= FN(matmul)(tokens, hidden, inner, active, inner, block->down, block->down_bias, added, threads);
        if (failed) return -1;
    }
    return 0;
}

#undef SCALAR
#undef FN
#undef STORED
#undef KV
#endif
