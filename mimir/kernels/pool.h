/* One kernel's work on several threads; see pool.c. */
#ifndef MIMIR_POOL_H
#define MIMIR_POOL_H

#include <stddef.h>

/* `count` items of a job from `first` on. */
typedef void mk_piece(const void *job, size_t first, size_t count);

/* All items of a job, split at multiples of `grain`, which takes one core about `nanoseconds`. Returns when all is
 * done. Where and whether a job is split depends on the arguments, on mk_threads and on what else runs, all public. */
void mk_split(size_t items, size_t grain, size_t nanoseconds, mk_piece *run, const void *job);

#endif
