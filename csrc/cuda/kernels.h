// The CUDA kernels' contract: plain structs of device pointers, strides (in elements) and sizes. No torch, and no CUDA
// header: streams are void*. Every function launches on `stream` and the current device, waits for nothing, and returns
// a cudaError_t as an int, 0 where all is well. Values on the device are not known to the host: where one would lead
// outside, nothing is read or written there, and the rows concerned are NaN.
#pragma once

#include <cstddef>
#include <cstdint>

namespace clinfast {
namespace cuda {

using Stream = void *;
constexpr int kNotServed = 801;  // cudaErrorNotSupported

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2 };
enum class GeluKind : int32_t { erf = 0, tanh = 1 };
enum class PoolingKind : int32_t { first_token = 0, mean = 1, max = 2 };

// out = LayerNorm(x + bias + residual) * weight + shift. bias and residual may be null.
struct LayerNormArgs {
  const void *x, *residual;
  const float *bias, *weight, *shift;
  void *out;
  int64_t x_stride, residual_stride, out_stride, rows;
  int32_t hidden;
  float eps;
};
int layer_norm(const LayerNormArgs &args, DType dtype, Stream stream);

// out[t] = LayerNorm(word[id] + token_type[type] + position[p]) * weight + shift, where the token is indices[t] of the
// flattened [batch, seqlen] ids and p its position_ids; where those are null, column + position_offset.
// token_type_ids may be null (type 0), token_type as well. A token that lies outside any of them gives NaN.
struct EmbeddingArgs {
  const void *input_ids, *token_type_ids;
  int64_t ids_row_stride, ids_column_stride, types_row_stride, types_column_stride;
  const int32_t *indices, *position_ids;
  const void *word, *position, *token_type;
  int64_t word_stride, position_stride, token_type_stride;
  const float *weight, *shift;
  void *out;
  int64_t out_stride, tokens, batch, seqlen, vocab_size, max_positions, type_vocab_size, position_offset;
  int32_t ids_itemsize, types_itemsize, hidden;
  float eps;
  DType out_dtype;
};
int embedding(const EmbeddingArgs &args, DType table_dtype, Stream stream);

// out = gelu(x + bias); bias may be null.
struct GeluArgs {
  const void *x;
  const float *bias;
  void *out;
  int64_t x_stride, out_stride, rows, hidden;
};
int gelu(const GeluArgs &args, GeluKind kind, DType dtype, Stream stream);

// out[b] = the note's first row, mean or maximum over its rows; a note without rows gives zeros.
struct PoolingArgs {
  const void *x;
  void *out;
  const int32_t *cu_seqlens;
  int64_t x_stride, out_stride, batch, rows, hidden;
};
int pooling(const PoolingArgs &args, PoolingKind kind, DType dtype, Stream stream);

// From a padded batch to packed tokens; see cpu/kernels.h. `notes` is room for 2 * batch int32; `facts` has tokens,
// max_seqlen, empty_notes, bad_id_at, bad_type_at, first_masked_note.
struct PackArgs {
  const void *mask, *input_ids, *token_type_ids;
  int64_t mask_row_stride, mask_column_stride, ids_row_stride, ids_column_stride, types_row_stride,
      types_column_stride, batch, seqlen, vocab_size, type_vocab_size;
  int32_t mask_itemsize, ids_itemsize, types_itemsize, keep_padding;
  int32_t *cu_seqlens, *indices, *seqused_k, *notes;
  int64_t *facts;
};
int pack(const PackArgs &args, Stream stream);

// `pack` into buffers of a fixed address: `rows` tokens of notes that empty ones follow up to number `notes`, which has
// the rows past the batch's. `from` has the outputs cu_seqlens [notes + 2], indices [rows], seqused_k [notes + 1] and
// facts; its `notes` are read only where pack_into_counts_first(). Positions are column + position_offset or, with
// counts_positions, those of position_ids() below.
struct PackIntoArgs {
  PackArgs from;
  int32_t *input_ids, *token_type_ids, *position_ids;
  int64_t rows, notes, position_offset, padding_idx;
  int32_t counts_positions;
};
bool pack_into_counts_first(int64_t positions);
int pack_into(const PackIntoArgs &args, Stream stream);

// padded[indices[t]] = packed[t]; every other row is zero. An index that is no position is left out. padded is
// contiguous.
struct UnpackArgs {
  const void *packed;
  void *padded;
  const int32_t *indices;
  int64_t packed_stride, tokens, positions, hidden;
};
int unpack(const UnpackArgs &args, DType packed_dtype, DType padded_dtype, Stream stream);

// position_ids[b, s] = padding_idx + (ids of row b up to s that are not padding_idx), or padding_idx where the id is it.
struct PositionArgs {
  const void *input_ids;
  int64_t row_stride, column_stride, batch, seqlen, padding_idx;
  int32_t itemsize;
  int32_t *position_ids;
};
int position_ids(const PositionArgs &args, Stream stream);

// out[t, h] = softmax(scale * q[t, h] . k[s, h]) @ v[s, h] over the keys s of t's own note; scale is positive.
// seqused_k may be null; it bounds the keys of note b to the first seqused_k[b].
struct AttentionArgs {
  const void *q, *k, *v;
  void *out;
  int64_t q_token_stride, q_head_stride, k_token_stride, k_head_stride, v_token_stride, v_head_stride,
      out_token_stride, out_head_stride;
  const int32_t *cu_seqlens_q, *cu_seqlens_k, *seqused_k;
  int32_t batch, num_heads, head_dim, q_tokens, k_tokens;
  float scale;
  // For `few`: room for q_tokens * num_heads * segments * (head_dim rounded up to 32, 64, 128 or 256, and 2), where
  // there is more than one segment; see attention_segments().
  float *partial;
  int32_t segments;
  int32_t vectors;  // set by attention(): every row starts on 16 bytes and head_dim is a multiple of 8
};
// `few` is for few queries a note, and serves any number.
enum class AttentionKernel : int32_t { automatic = 0, simt = 1, mma = 2, wgmma = 3, few = 4 };
// Into how many parts `few` may cut the longest note of k_tokens keys.
int attention_segments(int64_t k_tokens);
int attention(const AttentionArgs &args, DType dtype, AttentionKernel kernel, Stream stream);

// out = activation(x @ weight.T + bias) + residual, with exact GELU or without an activation; bias and residual may be
// null, and only one of GELU and residual may be wanted. Every row starts on 16 bytes. On compute capability 9.0, where
// the build had CUTLASS; elsewhere the result is cudaErrorNotSupported.
struct LinearArgs {
  const void *x, *weight;
  const float *bias;
  const void *residual, *bias16;  // bias16: the bias in the dtype of x, for linear_mma
  void *out;
  int64_t x_stride, weight_stride, residual_stride, out_stride, rows, in_features, out_features;
  int32_t multiprocessors;
};
// gelu(x @ weight.T + bias) alone, on compute capability 8.0 to 8.9, where the build had CUTLASS.
int linear_mma(const LinearArgs &args, DType dtype, Stream stream);
int linear_wgmma(const LinearArgs &args, bool gelu, DType dtype, Stream stream);
bool has_linear_mma();
bool has_cutlass();  // for one of the two

// What the driver and the build have; does not start the driver's context.
struct Versions {
  int driver, runtime, devices, error;
};
Versions versions();
const char *error_text(int code);
// Loads every kernel on the current device and raises its shared memory limit, so that nothing is left to be loaded
// inside a graph capture.
int prepare();
// Whether kernels are launched while the one before them ends, on cards of 9.0 and later; off at first.
void set_programmatic_launch(bool on);
// Makes `device` current; `before` becomes the one that was.
int exchange_device(int device, int &before);

}  // namespace cuda
}  // namespace clinfast
