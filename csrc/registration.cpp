// Registers one device's ops with torch.ops.svel, whose schemas Python defines. Compiled into each library,
// with SVEL_DEVICE naming its namespace.
#include <torch/csrc/stable/library.h>

#include "common/ops.h"

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(svel, CUDA, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(svel, CPU, m) {
#endif
  using namespace svel::SVEL_DEVICE;
  m.impl("posterior_mean", TORCH_BOX(&posterior_mean));
  m.impl("posterior_part", TORCH_BOX(&posterior_part));
  m.impl("stable_target", TORCH_BOX(&stable_target));
  m.impl("affine_step", TORCH_BOX(&affine_step));
  m.impl("stablevs_step", TORCH_BOX(&stablevs_step));
  m.impl("va_repa_loss", TORCH_BOX(&va_repa_loss));
  m.impl("va_repa_loss_backward", TORCH_BOX(&va_repa_loss_backward));
  m.impl("bank_push_", TORCH_BOX(&bank_push_));
  m.impl("bank_draw", TORCH_BOX(&bank_draw));
  m.impl("conditional_target_", TORCH_BOX(&conditional_target_));
}
