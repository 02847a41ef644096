// A stand-in for NCCL, for one rank of many on a machine with one GPU: the other ranks do not exist, and every
// collective is one kernel that keeps as many SMs busy as NCCL does, for as long as the bytes take over a link.
//
// What the others would send is a copy of what this rank sends them, so buffers are filled and shapes hold; sums are
// this rank's own. Losses therefore mean nothing; which kernels run, their times and the memory do. The ranks never
// wait for each other. Rates come from the environment (benchmarks/one_rank/run.py sets them).
//
//     nvcc -O2 -shared -Xcompiler -fPIC -arch=sm_90 -I.../nvidia/nccl/include nccl.cu -o libstandin.so
//     LD_PRELOAD=libstandin.so python ...

#include <cuda_runtime.h>
#include <nccl.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <vector>

struct ncclComm {
  int ranks, rank;
};

namespace {

constexpr int kCopies = 24;           // of one kernel; more are more kernels
constexpr int kThreads = 512;
constexpr int kShared = 80 * 1024;    // NCCL's kernels hold about this much, which bounds what runs beside them
constexpr size_t kSlice = 128 * 1024; // copied by a block between two looks at the clock

double setting(const char* name, double otherwise) {
  const char* text = std::getenv(name);
  return text ? std::atof(text) : otherwise;
}

const double kLatencyUs = setting("ONE_RANK_LATENCY_US", 15);
const double kGather = setting("ONE_RANK_ALL_GATHER_GBPS", 260);
const double kScatter = setting("ONE_RANK_REDUCE_SCATTER_GBPS", 242);
const double kReduce = setting("ONE_RANK_ALL_REDUCE_GBPS", 302);
const double kToAll = setting("ONE_RANK_ALL_TO_ALL_GBPS", 326);
const int kBlocks = static_cast<int>(setting("ONE_RANK_SMS", 24));

struct Copy {
  const char* from;
  char* to;
  size_t bytes;
};

struct Copies {
  Copy of[kCopies];
  int count;
};

__device__ unsigned long long now() {
  unsigned long long ns;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns));
  return ns;
}

// Every block copies its slices and lets as much time go by as the link would take for them.
__global__ void __launch_bounds__(kThreads) ncclStandIn(Copies copies, size_t total, double ns) {
  extern __shared__ char held[];
  const unsigned long long begun = now();
  size_t done = 0;
  for (int c = 0; c < copies.count; ++c) {
    const Copy copy = copies.of[c];
    for (size_t at = blockIdx.x * kSlice; at < copy.bytes; at += gridDim.x * kSlice) {
      const size_t bytes = min(kSlice, copy.bytes - at);
      const bool wide = ((reinterpret_cast<uintptr_t>(copy.from + at) | reinterpret_cast<uintptr_t>(copy.to + at)) & 15) == 0;
      const size_t in16 = wide ? bytes / 16 : 0;
      for (size_t i = threadIdx.x; i < in16; i += blockDim.x)
        reinterpret_cast<uint4*>(copy.to + at)[i] = reinterpret_cast<const uint4*>(copy.from + at)[i];
      for (size_t i = in16 * 16 + threadIdx.x; i < bytes; i += blockDim.x) copy.to[at + i] = copy.from[at + i];
      const double share = total ? static_cast<double>(done + at + bytes) / static_cast<double>(total) : 1.0;
      while (now() - begun < static_cast<unsigned long long>(ns * share)) __nanosleep(200);
    }
    done += copy.bytes;
  }
  while (now() - begun < static_cast<unsigned long long>(ns)) __nanosleep(200);
  if (ns < 0) held[threadIdx.x] = 0;
}

struct Call {                 // what one stream has been asked for since the group began
  std::vector<Copy> copies;
  std::vector<Copy> sends, receives;
  double ns = 0, sent = 0, received = 0;
  bool linked = false;  // whether another rank takes part
};

thread_local int depth = 0;
thread_local std::map<cudaStream_t, Call> calls;

size_t width(ncclDataType_t type) {
  switch (type) {
    case ncclInt8: case ncclUint8: case ncclFloat8e4m3: case ncclFloat8e5m2: return 1;
    case ncclFloat16: case ncclBfloat16: return 2;
    case ncclInt32: case ncclUint32: case ncclFloat32: return 4;
    default: return 8;
  }
}

ncclResult_t launch(cudaStream_t stream, Call& call) {
  const size_t pairs = std::min(call.sends.size(), call.receives.size());
  for (size_t i = 0; i < pairs; ++i)
    call.copies.push_back({call.sends[i].from, call.receives[i].to, std::min(call.sends[i].bytes, call.receives[i].bytes)});
  const double ns = call.ns + std::max(call.sent, call.received) / kToAll + (call.linked ? kLatencyUs * 1e3 : 0);
  size_t total = 0;
  for (const Copy& copy : call.copies) total += copy.bytes;
  size_t at = 0;
  static const bool once = cudaFuncSetAttribute(ncclStandIn, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared) == cudaSuccess;
  (void)once;
  do {
    Copies copies{};
    size_t bytes = 0;
    for (; at < call.copies.size() && copies.count < kCopies; ++at) {
      copies.of[copies.count++] = call.copies[at];
      bytes += call.copies[at].bytes;
    }
    const double share = total ? ns * static_cast<double>(bytes) / static_cast<double>(total) : ns;
    ncclStandIn<<<kBlocks, kThreads, kShared, stream>>>(copies, bytes, share);
  } while (at < call.copies.size());
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) std::fprintf(stderr, "stand-in for NCCL: %s\n", cudaGetErrorString(error));
  return error == cudaSuccess ? ncclSuccess : ncclUnhandledCudaError;
}

ncclResult_t flush() {
  ncclResult_t result = ncclSuccess;
  for (auto& [stream, call] : calls)
    if (launch(stream, call) != ncclSuccess) result = ncclUnhandledCudaError;
  calls.clear();
  return result;
}

ncclResult_t after() { return depth ? ncclSuccess : flush(); }

void copy(Call& call, const void* from, void* to, size_t bytes) {
  if (from != to && bytes) call.copies.push_back({static_cast<const char*>(from), static_cast<char*>(to), bytes});
}

Call& of(cudaStream_t stream, ncclComm_t comm) {
  Call& call = calls[stream];
  call.linked |= comm->ranks > 1;
  return call;
}

ncclResult_t make(ncclComm_t* comm, int ranks, int rank) {
  *comm = new ncclComm{ranks, rank};
  return ncclSuccess;
}

}  // namespace

extern "C" {

ncclResult_t ncclGetVersion(int* version) { *version = NCCL_VERSION_CODE; return ncclSuccess; }
ncclResult_t ncclGetUniqueId(ncclUniqueId* id) { std::memset(id, 1, sizeof *id); return ncclSuccess; }
const char* ncclGetErrorString(ncclResult_t) { return "the stand-in for NCCL"; }
const char* ncclGetLastError(ncclComm_t) { return ""; }
ncclResult_t ncclCommInitRank(ncclComm_t* c, int n, ncclUniqueId, int r) { return make(c, n, r); }
ncclResult_t ncclCommInitRankConfig(ncclComm_t* c, int n, ncclUniqueId, int r, ncclConfig_t*) { return make(c, n, r); }
ncclResult_t ncclCommInitRankScalable(ncclComm_t* c, int n, int r, int, ncclUniqueId*, ncclConfig_t*) { return make(c, n, r); }
ncclResult_t ncclCommSplit(ncclComm_t, int, int, ncclComm_t*, ncclConfig_t*) { return ncclInvalidUsage; }
ncclResult_t ncclCommFinalize(ncclComm_t) { return ncclSuccess; }
ncclResult_t ncclCommDestroy(ncclComm_t comm) { delete comm; return ncclSuccess; }
ncclResult_t ncclCommAbort(ncclComm_t) { return ncclSuccess; }
ncclResult_t ncclCommGetAsyncError(ncclComm_t, ncclResult_t* error) { *error = ncclSuccess; return ncclSuccess; }
ncclResult_t ncclCommCount(const ncclComm_t comm, int* n) { *n = comm->ranks; return ncclSuccess; }
ncclResult_t ncclCommUserRank(const ncclComm_t comm, int* r) { *r = comm->rank; return ncclSuccess; }
ncclResult_t ncclCommRegister(const ncclComm_t, void*, size_t, void** handle) { *handle = nullptr; return ncclSuccess; }
ncclResult_t ncclCommDeregister(const ncclComm_t, void*) { return ncclSuccess; }
ncclResult_t ncclCommWindowRegister(ncclComm_t, void*, size_t, ncclWindow_t* w, int) { *w = nullptr; return ncclSuccess; }
ncclResult_t ncclCommWindowDeregister(ncclComm_t, ncclWindow_t) { return ncclSuccess; }
ncclResult_t ncclMemAlloc(void** p, size_t bytes) { return cudaMalloc(p, bytes) == cudaSuccess ? ncclSuccess : ncclUnhandledCudaError; }
ncclResult_t ncclMemFree(void* p) { return cudaFree(p) == cudaSuccess ? ncclSuccess : ncclUnhandledCudaError; }
ncclResult_t ncclRedOpCreatePreMulSum(ncclRedOp_t* op, void*, ncclDataType_t, ncclScalarResidence_t, ncclComm_t) { *op = ncclSum; return ncclSuccess; }
ncclResult_t ncclRedOpDestroy(ncclRedOp_t, ncclComm_t) { return ncclSuccess; }
ncclResult_t ncclGroupStart() { ++depth; return ncclSuccess; }
ncclResult_t ncclGroupEnd() { return --depth ? ncclSuccess : flush(); }

ncclResult_t ncclAllGather(const void* send, void* recv, size_t count, ncclDataType_t type, ncclComm_t comm, cudaStream_t stream) {
  Call& call = of(stream, comm);
  const size_t bytes = count * width(type);
  for (int r = 0; r < comm->ranks; ++r) copy(call, send, static_cast<char*>(recv) + r * bytes, bytes);
  call.ns += static_cast<double>(bytes) * (comm->ranks - 1) / kGather;
  return after();
}

ncclResult_t ncclReduceScatter(const void* send, void* recv, size_t count, ncclDataType_t type, ncclRedOp_t, ncclComm_t comm, cudaStream_t stream) {
  Call& call = of(stream, comm);
  const size_t bytes = count * width(type);
  copy(call, static_cast<const char*>(send) + comm->rank * bytes, recv, bytes);
  call.ns += static_cast<double>(bytes) * (comm->ranks - 1) / kScatter;
  return after();
}

ncclResult_t ncclAllReduce(const void* send, void* recv, size_t count, ncclDataType_t type, ncclRedOp_t, ncclComm_t comm, cudaStream_t stream) {
  Call& call = of(stream, comm);
  const size_t bytes = count * width(type);
  copy(call, send, recv, bytes);
  call.ns += 2.0 * static_cast<double>(bytes) * (comm->ranks - 1) / comm->ranks / kReduce;
  return after();
}

ncclResult_t ncclReduce(const void* send, void* recv, size_t count, ncclDataType_t type, ncclRedOp_t, int root, ncclComm_t comm, cudaStream_t stream) {
  Call& call = of(stream, comm);
  if (root == comm->rank) copy(call, send, recv, count * width(type));
  call.ns += comm->ranks > 1 ? static_cast<double>(count * width(type)) / kReduce : 0;
  return after();
}

ncclResult_t ncclBroadcast(const void* send, void* recv, size_t count, ncclDataType_t type, int root, ncclComm_t comm, cudaStream_t stream) {
  Call& call = of(stream, comm);
  if (root == comm->rank) copy(call, send, recv, count * width(type));
  call.ns += comm->ranks > 1 ? static_cast<double>(count * width(type)) / kGather : 0;
  return after();
}

ncclResult_t ncclBcast(void* buffer, size_t count, ncclDataType_t type, int root, ncclComm_t comm, cudaStream_t stream) {
  return ncclBroadcast(buffer, buffer, count, type, root, comm, stream);
}

ncclResult_t ncclSend(const void* send, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream) {
  Call& call = of(stream, comm);
  const size_t bytes = count * width(type);
  call.sends.push_back({static_cast<const char*>(send), nullptr, bytes});
  call.sent += peer == comm->rank ? 0 : static_cast<double>(bytes);
  return after();
}

ncclResult_t ncclRecv(void* recv, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream) {
  Call& call = of(stream, comm);
  const size_t bytes = count * width(type);
  call.receives.push_back({nullptr, static_cast<char*>(recv), bytes});
  call.received += peer == comm->rank ? 0 : static_cast<double>(bytes);
  return after();
}

ncclResult_t ncclAlltoAll(const void* send, void* recv, size_t count, ncclDataType_t type, ncclComm_t comm, cudaStream_t stream) {
  Call& call = of(stream, comm);
  const size_t bytes = count * width(type) * comm->ranks;
  copy(call, send, recv, bytes);
  call.ns += static_cast<double>(bytes) * (comm->ranks - 1) / comm->ranks / kToAll;
  return after();
}

}  // extern "C"
