// The choice between the attention kernels.
#include "cuda/attention.cuh"

namespace clinfast {
namespace cuda {
int attention_segments(int64_t k_tokens) { return int((k_tokens + kSegmentKeys - 1) / kSegmentKeys); }

int attention(const AttentionArgs &given, DType dtype, AttentionKernel kernel, Stream stream) {
  AttentionArgs args = given;
  const bool half = dtype != DType::f32;
  const int64_t strides = args.q_token_stride | args.q_head_stride | args.k_token_stride | args.k_head_stride |
                          args.v_token_stride | args.v_head_stride | args.out_token_stride | args.out_head_stride |
                          args.head_dim;
  const bool few = kernel == AttentionKernel::few;
  args.vectors = (half || few) && strides % 8 == 0 && on_16_bytes(args.q) && on_16_bytes(args.k) && on_16_bytes(args.v) &&
                 on_16_bytes(args.out);
  if (args.num_heads == 0 || args.q_tokens == 0 || args.batch == 0) return 0;
  if (few) return attention_few(args, dtype, stream);
  const int cc = capability();
  const bool hopper = cc == 90 && half && args.vectors && (args.head_dim == 64 || args.head_dim == 128);
  if (kernel == AttentionKernel::wgmma && hopper) return attention_wgmma(args, dtype, stream);
  if (kernel == AttentionKernel::mma && (!half || cc < 80)) return kNotServed;
  if (half && cc >= 80 && kernel != AttentionKernel::simt) return attention_mma(args, dtype, stream);
  return attention_simt(args, dtype, stream);
}

}  // namespace cuda
}  // namespace clinfast
