// The layers of an encoder in one call: the same kernels in the same order as op by op, without the way
// back to the caller between them and without fresh memory for each result.
#include "vec.h"

namespace clinfast {
namespace CLINFAST_ISA {

void attention(const AttentionArgs &);
void layer_norm(const LayerNormArgs &);
void linear(const LinearArgs &);
int64_t rotate(const RotateArgs &);

// Rows of the feed-forward part at a time: its inner activations stay in the last-level cache.
static constexpr int64_t kSliceRows = 1024;

static int64_t slice_rows(int64_t tokens) { return tokens < kSliceRows ? tokens : kSliceRows; }

static int64_t element_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Whole cache lines, so that every part of the workspace starts on one.
static int64_t aligned(int64_t bytes) { return (bytes + 63) & ~int64_t(63); }

int64_t encoder_workspace_bytes(int64_t tokens, int64_t hidden, int64_t intermediate, DType dtype) {
  const int64_t size = element_bytes(dtype);
  return aligned(tokens * 3 * hidden * size) + 2 * aligned(tokens * hidden * size) +
         aligned(slice_rows(tokens) * intermediate * size);
}

void encoder(const EncoderArgs &a) {
  const int64_t hidden = a.num_heads * a.head_dim, size = element_bytes(a.dtype), row = hidden * size;
  char *x = static_cast<char *>(a.x);
  char *qkv = static_cast<char *>(a.workspace);
  char *context = qkv + aligned(a.tokens * 3 * row);
  char *y = context + aligned(a.tokens * row);
  char *inner = y + aligned(a.tokens * row);

  auto multiply = [&](const LinearWeights &w, const void *in, const void *residual, void *out, int64_t rows,
                      int64_t inputs, int64_t outputs, Activation activation, bool gated = false) {
    linear({in, w.packed, w.bias, residual, out, nullptr, inputs, residual ? outputs : 0, outputs, rows, inputs, outputs,
            activation, a.dtype, a.num_threads, gated});
  };
  auto normalise = [&](const NormWeights &w, const void *in, void *out, int64_t rows) {
    layer_norm({in, nullptr, nullptr, w.weight, w.shift, out, hidden, 0, hidden, rows, hidden, a.eps, a.dtype,
                a.num_threads});
  };

  for (int64_t i = 0; i < a.num_layers; i++) {
    const LayerWeights &layer = a.layers[i];
    const bool normed = a.pre_norm && layer.attention_norm.weight;
    if (normed) normalise(layer.attention_norm, x, y, a.tokens);
    multiply(layer.qkv, normed ? y : x, nullptr, qkv, a.tokens, hidden, 3 * hidden, Activation::none);
    if (layer.rotation.cos)
      rotate({qkv, layer.rotation.cos, layer.rotation.sin, a.cu_seqlens, a.places, 3 * hidden, a.head_dim, a.batch,
              a.tokens, 2 * a.num_heads, a.head_dim, a.positions, a.dtype, a.num_threads});
    attention({qkv, qkv + row, qkv + 2 * row, context, 3 * hidden, a.head_dim, 3 * hidden, a.head_dim, 3 * hidden,
               a.head_dim, hidden, a.head_dim, a.cu_seqlens, a.cu_seqlens, a.seqused_k, a.batch, a.num_heads,
              a.head_dim, a.scale, a.dtype, a.num_threads, a.bias, a.bias_reach, a.places, a.places,
              layer.position_keys, layer.position_queries, a.buckets, a.bucket_reach, a.position_rows, layer.window});
    multiply(layer.attention_output, context, x, y, a.tokens, hidden, hidden, Activation::none);
    if (!a.pre_norm) normalise(layer.attention_norm, y, y, a.tokens);
    // From here on y is the residual, and the rows of x are free.
    for (int64_t start = 0; start < a.tokens; start += kSliceRows) {
      const int64_t rows = slice_rows(a.tokens - start);
      char *in = y + start * row, *out = x + start * row;
      if (a.pre_norm) normalise(layer.output_norm, in, out, rows);
      multiply(layer.ffn_in, a.pre_norm ? out : in, nullptr, inner, rows, hidden, a.intermediate, a.activation, a.gated);
      multiply(layer.ffn_out, inner, in, out, rows, a.intermediate, hidden, Activation::none);
      if (!a.pre_norm) normalise(layer.output_norm, out, out, rows);
    }
  }
}

}  // namespace CLINFAST_ISA
}  // namespace clinfast
