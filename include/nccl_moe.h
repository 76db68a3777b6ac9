/*
 * nccl_moe.h - the collectives of expert parallelism, on an existing NCCL communicator or on host memory.
 *
 * Dispatch sends every token's row to the ranks that hold its top-k experts; combine brings the experts' outputs back
 * and sums them at the token's owner.  Symbols used throughout:
 *
 *   R  ranks of the communicator          E  experts of all ranks           L  experts of this rank ("local")
 *   T  tokens of this rank in this call   K  selections of a token (top-k)  H  elements of a row (hidden size)
 *   N  rows that this rank receives       row: one token's hidden vector
 *
 * Rules that hold for every function unless its comment says otherwise:
 *
 *  - It returns ncclResult_t.  Whatever is not ncclSuccess has a sentence in ncclMoeGetLastError that names the
 *    argument.  ncclInvalidArgument: an argument is wrong; nothing was enqueued, the communicator stays usable.
 *    ncclInvalidUsage: the call does not fit the state or the backend; likewise.  ncclRemoteError: a peer failed, timed
 *    out or aborted.  ncclSystemError, ncclUnhandledCudaError, ncclInternalError: as in NCCL.
 *  - Every struct that begins with {size, magic, version} is filled from its _INITIALIZER.  Fields are only ever
 *    appended and their zero means the default, so a program built against an older header runs on a newer library.
 *  - "Device memory" means memory of the communicator's backend: CUDA memory for ncclMoeCommInit, any host memory for
 *    ncclMoeCommInitHost.  Tensors are dense and row-major; the first index varies slowest.  Rows and all tensors start
 *    at multiples of 16 bytes (index, weight and count tensors: of their element).
 *  - Pointers to tensors of zero elements may be NULL: whatever is said to be given on every rank, ranks without tokens
 *    (or rows) need not give.
 *  - Tensors belong to the caller and must stay valid, and inputs unchanged, until the work that the call enqueued on
 *    the stream has run (until ncclMoeComplete's work for a SEND_ONLY call).
 *  - "Collective" means that every rank of the communicator calls it, in the same order as the communicator's other
 *    collective calls.  A communicator is used by one thread at a time; ncclMoeCommAbort, ncclMoeCommGetAsyncError and
 *    ncclMoeGetLastError may be called by any thread at any time.
 *  - A child of fork must not use its parent's communicators, nor free them: calls return ncclInvalidUsage.  While such
 *    a child lives, so do copies of its parent's sockets: that the parent has died may then be noticed only after
 *    timeoutMs.
 *  - "Stream-ordered" means that the work is enqueued on the stream and the host does not wait.  The host backend has
 *    no streams: it ignores the argument and has done the work when the call returns.
 *  - On a device, calls of one communicator run one after the other in the order of their enqueuing, whatever their
 *    streams: those outside of graphs, and those of one capture.  A graph's launch is ordered with everything else,
 *    other graphs of the communicator included, by the caller's streams alone; if two overlap, both are spoilt.  All
 *    ranks launch their graphs in the same order.
 *  - From sm_90 on, latency mode's kernels are launched programmatically
 *    (cudaLaunchAttributeProgrammaticStreamSerialization) and wait for the end of the kernel before them.  If that one
 *    triggers its dependents early, their blocks may take SMs that it has left.  If it was itself launched so, it must
 *    wait (cudaGridDependencySynchronize) for what came before.  They trigger theirs once all peers have begun the
 *    call: a kernel behind them that is launched so must wait likewise, whatever it touches, for those behind it rely
 *    on it.  Its blocks may already hold SMs while the call still runs.
 */
#ifndef NCCL_MOE_H_
#define NCCL_MOE_H_

#include <stddef.h>
#include <stdint.h>

/* With NCCL_MOE_NO_CUDA defined, or where nccl.h or cuda_runtime.h cannot be found, the few types needed are declared
 * here, compatible with NCCL's.  Do not then include nccl.h in the same file. */
#if !defined(NCCL_MOE_NO_CUDA) && defined(__has_include)
#if !__has_include(<nccl.h>) || !__has_include(<cuda_runtime.h>)
#define NCCL_MOE_NO_CUDA 1
#endif
#endif
#ifndef NCCL_MOE_NO_CUDA
#include <nccl.h>
#else
typedef struct ncclComm* ncclComm_t;
typedef struct CUstream_st* cudaStream_t;
typedef enum {
  ncclSuccess = 0,
  ncclUnhandledCudaError = 1,
  ncclSystemError = 2,
  ncclInternalError = 3,
  ncclInvalidArgument = 4,
  ncclInvalidUsage = 5,
  ncclRemoteError = 6,
  ncclInProgress = 7,
  ncclNumResults = 8
} ncclResult_t;
typedef enum { ncclInt32 = 2, ncclInt64 = 4, ncclFloat16 = 6, ncclFloat32 = 7, ncclBfloat16 = 9 } ncclDataType_t;
#endif

/* FP8 e4m3 by its value: NCCL's own name for it is younger than the oldest NCCL supported here. */
#define ncclMoeFloat8e4m3 ((ncclDataType_t)10)

#define NCCL_MOE_MAJOR 0
#define NCCL_MOE_MINOR 1
#define NCCL_MOE_PATCH 0
#define NCCL_MOE_VERSION_CODE (NCCL_MOE_MAJOR * 10000 + NCCL_MOE_MINOR * 100 + NCCL_MOE_PATCH)

#define NCCL_MOE_MAGIC 0x6d6f6501u /* "moe", 1 */
#define NCCL_MOE_MAX_TOPK 32
#define NCCL_MOE_MAX_RANKS 1024
#define NCCL_MOE_SCALE_BLOCK 128 /* elements that share a scale in the fused FP8 cast */

#ifdef __cplusplus
extern "C" {
#endif

typedef struct ncclMoeComm* ncclMoeComm_t;
typedef struct ncclMoeRouting* ncclMoeRouting_t;

/* ------------------------------------------------------------------------------------------------ communicator -- */

/* Which kernels serve a communicator's calls. */
typedef enum {
  ncclMoeModeAuto = 0,       /* latency mode for routings of at most 512 maxTokens, if it can serve them */
  ncclMoeModeThroughput = 1, /* training and prefill: counts are exchanged, then rows go to their final slots */
  ncclMoeModeLatency = 2     /* decoding: fixed slots, no count exchange before data moves.  At most 64 ranks, 4094
                              * experts, and routings for which (L+1) * (R * (ceil(maxTokens/32) + 1) + 1) + E + 6R
                              * is at most 24576, L the most experts of any rank, E all: lists that must fit into
                              * 96 KiB */
} ncclMoeMode_t;

/* What a communicator is sized for.  The same on every rank (checked at init, which names the field that differs) but
 * for numSms and timeoutMs.  Ranks whose jobToken differs do not meet. */
typedef struct ncclMoeConfig {
  size_t size;
  unsigned int magic;
  unsigned int version;
  int nExperts;            /* E, 1 to 2^20, on GPUs to 8192.  Required. */
  int maxTokens;           /* largest T of any rank in any call, 0 to 2^24.  Required. */
  int maxTopK;             /* largest K, 1 to NCCL_MOE_MAX_TOPK.  Required. */
  const int* expertToRank; /* host memory [E], copied: the rank of each expert.  NULL: blocks of consecutive experts,
                            * the first E mod R ranks hold one more.  A rank's local expert ids count its experts in
                            * increasing order of their global ids. */
  size_t maxRowBytes;      /* largest row in bytes, H times the element size, without scales; a multiple of 16 up to
                            * 2^24.  Required. */
  ncclMoeMode_t mode;
  int numSms;           /* SMs that a kernel may occupy; 0: the library's choice.  Ignored by the host backend. */
  int timeoutMs;        /* every wait on a peer ends after so long; 0: NCCL_MOE_TIMEOUT_MS, or else 100000 */
  size_t maxMemory;     /* bound in bytes on the device memory that the communicator itself takes; 0: none.
                         * Init fails and names the size needed where that is more. */
  const char* jobToken; /* host backend: a secret that the job's ranks share, at most 255 characters, copied.  NULL:
                         * NCCL_MOE_JOB_TOKEN.  Needed for tcp://; optional for file://, where rank 0 draws one. */
} ncclMoeConfig_t;

#define NCCL_MOE_CONFIG_INITIALIZER                                                                                    \
  { sizeof(ncclMoeConfig_t), NCCL_MOE_MAGIC, NCCL_MOE_VERSION_CODE, 0, 0, 0, NULL, 0, ncclMoeModeAuto, 0, 0, 0, NULL }

/* What ncclMoeCommGetInfo reports. */
typedef struct ncclMoeCommInfo {
  size_t size;
  unsigned int magic;
  unsigned int version;
  int rank;
  int nRanks;
  int nLocalExperts;  /* L */
  int onHost;         /* 1: host backend */
  size_t memoryBytes; /* device memory that communicator and routings hold now, what is kept for later allocations
                       * included, ncclMoeMemAlloc's not */
  int nScaleUpRanks;  /* ranks whose memory this rank reaches by loads and stores, itself included */
} ncclMoeCommInfo_t;

#define NCCL_MOE_COMM_INFO_INITIALIZER                                                                                 \
  { sizeof(ncclMoeCommInfo_t), NCCL_MOE_MAGIC, NCCL_MOE_VERSION_CODE, 0, 0, 0, 0, 0, 0 }

/* NCCL_MOE_VERSION_CODE of the library that runs.  Local.  Errors: ncclInvalidArgument. */
ncclResult_t ncclMoeGetVersion(int* version);
ncclResult_t pncclMoeGetVersion(int* version);

/* The CUDA memory that ncclMoeCommInit with this config over nRanks ranks will take on one rank; nothing is allocated.
 * Local.  Errors: ncclInvalidArgument, ncclInvalidUsage (more ranks or experts than GPUs are served for; this build has
 * no CUDA part). */
ncclResult_t ncclMoeCommMemoryNeeded(const ncclMoeConfig_t* config, int nRanks, size_t* bytes);
ncclResult_t pncclMoeCommMemoryNeeded(const ncclMoeConfig_t* config, int nRanks, size_t* bytes);

/* Adds the MoE collectives to an NCCL communicator.
 * Collective over comm; synchronises the host; not capturable.  comm is borrowed: it must outlive *moe, and NCCL calls
 * on it must not run at the same time as this function.  The current CUDA device must be comm's.
 * Errors: ncclInvalidArgument, ncclInvalidUsage (no NCCL or too old a one in the process, or this build has no CUDA
 * part), ncclRemoteError, ncclUnhandledCudaError, ncclSystemError.  *moe is NULL after an error. */
ncclResult_t ncclMoeCommInit(ncclMoeComm_t* moe, ncclComm_t comm, const ncclMoeConfig_t* config);
ncclResult_t pncclMoeCommInit(ncclMoeComm_t* moe, ncclComm_t comm, const ncclMoeConfig_t* config);

/* Makes a communicator over host memory.  Ranks are threads or processes; those of one machine (the same NCCL_HOSTID,
 * or else the same host name and boot) meet in shared memory; others, and those that cannot open each other's memory,
 * over TCP.  Collective; waits for all ranks to come, timeoutMs at most, and then for their answers, likewise; after a
 * failure it may take a second more, in which ranks tell each other why.
 *   rendezvous  "tcp://HOST:PORT": rank 0 listens there, the others connect; or
 *               "file:///PATH": rank 0 writes its address to PATH (made new, also in place of one that an earlier job
 *               left behind; readable by its user alone; gone after init), which all ranks must see.  Used by one
 *               job at a time.
 * Errors: ncclInvalidArgument, ncclInvalidUsage (config of a newer header), ncclSystemError, ncclRemoteError (a rank
 * did not come, or does not agree on the config).  *moe is NULL after an error. */
ncclResult_t ncclMoeCommInitHost(ncclMoeComm_t* moe, int nRanks, int rank, const char* rendezvous,
                                 const ncclMoeConfig_t* config);
ncclResult_t pncclMoeCommInitHost(ncclMoeComm_t* moe, int nRanks, int rank, const char* rendezvous,
                                  const ncclMoeConfig_t* config);

/* Fills info.  Local.  Errors: ncclInvalidArgument. */
ncclResult_t ncclMoeCommGetInfo(ncclMoeComm_t moe, ncclMoeCommInfo_t* info);
ncclResult_t pncclMoeCommGetInfo(ncclMoeComm_t moe, ncclMoeCommInfo_t* info);

/* Frees the communicator, its routings and its ncclMoeMemAlloc memory, after its enqueued work.  No thread may be in a
 * call on it: one that waits is to be ended by ncclMoeCommAbort, and to have returned, before.  All ranks call it, but
 * it waits for no peer: one that died does not matter, and one that still works gets ncclRemoteError.  Synchronises the
 * host; not capturable; graphs that captured the communicator's calls must not be launched afterwards.  NULL is fine.
 * Errors: ncclInvalidArgument, ncclUnhandledCudaError (all is freed even so), ncclRemoteError (a collective call timed
 * out in NCCL and still occupies the GPU: device memory is left to the process's end). */
ncclResult_t ncclMoeCommDestroy(ncclMoeComm_t moe);
ncclResult_t pncclMoeCommDestroy(ncclMoeComm_t moe);

/* Ends all waiting of this rank's calls, from any thread; they return ncclRemoteError or, on a device, end with
 * that async error.  Peers learn of it as of a dead rank.  Afterwards only ncclMoeCommDestroy, GetInfo, GetAsyncError
 * and GetLastError are useful.  Local.  Errors: ncclInvalidArgument. */
ncclResult_t ncclMoeCommAbort(ncclMoeComm_t moe);
ncclResult_t pncclMoeCommAbort(ncclMoeComm_t moe);

/* *asyncError: ncclSuccess, or the first error that enqueued work met.  A timeout, a dead peer, an abort and ranks
 * whose arguments differ are final; a receive buffer that is too small and a bad expert id hold until the routing's
 * next dispatch, also one in a graph, so ask before that.  The sentence is in ncclMoeGetLastError(moe).  Local, does
 * not wait.
 * Errors: ncclInvalidArgument. */
ncclResult_t ncclMoeCommGetAsyncError(ncclMoeComm_t moe, ncclResult_t* asyncError);
ncclResult_t pncclMoeCommGetAsyncError(ncclMoeComm_t moe, ncclResult_t* asyncError);

/* Leaves ranks out of the communicator's calls, or takes them in again: after a rank has died or been slow for longer
 * than timeoutMs, the others go on without it.  Latency mode only: while any rank is masked, routings that throughput
 * mode serves cannot be used, and ncclMoeRoutingCreate and ncclMoeMemAlloc are refused.  A rank that was late may be
 * taken in again; one whose process has ended cannot come back, a new communicator takes its place.  Ranks that are
 * threads of one process and share a GPU must not call this: it waits for the device.
 *   masked      host memory [R]: 1 leaves the rank out.  A caller's own is 0.
 *   generation  larger than in any earlier call on this communicator, on any rank.
 * Collective over the ranks that masked leaves in, with the same arguments; synchronises the device; not capturable;
 * waits for them, timeoutMs at most.  It ends a timeout's async error.  Every routing needs a new dispatch afterwards,
 * halves that were sent are dropped.  What a masked rank's experts would have added to a token is left out of combine's
 * sums and counted (ncclMoeCommGetStats); its tokens are nobody's.  NCCL_MOE_EXACT is refused meanwhile.  Graphs of
 * latency mode's calls captured before may be launched again; those of throughput mode's would wait for the masked
 * ranks until their timeout.
 * Errors: ncclInvalidArgument, ncclInvalidUsage (host backend; the communicator failed otherwise than by a timeout, or
 * has combined with NCCL_MOE_EXACT in latency mode, whose late rows could be taken for others'), ncclRemoteError (a
 * rank that is left in did not come: may be called again; the communicator was aborted), ncclUnhandledCudaError. */
ncclResult_t ncclMoeCommMaskRanks(ncclMoeComm_t moe, const int* masked, uint64_t generation);
ncclResult_t pncclMoeCommMaskRanks(ncclMoeComm_t moe, const int* masked, uint64_t generation);

/* What the communicator's calls have counted since ncclMoeCommInit, in either mode.  A dispatch with KEEP_ROUTING
 * counts as any other does; one whose receive buffer is too small delivers no rows and counts none. */
typedef struct ncclMoeCommStats {
  size_t size;
  unsigned int magic;
  unsigned int version;
  uint64_t* waitNs; /* host memory [R] or NULL: nanoseconds for which this rank's calls waited for each rank to begin
                           * the same call, the one or two microseconds of the message's flight and this rank's own
                           * start included: compare ranks.  The straggler is the one that the others wait for */
  uint64_t* expertTokens; /* host memory [L] or NULL: tokens that came for each local expert */
  uint64_t leftOut;       /* selections that combine left out, for their ranks were masked */
} ncclMoeCommStats_t;

#define NCCL_MOE_COMM_STATS_INITIALIZER                                                                                \
  { sizeof(ncclMoeCommStats_t), NCCL_MOE_MAGIC, NCCL_MOE_VERSION_CODE, NULL, NULL, 0 }

/* Reads the counters as they stand, while calls may run.  Local; synchronises the host for a copy.
 * Errors: ncclInvalidArgument, ncclInvalidUsage (host backend), ncclUnhandledCudaError. */
ncclResult_t ncclMoeCommGetStats(ncclMoeComm_t moe, ncclMoeCommStats_t* stats);
ncclResult_t pncclMoeCommGetStats(ncclMoeComm_t moe, ncclMoeCommStats_t* stats);

/* The sentence of the last error of this communicator, or with NULL of the calling thread; "" if none.  Valid until the
 * next call on that communicator (of that thread). */
const char* ncclMoeGetLastError(ncclMoeComm_t moe);
const char* pncclMoeGetLastError(ncclMoeComm_t moe);

/* Device memory that all ranks of the communicator reach.  Rows that throughput mode dispatches into it arrive without
 * a staging copy (on the host backend this is ordinary memory).  Combine reads any memory where it is.  Collective with
 * the same bytes (> 0) on every rank; synchronises the host; not capturable.  *ptr is aligned to 128 bytes at least,
 * its content undefined.  Freed by ncclMoeMemFree (collective) or with the communicator.  Where ranks on GPUs are
 * threads of one process, freed memory (that of routings too) serves the communicator's later allocations and goes back
 * to CUDA with the communicator: cudaFree would wait for all GPUs of the process, and so possibly for a kernel that
 * waits for this rank.
 * Errors: ncclInvalidArgument, ncclInvalidUsage (as of ncclMoeRoutingCreate), ncclRemoteError, ncclUnhandledCudaError,
 * ncclSystemError. */
ncclResult_t ncclMoeMemAlloc(void** ptr, size_t bytes, ncclMoeComm_t moe);
ncclResult_t pncclMoeMemAlloc(void** ptr, size_t bytes, ncclMoeComm_t moe);
ncclResult_t ncclMoeMemFree(void* ptr, ncclMoeComm_t moe);
ncclResult_t pncclMoeMemFree(void* ptr, ncclMoeComm_t moe);

/* ----------------------------------------------------------------------------------------------------- routing -- */

/* What dispatch delivers and combine reads.  Rows are always ordered by (source rank, token), whatever the timing. */
typedef enum {
  ncclMoeLayoutRankMajor = 0, /* [N, H]: one row per (token, this rank), ordered by (source rank, token); with it local
                               * expert ids [N, K] (-1: that selection is not here) and weights [N, K] */
  ncclMoeLayoutExpertMajor = 1, /* [N, H]: one row per (token, local expert), grouped by local expert, each group
                                 * starting at a multiple of expertAlignment; within a group ordered by (source rank,
                                 * token). N counts the groups rounded up to expertAlignment. */
  ncclMoeLayoutExpertPadded = 2 /* [L, R*maxTokens, H]: expert l's rows are the first expertCounts[l] of its plane,
                                 * ordered by (source rank, token). N is the sum of the counts. */
} ncclMoeLayout_t;

typedef struct ncclMoeRoutingConfig {
  size_t size;
  unsigned int magic;
  unsigned int version;
  int topK;      /* K of this routing's calls, 1 to the communicator's maxTopK.  Required. */
  int maxTokens; /* largest T of any rank in this routing's calls; 0: the communicator's.  It is also the
                  * maxTokens of ncclMoeLayoutExpertPadded. */
  ncclMoeLayout_t layout;
  int expertAlignment; /* ncclMoeLayoutExpertMajor: 1 to 65536, in rows; 0: 1 */
  int hostCounts;      /* 1: dispatch also leaves the counts where ncclMoeRoutingGetCounts reads them */
} ncclMoeRoutingConfig_t;

#define NCCL_MOE_ROUTING_CONFIG_INITIALIZER                                                                            \
  { sizeof(ncclMoeRoutingConfig_t), NCCL_MOE_MAGIC, NCCL_MOE_VERSION_CODE, 0, 0, ncclMoeLayoutRankMajor, 0, 0 }

/* The device memory that a routing of this config takes.  Local.  Errors: ncclInvalidArgument, ncclInvalidUsage
 * (latency mode cannot serve it). */
ncclResult_t ncclMoeRoutingMemoryNeeded(ncclMoeComm_t moe, const ncclMoeRoutingConfig_t* config, size_t* bytes);
ncclResult_t pncclMoeRoutingMemoryNeeded(ncclMoeComm_t moe, const ncclMoeRoutingConfig_t* config, size_t* bytes);

/* Makes the object that remembers which rows went where: written by dispatch, read by combine and by later dispatches
 * that keep it.  All memory is taken here.  Collective with the same config on every rank; synchronises the host; not
 * capturable.  A routing serves one dispatch-combine pair at a time; use one per layer or micro-batch in flight.
 * Errors: ncclInvalidArgument (on GPUs also: ranks differ), ncclInvalidUsage (latency mode cannot serve it; ranks are
 * masked; host backend: ranks differ), ncclUnhandledCudaError, ncclSystemError, ncclRemoteError. */
ncclResult_t ncclMoeRoutingCreate(ncclMoeRouting_t* routing, ncclMoeComm_t moe, const ncclMoeRoutingConfig_t* config);
ncclResult_t pncclMoeRoutingCreate(ncclMoeRouting_t* routing, ncclMoeComm_t moe, const ncclMoeRoutingConfig_t* config);

/* Frees a routing after its enqueued work; local, synchronises the host.  A SEND_ONLY call that was not completed is
 * completed first on the host backend, which waits for the peers that do the same.  NULL is fine.
 * Errors: ncclInvalidArgument, ncclRemoteError. */
ncclResult_t ncclMoeRoutingDestroy(ncclMoeRouting_t routing, ncclMoeComm_t moe);
ncclResult_t pncclMoeRoutingDestroy(ncclMoeRouting_t routing, ncclMoeComm_t moe);

/* Waits for the routing's last dispatch (its counts, not its rows) and copies them to host memory: *nRows is N;
 * expertCounts, if not NULL, takes [L] rows per local expert without padding.  Local; needs hostCounts; not capturable.
 * In latency mode the counts of a SEND_ONLY dispatch come with ncclMoeComplete.  Returns that dispatch's error where it
 * failed, also when the receive buffer was too small (*nRows is then the size needed).
 * Errors: ncclInvalidArgument, ncclInvalidUsage (no dispatch yet; hostCounts not asked for; the last dispatch was
 * captured in a graph, whose counts are in device memory alone; in latency mode it was SEND_ONLY and is not completed),
 * ncclRemoteError. */
ncclResult_t ncclMoeRoutingGetCounts(ncclMoeRouting_t routing, ncclMoeComm_t moe, int64_t* nRows, int* expertCounts);
ncclResult_t pncclMoeRoutingGetCounts(ncclMoeRouting_t routing, ncclMoeComm_t moe, int64_t* nRows, int* expertCounts);

/* ---------------------------------------------------------------------------------------------------- dispatch -- */

/* How dispatch changes rows on their way.  A row has at most 4096 bytes of scales (see scaleBytes). */
typedef enum {
  ncclMoeQuantNone = 0,
  /* ncclBfloat16 rows become ncclMoeFloat8e4m3.  Each block of NCCL_MOE_SCALE_BLOCK elements of a row (the last may be
   * shorter) is divided by its scale amax / 448, where amax is the block's largest magnitude, taken as 2^-64 at least
   * and not counting NaNs.  q = e4m3(x * (448 / amax)), all in FP32, rounded to nearest even, saturated.
   * scales: FP32, ceil(H/128) per row. */
  ncclMoeQuantFp8 = 1,
  /* The same with the scale rounded up to a power of two and stored as its biased exponent (UE8M0, one byte, value
   * 2^(byte-127)): ceil(H/128) bytes per row, padded with zero bytes to a multiple of 4.  q = e4m3(x / scale).  This is
   * DeepGEMM's packing of four exponents in an int32. */
  ncclMoeQuantFp8Ue8m0 = 2
} ncclMoeQuant_t;

/* How dispatch lays out recvScales. */
typedef enum {
  ncclMoeScaleRowMajor = 0,   /* [rows, scaleBytes] */
  ncclMoeScaleColumnMajor = 1 /* 4-byte words, [scaleBytes/4, ld] with ld = recvCapacity; in ncclMoeLayoutExpertPadded
                               * [L, scaleBytes/4, R*maxTokens].  ld must be a multiple of 4 (what TMA loads want). */
} ncclMoeScaleLayout_t;

/* Flags of dispatch and combine. */
#define NCCL_MOE_SEND_ONLY 1u    /* only the sending half; ncclMoeComplete(routing) does the rest */
#define NCCL_MOE_KEEP_ROUTING 2u /* dispatch: the routing of the last dispatch holds; topkIdx is not read */
#define NCCL_MOE_EXACT 4u        /* combine from expert layouts: every selection's row crosses, is rounded once */

/* Arguments of a dispatch.  "rows" stands for the layout's leading dimensions: [N] or [L, R*maxTokens]. */
typedef struct ncclMoeDispatchArgs {
  size_t size;
  unsigned int magic;
  unsigned int version;
  /* in */
  const void* x;         /* [T, H] of type.  May be NULL if T is 0. */
  ncclDataType_t type;   /* ncclBfloat16, ncclFloat16, ncclFloat32, ncclMoeFloat8e4m3 */
  int hidden;            /* H; a row is a multiple of 16 bytes (also after the FP8 cast) and fits maxRowBytes */
  int nTokens;           /* T, 0 to the routing's maxTokens; ranks may differ */
  const int* nTokensDev; /* device memory, or NULL: T is read from here when the work runs, clamped to 0..nTokens */
  const void* topkIdx;   /* [T, K] global expert ids of topkIdxType; -1: no expert.  A token may not name an expert
                          * twice.  Ids out of range or repeated are an error that names token and position, on the
                          * host backend on every rank. */
  ncclDataType_t topkIdxType; /* ncclInt32 or ncclInt64 */
  const float* topkWeights;   /* [T, K] or NULL */
  const void* scales;         /* [T, scaleBytes] opaque bytes that travel with the rows (FP8 rows' scales), or NULL */
  int scaleBytes;             /* 0 to 4096, 0 without scales; on GPUs at most max(256, maxRowBytes / 16) of the
                               * communicator.  With quant it is the library's to know; leave it 0. */
  ncclMoeQuant_t quant;
  ncclMoeScaleLayout_t scaleLayout;
  /* out */
  void* recvX;          /* [rows, H] of type (ncclMoeFloat8e4m3 with quant).  Rows that receive no token, alignment
                         * padding included, are left as they are. */
  int64_t recvCapacity; /* rows that recvX and the tensors below have; at least N, or the dispatch fails on every rank,
                         * naming the rank and the size needed, and writes none of the row tensors.
                         * Ignored by ncclMoeLayoutExpertPadded. */
  void* recvScales;     /* as scaleLayout says; needed with scales or quant */
  int* recvTopkIdx;     /* RANK_MAJOR: [N, K] local expert ids, -1: not here; or NULL.  Other layouts: NULL */
  float* recvWeights;   /* RANK_MAJOR: [N, K], 0 where recvTopkIdx is -1; other layouts: [rows]; or NULL.  Needs
                         * topkWeights */
  int* recvCount;       /* [1]: N, or NULL */
  int* expertCounts;    /* [L]: rows for each local expert, without padding, or NULL */
  int* expertOffsets;   /* EXPERT_MAJOR: [L+1] first row of each group, and N; or NULL.  Other layouts: NULL */
  /* how */
  unsigned int flags; /* NCCL_MOE_SEND_ONLY | NCCL_MOE_KEEP_ROUTING */
  int numSms;         /* 0: the communicator's */
} ncclMoeDispatchArgs_t;

#define NCCL_MOE_DISPATCH_ARGS_INITIALIZER                                                                             \
  {                                                                                                                    \
    sizeof(ncclMoeDispatchArgs_t), NCCL_MOE_MAGIC, NCCL_MOE_VERSION_CODE, NULL, ncclBfloat16, 0, 0, NULL, NULL,        \
      ncclInt64, NULL, NULL, 0, ncclMoeQuantNone, ncclMoeScaleRowMajor, NULL, 0, NULL, NULL, NULL, NULL, NULL, NULL,   \
      0, 0                                                                                                             \
  }

/* Sends each token's row, once per rank, to the ranks that hold its experts, and delivers it there in the routing's
 * layout. Collective (hidden, type, quant, scaleBytes, flags and which of topkWeights and scales are given: the same on
 * every rank, which the host backend checks, naming what differs; nTokens, nTokensDev, capacities and numSms are each
 * rank's own); stream-ordered; may be captured in a CUDA graph, and what a replay reads from topkIdx and nTokensDev may
 * change.  With KEEP_ROUTING, nTokens and what nTokensDev holds must be the kept dispatch's.
 * Errors: ncclInvalidArgument, ncclInvalidUsage (also: receive capacity, from the host backend), ncclRemoteError,
 * ncclUnhandledCudaError. */
ncclResult_t ncclMoeDispatch(const ncclMoeDispatchArgs_t* args, ncclMoeRouting_t routing, ncclMoeComm_t moe,
                             cudaStream_t stream);
ncclResult_t pncclMoeDispatch(const ncclMoeDispatchArgs_t* args, ncclMoeRouting_t routing, ncclMoeComm_t moe,
                              cudaStream_t stream);

/* ----------------------------------------------------------------------------------------------------- combine -- */

typedef struct ncclMoeCombineArgs {
  size_t size;
  unsigned int magic;
  unsigned int version;
  /* in */
  const void* x;        /* [rows, H] in the layout and order in which the routing's last dispatch delivered.  Rows that
                         * received no token are not read. */
  ncclDataType_t type;  /* ncclBfloat16, ncclFloat16, ncclFloat32 */
  int hidden;           /* H; it need not be the dispatch's */
  const float* weights; /* expert layouts: [rows] factor of each row (dispatch's recvWeights), or NULL: 1.  RANK_MAJOR:
                         * NULL, for its rows are sums over experts already */
  const float* gradWeights; /* gradients of the weights: [N, K] in RANK_MAJOR (read where recvTopkIdx was not -1),
                             * [rows] in expert layouts; or NULL */
  /* out */
  void* out; /* [T, H] of type, T of the routing's dispatch; zeros for a token without any expert.  May be NULL
              * if T is 0. */
  float*
    gradTopkWeights; /* [T, K]: gradWeights back at the owner, 0 for selections of -1 or of masked ranks; or NULL */
  /* how */
  unsigned int flags;   /* NCCL_MOE_SEND_ONLY | NCCL_MOE_EXACT */
  int numSms;           /* 0: the communicator's */
  int withGradWeights;  /* 1: weight gradients are returned; gradWeights and gradTopkWeights are then needed, but on
                        * ranks that have no rows, or no tokens.  The same on every rank */
  ncclMoeQuant_t quant; /* ncclMoeQuantFp8: half the bytes cross.  For routings that latency mode serves (see
                         * ncclMoeMode_t), ncclBfloat16 and H a multiple of 16, not with EXACT.  Each rank's FP32 sum
                         * of a token is not rounded to type but cast as dispatch casts rows; the owner adds q * scale,
                         * each product rounded to FP32 */
} ncclMoeCombineArgs_t;

#define NCCL_MOE_COMBINE_ARGS_INITIALIZER                                                                              \
  {                                                                                                                    \
    sizeof(ncclMoeCombineArgs_t), NCCL_MOE_MAGIC, NCCL_MOE_VERSION_CODE, NULL, ncclBfloat16, 0, NULL, NULL, NULL,      \
      NULL, 0, 0, 0, ncclMoeQuantNone                                                                                  \
  }

/* Brings rows back to their tokens' owners and sums them.  The sum of a token is made in FP32 and in a fixed order:
 *   default  each rank adds its (weighted) rows of the token in the order of the token's selections k, starting from 0,
 *            each product and each sum rounded to FP32, and rounds the result to type; the owner adds those in the
 *            order of the ranks, starting from 0, in FP32, and rounds to type.  One row per (token, rank) crosses
 *            the wire.
 *   EXACT    the owner adds the (weighted) rows in the order of k and rounds once.  One row per selection crosses.
 * Collective (hidden, type, flags, quant, withGradWeights and whether weights are given: the same on every rank);
 * stream-ordered; may be captured.  Needs a dispatch of the same routing before it, and may be repeated.
 * Errors: ncclInvalidArgument, ncclInvalidUsage, ncclRemoteError, ncclUnhandledCudaError. */
ncclResult_t ncclMoeCombine(const ncclMoeCombineArgs_t* args, ncclMoeRouting_t routing, ncclMoeComm_t moe,
                            cudaStream_t stream);
ncclResult_t pncclMoeCombine(const ncclMoeCombineArgs_t* args, ncclMoeRouting_t routing, ncclMoeComm_t moe,
                             cudaStream_t stream);

/* The second half of the routing's SEND_ONLY dispatch or combine: afterwards its outputs are there.  Latency mode
 * stores them in this half, throughput mode and the host backend may from the first one on: nothing may use them from
 * then on.  Between the two halves nothing runs on the device.  Collective; several routings may be in flight,
 * completed in the same order on every rank (a first half that a rank refuses on the host backend has no second half
 * there, and waits like a whole call, for the peers' second halves if need be); stream-ordered, on any stream; both
 * halves belong into one capture, or neither into any.
 * Errors: ncclInvalidArgument, ncclInvalidUsage (nothing to complete), ncclRemoteError, ncclUnhandledCudaError. */
ncclResult_t ncclMoeComplete(ncclMoeRouting_t routing, ncclMoeComm_t moe, cudaStream_t stream);
ncclResult_t pncclMoeComplete(ncclMoeRouting_t routing, ncclMoeComm_t moe, cudaStream_t stream);

/* Bytes of scales per row that the fused cast makes, what recvScales is sized by. */
#define NCCL_MOE_QUANT_SCALE_BYTES(quant, hidden)                                                                      \
  ((quant) == ncclMoeQuantFp8        ? ((hidden) + NCCL_MOE_SCALE_BLOCK - 1) / NCCL_MOE_SCALE_BLOCK * 4                \
   : (quant) == ncclMoeQuantFp8Ue8m0 ? ((hidden) + 4 * NCCL_MOE_SCALE_BLOCK - 1) / (4 * NCCL_MOE_SCALE_BLOCK) * 4      \
                                     : 0)

#ifdef __cplusplus
}
#endif

#endif /* NCCL_MOE_H_ */
