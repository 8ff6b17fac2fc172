// One fault for each compute-sanitizer tool to find, so that a clean run of the tool means something.
#include <cstdio>
#include <cstring>

__global__ void out_of_bounds(float* data, int n) { data[n + threadIdx.x] = 1.0f; }

__global__ void race(float* data) {
  __shared__ float word;
  word = static_cast<float>(threadIdx.x);  // every thread writes, nothing orders them
  data[threadIdx.x] = word;
}

__global__ void uninitialised(const float* data, float* out) { out[threadIdx.x] = data[threadIdx.x] + 1.0f; }

__global__ void divergent_barrier(float* data) {
  if (threadIdx.x < 16) __syncthreads();
  data[threadIdx.x] = 1.0f;
}

int main(int, char** argv) {
  const char* fault = argv[1];
  float *data, *out;
  cudaMalloc(&data, 64 * sizeof(float));
  cudaMalloc(&out, 64 * sizeof(float));
  if (std::strcmp(fault, "out-of-bounds") == 0) out_of_bounds<<<1, 64>>>(data, 64);
  if (std::strcmp(fault, "race") == 0) race<<<1, 64>>>(data);
  if (std::strcmp(fault, "uninitialised") == 0) uninitialised<<<1, 64>>>(data, out);
  if (std::strcmp(fault, "divergent-barrier") == 0) divergent_barrier<<<1, 64>>>(data);
  std::printf("%s: %s\n", fault, cudaGetErrorString(cudaDeviceSynchronize()));
  return 0;
}
