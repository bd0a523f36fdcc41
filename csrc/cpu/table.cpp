#include "vec.h"

#define CLINFAST_STRING_(x) #x
#define CLINFAST_STRING(x) CLINFAST_STRING_(x)

namespace clinfast {
namespace CLINFAST_ISA {

void attention(const AttentionArgs &);
void layer_norm(const LayerNormArgs &);
int64_t embedding(const EmbeddingArgs &);
void gelu(const GeluArgs &);
int64_t pooling(const PoolingArgs &);
void pack(const PackArgs &, PackResult &);
int64_t unpack(const UnpackArgs &);

extern const KernelTable table = {
    CLINFAST_STRING(CLINFAST_ISA), attention, layer_norm, embedding, gelu, pooling, pack, unpack,
};

}  // namespace CLINFAST_ISA
}  // namespace clinfast
