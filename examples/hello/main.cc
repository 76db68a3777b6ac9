// Two ranks, here threads of one process, send their tokens to the experts and get them back, weighted and summed.
#include <nccl_moe.h>
#include <unistd.h>

#include <cstdio>
#include <string>
#include <thread>

bool runRank(int rank, const char* rendezvous) {
  enum { nTokens = 2, hidden = 4, topK = 2, nExperts = 4, capacity = 8 };
  ncclMoeConfig_t config = NCCL_MOE_CONFIG_INITIALIZER;
  config.nExperts = nExperts, config.maxTokens = nTokens, config.maxTopK = topK, config.maxRowBytes = 16;
  ncclMoeRoutingConfig_t layer = NCCL_MOE_ROUTING_CONFIG_INITIALIZER;
  layer.topK = topK, layer.layout = ncclMoeLayoutExpertMajor;

  alignas(16) float x[nTokens * hidden] = {1, 2, 3, 4, 5, 6, 7, 8}, received[capacity * hidden], out[nTokens * hidden];
  int experts[nTokens * topK] = {0, 3, 2, 1}; // experts 0 and 1 live on rank 0, experts 2 and 3 on rank 1
  float weights[nTokens * topK] = {0.5, 0.5, 0.25, 0.75}, rowWeights[capacity];
  ncclMoeDispatchArgs_t send = NCCL_MOE_DISPATCH_ARGS_INITIALIZER;
  send.x = x, send.type = ncclFloat32, send.hidden = hidden, send.nTokens = nTokens;
  send.topkIdx = experts, send.topkIdxType = ncclInt32, send.topkWeights = weights;
  send.recvX = received, send.recvWeights = rowWeights, send.recvCapacity = capacity;
  ncclMoeCombineArgs_t back = NCCL_MOE_COMBINE_ARGS_INITIALIZER;
  back.x = received, back.type = ncclFloat32, back.hidden = hidden, back.weights = rowWeights, back.out = out;

  ncclMoeComm_t comm = nullptr;
  ncclMoeRouting_t routing = nullptr;
  bool ok = ncclMoeCommInitHost(&comm, 2, rank, rendezvous, &config) == ncclSuccess &&
            ncclMoeRoutingCreate(&routing, comm, &layer) == ncclSuccess &&
            ncclMoeDispatch(&send, routing, comm, nullptr) == ncclSuccess && // then the experts work on `received`
            ncclMoeCombine(&back, routing, comm, nullptr) == ncclSuccess;
  if (!ok) fprintf(stderr, "rank %d: %s\n", rank, ncclMoeGetLastError(comm));
  for (int i = 0; ok && i < nTokens * hidden; i++) ok = out[i] == x[i]; // the experts did nothing, weights add up to 1
  ncclMoeCommDestroy(comm);
  return ok;
}

int main() {
  const std::string rendezvous = "file:///tmp/moe-hello-" + std::to_string(getpid());
  bool ok[2];
  std::thread other([&] { ok[1] = runRank(1, rendezvous.c_str()); });
  ok[0] = runRank(0, rendezvous.c_str());
  other.join();
  printf("%s\n", ok[0] && ok[1] ? "every token came back" : "failed");
  return ok[0] && ok[1] ? 0 : 1;
}
