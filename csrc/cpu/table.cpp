#include "vec.h"

#define CLINFAST_STRING_(x) #x
#define CLINFAST_STRING(x) CLINFAST_STRING_(x)

namespace clinfast {
namespace CLINFAST_ISA {

void attention(const AttentionArgs &);
void layer_norm(const LayerNormArgs &);
void embedding(const EmbeddingArgs &);
void gelu(const GeluArgs &);
void pooling(const PoolingArgs &);
void pack(const PackArgs &, PackResult &);
void unpack(const UnpackArgs &);

extern const KernelTable table = {
    CLINFAST_STRING(CLINFAST_ISA), attention, layer_norm, embedding, gelu, pooling, pack, unpack,
};

}  // namespace CLINFAST_ISA
}  // namespace clinfast
