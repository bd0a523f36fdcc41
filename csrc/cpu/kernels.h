// The CPU kernels' contract: plain structs of pointers, strides (in elements) and sizes. No torch.
#pragma once

#include <cstdint>

namespace clinfast {

enum class DType : int32_t { f32 = 0, bf16 = 1 };
enum class GeluKind : int32_t { erf = 0, tanh = 1 };
enum class Activation : int32_t { none = 0, gelu = 1, gelu_tanh = 2, relu = 3, tanh = 4, silu = 5 };
enum class PoolingKind : int32_t { first_token = 0, mean = 1, max = 2 };
enum class MaskType : int32_t { none = 0, bytes = 1, int32 = 4, int64 = 8 };

// out[t, h] = softmax(scale * q[t, h] . k[s, h]) @ v[s, h] over the keys s of t's own note.
// Last dimensions are contiguous. seqused_k may be null; it bounds the keys of note b to the first seqused_k[b].
// Where bias [num_heads, 2 * bias_reach + 1] is given, bias[h, clamp(place of s - place of t, +-bias_reach)] is added to the
// scaled scores. q_places and k_places hold a place for each row; where null, it is the row's rank in its note.
// Where buckets [2 * bucket_reach + 1] is given, q[t, h] . position_keys[h, r] + k[s, h] . position_queries[h, r] is added before
// the scale, r being buckets[clamp(place of t - place of s, +-bucket_reach) + bucket_reach]; each of these tables
// [num_heads, position_rows, head_dim] may be null. Then places rise within a note, and buckets never decrease.
// With a window, a query looks at the keys whose place is at most `window` from its own; those outside are skipped. k_places
// then ascend over a note's used keys. A window goes with neither bias nor buckets.
struct AttentionArgs {
  const void *q, *k, *v;
  void *out;
  int64_t q_token_stride, q_head_stride;
  int64_t k_token_stride, k_head_stride;
  int64_t v_token_stride, v_head_stride;
  int64_t out_token_stride, out_head_stride;
  const int32_t *cu_seqlens_q, *cu_seqlens_k, *seqused_k;
  int64_t batch, num_heads, head_dim;
  float scale;
  DType dtype;
  int32_t num_threads;
  const float *bias = nullptr;
  int64_t bias_reach = 0;
  const int32_t *q_places = nullptr, *k_places = nullptr;
  const void *position_keys = nullptr, *position_queries = nullptr;
  const int32_t *buckets = nullptr;
  int64_t bucket_reach = 0, position_rows = 0;
  int64_t window = -1;
};

// Rotates the halves of each head of x [tokens, num_heads, head_dim] by its token's place p, in place: (a, b) becomes
// (a cos[p] - b sin[p], b cos[p] + a sin[p]) with tables [positions, head_dim / 2]. `places` [tokens] are ranks in the note
// where null; a negative one turns backwards. Returns the first token whose place is not within the tables, which is left as it was, or -1.
struct RotateArgs {
  void *x;
  const float *cos, *sin;
  const int32_t *cu_seqlens, *places;
  int64_t token_stride, head_stride;
  int64_t batch, tokens, num_heads, head_dim, positions;
  DType dtype;
  int32_t num_threads;
};

// out[r, i] = activation(x[r, i]) * x[r, outputs + i].
struct GateArgs {
  const void *x;
  void *out;
  int64_t x_stride, out_stride;
  int64_t rows, outputs;
  Activation activation;
  DType dtype;
  int32_t num_threads;
};

// out = LayerNorm(x + bias + residual) * weight + shift. bias and residual may be null.
struct LayerNormArgs {
  const void *x, *residual;
  const float *bias, *weight, *shift;
  void *out;
  int64_t x_stride, residual_stride, out_stride;
  int64_t rows, hidden;
  float eps;
  DType dtype;
  int32_t num_threads;
};

// out[t] = LayerNorm(word[id] + token_type[type] + position[p]) * weight + shift, where the token is indices[t] of the
// flattened [batch, seqlen] ids and p its position_ids, contiguous; where those are null, column + position_offset.
// token_type_ids may be null (type 0), token_type as well; where weight and shift are null, the sum itself.
// Returns the first t whose index, id, type or position lies outside, or -1; those rows are left as they were.
struct EmbeddingArgs {
  const void *input_ids, *token_type_ids;
  int64_t ids_row_stride, ids_column_stride, types_row_stride, types_column_stride;
  int32_t ids_itemsize, types_itemsize;
  const int32_t *indices, *position_ids;
  int64_t seqlen, tokens, hidden, position_offset;
  const void *word, *position, *token_type;
  int64_t word_stride, position_stride, token_type_stride;
  const float *weight, *shift;
  void *out;
  int64_t out_stride;
  float eps;
  DType table_dtype, out_dtype;
  int32_t num_threads;
  int64_t batch, vocab_size, max_positions, type_vocab_size;
};

// out = activation(x @ weight.T + bias) + residual. `packed` was written by linear_pack for the same instruction set.
// bias and residual may be null; residual may not overlap out. out_rows may be null; else row r goes to row out_rows[r].
// With `gated`, weights (packed so) and bias have twice out_features rows, and out = activation(first half) * second half.
struct LinearArgs {
  const void *x, *packed;
  const float *bias;
  const void *residual;
  void *out;
  const int32_t *out_rows;
  int64_t x_stride, residual_stride, out_stride;
  int64_t rows, in_features, out_features;
  Activation activation;
  DType dtype;
  int32_t num_threads;
  bool gated = false;
};

// out = gelu(x + bias); bias may be null.
struct GeluArgs {
  const void *x;
  const float *bias;
  void *out;
  int64_t x_stride, out_stride;
  int64_t rows, hidden;
  GeluKind kind;
  DType dtype;
  int32_t num_threads;
};

// out[b] = the note's first row, mean or maximum over its rows; a note without rows gives zeros. Returns the first note
// whose rows are not within 0..rows, before anything is read, or -1.
struct PoolingArgs {
  const void *x;
  void *out;
  const int32_t *cu_seqlens;
  int64_t x_stride, out_stride;
  int64_t batch, rows, hidden;
  PoolingKind kind;
  DType dtype;
  int32_t num_threads;
};

// From a padded batch to packed tokens. cu_seqlens has batch + 1 entries, indices room for batch * seqlen.
// keep_padding orders each note's real tokens before its padded ones and keeps both: cu_seqlens then steps by seqlen
// and seqused_k holds the real lengths. Out-of-range ids are sought over every position, padded ones too.
struct PackArgs {
  const void *mask, *input_ids, *token_type_ids;
  int64_t mask_row_stride, mask_column_stride;
  int64_t ids_row_stride, ids_column_stride, types_row_stride, types_column_stride;
  int32_t ids_itemsize, types_itemsize;
  MaskType mask_type;
  int64_t batch, seqlen, vocab_size, type_vocab_size;
  int32_t keep_padding;
  int32_t *cu_seqlens, *indices, *seqused_k;
};

struct PackResult {
  int64_t tokens, max_seqlen, empty_notes;
  int64_t bad_id_at, bad_type_at;  // flat position of the first value out of range, -1 where there is none
  int64_t first_masked_note;       // first note whose column 0 is masked, -1 where there is none
};

// position_ids[b, s] = padding_idx + (ids of row b up to s that are not padding_idx), or padding_idx where the id is it.
struct PositionArgs {
  const void *input_ids;
  int64_t row_stride, column_stride;
  int32_t itemsize;
  int64_t batch, seqlen, padding_idx;
  int32_t *position_ids;
};

// padded[indices[t]] = packed[t]; every other row is zero. Returns the first t whose index is not a position, before
// anything is written, or -1.
struct UnpackArgs {
  const void *packed;
  void *padded;
  const int32_t *indices;
  int64_t packed_stride, padded_stride;
  int64_t tokens, positions, hidden;
  DType packed_dtype, padded_dtype;
  int32_t num_threads;
};

struct LinearWeights {
  const void *packed;
  const float *bias;
};
struct NormWeights {
  const float *weight, *shift;
};
// Tables of RotateArgs, null where nothing is rotated.
struct RotationTables {
  const float *cos, *sin;
};
// Where attention_norm is null, a pre-norm layer's attention takes its input as it is. `window` as in AttentionArgs.
struct LayerWeights {
  LinearWeights qkv, attention_output;
  NormWeights attention_norm;
  LinearWeights ffn_in, ffn_out;
  NormWeights output_norm;
  const void *position_keys, *position_queries;
  RotationTables rotation;
  int64_t window;
};

// x [tokens, num_heads * head_dim], contiguous, through `num_layers` layers, in place. `workspace` has
// encoder_workspace_bytes and starts on a cache line. With pre_norm each LayerNorm stands before what it belongs to, inside
// the residual; else behind the residual. bias, buckets and what goes with them, and places [tokens]: as in AttentionArgs, in
// every layer.
struct EncoderArgs {
  const LayerWeights *layers;
  void *x, *workspace;
  const int32_t *cu_seqlens, *seqused_k;
  int64_t num_layers, tokens, batch, num_heads, head_dim, intermediate;
  float scale, eps;
  Activation activation;
  int32_t pre_norm;
  DType dtype;
  int32_t num_threads;
  const float *bias = nullptr;
  int64_t bias_reach = 0;
  const int32_t *places = nullptr;
  const int32_t *buckets = nullptr;
  int64_t bucket_reach = 0, position_rows = 0;
  bool gated = false;  // ffn_in is
  int64_t positions = 0;  // of the rotation tables
};

struct KernelTable {
  const char *isa;
  void (*attention)(const AttentionArgs &);
  void (*layer_norm)(const LayerNormArgs &);
  int64_t (*embedding)(const EmbeddingArgs &);
  void (*gelu)(const GeluArgs &);
  void (*linear)(const LinearArgs &);
  int64_t (*linear_packed_bytes)(int64_t in_features, int64_t out_features, bool gated, DType dtype);
  void (*linear_pack)(const void *weight, int64_t stride, int64_t in_features, int64_t out_features, bool gated,
                      DType dtype, void *packed, int num_threads);
  void (*encoder)(const EncoderArgs &);
  int64_t (*encoder_workspace_bytes)(int64_t tokens, int64_t hidden, int64_t intermediate, DType dtype);
  int64_t (*pooling)(const PoolingArgs &);
  void (*pack)(const PackArgs &, PackResult &);
  int64_t (*unpack)(const UnpackArgs &);
  void (*position_ids)(const PositionArgs &);
  int64_t (*rotate)(const RotateArgs &);
  void (*gate)(const GateArgs &);
};

// Whether the `width` bytes at each address equal the `count * width` bytes at `expected`.
bool values_unchanged(const int64_t *addresses, const void *expected, int64_t count, int64_t width);

// The best table that this processor runs, or the one CLINFAST_CPU_ISA names. Null with `error` set where the name
// is unknown or the processor lacks it.
const KernelTable *select_kernels(const char *name, const char **error);
const char *const *available_isas(int *count);
// Tables by a number that stays theirs: what was packed for one instruction set is multiplied by the same.
int table_number(const KernelTable *table);
const KernelTable *table_of(int number);

}  // namespace clinfast
