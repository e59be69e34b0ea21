/* Runs steps on threads, and records them on a tape, which runs the steps of many calls as one. See replay.py. */

#include "common.h"

#include <omp.h>
#if LEVEL >= AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

typedef struct Block {  // scratch memory of a tape
  void *memory;
  size_t size;
  int is_lent;
  struct Block *next;
} Block;

typedef struct {
  Step *steps;
  int64_t length, room;
  int threads, failed;
  Block *blocks;
} Tape;

static __thread Tape *tape;  // NULL: nothing is recorded

int has_amx = 0;

/* The instruction set in use: the one that the library is built for, or the one below AMX where tiles are not granted. */
int kernel_level(void) {
#ifdef EMULATE_AMX
  has_amx = 1;
#elif LEVEL >= AMX
  has_amx = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#endif
  return LEVEL < AMX || has_amx ? LEVEL : AVX512_BF16;
}

/* From now on this thread's steps are recorded on a tape too; NULL: no longer. */
void record(Tape *to) { tape = to; }

static void run(const Step *steps, int64_t length, int threads) {
  if (threads == 1) {
    for (int64_t i = 0; i < length; i++) steps[i].work(steps[i].job, 0, steps[i].count);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num(), all = omp_get_num_threads();
    for (int64_t i = 0; i < length; i++) {
      const Step s = steps[i];
      const int parts = s.threads < all ? s.threads : all;
      if (thread < parts) s.work(s.job, s.count * thread / parts, s.count * (thread + 1) / parts);
      const int is_alone = parts == 1 && i + 1 < length && steps[i + 1].threads == 1;  // the same thread goes on
      if (!s.no_barrier && !is_alone) {
#pragma omp barrier
      }
    }
  }
}

void perform(const Step *steps, int64_t length, size_t job_size) {
  int threads = 1;
  for (int64_t i = 0; i < length; i++) threads = steps[i].threads > threads ? steps[i].threads : threads;
  run(steps, length, threads);
  if (!tape) return;
  if (tape->length + length > tape->room) {
    const int64_t room = 2 * tape->room + length;
    Step *more = realloc(tape->steps, (size_t)room * sizeof *more);
    if (!more) {
      tape->failed = 1;
      return;
    }
    tape->steps = more, tape->room = room;
  }
  for (int64_t i = 0; i < length; i++) {
    void *job = malloc(job_size);
    if (!job) {
      tape->failed = 1;
      return;
    }
    memcpy(job, steps[i].job, job_size);
    tape->steps[tape->length] = steps[i];
    tape->steps[tape->length++].job = job;
  }
  if (threads > tape->threads) tape->threads = threads;
}

void *borrow(size_t size) {
  size = (size + 63) / 64 * 64;
  if (!tape) return aligned_alloc(64, size);
  for (Block *b = tape->blocks; b; b = b->next)
    if (!b->is_lent && b->size >= size) return b->is_lent = 1, b->memory;
  Block *block = malloc(sizeof *block);
  void *memory = aligned_alloc(64, size);
  if (!block || !memory) {
    free(block), free(memory);
    return NULL;
  }
  *block = (Block){memory, size, 1, tape->blocks};
  tape->blocks = block;
  return memory;
}

void give_back(void *memory) {
  if (!tape) free(memory);
  else for (Block *b = tape->blocks; b; b = b->next) b->is_lent &= b->memory != memory;
}

int *fault_of_step(int *own) { return tape ? &tape->failed : own; }

Tape *tape_new(void) { return calloc(1, sizeof(Tape)); }

/* 0, or -1 where there was no memory for a step, then or now. */
int tape_run(const Tape *t) {
  run(t->steps, t->length, t->threads ? t->threads : 1);
  return t->failed ? -1 : 0;
}

void tape_free(Tape *t) {
  if (tape == t) tape = NULL;
  for (int64_t i = 0; i < t->length; i++) free((void *)t->steps[i].job);
  for (Block *b = t->blocks, *next; b; b = next) {
    next = b->next;
    free(b->memory), free(b);
  }
  free(t->steps), free(t);
}
