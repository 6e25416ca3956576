// Launches of the single-pass kernel: the list of compiled tiles is that of the planner.
#include "stable_target/launch.cuh"
#include "stable_target/stream.cuh"

namespace svel::cuda {
namespace {

template <typename T, int EV, int THREADS, int Q, int TR>
bool launch_if(const char* op, const Inputs& in, const WorkList& work, const Partials& parts,
               const Plan& plan, cudaStream_t stream) {
  const bool same_type = EV == 1 || in.refs.dtype == DtypeOf<T>::value;
  if (!same_type || plan.threads != THREADS || plan.tile_d != THREADS * Q || plan.tile_refs != TR)
    return false;
  const auto kernel = stream_kernel<T, EV, THREADS, Q, TR>;
  const int bytes = static_cast<int>(plan.smem_bytes);
  check_cuda(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  kernel<<<static_cast<unsigned>(plan.blocks), THREADS, bytes, stream>>>(in, work, parts, plan.stages);
  check_launch(op);
  return true;
}

template <typename T>
bool launch_half(const char* op, const Inputs& in, const WorkList& work, const Partials& parts,
                 const Plan& plan, cudaStream_t stream) {
  return launch_if<T, 8, 128, 8, 8>(op, in, work, parts, plan, stream) ||
         launch_if<T, 8, 256, 8, 8>(op, in, work, parts, plan, stream) ||
         launch_if<T, 8, 512, 8, 8>(op, in, work, parts, plan, stream) ||
         launch_if<T, 8, 512, 16, 4>(op, in, work, parts, plan, stream) ||
         launch_if<T, 8, 512, 32, 2>(op, in, work, parts, plan, stream);
}

bool launch_float(const char* op, const Inputs& in, const WorkList& work, const Partials& parts,
                  const Plan& plan, cudaStream_t stream) {
  return launch_if<float, 4, 128, 8, 8>(op, in, work, parts, plan, stream) ||
         launch_if<float, 4, 256, 8, 4>(op, in, work, parts, plan, stream) ||
         launch_if<float, 4, 512, 8, 4>(op, in, work, parts, plan, stream) ||
         launch_if<float, 4, 512, 16, 2>(op, in, work, parts, plan, stream) ||
         launch_if<float, 4, 512, 32, 1>(op, in, work, parts, plan, stream);
}

bool launch_plain(const char* op, const Inputs& in, const WorkList& work, const Partials& parts,
                  const Plan& plan, cudaStream_t stream) {
  return launch_if<float, 1, 128, 8, 8>(op, in, work, parts, plan, stream) ||
         launch_if<float, 1, 512, 8, 4>(op, in, work, parts, plan, stream) ||
         launch_if<float, 1, 512, 32, 1>(op, in, work, parts, plan, stream);
}

}  // namespace

void run_stream(const char* op, const Inputs& in, const Plan& plan, void* workspace, cudaStream_t stream) {
  Carver carver(workspace);
  const WorkList work =
      build_work_list(in, plan.tile_refs, carver.take<char>(work_list_bytes(in.n, in.k)), stream);
  check_launch(op);
  Partials parts;
  parts.sums = carver.take<float>(2 * plan.blocks * in.d);
  parts.running = carver.take<double>(plan.blocks * in.d);
  parts.centres = carver.take<float>(plan.blocks * in.d);
  parts.max_score = carver.take<float>(2 * plan.blocks);
  parts.total = carver.take<double>(2 * plan.blocks);
  parts.y_square = carver.take<double>(plan.blocks);

  const bool launched = !plan.aligned                 ? launch_plain(op, in, work, parts, plan, stream)
                        : in.refs.dtype == Dtype::f16 ? launch_half<__half>(op, in, work, parts, plan, stream)
                        : in.refs.dtype == Dtype::bf16
                            ? launch_half<__nv_bfloat16>(op, in, work, parts, plan, stream)
                            : launch_float(op, in, work, parts, plan, stream);
  if (!launched)
    throw std::runtime_error(std::string("svel::") + op + ": no compiled kernel for the planned tile");

  const int64_t slices = combine_slices(in.n, in.d);
  combine_kernel<<<static_cast<unsigned>(in.n * slices), COMBINE_THREADS, plan.blocks * sizeof(double),
                   stream>>>(in, work, parts, plan.blocks);
  check_launch(op);
}

}  // namespace svel::cuda
