#include "cuda/attention.cuh"

namespace clinfast {
namespace cuda {

int attention_wgmma(const AttentionArgs &, DType, Stream) { return 801; }

}  // namespace cuda
}  // namespace clinfast
