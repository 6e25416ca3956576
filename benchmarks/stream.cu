// What reading class banks takes at least: 210 classes of 2 MB, or of as many KB as are given, anywhere in a
// bank of 1,001, by a kernel that does nothing else; of so many different ones where a second number is
// given, which come from the L2 when they come again. One block for each multiprocessor, a ring of bulk
// copies in shared memory; each block reads a range of the list, or all blocks take tiles in turn. Times as
// in timing.py: graph replays, cold L2.
//
//   nvcc -O3 -std=c++17 -arch=sm_90a -Icsrc benchmarks/stream.cu -o stream && ./stream 512 10
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>

#include "common/hopper.cuh"

using namespace svel;

namespace {

constexpr int CLASSES = 1001, USED = 210, RING_BYTES = 208 << 10, MOST_STAGES = 64;

struct Stream {
  const char* bank;
  const int* classes;  // (USED,)
  long class_bytes;
  int tile, stages, in_flight;  // bytes of a tile; tiles in the ring; of these, on their way at once
  bool in_turn;
  float* out;  // (blocks,)
};

__device__ long tile_of(const Stream& stream, long i) {
  const long tiles = stream.class_bytes / stream.tile * USED, each = (tiles + gridDim.x - 1) / gridDim.x;
  const long tile = stream.in_turn ? i * gridDim.x + blockIdx.x : blockIdx.x * each + i;
  return i < each && tile < tiles ? tile : -1;
}

__global__ void __launch_bounds__(64, 1) read_classes(const __grid_constant__ Stream stream) {
  extern __shared__ __align__(128) char memory[];
  Barrier* const full = reinterpret_cast<Barrier*>(memory);
  Barrier* const empty = full + MOST_STAGES;
  char* const ring = memory + 2 * MOST_STAGES * sizeof(Barrier);
  if (threadIdx.x == 0) {
    for (int s = 0; s < stream.stages; ++s) init_barrier(full + s, 1), init_barrier(empty + s, 1);
    publish_barriers();
  }
  __syncthreads();
  const long in_class = stream.class_bytes / stream.tile;
  int s = 0, phase = 0, behind = 0, behind_phase = 0;
  if (threadIdx.x == 32) {
    const uint64_t policy = read_once_policy();
    for (long i = 0, tile; (tile = tile_of(stream, i)) >= 0; ++i) {
      if (i >= stream.in_flight) {
        wait_barrier(full + behind, behind_phase);
        if (++behind == stream.stages) behind = 0, behind_phase ^= 1;
      }
      wait_barrier(empty + s, phase ^ 1);
      arrive_expecting(full + s, stream.tile);
      const char* const from = stream.bank + stream.classes[tile / in_class] * stream.class_bytes;
      bulk_copy(ring + s * stream.tile, from + tile % in_class * stream.tile, stream.tile, full + s, policy);
      if (++s == stream.stages) s = 0, phase ^= 1;
    }
  } else if (threadIdx.x == 0) {
    float sum = 0;
    for (long i = 0; tile_of(stream, i) >= 0; ++i) {
      wait_barrier(full + s, phase);
      sum += *reinterpret_cast<float*>(ring + s * stream.tile);
      arrive(empty + s);
      if (++s == stream.stages) s = 0, phase ^= 1;
    }
    stream.out[blockIdx.x] = sum;
  }
}

__global__ void read_all(const float4* values, long count, float* out) {
  float sum = 0;
  for (long i = blockIdx.x * long{blockDim.x} + threadIdx.x; i < count; i += long{gridDim.x} * blockDim.x) {
    const float4 v = values[i];
    sum += v.x + v.y + v.z + v.w;
  }
  if (sum == 1.5f) *out = sum;  // never, but the compiler does not know
}

__global__ void fill(unsigned* values, long count) {
  for (long i = blockIdx.x * long{blockDim.x} + threadIdx.x; i < count; i += long{gridDim.x} * blockDim.x) {
    unsigned v = static_cast<unsigned>(i) * 2654435761u;
    v = (v ^ v >> 15) * 2246822519u;
    values[i] = (v ^ v >> 13) & 0x3fff3fff;
  }
}

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
  std::exit(1);
}

// Microseconds: the median of replays over several lists, whose classes the L2 does not have.
template <typename Launch>
float replay_time(const std::vector<int*>& lists, const float4* other, long others, float* out,
                  const Launch& launch) {
  cudaStream_t stream;
  cudaEvent_t begin, end;
  check(cudaStreamCreate(&stream)), check(cudaEventCreate(&begin)), check(cudaEventCreate(&end));
  std::vector<cudaGraphExec_t> graphs;
  for (const int* list : lists) {
    cudaGraph_t graph;
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    launch(list, stream);
    check(cudaStreamEndCapture(stream, &graph));
    graphs.emplace_back();
    check(cudaGraphInstantiate(&graphs.back(), graph, 0));
  }
  std::vector<float> times;
  for (int i = 0; i < 44; ++i) {
    read_all<<<1056, 256, 0, stream>>>(other, others, out);
    check(cudaEventRecord(begin, stream));
    check(cudaGraphLaunch(graphs[i % graphs.size()], stream));
    check(cudaEventRecord(end, stream));
    check(cudaEventSynchronize(end));
    float milliseconds;
    check(cudaEventElapsedTime(&milliseconds, begin, end));
    if (i >= 4) times.push_back(1000 * milliseconds);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

}  // namespace

int main(int count, char** values) {
  const long class_bytes = (count > 1 ? std::max(std::atol(values[1]) / 32 * 32, 32L) : 2048)
                           << 10;  // whole tiles
  const int different = count > 2 ? std::clamp(std::atoi(values[2]), 1, USED) : USED;
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0));
  char* bank;
  float4* other;
  float* out;
  const long bytes = CLASSES * class_bytes, others = 1 << 24;
  check(cudaMalloc(&bank, bytes)), check(cudaMalloc(&other, others * sizeof(float4)));
  check(cudaMalloc(&out, 4096));
  fill<<<1024, 256>>>(reinterpret_cast<unsigned*>(bank), bytes / 4);
  check(cudaMemset(other, 1, others * sizeof(float4)));
  std::mt19937 random(0);
  std::vector<int> classes(CLASSES);
  std::iota(classes.begin(), classes.end(), 0);
  std::vector<int*> lists(4);
  for (int*& list : lists) {
    std::shuffle(classes.begin(), classes.end(), random);
    std::vector<int> used(USED);
    for (int i = 0; i < USED; ++i) used[i] = classes[i % different];
    check(cudaMalloc(&list, USED * sizeof(int)));
    check(cudaMemcpy(list, used.data(), USED * sizeof(int), cudaMemcpyHostToDevice));
  }
  check(cudaFuncSetAttribute(read_classes, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             RING_BYTES + 2 * MOST_STAGES * sizeof(Barrier)));
  std::printf("%s\n| tiles | on their way | ranges | in turn |\n| --- | --- | --- | --- |\n", device.name);
  for (const int tile : {8 << 10, 16 << 10, 32 << 10}) {
    for (const int kilobytes : {32, 48, 64, 96, 208}) {
      if (kilobytes * 1024 < 2 * tile) continue;
      float times[2];
      for (const bool in_turn : {false, true}) {
        const int stages = std::min(MOST_STAGES, RING_BYTES / tile);
        times[in_turn] = replay_time(lists, other, others, out, [&](const int* list, cudaStream_t stream) {
          const Stream arguments{bank,    list, class_bytes, tile, stages, kilobytes * 1024 / tile,
                                 in_turn, out};
          read_classes<<<device.multiProcessorCount, 64, stages * tile + 2 * MOST_STAGES * sizeof(Barrier),
                         stream>>>(arguments);
          check(cudaGetLastError());
        });
      }
      std::printf("| %d KB | %d KB | %.1f µs | %.1f µs |\n", tile >> 10, kilobytes, times[0], times[1]);
    }
  }
  return 0;
}
