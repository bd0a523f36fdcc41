#include "vec.h"

#define CLINFAST_STRING_(x) #x
#define CLINFAST_STRING(x) CLINFAST_STRING_(x)

namespace clinfast {
namespace CLINFAST_ISA {

void attention(const AttentionArgs &);
void layer_norm(const LayerNormArgs &);
int64_t embedding(const EmbeddingArgs &);
void gelu(const GeluArgs &);
void linear(const LinearArgs &);
int64_t linear_packed_bytes(int64_t, int64_t, bool, DType);
void linear_pack(const void *, int64_t, int64_t, int64_t, bool, DType, void *, int);
void encoder(const EncoderArgs &);
int64_t encoder_workspace_bytes(int64_t, int64_t, int64_t, DType);
int64_t pooling(const PoolingArgs &);
void pack(const PackArgs &, PackResult &);
int64_t unpack(const UnpackArgs &);
void position_ids(const PositionArgs &);
int64_t rotate(const RotateArgs &);
void gate(const GateArgs &);

extern const KernelTable table = {
    CLINFAST_STRING(CLINFAST_ISA), attention, layer_norm, embedding, gelu, linear, linear_packed_bytes, linear_pack,
    encoder, encoder_workspace_bytes, pooling, pack, unpack, position_ids, rotate, gate,
};

}  // namespace CLINFAST_ISA
}  // namespace clinfast
