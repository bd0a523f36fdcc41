// clinfast._C: the compiled kernels behind plain integers (addresses, strides in elements, sizes). It links neither
// torch nor an OpenMP runtime: the OpenMP symbols resolve to the runtime that torch has already loaded.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cpu/kernels.h"
#include "launch.h"
#if defined(CLINFAST_CUDA)
#include "cuda_bindings.h"
#endif

namespace py = pybind11;
using namespace clinfast;

namespace {

template <typename T> T *pointer(uintptr_t address) { return reinterpret_cast<T *>(address); }

const KernelTable *current = nullptr;

const KernelTable &kernels() {
  if (!current) throw std::runtime_error("clinfast._C.select_isa was not called");
  return *current;
}

std::string select_isa(const std::string &name) {
  const char *error = nullptr;
  const KernelTable *table = select_kernels(name.c_str(), &error);
  if (!table) {
    int count = 0;
    const char *const *names = available_isas(&count);
    std::string known;
    for (int i = 0; i < count; i++) known += (i ? ", " : "") + std::string(names[i]);
    throw std::invalid_argument("CLINFAST_CPU_ISA is '" + name + "': " + error + "; this processor runs " + known);
  }
  current = table;
  return table->isa;
}

py::list isas() {
  int count = 0;
  const char *const *names = available_isas(&count);
  py::list result;
  for (int i = 0; i < count; i++) result.append(names[i]);
  return result;
}

void check_boundaries(const std::string &op, const std::string &name, const int32_t *cu_seqlens, int64_t batch, int64_t tokens) {
  if (cu_seqlens[0] != 0 || cu_seqlens[batch] != tokens)
    throw py::value_error(op + ": " + name + " goes from " + std::to_string(cu_seqlens[0]) + " to " +
                          std::to_string(cu_seqlens[batch]) + "; it must go from 0 to the number of rows, " +
                          std::to_string(tokens));
  for (int64_t note = 0; note < batch; note++)
    if (cu_seqlens[note + 1] < cu_seqlens[note])
      throw py::value_error(op + ": " + name + " decreases after entry " + std::to_string(note));
}

void check_used(const int32_t *seqused_k, const int32_t *cu_seqlens_k, int64_t batch) {
  for (int64_t note = 0; seqused_k && note < batch; note++) {
    int32_t keys = cu_seqlens_k[note + 1] - cu_seqlens_k[note];
    if (seqused_k[note] < 0 || seqused_k[note] > keys)
      throw py::value_error("attention: seqused_k[" + std::to_string(note) + "] is " + std::to_string(seqused_k[note]) +
                            "; the note has " + std::to_string(keys) + " keys");
  }
}

void check_buckets(const int32_t *buckets, int64_t count, int64_t rows) {
  for (int64_t i = 0; i < count; i++)
    if (buckets[i] < 0 || buckets[i] >= rows || (i && buckets[i] < buckets[i - 1]))
      throw py::value_error("attention_disentangled: buckets[" + std::to_string(i) + "] is " +
                            std::to_string(buckets[i]) + "; buckets must lie within the " + std::to_string(rows) +
                            " rows of the tables and not decrease");
}

void check_places(const std::string &name, const int32_t *places, const int32_t *cu_seqlens, int64_t batch) {
  static constexpr int64_t kWidest = int64_t(1) << 24;
  for (int64_t note = 0; places && note < batch; note++) {
    for (int64_t i = cu_seqlens[note] + 1; i < cu_seqlens[note + 1]; i++)
      if (places[i] <= places[i - 1] || int64_t(places[i]) - places[cu_seqlens[note]] > kWidest)
        throw py::value_error("attention_disentangled: " + name + "[" + std::to_string(i) + "] is " +
                              std::to_string(places[i]) + "; within a note places must rise, by at most " +
                              std::to_string(kWidest) + " in all");
  }
}

void attention_disentangled(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, int64_t q_token_stride,
                            int64_t q_head_stride, int64_t k_token_stride, int64_t k_head_stride,
                            int64_t v_token_stride, int64_t v_head_stride, int64_t out_token_stride,
                            int64_t out_head_stride, uintptr_t cu_seqlens_q, uintptr_t cu_seqlens_k,
                            uintptr_t seqused_k, int64_t batch, int64_t num_heads, int64_t head_dim, float scale,
                            int dtype, int num_threads, int64_t q_tokens, int64_t k_tokens, uintptr_t position_keys,
                            uintptr_t position_queries, uintptr_t buckets, int64_t bucket_reach, int64_t position_rows,
                            uintptr_t q_places, uintptr_t k_places) {
  const AttentionArgs args{pointer<void>(q),
                           pointer<void>(k),
                           pointer<void>(v),
                           pointer<void>(out),
                           q_token_stride,
                           q_head_stride,
                           k_token_stride,
                           k_head_stride,
                           v_token_stride,
                           v_head_stride,
                           out_token_stride,
                           out_head_stride,
                           pointer<int32_t>(cu_seqlens_q),
                           pointer<int32_t>(cu_seqlens_k),
                           pointer<int32_t>(seqused_k),
                           batch,
                           num_heads,
                           head_dim,
                           scale,
                           DType(dtype),
                           num_threads,
                           nullptr,
                           0,
                           pointer<int32_t>(q_places),
                           pointer<int32_t>(k_places),
                           pointer<void>(position_keys),
                           pointer<void>(position_queries),
                           pointer<int32_t>(buckets),
                           bucket_reach,
                           position_rows};
  check_boundaries("attention_disentangled", "cu_seqlens_q", args.cu_seqlens_q, batch, q_tokens);
  check_boundaries("attention_disentangled", "cu_seqlens_k", args.cu_seqlens_k, batch, k_tokens);
  check_used(args.seqused_k, args.cu_seqlens_k, batch);
  check_buckets(args.buckets, 2 * bucket_reach + 1, position_rows);
  check_places("q_places", args.q_places, args.cu_seqlens_q, batch);
  check_places("k_places", args.k_places, args.cu_seqlens_k, batch);
  py::gil_scoped_release release;
  kernels().attention(args);
}

void attention_biased(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, int64_t q_token_stride,
                      int64_t q_head_stride, int64_t k_token_stride, int64_t k_head_stride, int64_t v_token_stride,
                      int64_t v_head_stride, int64_t out_token_stride, int64_t out_head_stride, uintptr_t cu_seqlens_q,
                      uintptr_t cu_seqlens_k, uintptr_t seqused_k, int64_t batch, int64_t num_heads, int64_t head_dim,
                      float scale, int dtype, int num_threads, int64_t q_tokens, int64_t k_tokens, uintptr_t bias,
                      int64_t bias_reach, uintptr_t q_places, uintptr_t k_places, int64_t window) {
  const AttentionArgs args{pointer<void>(q),
                           pointer<void>(k),
                           pointer<void>(v),
                           pointer<void>(out),
                           q_token_stride,
                           q_head_stride,
                           k_token_stride,
                           k_head_stride,
                           v_token_stride,
                           v_head_stride,
                           out_token_stride,
                           out_head_stride,
                           pointer<int32_t>(cu_seqlens_q),
                           pointer<int32_t>(cu_seqlens_k),
                           pointer<int32_t>(seqused_k),
                           batch,
                           num_heads,
                           head_dim,
                           scale,
                           DType(dtype),
                           num_threads,
                           pointer<float>(bias),
                           bias_reach,
                           pointer<int32_t>(q_places),
                           pointer<int32_t>(k_places),
                           nullptr,
                           nullptr,
                           nullptr,
                           0,
                           0,
                           window};
  check_boundaries("attention", "cu_seqlens_q", args.cu_seqlens_q, batch, q_tokens);
  check_boundaries("attention", "cu_seqlens_k", args.cu_seqlens_k, batch, k_tokens);
  check_used(args.seqused_k, args.cu_seqlens_k, batch);
  py::gil_scoped_release release;
  kernels().attention(args);
}

void attention(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, int64_t q_token_stride, int64_t q_head_stride,
               int64_t k_token_stride, int64_t k_head_stride, int64_t v_token_stride, int64_t v_head_stride,
               int64_t out_token_stride, int64_t out_head_stride, uintptr_t cu_seqlens_q, uintptr_t cu_seqlens_k,
               uintptr_t seqused_k, int64_t batch, int64_t num_heads, int64_t head_dim, float scale, int dtype,
               int num_threads, int64_t q_tokens, int64_t k_tokens) {
  attention_biased(q, k, v, out, q_token_stride, q_head_stride, k_token_stride, k_head_stride, v_token_stride,
                   v_head_stride, out_token_stride, out_head_stride, cu_seqlens_q, cu_seqlens_k, seqused_k, batch,
                   num_heads, head_dim, scale, dtype, num_threads, q_tokens, k_tokens, 0, 0, 0, 0, -1);
}

void layer_norm(uintptr_t x, uintptr_t residual, uintptr_t bias, uintptr_t weight, uintptr_t shift, uintptr_t out,
                int64_t x_stride, int64_t residual_stride, int64_t out_stride, int64_t rows, int64_t hidden,
                float eps, int dtype, int num_threads) {
  const LayerNormArgs args{pointer<void>(x), pointer<void>(residual), pointer<float>(bias), pointer<float>(weight),
                           pointer<float>(shift), pointer<void>(out), x_stride, residual_stride, out_stride, rows,
                           hidden, eps, DType(dtype), num_threads};
  py::gil_scoped_release release;
  kernels().layer_norm(args);
}

int64_t embedding(uintptr_t input_ids, uintptr_t token_type_ids, int64_t ids_row_stride, int64_t ids_column_stride,
                  int64_t types_row_stride, int64_t types_column_stride, int ids_itemsize, int types_itemsize,
                  uintptr_t indices, uintptr_t position_ids, int64_t seqlen, int64_t tokens, int64_t hidden,
                  int64_t position_offset,
                  uintptr_t word, uintptr_t position, uintptr_t token_type, int64_t word_stride,
                  int64_t position_stride, int64_t token_type_stride, uintptr_t weight, uintptr_t shift, uintptr_t out,
                  int64_t out_stride, float eps, int table_dtype, int out_dtype, int num_threads, int64_t batch,
                  int64_t vocab_size, int64_t max_positions, int64_t type_vocab_size) {
  const EmbeddingArgs args{pointer<void>(input_ids), pointer<void>(token_type_ids), ids_row_stride,
                           ids_column_stride, types_row_stride, types_column_stride, ids_itemsize, types_itemsize,
                           pointer<int32_t>(indices), pointer<int32_t>(position_ids), seqlen, tokens, hidden,
                           position_offset, pointer<void>(word),
                           pointer<void>(position), pointer<void>(token_type), word_stride, position_stride,
                           token_type_stride, pointer<float>(weight), pointer<float>(shift), pointer<void>(out),
                           out_stride, eps, DType(table_dtype), DType(out_dtype), num_threads, batch, vocab_size,
                           max_positions, type_vocab_size};
  py::gil_scoped_release release;
  return kernels().embedding(args);
}

void gelu(uintptr_t x, uintptr_t bias, uintptr_t out, int64_t x_stride, int64_t out_stride, int64_t rows,
          int64_t hidden, int kind, int dtype, int num_threads) {
  const GeluArgs args{pointer<void>(x), pointer<float>(bias), pointer<void>(out), x_stride, out_stride, rows, hidden,
                      GeluKind(kind), DType(dtype), num_threads};
  py::gil_scoped_release release;
  kernels().gelu(args);
}

int64_t pooling(uintptr_t x, uintptr_t out, uintptr_t cu_seqlens, int64_t x_stride, int64_t out_stride, int64_t batch,
                int64_t rows, int64_t hidden, int kind, int dtype, int num_threads) {
  const PoolingArgs args{pointer<void>(x), pointer<void>(out), pointer<int32_t>(cu_seqlens), x_stride, out_stride,
                         batch, rows, hidden, PoolingKind(kind), DType(dtype), num_threads};
  py::gil_scoped_release release;
  return kernels().pooling(args);
}

void pack(uintptr_t mask, uintptr_t input_ids, uintptr_t token_type_ids, int64_t mask_row_stride,
          int64_t mask_column_stride, int64_t ids_row_stride, int64_t ids_column_stride,
          int64_t types_row_stride, int64_t types_column_stride, int ids_itemsize, int types_itemsize,
          int mask_itemsize, int64_t batch, int64_t seqlen, int64_t vocab_size, int64_t type_vocab_size,
          bool keep_padding, uintptr_t cu_seqlens, uintptr_t indices, uintptr_t seqused_k, uintptr_t facts) {
  const PackArgs args{pointer<void>(mask), pointer<void>(input_ids), pointer<void>(token_type_ids), mask_row_stride,
                      mask_column_stride, ids_row_stride, ids_column_stride, types_row_stride, types_column_stride,
                      ids_itemsize, types_itemsize, MaskType(mask_itemsize), batch, seqlen, vocab_size,
                      type_vocab_size, keep_padding, pointer<int32_t>(cu_seqlens), pointer<int32_t>(indices),
                      pointer<int32_t>(seqused_k)};
  static_assert(sizeof(PackResult) == 6 * sizeof(int64_t), "facts is an array of six int64");
  py::gil_scoped_release release;
  kernels().pack(args, *pointer<PackResult>(facts));
}

int64_t unpack(uintptr_t packed, uintptr_t padded, uintptr_t indices, int64_t packed_stride, int64_t padded_stride,
               int64_t tokens, int64_t positions, int64_t hidden, int packed_dtype, int padded_dtype,
               int num_threads) {
  const UnpackArgs args{pointer<void>(packed), pointer<void>(padded), pointer<int32_t>(indices), packed_stride,
                        padded_stride, tokens, positions, hidden, DType(packed_dtype), DType(padded_dtype),
                        num_threads};
  py::gil_scoped_release release;
  return kernels().unpack(args);
}

void position_ids(uintptr_t input_ids, int64_t row_stride, int64_t column_stride, int itemsize, int64_t batch,
                  int64_t seqlen, int64_t padding_idx, uintptr_t out) {
  const PositionArgs args{pointer<void>(input_ids), row_stride, column_stride, itemsize, batch, seqlen, padding_idx,
                          pointer<int32_t>(out)};
  py::gil_scoped_release release;
  kernels().position_ids(args);
}

void linear(uintptr_t x, uintptr_t packed, uintptr_t bias, uintptr_t residual, uintptr_t out, uintptr_t out_rows,
            int64_t out_row_count, int64_t x_stride, int64_t residual_stride, int64_t out_stride, int64_t rows,
            int64_t in_features, int64_t out_features, int activation, bool gated, int dtype, int table,
            int num_threads) {
  const int32_t *to = pointer<int32_t>(out_rows);
  for (int64_t row = 0; to && row < rows; row++)
    if (to[row] < 0 || to[row] >= out_row_count)
      throw py::index_error("linear: rows[" + std::to_string(row) + "] is " + std::to_string(to[row]) + "; out has " +
                            std::to_string(out_row_count) + " rows");
  const LinearArgs args{pointer<void>(x), pointer<void>(packed), pointer<float>(bias), pointer<void>(residual),
                        pointer<void>(out), to, x_stride, residual_stride, out_stride, rows, in_features, out_features,
                        Activation(activation), DType(dtype), num_threads, gated};
  py::gil_scoped_release release;
  table_of(table)->linear(args);
}

int current_table() { return table_number(&kernels()); }

int64_t linear_packed_bytes(int64_t in_features, int64_t out_features, bool gated, int dtype, int table) {
  return table_of(table)->linear_packed_bytes(in_features, out_features, gated, DType(dtype));
}

void linear_pack(uintptr_t weight, int64_t stride, int64_t in_features, int64_t out_features, bool gated, int dtype,
                 uintptr_t packed, int table, int num_threads) {
  py::gil_scoped_release release;
  table_of(table)->linear_pack(pointer<void>(weight), stride, in_features, out_features, gated, DType(dtype),
                        pointer<void>(packed), num_threads);
}

int64_t rotate(uintptr_t x, uintptr_t cos, uintptr_t sin, uintptr_t cu_seqlens, uintptr_t places, int64_t token_stride,
               int64_t head_stride, int64_t batch, int64_t tokens, int64_t num_heads, int64_t head_dim,
               int64_t positions, int dtype, int num_threads) {
  const RotateArgs args{pointer<void>(x), pointer<float>(cos), pointer<float>(sin), pointer<int32_t>(cu_seqlens),
                        pointer<int32_t>(places), token_stride, head_stride, batch, tokens, num_heads, head_dim,
                        positions, DType(dtype), num_threads};
  if (!places) check_boundaries("rotate", "cu_seqlens", args.cu_seqlens, batch, tokens);
  py::gil_scoped_release release;
  return kernels().rotate(args);
}

void gate(uintptr_t x, uintptr_t out, int64_t x_stride, int64_t out_stride, int64_t rows, int64_t outputs,
          int activation, int dtype, int num_threads) {
  const GateArgs args{pointer<void>(x), pointer<void>(out), x_stride, out_stride, rows, outputs,
                      Activation(activation), DType(dtype), num_threads};
  py::gil_scoped_release release;
  kernels().gate(args);
}

void encoder(uintptr_t layers, uintptr_t x, uintptr_t workspace, uintptr_t cu_seqlens, uintptr_t seqused_k,
             int64_t num_layers, int64_t tokens, int64_t batch, int64_t num_heads, int64_t head_dim,
             int64_t intermediate, float scale, float eps, int activation, bool pre_norm, int dtype, int table,
             int num_threads, uintptr_t bias, int64_t bias_reach, uintptr_t places, uintptr_t buckets,
             int64_t bucket_reach, int64_t position_rows, bool gated, int64_t positions) {
  const EncoderArgs args{pointer<LayerWeights>(layers), pointer<void>(x), pointer<void>(workspace),
                         pointer<int32_t>(cu_seqlens), pointer<int32_t>(seqused_k), num_layers, tokens, batch,
                         num_heads, head_dim, intermediate, scale, eps, Activation(activation), pre_norm,
                         DType(dtype), num_threads, pointer<float>(bias), bias_reach, pointer<int32_t>(places),
                         pointer<int32_t>(buckets), bucket_reach, position_rows, gated, positions};
  py::gil_scoped_release release;
  table_of(table)->encoder(args);
}

int64_t encoder_workspace_bytes(int64_t tokens, int64_t hidden, int64_t intermediate, int dtype, int table) {
  return table_of(table)->encoder_workspace_bytes(tokens, hidden, intermediate, DType(dtype));
}

bool unchanged(uintptr_t addresses, uintptr_t expected, int64_t count, int64_t width) {
  return values_unchanged(pointer<int64_t>(addresses), pointer<void>(expected), count, width);
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Compiled clinfast kernels. Addresses are integers, strides count elements; nothing is checked here: call "
            "them through clinfast.ops.";
  if (PyModule_AddFunctions(m.ptr(), launch_methods)) throw py::error_already_set();
  m.def("select_isa", &select_isa, "Use the kernels of this instruction set; '' chooses the widest.");
  m.def("available_isas", &isas);
  m.def("attention", &attention);
  m.def("attention_biased", &attention_biased);
  m.def("attention_disentangled", &attention_disentangled);
  m.def("layer_norm", &layer_norm);
  m.def("embedding", &embedding);
  m.def("gelu", &gelu);
  m.def("current_table", &current_table);
  m.def("encoder", &encoder);
  m.def("encoder_workspace_bytes", &encoder_workspace_bytes);
  m.def("linear", &linear);
  m.def("linear_packed_bytes", &linear_packed_bytes);
  m.def("linear_pack", &linear_pack);
  m.def("pooling", &pooling);
  m.def("pack", &pack);
  m.def("position_ids", &position_ids);
  m.def("unpack", &unpack);
  m.def("rotate", &rotate);
  m.def("gate", &gate);
  m.def("values_unchanged", &unchanged);
#if defined(CLINFAST_CUDA)
  add_cuda(m.def_submodule("cuda"));
#endif
}
